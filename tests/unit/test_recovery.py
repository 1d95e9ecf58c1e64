"""What is done about failures, how often, and to whom a stuck step is put down."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from ps.errors import JobError
from ps.messages import ShardStats
from workers.bunches import Bunches
from workers.recovery import Budget, Failure, first_steps, laggards
from workers.report import StepReport


def stats(*fences: int, version: int | None = None) -> ShardStats:
    return ShardStats(
        shard_id=0,
        version=min(fences) if version is None else version,
        rows_pulled=0,
        rows_pushed=0,
        duplicates_dropped=0,
        num_rows=0,
        size_bytes=0,
        fences=(min(fences),) * len(fences),
        expected=fences,
    )


WORKER = Failure("worker 0 died", workers=frozenset([0]))
SHARD = Failure("shard 1 died", shards=frozenset([1]))


@pytest.mark.parametrize(
    ("failure", "durability", "wanted"),
    [
        (WORKER, "snapshot", "replace_worker"),
        (WORKER, "log", "replace_worker"),
        (SHARD, "snapshot", "rollback"),
        (SHARD, "log", "replay"),
        (WORKER.plus(SHARD), "log", "rollback"),
        (SHARD.plus(SHARD), "log", "rollback"),
        (Failure("a gap", start_over=True), "log", "rollback"),
        (
            Failure("both", shards=frozenset([0]), workers=frozenset([1])),
            "log",
            "rollback",
        ),
    ],
)
def test_the_least_that_mends_it(failure: Failure, durability: Any, wanted: str) -> None:
    assert failure.action(durability) == wanted


def test_two_failures_at_once_are_both_named_once() -> None:
    both = WORKER.plus(SHARD)
    assert both.cause == "worker 0 died; then shard 1 died"
    assert both.plus(SHARD).cause == both.cause
    assert (both.shards, both.workers) == ({1}, {0})


def test_a_budget_is_for_recoveries_without_progress() -> None:
    budget = Budget(2)
    for version in (0, 1, 1, 5, 5):
        budget.spend(WORKER, version)
    with pytest.raises(JobError, match=r"gave up after 2 recoveries .* at step 5: worker 0 died$"):
        budget.spend(WORKER, 5)


def test_steps_made_again_after_a_rollback_are_no_progress() -> None:
    budget = Budget(2)
    budget.spend(SHARD, 7)
    budget.spend(SHARD, 6)
    with pytest.raises(JobError, match=r"shard 1 died \| worker 0 died"):
        budget.spend(WORKER, 7)


def test_the_ranks_furthest_behind_name_the_workers_to_blame() -> None:
    # Rank 3 is behind on shard 1 only: its push never came there.
    seen = [stats(6, 6, 6, 6), stats(6, 6, 6, 5)]
    assert laggards(seen, num_workers=2) == {1}
    assert laggards(seen, num_workers=4) == {3}
    assert laggards([stats(4, 4), stats(4, 4)], num_workers=2) == {0, 1}
    assert first_steps(seen) == [5, 5, 5, 5]


class FakeRun:
    """Workers whose calls the test answers."""

    def __init__(self, workers: int) -> None:
        self.calls: list[tuple[int, int, Future[Any]]] = []
        self.workers = [FakeWorker(worker, self.calls) for worker in range(workers)]


class FakeWorker:
    def __init__(self, worker: int, calls: list[tuple[int, int, Future[Any]]]) -> None:
        self.run_to = FakeMethod(lambda end, future: calls.append((worker, end, future)))


class FakeMethod:
    def __init__(self, called: Callable[[int, Future[Any]], None]) -> None:
        self._called = called

    def remote(self, end: int) -> FakeMethod:
        self._future: Future[Any] = Future()
        self._called(end, self._future)
        return self

    def future(self) -> Future[Any]:
        return self._future


def started(ends: list[int]) -> tuple[FakeRun, Bunches, list[tuple[Any, ...]]]:
    events: list[tuple[Any, ...]] = []
    run = FakeRun(2)
    bunches = Bunches(run, ends, 0, lambda kind, key, value: events.append((kind, *key, value)))  # type: ignore[arg-type]
    while not bunches.full:
        bunches.queue()
    return run, bunches, events


def answer(run: FakeRun, call: int, steps: int = 1) -> None:
    run.calls[call][2].set_result([StepReport(steps=steps)])


def taken(bunches: Bunches, events: list[tuple[Any, ...]]) -> list[int]:
    ends = []
    while events:
        kind, *key, future = events.pop(0)
        assert kind == "steps"
        ends += [bunch.end for bunch in bunches.take(*key, future=future)]
    return ends


def test_two_bunches_are_under_way_and_done_when_all_workers_are() -> None:
    run, bunches, events = started([10, 20, 25])
    assert [call[:2] for call in run.calls] == [(0, 10), (1, 10), (0, 20), (1, 20)]
    answer(run, 0)
    answer(run, 2)
    answer(run, 3)
    assert taken(bunches, events) == []
    answer(run, 1)
    assert taken(bunches, events) == [10, 20]
    assert not bunches.at_end
    assert bunches.done
    bunches.queue()
    assert bunches.at_end
    assert bunches.full


def test_a_new_worker_is_told_what_the_old_one_has_not_reported() -> None:
    run, bunches, events = started([10, 20])
    answer(run, 1)
    answer(run, 2)
    assert taken(bunches, events) == []
    old = run.calls[3]
    bunches.again({1})
    assert [call[:2] for call in run.calls[4:]] == [(1, 20)]
    old[2].set_exception(AssertionError("what the old one says does not count"))
    answer(run, 0)
    answer(run, 4)
    assert taken(bunches, events) == [10, 20]


def test_starting_over_forgets_what_was_told() -> None:
    run, bunches, events = started([10, 20])
    answer(run, 0)
    bunches.start_over(5)
    for call in (1, 2, 3):
        answer(run, call)
    assert taken(bunches, events) == []
    bunches.queue()
    assert [call[:2] for call in run.calls[4:]] == [(0, 10), (1, 10)]
    assert bunches.queued_to == 10
