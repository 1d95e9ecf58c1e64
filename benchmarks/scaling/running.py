"""Shards and workers in processes of their own, without Ray: what is timed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.ps.processes import Child
from ps.client import PendingPull, ShardClient
from ps.errors import JobError, ShardLostError
from ps.initializers import Constant
from ps.optimizers import SGD
from ps.partition import DistinctRows, Layout, distinct_rows
from ps.ragged import F32
from ps.shard import ShardSpec, ShardState
from ps.spec import EmbeddingSpec, TableSpec
from ps.warm import warm_up
from ps.wire.greeting import Credentials
from ps.wire.handshake import new_token
from ps.wire.messages import WireFormat
from ps.wire.server import Endpoint, ServerOptions, ShardLoop
from ps.wire.transport import TransportName, TransportOptions, WireTransport

Batch = dict[str, DistinctRows]
_FINGERPRINT = 11
_MAX_BATCHES = 400
_NOTHING = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A cluster on this machine."""

    shards: int
    workers: int
    dim: int
    tables: int = 1
    table_rows: int = 2_000_000
    """Of all tables together."""

    @property
    def embedding(self) -> EmbeddingSpec:
        """Its tables."""
        return EmbeddingSpec(tuple(self._table(f"t{i}") for i in range(self.tables)), ())

    @property
    def format(self) -> WireFormat:
        """Of its messages."""
        return WireFormat((self.dim,) * self.tables)

    def _table(self, name: str) -> TableSpec:
        return TableSpec(
            name=name,
            vocabulary_size=self.table_rows // self.tables,
            dim=self.dim,
            combiner="sum",
            initializer=Constant(1.0),
            optimizer=SGD(0.1),
        )


class Shards:
    """The shards of a setup; several may share a process, each with a thread."""

    def __init__(self, setup: Setup, processes: int | None = None) -> None:
        self.setup = setup
        self.token = new_token()
        parts = np.array_split(np.arange(setup.shards), processes or setup.shards)
        self._children = [Child(_serve, setup, self.token, part.tolist()) for part in parts]
        self.endpoints: list[Endpoint] = [e for child in self._children for e in child.receive()]

    def cpu_s(self) -> float:
        """Seconds of CPU that the shards' threads have taken so far."""
        for child in self._children:
            child.send("cpu")
        return float(sum(child.receive() for child in self._children))

    def close(self) -> None:
        """End them."""
        for child in self._children:
            child.kill()


def _serve(pipe: Connection, setup: Setup, token: bytes, shards: Sequence[int]) -> None:
    loops = []
    for k in shards:
        spec = ShardSpec(
            shard_id=k,
            num_shards=setup.shards,
            num_workers=setup.workers,
            embedding=setup.embedding,
            dense_optimizer=SGD(),
        )
        warm_up(spec)
        state = ShardState(spec)
        state.set_dense(_NOTHING, _NOTHING)
        options = ServerOptions(
            token=token, fingerprint=_FINGERPRINT, format=setup.format, pin=True
        )
        loops.append(ShardLoop(state, options))
    pipe.send([loop.endpoint for loop in loops])
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(sum(loop.call(time.thread_time).result() for loop in loops))


class Worker:
    """A worker's connections, and its steps."""

    def __init__(
        self,
        setup: Setup,
        endpoints: Sequence[Endpoint],
        token: bytes,
        rank: int,
        transport: TransportName,
        version: int,
    ) -> None:
        self._embedding = setup.embedding
        options = TransportOptions(name=transport, format=setup.format)
        self._wire = _connected(endpoints, Credentials(token, rank, _FINGERPRINT), options)
        layout = Layout.of(self._embedding, setup.shards)
        self.client = ShardClient(self._embedding, layout, self._wire, rank, setup.format)
        self.version = version

    def pull(self, batch: Batch, step: int, version: int) -> PendingPull:
        """Ask for the rows of a step."""
        return self.client.pull(step, version, batch)

    def gradients(self, rows: Mapping[str, F32]) -> dict[str, F32]:
        """One pass over the rows: for combine, dense step and transposed combine."""
        grads = {}
        for name, values in rows.items():
            grads[name] = self.client.gradients(values.shape)
            np.multiply(values, np.float32(1e-6), out=grads[name])
        return grads

    def push(self, batch: Batch, grads: Mapping[str, F32]) -> None:
        """Send the gradients of a step."""
        self.client.push(self.version, batch, grads, _NOTHING, None)
        self.version += 1

    def close(self) -> None:
        """Wait for the pushes and disconnect."""
        self.client.flush()
        self._wire.close()


def _connected(
    endpoints: Sequence[Endpoint], credentials: Credentials, options: TransportOptions
) -> WireTransport:
    """Once more where the machine is too busy for the handshake's deadline."""
    for _ in range(9):
        try:
            return WireTransport(endpoints, credentials, options)
        except (JobError, ShardLostError):
            time.sleep(0.5)
    return WireTransport(endpoints, credentials, options)


def make_batches(setup: Setup, rows: int, rank: int = 0) -> list[Batch]:
    """Batches of so many distinct rows, which come back late: not from the caches."""
    placements = Layout.of(setup.embedding, setup.shards).placements
    rng = np.random.default_rng([rows, rank])
    per_table = max(1, rows // setup.tables)
    vocabulary = setup.table_rows // setup.tables
    ids = {name: rng.permutation(vocabulary) for name in placements}
    count = min(_MAX_BATCHES, vocabulary // per_table)
    return [
        {
            name: distinct_rows(ids[name][i * per_table : (i + 1) * per_table].copy(), placement)[0]
            for name, placement in placements.items()
        }
        for i in range(count)
    ]


def timed_steps(
    worker: Worker, batches: Sequence[Batch], lookahead: int, count: int
) -> list[float]:
    """Seconds of each step but the first, from one push to the next; `lookahead` is 0 or 1."""
    laps: list[float] = []
    first = worker.version  # not 0 again: those rows may still be in the caches
    pending = worker.pull(batches[first % len(batches)], first, first)
    for turn in range(first, first + count):
        batch, upcoming = (batches[(turn + i) % len(batches)] for i in range(2))
        rows = pending.result().rows
        del pending
        step = worker.version
        if lookahead:
            pending = worker.pull(upcoming, step + 1, step)
        worker.push(batch, worker.gradients(rows))
        del rows
        if not lookahead:
            pending = worker.pull(upcoming, step + 1, step + 1)
        laps.append(time.perf_counter())
    pending.result()
    gaps: list[float] = np.diff(laps).tolist()
    return gaps
