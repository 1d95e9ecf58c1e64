"""What a step took, what a number of steps took, and what a run says of it. Pure.

The loop measures with a `StepClock` and makes one `StepRecord` per step. A worker sends the driver
a `StepReport` over many of them; the driver makes one `Progress` of all workers' reports and the
shards' counters.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import zip_longest
from operator import add
from typing import Any, Literal, Self, get_args

import numpy as np

from ps.messages import ShardStats
from workers.jobplan import JobPlan

Cause = Literal["input", "pull", "barrier", "combine", "dense", "push", "other"]
"""What a worker's time goes to: waiting for the next prepared batch; for rows; for other workers'
pushes, without which the rows' version is not made; activations and row gradients on the host; the
TensorFlow step; sending gradients; the rest."""
CAUSES: tuple[Cause, ...] = get_args(Cause)
_INDEX = {cause: i for i, cause in enumerate(CAUSES)}


class StepClock:
    """Splits a worker's time by cause: every moment belongs to one, so the parts sum to the whole.

    >>> now = iter([0.0, 2.0, 5.0, 6.0])
    >>> clock = StepClock(lambda: next(now))
    >>> clock.lap("pull"), clock.lap("dense")
    (2.0, 3.0)
    >>> clock.move(0.5, "pull", "barrier")
    >>> dict(zip(CAUSES, clock.stop()))["other"]
    1.0
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start now; `clock` gives seconds and never goes back."""
        self._clock = clock
        self._seconds = [0.0] * len(CAUSES)
        self._last = clock()

    def start(self) -> None:
        """Forget everything since the last step: the worker had nothing to do."""
        self._seconds = [0.0] * len(CAUSES)
        self._last = self._clock()

    def lap(self, cause: Cause) -> float:
        """Put the seconds since the last lap down to a cause; returns them."""
        now = self._clock()
        seconds = now - self._last
        self._last = now
        self._seconds[_INDEX[cause]] += seconds
        return seconds

    def move(self, seconds: float, source: Cause, target: Cause) -> None:
        """Put seconds of one cause down to another, at most as many as there are.

        A shard says how long it held an answer back; the worker waited for no more than a part of
        that if it was busy meanwhile.
        """
        moved = min(max(seconds, 0.0), self._seconds[_INDEX[source]])
        self._seconds[_INDEX[source]] -= moved
        self._seconds[_INDEX[target]] += moved

    def stop(self) -> tuple[float, ...]:
        """End a step and begin the next; returns the step's seconds in the order of `CAUSES`."""
        self.lap("other")
        seconds = tuple(self._seconds)
        self._seconds = [0.0] * len(CAUSES)
        return seconds


