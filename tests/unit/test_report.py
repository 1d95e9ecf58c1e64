"""What steps took: the clock loses no moment, sums and merges agree, progress says it in parts."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.messages import ShardStats
from workers.report import CAUSES, Progress, ShardTraffic, StepClock, StepRecord, StepReport


def ticking(*times: float) -> Callable[[], float]:
    left = iter(times)
    return lambda: next(left)


def seconds(**causes: float) -> tuple[float, ...]:
    return tuple(causes.get(cause, 0.0) for cause in CAUSES)


counts = st.integers(0, 10**9)
moments = st.integers(0, 2**20).map(lambda n: n / 1024)  # their sums are exact


@st.composite
def records(draw: st.DrawFn, shards: int = 3) -> StepRecord:
    def by_shard(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.lists(values, min_size=shards, max_size=shards)))

    return StepRecord(
        step=draw(st.integers(0, 100)),
        examples=draw(counts),
        loss=draw(moments),
        ids=draw(counts),
        rows=draw(counts),
        staleness=draw(st.integers(0, 5)),
        seconds=tuple(draw(st.lists(moments, min_size=len(CAUSES), max_size=len(CAUSES)))),
        traffic=ShardTraffic(by_shard(moments), *(by_shard(counts) for _ in range(3))),
    )


def test_every_moment_of_a_step_belongs_to_one_cause() -> None:
    clock = StepClock(ticking(10.0, 11.0, 13.0, 16.0, 20.0, 25.0, 100.0, 101.0, 101.0))
    assert [clock.lap(c) for c in ("input", "pull", "combine", "pull")] == [1.0, 2.0, 3.0, 4.0]
    assert clock.stop() == seconds(input=1.0, pull=6.0, combine=3.0, other=5.0)
    clock.start()
    clock.lap("dense")
    assert clock.stop() == seconds(dense=1.0), "the time until start() belongs to no step"


def test_a_barrier_is_no_more_than_what_was_waited() -> None:
    clock = StepClock(ticking(0.0, 2.0, 2.0, 5.0, 5.0))
    clock.lap("pull")
    clock.move(0.5, "pull", "barrier")
    assert clock.stop() == seconds(pull=1.5, barrier=0.5)
    clock.lap("pull")
    clock.move(60.0, "pull", "barrier")  # most of it while the worker was busy
    clock.move(-1.0, "barrier", "pull")
    assert clock.stop() == seconds(barrier=3.0)


@given(st.lists(records(), max_size=6), st.integers(0, 6))
def test_reports_of_parts_make_the_report_of_the_whole(steps: list[StepRecord], cut: int) -> None:
    whole = StepReport.of(iter(steps), keep=True)
    parts = StepReport.of(steps[:cut], keep=True).plus(StepReport.of(steps[cut:], keep=True))
    assert parts == whole
    assert whole.records == tuple(steps)
    assert whole.total_s == sum(whole.step_times_s) == sum(r.total_s for r in steps)
    assert whole.rows == sum(r.rows for r in steps)
    assert sum(whole.staleness) == whole.steps == len(steps)
    assert whole.max_staleness == max((r.staleness for r in steps), default=0)
    for shard in range(3 if steps else 0):
        assert whole.traffic.sent_bytes[shard] == sum(r.traffic.sent_bytes[shard] for r in steps)
    assert pickle.loads(pickle.dumps(whole)) == whole


def test_a_report_holds_no_steps_unless_asked_and_takes_steps_without_traffic() -> None:
    step = StepRecord(0, 10, 0.5, 40, 20, staleness=-3, seconds=seconds(dense=1.0))
    report = StepReport.of([step, replace(step, staleness=2)])
    assert report.records == ()
    assert report.staleness == (1, 0, 1), "rows newer than the step asks for are not stale"
    assert report.traffic == ShardTraffic()
    assert report.parts() == {**dict.fromkeys(CAUSES, 0.0), "dense": 1.0}


def test_quantiles_are_of_single_steps() -> None:
    steps = [StepRecord(i, 1, 0.0, 1, 1, 0, seconds(dense=float(i))) for i in range(101)]
    report = StepReport.of(steps)
    assert report.step_quantile_s(0.5) == 50.0
    assert report.step_quantile_s(0.99) == 99.0
    assert StepReport().step_quantile_s(0.5) == 0.0


def stats(shard: int, pulled: int, pushed: int, staleness: tuple[int, ...] = ()) -> ShardStats:
    return ShardStats(shard, 1, pulled, pushed, 0, 1000, 4096, staleness)


def test_progress_says_what_all_workers_did_in_parts_and_per_shard() -> None:
    plan: Any = SimpleNamespace(
        first_step=100, steps_per_epoch=4, job=SimpleNamespace(train=SimpleNamespace(batch_size=20))
    )
    step = StepRecord(
        104, 10, 0.5, 40, 20, 0, seconds(input=1.0, pull=2.0, barrier=1.0, dense=4.0),
        ShardTraffic((1.0, 3.0), (5, 15), (100, 300), (200, 600)),
    )  # fmt: skip
    fast = StepReport.of([step, step])
    slow = StepReport.of([replace(step, loss=1.0, staleness=2), step])
    progress = Progress.of(
        plan,
        6,
        [fast, slow],
        elapsed_s=4.0,
        before=[stats(0, 10, 20, (3,)), stats(1, 0, 0)],
        after=[stats(0, 18, 24, (5, 0, 1)), stats(1, 2, 6, (2, 2))],
    )
    assert (progress.step, progress.epoch, progress.examples) == (106, 2, 120)
    assert progress.loss == (0.5 * 3 + 1.0) / 4
    assert progress.examples_per_s == 10.0
    assert progress.step_median_s == progress.step_p99_s == 8.0
    assert progress.staleness == 2
    assert progress.staleness_counts == (3, 0, 1)
    assert progress.push_staleness_counts == (4, 2, 1)
    assert progress.rows_per_step == 40.0, "a step is all workers' together"
    assert progress.unique_ratio == 0.5
    assert progress.sent_bytes_per_step == 800.0
    assert progress.received_bytes_per_step == 1600.0
    assert progress.time["barrier"] == 0.125
    assert sum(progress.time.values()) == 1.0
    assert (progress.pull_wait, progress.dense) == (0.375, 0.5)
    assert progress.shard_rows_per_s == (3.0, 2.0)
    assert progress.shard_bytes_per_s == (300.0, 900.0)
    assert progress.shard_wait == (0.125, 0.375)
    assert progress.reports == (fast, slow)


def test_progress_without_counted_traffic_has_none() -> None:
    plan: Any = SimpleNamespace(
        first_step=0, steps_per_epoch=4, job=SimpleNamespace(train=SimpleNamespace(batch_size=20))
    )
    report = StepReport.of([StepRecord(0, 20, 0.5, 0, 0, 0, seconds(dense=0.0))])
    progress = Progress.of(plan, 1, [report], 1.0, [stats(0, 0, 0)], [stats(0, 0, 0)])
    assert progress.shard_bytes_per_s == progress.shard_wait == ()
    assert progress.unique_ratio == progress.dense == 0.0
    assert progress.step_p99_s == pytest.approx(0.0)


def test_progress_takes_no_steps_and_shards_that_count_anew() -> None:
    """Of a run that goes on after its last step, and after a shard was replaced."""
    plan: Any = SimpleNamespace(
        first_step=3, steps_per_epoch=4, job=SimpleNamespace(train=SimpleNamespace(batch_size=20))
    )
    before, after = [stats(0, 50, 60, (4, 1))], [stats(0, 5, 6, (1, 1))]
    progress = Progress.of(plan, 0, [StepReport(), StepReport()], 2.0, before, after)
    assert (progress.step, progress.epoch, progress.examples) == (3, 1, 0)
    assert (progress.loss, progress.rows_per_step, progress.sent_bytes_per_step) == (0.0, 0.0, 0.0)
    assert progress.shard_rows_per_s == (0.0,)
    assert progress.push_staleness_counts == (0, 0)
    one = StepReport.of([StepRecord(9, 20, 0.5, 0, 7, 0, seconds(dense=1.0))])
    uneven = Progress.of(plan, 6, [StepReport(), one], 2.0, before, after)
    assert (uneven.loss, uneven.rows_per_step, uneven.epoch) == (0.5, 7.0, 2)
