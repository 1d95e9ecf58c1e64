"""TensorFlow in one process: the same model, batches, first values and optimizers.

*tables* has a variable per table, *one* has all tables in one variable, with offsets added to ids.
Both gather, run the dense model and its optimizer as one XLA program, sum gradients by row
(`tf.unique`, `unsorted_segment_sum`) and apply them sparsely, all in one `tf.function`. *Keras* has
a `keras.layers.Embedding` per table and a Keras optimizer, as its users write it.
"""

from __future__ import annotations

import gc
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from benchmarks.dlrm.case import (
    BATCH,
    CHUNK,
    DIM,
    MODEL,
    Case,
    OptimizerName,
    Setting,
    batches,
    first_rows,
    job,
    optimizers,
)
from benchmarks.dlrm.result import Run, rate
from ps.optimizers import Optimizer, evaluate_rate
from ps.ragged import F32
from workers.model import built_model, job_inputs

Kind = Literal["tables", "one", "one, no XLA", "Keras"]
Step = Callable[[Any, Any, Any], Any]
_KERAS_STEPS = 4 * CHUNK
_IN_MEMORY = 40
"""Batches of a run that does not read."""


@dataclass(frozen=True)
class Peer:
    """A contender."""

    kind: Kind
    optimizer: OptimizerName = "Adagrad"
    reads: bool = False
    """Parquet, while it trains; or the batches are there as tensors before it starts."""

    def __str__(self) -> str:
        return f"TensorFlow, {self.kind}" + (", from Parquet" if self.reads else "")


def run(case: Case, peers: Sequence[Peer]) -> list[Run]:
    """One after the other, with as many threads as TensorFlow likes."""
    rows = first_rows(case)
    kept = [_tensors(b) for b in itertools.islice(batches(case), _IN_MEMORY)]
    runs = []
    for peer in peers:
        step = _step(peer.kind, peer.optimizer, case, rows)
        feed = _read_ahead(case) if peer.reads else itertools.cycle(kept)
        steps = _KERAS_STEPS if peer.kind == "Keras" else case.steps
        runs.append(_timed(peer, step, feed, steps))
        print(f"  {peer}, {peer.optimizer}: {rate(runs[-1:]):,.0f} examples/s", flush=True)
        del step, feed
        gc.collect()
    return runs


def _timed(peer: Peer, step: Step, feed: Iterator[Any], steps: int) -> Run:
    rates, loss = [], float("nan")
    for chunk in range(steps // CHUNK):
        start = time.perf_counter()
        losses = [step(*batch) for batch in itertools.islice(feed, CHUNK)]
        total = float(tf.add_n(losses))  # waits
        rates.append(CHUNK * BATCH / (time.perf_counter() - start))
        loss = total / CHUNK if chunk == 0 else loss
    return Run(str(peer), peer.optimizer, rates, loss)


def _tensors(batch: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    ids, dense, labels = batch
    return tf.constant(ids), tf.constant(dense), tf.constant(labels)


def _read_ahead(case: Case) -> Iterator[Any]:
    """Batches that a thread reads meanwhile, at most two ahead."""
    ready: queue.Queue[Any] = queue.Queue(2)

    def read() -> None:
        for batch in batches(case):
            ready.put(_tensors(batch))

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield ready.get()


def _step(kind: Kind, optimizer: OptimizerName, case: Case, rows: F32) -> Step:
    if kind == "Keras":
        return _keras(optimizer, case, rows)
    if kind == "tables":
        return _tables(optimizer, case, rows)
    return _one(optimizer, case, rows, jit=kind == "one")


class Dense:
    """The dense model and its optimizer: activations to loss and their gradients."""

    def __init__(self, optimizer: OptimizerName, case: Case) -> None:
        self.model = built_model(MODEL, job_inputs(job(case, Setting())))
        self.names = list(case.sizes)
        self._optimizer = optimizers(optimizer)[1]
        self._slots = [
            tf.Variable(tf.fill(v.shape, np.float32(value)))
            for v in self.model.trainable_variables
            for value in self._optimizer.slot_initial_values
        ]

    def __call__(self, activations: list[Any], dense: Any, labels: Any) -> Any:
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            tape.watch(activations)
            named = dict(zip(self.names, activations, strict=True))
            logits = tf.reshape(self.model(named, dense, training=True), [-1])
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))
        grads, dense_grads = tape.gradient(loss, (activations, list(variables)))
        for i, (variable, grad) in enumerate(zip(variables, dense_grads, strict=True)):
            if self._slots:
                self._slots[i].assign_add(grad * grad)
                grad = grad / tf.sqrt(self._slots[i])  # noqa: PLW2901
            variable.assign_sub(self._optimizer.learning_rate * grad)
        return loss, grads


