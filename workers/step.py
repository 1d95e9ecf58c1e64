"""`StepLoop`: the training steps of one rank. No Ray: the client decides how messages travel.

In sync mode step t reads version t - lookahead of every row, or a newer one at the start of the
run and behind a boundary (`StepOptions.boundary_every`), from where a job may have to go on with
nothing older: which version that is depends on t alone, not on where a loop was started. The pull
for step t + lookahead goes out before the push of step t, on the same ordered connection; so a
shard has answered every pull for version t before it can make version t + 1, and results do not
depend on timing.

Batches are read, and their rows made distinct, in a thread of their own (`data.prefetch`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ps.bags import ShardBags
from ps.client import PendingPull, PulledRows, ShardClient
from ps.errors import MantaError
from ps.messages import LATEST
from ps.partition import DistinctRows
from ps.ragged import F32
from ps.shard import Mode
from ps.spec import EmbeddingSpec
from ps.step_message import StepMessage
from workers.batches import Batch, ExampleReader
from workers.plan import (
    BatchPlan,
    DeviceInputs,
    activations,
    device_inputs,
    plan_batch,
    quantized,
    row_gradients,
)
from workers.prefetch import Prefetched
from workers.report import ShardTraffic, StepClock, StepRecord, StepReport
from workers.rowcache import Lookup, RowCache, filled, looked_up, row_caches

if TYPE_CHECKING:  # imports TensorFlow, which only a worker's own process needs
    from workers.dense import DenseStep


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How a rank steps; the fields of a job's configuration that it needs."""

    batch_size: int
    epochs: int = 1
    lookahead: int = 0
    mode: Mode = "sync"
    boundary_every: int = 0
    """Sync mode: no step reads a version from before the last multiple of this; 0 for no limit."""
    prefetch: int = 0
    timeout_s: float = 300.0
    cached_rows: int = 0
    cache_max_age: int = 0
    keep_records: bool = False
    """Whether reports hold every step."""
    shard_combined: frozenset[str] = frozenset()
    """Tables whose bags the shards combine."""

    def version_of(self, step: int, first_step: int) -> int:
        """The version that a step reads in sync mode, in a run that begins at `first_step`.

        >>> options = StepOptions(batch_size=1, lookahead=2, boundary_every=4)
        >>> [options.version_of(step, 1) for step in range(1, 12)]
        [1, 1, 1, 4, 4, 4, 5, 8, 8, 8, 9]
        """
        boundary = step - step % self.boundary_every if self.boundary_every else 0
        return max(first_step, boundary, step - self.lookahead)


@dataclass(frozen=True, slots=True, eq=False)
class _Pulling:
    batch: Batch
    plan: BatchPlan
    pending: PendingPull
    cached: dict[str, Lookup]


