"""`StepLoop`: the training steps of one worker. No Ray: the client decides how messages travel.

In sync mode step t reads version t - lookahead of every row. The pull for step t + lookahead goes
out before the push of step t, on the same ordered connection; so a shard has answered every pull
for version t before it can make version t + 1, and results do not depend on timing.

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
    """How a worker steps; the fields of a job's configuration that it needs."""

    batch_size: int
    epochs: int = 1
    lookahead: int = 0
    mode: Mode = "sync"
    prefetch: int = 0
    timeout_s: float = 300.0
    cached_rows: int = 0
    cache_max_age: int = 0
    keep_records: bool = False
    """Whether reports hold every step."""
    shard_combined: frozenset[str] = frozenset()
    """Tables whose bags the shards combine."""


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
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start at `first_step`, which is the version that the shards are at."""
        self._spec = spec
        self._client = client
        self._dense = dense
        self._options = options
        self._worker = worker
        self._clock = StepClock(clock)
        self._batches = Prefetched(self._all_batches(train), options.prefetch, name="input")
        self._caches: dict[str, RowCache] = {}
        if options.cached_rows:
            self._caches = row_caches(spec, options.cached_rows, options.cache_max_age)
        self._first_step = self._next_pull = first_step
        self._ahead: deque[_Pulling] = deque()
        self.step = first_step
        """The next step to run."""

    def run(self, num_steps: int) -> StepReport:
        """Run the next steps, at most as many as there are."""
        return StepReport.of(self._steps(num_steps), keep=self._options.keep_records)

    def _steps(self, num_steps: int) -> Iterator[StepRecord]:
        self._clock.start()
        end = self.step + num_steps
        while self.step < end and self._pull_ahead():
            yield self._one_step(self._ahead.popleft())

    def _one_step(self, current: _Pulling) -> StepRecord:
        clock, plan = self._clock, current.plan
        pulled = current.pending.result(self._options.timeout_s)
        clock.lap("pull")
        clock.move(max(pulled.barrier_s, default=0.0), "pull", "barrier")
        rows = filled(self._caches, current.cached, pulled.rows) if self._caches else pulled.rows
        found, device = self._inputs(plan, rows)
        clock.lap("combine")
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

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._batches.close()

    def evaluate(self, test: ExampleReader, version: int) -> tuple[F32, F32]:
        """Labels and predictions, float32 [n] each, of this worker's part of a data set."""
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

    def _all_batches(self, reader: ExampleReader) -> Iterator[tuple[Batch, BatchPlan]]:
        for epoch in range(self._options.epochs):
            for batch in reader.epoch(epoch, self._options.batch_size):
                yield batch, self._planned(batch)

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
            version = max(self._first_step, step - self._options.lookahead)
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