class Rows:
    """Rows of one table or all, with their accumulators."""

    def __init__(self, optimizer: OptimizerName, rows: F32) -> None:
        self._optimizer = optimizers(optimizer)[0]
        self.rows = tf.Variable(rows)
        self._slots = [
            tf.Variable(tf.fill(rows.shape, np.float32(value)))
            for value in self._optimizer.slot_initial_values
        ]

    def apply(self, ids: Any, grads: Any) -> None:
        """One summed gradient per row; SGD is linear and takes them as they are."""
        rate = np.float32(evaluate_rate(self._optimizer.learning_rate, 0))
        if not self._slots:
            self.rows.scatter_sub(tf.IndexedSlices(rate * grads, ids))
            return
        unique, inverse = tf.unique(ids, out_idx=tf.int64)
        summed = tf.math.unsorted_segment_sum(grads, inverse, tf.size(unique))
        tf.raw_ops.ResourceSparseApplyAdagradV2(
            var=self.rows.handle,
            accum=self._slots[0].handle,
            lr=rate,
            epsilon=np.float32(0.0),
            grad=summed,
            indices=unique,
        )


def _tables(optimizer: OptimizerName, case: Case, rows: F32) -> Step:
    splits = np.cumsum(list(case.sizes.values()))[:-1]
    tables = [Rows(optimizer, part) for part in np.split(rows, splits)]
    dense_step = tf.function(Dense(optimizer, case), jit_compile=True)

    def step(ids: Any, dense: Any, labels: Any) -> Any:
        per_table = tf.unstack(ids)
        found = [tf.gather(t.rows, i) for t, i in zip(tables, per_table, strict=True)]
        loss, grads = dense_step(found, dense, labels)
        for table, table_ids, grad in zip(tables, per_table, grads, strict=True):
            table.apply(table_ids, grad)
        return loss

    return _function(step)


def _one(optimizer: OptimizerName, case: Case, rows: F32, jit: bool) -> Step:
    table = Rows(optimizer, rows)
    dense_model = Dense(optimizer, case)
    sizes = list(case.sizes.values())
    offsets = np.cumsum([0, *sizes[:-1]])[:, None]

    def packed(found: Any, dense: Any, labels: Any) -> Any:
        loss, grads = dense_model(tf.unstack(found), dense, labels)
        return loss, tf.stack(grads)

    dense_step = tf.function(packed, jit_compile=True) if jit else packed

    def step(ids: Any, dense: Any, labels: Any) -> Any:
        places = ids + offsets
        loss, grads = dense_step(tf.gather(table.rows, places), dense, labels)
        table.apply(tf.reshape(places, [-1]), tf.reshape(grads, [-1, DIM]))
        return loss

    return _function(step)


def _keras(optimizer: OptimizerName, case: Case, rows: F32) -> Step:
    dense_model = Dense(optimizer, case).model
    starts = np.cumsum([0, *case.sizes.values()])
    layers = []
    for size, start in zip(case.sizes.values(), starts, strict=False):
        layer = keras.layers.Embedding(size, DIM)
        layer.build()
        layer.embeddings.assign(rows[start : start + size])
        layers.append(layer)
    tables = [layer.embeddings.value for layer in layers]
    variables = list(dense_model.trainable_variables)
    of_tables, of_dense = (_keras_optimizer(o) for o in optimizers(optimizer))
    of_tables.build(tables)
    of_dense.build(variables)

    def step(ids: Any, dense: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            found = [layer(i) for layer, i in zip(layers, tf.unstack(ids), strict=True)]
            named = dict(zip(case.sizes, found, strict=True))
            logits = tf.reshape(dense_model(named, dense, training=True), [-1])
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))
        table_grads, dense_grads = tape.gradient(loss, (tables, variables))
        of_tables.apply(table_grads, tables)
        of_dense.apply(dense_grads, variables)
        return loss

    return _function(step)


def _keras_optimizer(ours: Optimizer) -> Any:
    rate = evaluate_rate(ours.learning_rate, 0)
    if not ours.slot_names:
        return keras.optimizers.SGD(rate)
    return keras.optimizers.Adagrad(rate, ours.slot_initial_values[0], epsilon=0)


def _function(step: Step) -> Step:
    traced: Step = tf.function(step, autograph=False)
    return traced
