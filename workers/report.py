"""What a step took, what a number of steps took, and what a run says of it. Pure.

The loop measures with a `StepClock` and makes one `StepRecord` per step. A worker sends the driver
a `StepReport` over many of them for each of its ranks; the driver makes one `Progress` of all
ranks' reports and the shards' counters.
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
    """One step of one rank."""

    step: int
    """From 0; the step that makes version step + 1."""
    examples: int
    loss: float
    """Mean over the rank's part of the batch."""
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


class Steps:
    """Steps of one rank, summed up as they come; held as well only with `keep`."""

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self._steps = self._examples = self._ids = self._rows = 0
        self._loss = 0.0
        self._seconds = [0.0] * len(CAUSES)
        self._staleness: Counter[int] = Counter()
        self._times: list[float] = []
        self._traffic = ShardTraffic()
        self._kept: list[StepRecord] = []

    def add(self, record: StepRecord) -> None:
        """One more."""
        self._steps += 1
        self._examples += record.examples
        self._loss += record.loss
        self._ids += record.ids
        self._rows += record.rows
        for i, s in enumerate(record.seconds):
            self._seconds[i] += s
        self._staleness[max(0, record.staleness)] += 1
        self._times.append(record.total_s)
        self._traffic = self._traffic.plus(record.traffic)
        if self._keep:
            self._kept.append(record)

    def sums(self) -> dict[str, Any]:
        """The fields of their `StepReport`."""
        oldest = max(self._staleness, default=-1)
        return {
            "steps": self._steps,
            "examples": self._examples,
            "loss": self._loss,
            "ids": self._ids,
            "rows": self._rows,
            "seconds": tuple(self._seconds),
            "staleness": tuple(self._staleness[s] for s in range(oldest + 1)),
            "step_times_s": tuple(self._times),
            "traffic": self._traffic,
            "records": tuple(self._kept),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What was done in a number of steps; sums unless the name says otherwise."""

    steps: int = 0
    """One rank's step counts one."""
    examples: int = 0
    loss: float = 0.0
    """Sum over steps of the mean loss of a rank's part of the batch."""
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
        steps = Steps(keep=keep)
        for record in records:
            steps.add(record)
        return cls(**steps.sums())

    def plus(self, other: StepReport) -> StepReport:
        """Both together, of one rank or of two."""
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
    """One progress report: what happened since the one before, all ranks together."""

    step: int
    """Steps behind the tables, with those of the snapshot that the run started from."""
    epoch: int
    """Of this run's input, from 1."""
    examples: int
    """Examples since the start of the input."""
    loss: float
    """Mean loss over the steps since the last report."""
    examples_per_s: float
    step_median_s: float
    """Of a rank's steps."""
    step_p99_s: float
    staleness: int
    """Largest staleness seen since the last report, in steps."""
    staleness_counts: tuple[int, ...]
    """Ranks' steps by the staleness of the rows they read: element s counts s steps."""
    push_staleness_counts: tuple[int, ...]
    """Pushes that shards applied, by the steps that were applied after the pull they rest on."""
    rows_per_step: float
    """Distinct rows pulled, counted once per rank."""
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
    """What this sums up: a report per rank,"""
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
        """After `done` steps of the input; what happened since the last report.

        There may be no step: of a run that was resumed where it had ended, say. A shard that was
        replaced counts from 0 again, which shows as less work than it did.
        """
        both = reduce(StepReport.plus, reports)
        steps = max(1, *(report.steps for report in reports))
        parts, traffic = both.parts(), both.traffic
        bytes_by_shard = _added(traffic.sent_bytes, traffic.received_bytes)
        return cls(
            step=plan.first_step + done,
            epoch=max(0, done - 1) // plan.steps_per_epoch + 1,
            examples=done * plan.job.train.batch_size,
            loss=both.loss / max(1, both.steps),
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
                max(0, b.rows_pulled + b.rows_pushed - a.rows_pulled - a.rows_pushed) / elapsed_s
                for a, b in zip(before, after, strict=True)
            ),
            shard_bytes_per_s=tuple(n / elapsed_s for n in bytes_by_shard),
            shard_wait=tuple(s / (both.total_s or 1.0) for s in traffic.wait_s),
            reports=tuple(reports),
            stats=tuple(after),
        )


def _pushes_since(before: Sequence[ShardStats], after: Sequence[ShardStats]) -> tuple[int, ...]:
    """Pushes by staleness, of all shards."""
    seen: tuple[int, ...] = reduce(_added, (shard.staleness for shard in before), ())
    counts: tuple[int, ...] = reduce(_added, (shard.staleness for shard in after), ())
    return tuple(max(0, n) for n in _added(counts, tuple(-n for n in seen)))


def _added(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """Element by element; the shorter as if it went on with zeros."""
    if not a or not b:
        return a or b
    if len(a) == len(b):
        return tuple(map(add, a, b))
    return tuple(x + y for x, y in zip_longest(a, b, fillvalue=0))
