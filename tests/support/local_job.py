"""A job in this process: real shards, readers and step loops; no Ray, no TensorFlow, no sockets."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from ps.client import LocalTransport, ShardClient
from ps.errors import MantaError
from ps.partition import Layout
from ps.ragged import F32
from ps.shard import ShardSpec, ShardState
from ps.step_message import StepMessage
from tests.support.shards import whole_table
from workers.batches import Batch, ExampleReader
from workers.config import JobConfig
from workers.modes import ranks_of
from workers.ranks import Ranks
from workers.step import StepLoop, StepOptions

NUM_DENSE, NUM_STATE = 7, 3
PATIENCE_S = 60.0


class FakeDense:
    """Gradients that depend on everything that a step is given, in plain NumPy."""

    def __init__(self) -> None:
        self.seen: list[Batch] = []
        """What it was trained with."""

    def train(self, batch: Batch, found: Mapping[str, F32], dense: F32, state: F32, *_: Any) -> Any:
        self.seen.append(batch)
        level = np.float32(batch.labels.mean() + dense.sum() + state.sum())
        grads = {name: np.tanh(values + level) for name, values in found.items()}
        return SimpleNamespace(
            loss=float(level),
            activation_grads=grads,
            device_grads={},
            dense_grad=np.float32(0.1) * dense + batch.dense.mean(),
            state=np.float32(0.5) * state + batch.labels.mean(),
        )

    def predict(
        self, batch: Batch, found: Mapping[str, F32], dense: F32, state: F32, *_: Any
    ) -> F32:
        return np.float32(1.0) * batch.labels + np.float32(dense.sum())


class LocalJob:
    """The shards of a job, all at one version, and new loops for its ranks whenever wanted."""

    def __init__(self, job: JobConfig, *, version: int = 0, history: int = 0) -> None:
        self.job = job
        self.spec = job.embedding_spec()
        self.model = FakeDense()
        count = job.cluster.shards
        self.layout = Layout.of(self.spec, count, NUM_DENSE, NUM_STATE)
        shard = ShardSpec(
            shard_id=0,
            num_shards=count,
            num_workers=job.num_ranks,
            embedding=self.spec,
            dense_optimizer=job.train.dense_optimizer,
            seed=job.seed,
            history=history,
        )
        self.shards = [ShardState(replace(shard, shard_id=k)) for k in range(count)]
        values = np.linspace(-1, 1, NUM_DENSE, dtype=np.float32)
        for k, state in enumerate(self.shards):
            dense, rest = (
                slice(*splits[k : k + 2])
                for splits in (self.layout.dense_splits, self.layout.state_splits)
            )
            state.set_dense(values[dense], np.ones(NUM_STATE, np.float32)[rest], None, version)

    def restored(self, job: JobConfig) -> LocalJob:
        """The same state on the shards of another job, which have no history."""
        other = LocalJob(job)
        for table in self.spec.tables:
            arrays = whole_table(self.shards, table.name)
            for shard in other.shards:
                for slab, rows, slots in shard.slabs(table.name):
                    span = slice(slab.first_id, slab.first_id + slab.num_rows)
                    for array, values in zip((rows, *slots.values()), arrays, strict=True):
                        array[...] = values[span]
        dense, slots, state = self.dense()
        for k, shard in enumerate(other.shards):
            own = slice(*other.layout.dense_splits[k : k + 2])
            own_state = slice(*other.layout.state_splits[k : k + 2])
            parts = {name: values[own] for name, values in slots.items()}
            shard.set_dense(dense[own], state[own_state], parts, self.version)
        return other

    @property
    def version(self) -> int:
        """Of all shards, which must have the same."""
        (version,) = {shard.version for shard in self.shards}
        return version

    def dense(self) -> tuple[F32, dict[str, F32], F32]:
        """The whole flat vectors."""
        parts = [shard.dense() for shard in self.shards]
        slots = {name: np.concatenate([p[1][name] for p in parts]) for name in parts[0][1]}
        return np.concatenate([p[0] for p in parts]), slots, np.concatenate([p[2] for p in parts])

    def contents(self) -> list[bytes]:
        """Everything that training changes, whatever the number of shards."""
        tables = [a for t in self.spec.tables for a in whole_table(self.shards, t.name)]
        dense, slots, state = self.dense()
        return [array.tobytes() for array in (*tables, dense, *slots.values(), state)]

    def options(self) -> StepOptions:
        """As a worker makes them."""
        job, train = self.job, self.job.train
        return StepOptions(
            batch_size=job.worker_batch_size, epochs=train.epochs, lookahead=train.lookahead,
            boundary_every=job.recovery.boundary_every, prefetch=job.data.prefetch,
            timeout_s=30.0, keep_records=True,
        )  # fmt: skip

    def loop(self, rank: int, step: int, transport: Any = None, **arguments: Any) -> StepLoop:
        """A new loop of one rank."""
        transport = transport or LocalTransport(self.shards)
        return StepLoop(
            self.spec, ShardClient(self.spec, self.layout, transport, rank),
            self.model, self.reader(rank), self.options(),  # type: ignore[arg-type]
            worker=rank, step=step, **arguments,
        )  # fmt: skip

    def reader(self, rank: int) -> ExampleReader:
        """Of the training data."""
        job = self.job
        return ExampleReader(job.data.train, job.data, job.features, worker=rank,
                             num_workers=job.num_ranks, seed=job.seed)  # fmt: skip

    def workers(
        self, steps: Sequence[int] | None = None, transports: Mapping[int, Any] | None = None
    ) -> list[Ranks]:
        """New worker actors, with a loop for each rank at its step (default: the version)."""
        job, transports = self.job, transports or {}
        steps = [self.version] * job.num_ranks if steps is None else steps
        return [
            Ranks(
                {
                    rank: self.loop(rank, steps[rank], transports.get(rank))
                    for rank in ranks_of(worker, job.cluster.workers, job.num_ranks)
                },
                keep_records=True,
            )
            for worker in range(job.cluster.workers)
        ]

    def run(self, workers: Sequence[Ranks], end: int, seed: int = 0) -> None:
        """Run workers up to a step, in any order in which none has to wait for another."""
        rng, options = random.Random(seed), self.options()
        while True:
            steps = [min(worker.where().values()) for worker in workers]
            if min(steps) >= end:
                break
            made = min(shard.version for shard in self.shards)
            ready = [w for w, t in enumerate(steps) if t < end and options.version_of(t, 0) <= made]
            chosen = rng.choice(ready)
            workers[chosen].run_to(steps[chosen] + 1)
        for worker in workers:
            worker.finish()
            worker.close()


class Waiting:
    """One rank's way to shards that threads share; a thread waits as it would for a socket."""

    def __init__(self, run: LocalJob, changed: threading.Condition, rank: int) -> None:
        self._local = LocalTransport(run.shards)
        self._shards = run.shards
        self._changed = changed
        self._rank = rank
        self._error: MantaError | None = None
        self._under_way = 0
        self.memory = self._local.memory
        self.closed = False

    def pull(self, message: StepMessage) -> Sequence[Any]:
        with self._changed:
            return [Waited(self, answer) for answer in self._local.pull(message)]

    def push(self, message: StepMessage) -> None:
        if self._under_way == 4:
            self.flush(PATIENCE_S)
        with self._changed:
            self._check()
            self._local.push(message)
            self._under_way += 1
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> None:
        answers: list[int] = []
        with self._changed:
            for shard in self._shards:
                shard.flush(self._rank, answers.append)
            self.wait(lambda: len(answers) == len(self._shards))
        self._under_way = 0

    def wait(self, there: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._error or there(), PATIENCE_S), "deadlock"
            self._check()

    def abort(self, error: MantaError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


class Waited:
    """An answer that a thread waits for."""

    def __init__(self, transport: Waiting, answer: Any) -> None:
        self._transport = transport
        self._answer = answer

    def result(self, timeout_s: float) -> tuple[int, float]:
        self._transport.wait(lambda: self._answer._rows is not None)
        version: tuple[int, float] = self._answer.result(0.0)
        return version


def in_threads(calls: Sequence[Callable[[], object]]) -> None:
    errors: list[BaseException] = []

    def guarded(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    if errors:
        raise errors[0]