class StepLoop:
    """Runs steps in order; keeps `lookahead` pulls under way ahead of the current step."""

    def __init__(
        self,
        spec: EmbeddingSpec,
        client: ShardClient,
        dense: DenseStep,
        train: ExampleReader,
        options: StepOptions,
        *,
        worker: int,
        first_step: int = 0,
        step: int | None = None,
        oldest: int = 0,
        before_step: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start at any step of a run.

        Args:
            spec: tables and features.
            client: of this rank.
            dense: the dense model; ranks may share one.
            train: the rank's part of the input.
            options: see there.
            worker: the rank, which messages call so.
            first_step: the step that the run, and its input, began with.
            step: the step to start with: the shards have this rank's pushes for all steps before,
                and the versions that a loop needs that was there all the time. None: `first_step`.
            oldest: no version before this one is asked for. It makes a difference only where a run
                goes on from a snapshot that lies at none of its boundaries.
            before_step: called with each step's number before the dense model gets its batch.
            clock: gives seconds.
        """
        self._spec = spec
        self._client = client
        self._dense = dense
        self._options = options
        self._worker = worker
        self._clock = StepClock(clock)
        self._first_step = first_step
        self.step = self._next_pull = first_step if step is None else step
        """The next step to run."""
        self._oldest = max(first_step, oldest)
        self._before_step = before_step
        self._error: MantaError | None = None
        batches = self._all_batches(train, self.step - first_step)
        self._batches = Prefetched(batches, options.prefetch, name="input")
        self._caches: dict[str, RowCache] = {}
        if options.cached_rows:
            self._caches = row_caches(spec, options.cached_rows, options.cache_max_age)
        self._ahead: deque[_Pulling] = deque()

    def run(self, num_steps: int) -> StepReport:
        """Run the next steps, at most as many as there are."""
        return self.run_to(self.step + num_steps)

    def run_to(self, step: int) -> StepReport:
        """Run all steps before `step`, as far as there is input."""
        return StepReport.of(self._steps(step), keep=self._options.keep_records)

    def run_one(self) -> StepRecord | None:
        """Run the next step; None at the end of the input.

        Raises:
            MantaError: what `abort` was given, among others.
        """
        if self._error is not None:
            raise self._error
        self._clock.start()
        return self._one_step(self._ahead.popleft()) if self._pull_ahead() else None

    def _steps(self, end: int) -> Iterator[StepRecord]:
        while self.step < end and (record := self.run_one()) is not None:
            yield record

    def _one_step(self, current: _Pulling) -> StepRecord:
        clock, plan = self._clock, current.plan
        pulled = current.pending.result(self._options.timeout_s)
        clock.lap("pull")
        clock.move(max(pulled.barrier_s, default=0.0), "pull", "barrier")
        rows = filled(self._caches, current.cached, pulled.rows) if self._caches else pulled.rows
        found, device = self._inputs(plan, rows)
        clock.lap("combine")
        if self._before_step is not None:
            self._before_step(self.step)
        result = self._dense.train(current.batch, found, pulled.dense, pulled.state, device)
        clock.lap("dense")
        pushed, grads = row_gradients(
            self._spec, plan, result.activation_grads, result.device_grads, self._client.gradients
        )
        clock.lap("combine")
        state = result.state if self._worker == 0 else None
        sent = self._client.push(self.step, pushed, grads, result.dense_grad, state)
        clock.lap("push")
        self.step += 1
        return StepRecord(
            step=self.step - 1,
            examples=self._options.batch_size,
            loss=result.loss,
            ids=plan.num_ids,
            rows=sum(d.local_rows.size for d in plan.distinct.values()),
            staleness=max(0, self.step - 1 - pulled.version),
            seconds=clock.stop(),
            traffic=_traffic(pulled, sent),
        )

    def finish(self) -> None:
        """Wait until the shards have every push: only then is the last version made."""
        self._client.flush(self._options.timeout_s)

    def abort(self, error: MantaError) -> None:
        """Let a step that waits for its input, and every later one, raise this; any thread may."""
        self._error = error
        self._batches.fail(error)

    def close(self) -> None:
        """End the thread that reads ahead, and forget the pulls under way."""
        self._batches.close()
        self._ahead.clear()

    def evaluate(self, test: ExampleReader, version: int) -> tuple[F32, F32]:
        """Labels and predictions, float32 [n] each, of this rank's part of a data set."""
        labels, predictions = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
        for batch in test.in_order(self._options.batch_size):
            plan = self._planned(batch)
            pending = self._client.pull(version, version, plan.distinct)
            pulled = pending.result(self._options.timeout_s)
            found, device = self._inputs(plan, pulled.rows)
            result = self._dense.predict(batch, found, pulled.dense, pulled.state, device)
            real = batch.example_weights > 0
            labels.append(batch.labels[real])
            predictions.append(result[real])
        return np.concatenate(labels), np.concatenate(predictions)

    def _inputs(
        self, plan: BatchPlan, rows: Mapping[str, F32]
    ) -> tuple[dict[str, F32], DeviceInputs]:
        """What the dense step gets: activations combined here, and rows that it combines."""
        seen = quantized(self._spec, rows)
        found = activations(self._spec, plan, seen)
        return {**found, **plan.lengths}, device_inputs(plan, seen)

    def _planned(self, batch: Batch) -> BatchPlan:
        combined = self._options.shard_combined
        return plan_batch(self._spec, self._client.layout, batch.bags, combined)

    def _all_batches(self, reader: ExampleReader, behind: int) -> Iterator[tuple[Batch, BatchPlan]]:
        """What is left of the input when this many steps have had their batches."""
        size = self._options.batch_size
        begun, first_batch = divmod(behind, max(1, reader.steps_per_epoch(size)))
        for epoch in range(begun, self._options.epochs):
            for batch in reader.epoch(epoch, size, first_batch):
                yield batch, self._planned(batch)
            first_batch = 0

    def _pull_ahead(self) -> bool:
        """Send the pulls of the current step and of `lookahead` more; False at the end."""
        while len(self._ahead) <= self._options.lookahead:
            prepared = next(self._batches, None)
            self._clock.lap("input")
            if prepared is None:
                break
            self._ahead.append(self._pull(*prepared))
            self._next_pull += 1
            self._clock.lap("pull")
        return bool(self._ahead)

    def _pull(self, batch: Batch, plan: BatchPlan) -> _Pulling:
        step, version = self._next_pull, LATEST
        if self._options.mode == "sync":
            version = max(self._oldest, self._options.version_of(step, self._first_step))
        cached: dict[str, Lookup] = {}
        wanted: Mapping[str, DistinctRows | ShardBags] = plan.distinct
        if self._caches:
            distinct = {n: d for n, d in plan.distinct.items() if isinstance(d, DistinctRows)}
            cached = looked_up(self._caches, distinct, step)
            wanted = {name: lookup.missing for name, lookup in cached.items()}
        return _Pulling(batch, plan, self._client.pull(step, version, wanted), cached)


def _traffic(pulled: PulledRows, sent: StepMessage) -> ShardTraffic:
    pull = pulled.message
    assert pull is not None, "the client says what it asked for"
    to_shards = pull.names_bytes() + sent.names_bytes() + sent.values_bytes()
    return ShardTraffic(
        wait_s=pulled.wait_s,
        rows=tuple(pull.rows_by_shard().tolist()),
        sent_bytes=tuple(to_shards.tolist()),
        received_bytes=tuple(pull.values_bytes().tolist()),
    )
