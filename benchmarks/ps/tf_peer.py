"""TensorFlow's parameter servers: two `ps` tasks and a worker, gRPC between them.

`Strategy` has the variables of `tf.distribute.ParameterServerStrategy`. Its step is one
`tf.function` that the worker runs; we start it there directly, without `ClusterCoordinator`, whose
scheduling took longer. Rows and gradients are tensors in the worker's memory.

`Session` is the older way, and faster for small steps: the client is the worker itself and runs the
same step as a graph in a `tf.compat.v1.Session`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

from benchmarks.ps import table, tf_server
from benchmarks.ps.contenders import Gradients
from benchmarks.ps.table import DIM, SHARDS, Batch
from ps.ragged import F32, I64

_WORKER = "/job:worker/replica:0/task:0/device:CPU:0"
_IDS, _GRADS = tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, DIM], tf.float32)
Batches = Mapping[int, Sequence[Batch]]


class Strategy:
    """`ParameterServerStrategy`, a function per step, run on the worker."""

    def __init__(self, batches: Batches) -> None:
        cluster = tf_server.new_cluster(SHARDS)
        self._servers = [*tf_server.start(cluster, "ps"), *tf_server.start(cluster, "worker")]
        for server in self._servers:
            server.receive()
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(cluster), rpc_layer="grpc"
        )
        with tf.distribute.ParameterServerStrategy(resolver).scope():
            # One after the other: each goes to the next server.
            self._tables = [tf.Variable(partial(_zeros, shard)) for shard in range(SHARDS)]
        for shard, variable in enumerate(self._tables):
            for span, values in table.initial_rows(shard):
                rows = tf.range(span.start, span.stop)
                variable.scatter_update(tf.IndexedSlices(values, rows))
        self._gather = tf.function(self._pulled, input_signature=[_IDS] * SHARDS)
        self._update = tf.function(
            self._pushed_and_pulled, input_signature=[_IDS] * 2 * SHARDS + [_GRADS] * SHARDS
        )
        self._ids: dict[int, list[Any]] = {}
        self._grads: list[Any] = []

    def pull(self, batch: Batch) -> Sequence[F32]:
        return _run(self._gather, self._ids_of(batch))

    def make_gradients(self, batch: Batch) -> None:
        self._grads = _on_worker(batch.parts(batch.grads))

    def step(self, batch: Batch, upcoming: Batch) -> Sequence[F32]:
        return _run(self._update, [*self._ids_of(batch), *self._ids_of(upcoming), *self._grads])

    def close(self) -> None:
        for server in self._servers:
            server.kill()

    def _ids_of(self, batch: Batch) -> list[Any]:
        if id(batch) not in self._ids:  # when the contender is warmed up
            self._ids[id(batch)] = _on_worker(batch.local_rows)
        return self._ids[id(batch)]

    def _pulled(self, *ids: Any) -> list[Any]:
        rows = []
        for variable, local in zip(self._tables, ids, strict=True):
            with tf.device(variable.device):
                found = tf.gather(variable, local)
            with tf.device(_WORKER):
                rows.append(tf.identity(found))
        return rows

    def _pushed_and_pulled(self, *tensors: Any) -> list[Any]:
        ids, upcoming, grads = tensors[:SHARDS], tensors[SHARDS:-SHARDS], tensors[-SHARDS:]
        for variable, local, grad in zip(self._tables, ids, grads, strict=True):
            with tf.device(variable.device):
                variable.scatter_sub(tf.IndexedSlices(grad, local))
        return self._pulled(*upcoming)


def _zeros(shard: int) -> Any:
    return tf.zeros((table.local_rows(shard), DIM))


def _run(function: Any, arguments: Sequence[Any]) -> list[Any]:
    with tf.device(_WORKER):
        rows: list[Any] = function(*arguments)
    context.async_wait()
    return rows


def _on_worker(arrays: Sequence[F32 | I64]) -> list[Any]:
    with tf.device(_WORKER):
        return [tf.identity(tf.constant(array)) for array in arrays]


class Session:
    """A graph, fed with arrays, in a session of this process's own server."""

    def __init__(self, batches: Batches) -> None:
        tf1: Any = tf.compat.v1
        tf1.disable_eager_execution()
        tf1.logging.set_verbosity(tf1.logging.ERROR)
        cluster = tf_server.new_cluster(SHARDS)
        self._servers = tf_server.start(cluster, "ps")
        own = tf_server.server(cluster, "worker", 0)
        for child in self._servers:
            child.receive()
        session = tf1.Session(own.target)
        pulled, updated = _Graph(tf1), _Graph(tf1)
        for shard in range(SHARDS):
            with tf.device(f"/job:ps/task:{shard}"):
                shape = (table.local_rows(shard), DIM)
                variable = tf1.get_variable(
                    f"table{shard}", shape, initializer=tf1.zeros_initializer(), use_resource=True
                )
                ids, values = tf1.placeholder(tf.int64, [None]), tf1.placeholder(tf.float32)
                put = variable.scatter_update(tf.IndexedSlices(values, ids))
                session.run(variable.initializer)
                for span, array in table.initial_rows(shard):
                    session.run(put, {ids: np.arange(span.start, span.stop), values: array})
                pulled.add(variable, push=False)
                updated.add(variable, push=True)
        self._pull = session.make_callable(pulled.rows, feed_list=pulled.upcoming)
        feeds = [*updated.ids, *updated.upcoming, *updated.grads]
        self._update = session.make_callable(updated.rows, feed_list=feeds)
        self._gradients = Gradients(batches)
        self._grads: list[F32] = []

    def pull(self, batch: Batch) -> Sequence[F32]:
        rows: Sequence[F32] = self._pull(*batch.local_rows)
        return rows

    def make_gradients(self, batch: Batch) -> None:
        self._grads = self._gradients.written(batch)

    def step(self, batch: Batch, upcoming: Batch) -> Sequence[F32]:
        rows: Sequence[F32] = self._update(*batch.local_rows, *upcoming.local_rows, *self._grads)
        return rows

    def close(self) -> None:
        for server in self._servers:
            server.kill()


class _Graph:
    """Placeholders, and the rows that come of them."""

    def __init__(self, tf1: Any) -> None:
        self._tf1 = tf1
        self.ids: list[Any] = []
        self.upcoming: list[Any] = []
        self.grads: list[Any] = []
        self.rows: list[Any] = []

    def add(self, variable: Any, push: bool) -> None:
        """A table; its device is that of the scope."""
        with tf.device(_WORKER):
            ids, upcoming = (self._tf1.placeholder(tf.int64, [None]) for _ in range(2))
            grads = self._tf1.placeholder(tf.float32, [None, DIM])
        with ExitStack() as after:
            if push:
                update = variable.scatter_sub(tf.IndexedSlices(grads, ids))
                after.enter_context(tf.control_dependencies([update]))
            found = tf.gather(variable, upcoming)
        with tf.device(_WORKER):
            self.rows.append(tf.identity(found))
        self.ids.append(ids)
        self.upcoming.append(upcoming)
        self.grads.append(grads)