@dataclass(frozen=True, slots=True)
class ShardTraffic:
    """What went between a worker and each shard; by shard id, () where nobody counted."""

    wait_s: tuple[float, ...] = ()
    """Seconds that the worker waited for this shard's answer, once it had those of the shards
    before it: they sum to `pull` and `barrier` but for what sending takes."""
    rows: tuple[int, ...] = ()
    """Rows (or bags, where the shard combines) that came from it."""
    sent_bytes: tuple[int, ...] = ()
    """From the worker to the shard; arrays, without headers."""
    received_bytes: tuple[int, ...] = ()

    def plus(self, other: ShardTraffic) -> ShardTraffic:
        """Both together."""
        return ShardTraffic(
            _added(self.wait_s, other.wait_s),
            _added(self.rows, other.rows),
            _added(self.sent_bytes, other.sent_bytes),
            _added(self.received_bytes, other.received_bytes),
        )


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of one worker."""

    step: int
    """From 0; the step that makes version step + 1."""
    examples: int
    loss: float
    """Mean over the worker's batch."""
    ids: int
    """Ids looked up."""
    rows: int
    """Distinct rows among them."""
    staleness: int
    """The step minus the version of the rows that it read."""
    seconds: tuple[float, ...]
    """By cause, in the order of `CAUSES`."""
    traffic: ShardTraffic = ShardTraffic()

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What was done in a number of steps; sums unless the name says otherwise."""

    steps: int = 0
    """One worker's step counts one."""
    examples: int = 0
    loss: float = 0.0
    """Sum over steps of the mean loss of a worker's batch."""
    ids: int = 0
    rows: int = 0
    seconds: tuple[float, ...] = (0.0,) * len(CAUSES)
    staleness: tuple[int, ...] = ()
    """Steps by staleness: element s counts those that read rows s steps old (or newer, for 0)."""
    step_times_s: tuple[float, ...] = ()
    """Seconds of every step."""
    traffic: ShardTraffic = ShardTraffic()
    records: tuple[StepRecord, ...] = ()
    """Every step, if they were kept."""

    @classmethod
    def of(cls, records: Iterable[StepRecord], *, keep: bool = False) -> Self:
        """Sum up steps as they come; only with `keep` are they held as well."""
        steps = examples = ids = rows = 0
        loss, seconds, traffic = 0.0, [0.0] * len(CAUSES), ShardTraffic()
        staleness: Counter[int] = Counter()
        times, kept = [], []
        for record in records:
            steps += 1
            examples += record.examples
            loss += record.loss
            ids += record.ids
            rows += record.rows
            for i, s in enumerate(record.seconds):
                seconds[i] += s
            staleness[max(0, record.staleness)] += 1
            times.append(record.total_s)
            traffic = traffic.plus(record.traffic)
            if keep:
                kept.append(record)
        return cls(
            steps=steps,
            examples=examples,
            loss=loss,
            ids=ids,
            rows=rows,
            seconds=tuple(seconds),
            staleness=tuple(staleness[s] for s in range(max(staleness, default=-1) + 1)),
            step_times_s=tuple(times),
            traffic=traffic,
            records=tuple(kept),
        )

    def plus(self, other: StepReport) -> StepReport:
        """Both together, of one worker or of two."""
        return StepReport(
            steps=self.steps + other.steps,
            examples=self.examples + other.examples,
            loss=self.loss + other.loss,
            ids=self.ids + other.ids,
            rows=self.rows + other.rows,
            seconds=_added(self.seconds, other.seconds),
            staleness=_added(self.staleness, other.staleness),
            step_times_s=self.step_times_s + other.step_times_s,
            traffic=self.traffic.plus(other.traffic),
            records=self.records + other.records,
        )

    @property
    def total_s(self) -> float:
        """Seconds of all steps."""
        return sum(self.seconds)

    @property
    def max_staleness(self) -> int:
        """Of any step."""
        return max(0, len(self.staleness) - 1)

    def parts(self) -> dict[Cause, float]:
        """What part of the time went to each cause; they sum to 1."""
        total = self.total_s or 1.0
        return {cause: s / total for cause, s in zip(CAUSES, self.seconds, strict=True)}

    def step_quantile_s(self, q: float) -> float:
        """Seconds that a part q (0 to 1) of the steps stayed within; 0.0 without any step."""
        return float(np.quantile(self.step_times_s, q)) if self.step_times_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One progress report: what happened since the one before, all workers together."""

    step: int
    """Steps behind the tables, with those of the snapshot that the run started from."""
    epoch: int
    """Of this run, from 1."""
    examples: int
    """Examples since the start of this run."""
    loss: float
    """Mean loss over the steps since the last report."""
    examples_per_s: float
    step_median_s: float
    """Of a worker's steps."""
    step_p99_s: float
    staleness: int
    """Largest staleness seen since the last report, in steps."""
    staleness_counts: tuple[int, ...]
    """Workers' steps by the staleness of the rows they read: element s counts s steps."""
    push_staleness_counts: tuple[int, ...]
    """Pushes that shards applied, by the steps that were applied after the pull they rest on."""
    rows_per_step: float
    """Distinct rows pulled, counted once per worker."""
    unique_ratio: float
    """Distinct rows pulled per id looked up."""
    sent_bytes_per_step: float
    """From workers to shards."""
    received_bytes_per_step: float
    time: dict[Cause, float]
    """Parts of the workers' time by cause, which sum to 1."""
    pull_wait: float
    """Part of the workers' time spent waiting for rows: `pull` and `barrier` together."""
    dense: float
    """Part of the workers' time spent in the dense step."""
    shard_rows_per_s: tuple[float, ...]
    """Rows pulled and updated per second, per shard."""
    shard_bytes_per_s: tuple[float, ...]
    """Bytes from and to each shard per second; () where nobody counted."""
    shard_wait: tuple[float, ...]
    """Part of the workers' time spent waiting for each shard, after the shards before it; () where
    nobody counted."""
    reports: tuple[StepReport, ...]
    """What this sums up: a report per worker,"""
    stats: tuple[ShardStats, ...]
    """and each shard's counters since it started."""

    @classmethod
    def of(
        cls,
        plan: JobPlan,
        done: int,
        reports: Sequence[StepReport],
        elapsed_s: float,
        before: Sequence[ShardStats],
        after: Sequence[ShardStats],
    ) -> Self:
        """After `done` steps of a run; the reports, seconds and counters since the last one."""
        both = reduce(StepReport.plus, reports)
        steps = max(report.steps for report in reports)
        parts, traffic = both.parts(), both.traffic
        bytes_by_shard = _added(traffic.sent_bytes, traffic.received_bytes)
        return cls(
            step=plan.first_step + done,
            epoch=(done - 1) // plan.steps_per_epoch + 1,
            examples=done * plan.job.train.batch_size,
            loss=both.loss / both.steps,
            examples_per_s=both.examples / elapsed_s,
            step_median_s=both.step_quantile_s(0.5),
            step_p99_s=both.step_quantile_s(0.99),
            staleness=both.max_staleness,
            staleness_counts=both.staleness,
            push_staleness_counts=_pushes_since(before, after),
            rows_per_step=both.rows / steps,
            unique_ratio=both.rows / max(1, both.ids),
            sent_bytes_per_step=sum(traffic.sent_bytes) / steps,
            received_bytes_per_step=sum(traffic.received_bytes) / steps,
            time=parts,
            pull_wait=parts["pull"] + parts["barrier"],
            dense=parts["dense"],
            shard_rows_per_s=tuple(
                (b.rows_pulled + b.rows_pushed - a.rows_pulled - a.rows_pushed) / elapsed_s
                for a, b in zip(before, after, strict=True)
            ),
            shard_bytes_per_s=tuple(n / elapsed_s for n in bytes_by_shard),
            shard_wait=tuple(s / both.total_s for s in traffic.wait_s),
            reports=tuple(reports),
            stats=tuple(after),
        )


def _pushes_since(before: Sequence[ShardStats], after: Sequence[ShardStats]) -> tuple[int, ...]:
    """Pushes by staleness, of all shards."""
    seen: tuple[int, ...] = reduce(_added, (shard.staleness for shard in before), ())
    counts: tuple[int, ...] = reduce(_added, (shard.staleness for shard in after), ())
    return _added(counts, tuple(-n for n in seen))


def _added(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """Element by element; the shorter as if it went on with zeros."""
    if not a or not b:
        return a or b
    if len(a) == len(b):
        return tuple(map(add, a, b))
    return tuple(x + y for x, y in zip_longest(a, b, fillvalue=0))
