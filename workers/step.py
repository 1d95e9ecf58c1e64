"""`StepLoop`: the training steps of one worker. No Ray: the client decides how messages travel.

Step t reads version t - lookahead of every row. The pull for step t + lookahead goes out before
the push of step t, on the same ordered connection; so a shard has answered every pull for version
t before it can make version t + 1, and results do not depend on timing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ps.client import PendingPull, ShardClient
from ps.ragged import F32
from ps.spec import EmbeddingSpec
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

if TYPE_CHECKING:  # imports TensorFlow, which only a worker's own process needs
    from workers.dense import DenseStep


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a worker did in a number of steps; sums unless the name says otherwise."""

    steps: int
    examples: int
    loss: float
    """Sum over steps of the mean loss of this worker's batch."""
    rows: int
    """Distinct rows pulled."""
    ids: int
    """Ids looked up."""
    max_staleness: int
    """Largest difference between a step and the version of the rows it read."""
    pull_wait_s: float
    dense_s: float
    total_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Pulling:
    batch: Batch
    plan: BatchPlan
    pending: PendingPull


class StepLoop:
    """Runs steps in order; keeps `lookahead` pulls under way ahead of the current step."""

    def __init__(
        self,
        spec: EmbeddingSpec,
        client: ShardClient,
        dense: DenseStep,
        train: ExampleReader,
        *,
        batch_size: int,
        epochs: int,
        lookahead: int,
        worker: int,
        timeout_s: float,
        first_step: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start at `first_step`, which is the version that the shards are at."""
        self._spec = spec
        self._client = client
        self._dense = dense
        self._batch_size = batch_size
        self._lookahead = lookahead
        self._worker = worker
        self._timeout_s = timeout_s
        self._clock = clock
        self._batches = self._all_epochs(train, epochs)
        self._first_step = self._next_pull = first_step
        self._ahead: deque[_Pulling] = deque()
        self.step = first_step
        """The next step to run."""

    def run(self, num_steps: int) -> StepReport:
        """Run the next steps, at most as many as there are."""
        start = self._clock()
        losses, rows, ids, staleness, wait_s, dense_s = 0.0, 0, 0, 0, 0.0, 0.0
        first = self.step
        while self.step < first + num_steps and self._pull_ahead():
            current = self._ahead.popleft()
            t0 = self._clock()
            pulled = current.pending.result(self._timeout_s)
            t1 = self._clock()
            found, device = self._inputs(current.plan, pulled.rows)
            t2 = self._clock()
            result = self._dense.train(current.batch, found, pulled.dense, pulled.state, device)
            t3 = self._clock()
            pushed, grads = row_gradients(
                self._spec, current.plan, result.activation_grads, result.device_grads
            )
            state = result.state if self._worker == 0 else None
            self._client.push(self.step, pushed, grads, result.dense_grad, state)
            losses += result.loss
            rows += sum(len(r) for r in pulled.rows.values())
            ids += current.plan.num_ids
            staleness = max(staleness, self.step - pulled.version)
            wait_s += t1 - t0
            dense_s += t3 - t2
            self.step += 1
        steps = self.step - first
        return StepReport(
            steps=steps,
            examples=steps * self._batch_size,
            loss=losses,
            rows=rows,
            ids=ids,
            max_staleness=staleness,
            pull_wait_s=wait_s,
            dense_s=dense_s,
            total_s=self._clock() - start,
        )

    def finish(self) -> None:
        """Wait until the shards have every push: only then is the last version made."""
        self._client.flush(self._timeout_s)

    def evaluate(self, test: ExampleReader, version: int) -> tuple[F32, F32]:
        """Labels and predictions, float32 [n] each, of this worker's part of a data set."""
        labels, predictions = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
        for batch in test.in_order(self._batch_size):
            plan = plan_batch(self._spec, self._client.layout, batch.bags)
            pulled = self._client.pull(version, version, plan.distinct).result(self._timeout_s)
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

    def _all_epochs(self, reader: ExampleReader, epochs: int) -> Iterator[Batch]:
        for epoch in range(epochs):
            yield from reader.epoch(epoch, self._batch_size)

    def _pull_ahead(self) -> bool:
        """Send the pulls of the current step and of `lookahead` more; False at the end."""
        while len(self._ahead) <= self._lookahead:
            batch = next(self._batches, None)
            if batch is None:
                break
            plan = plan_batch(self._spec, self._client.layout, batch.bags)
            version = max(self._first_step, self._next_pull - self._lookahead)
            pending = self._client.pull(self._next_pull, version, plan.distinct)
            self._ahead.append(_Pulling(batch, plan, pending))
            self._next_pull += 1
        return bool(self._ahead)
