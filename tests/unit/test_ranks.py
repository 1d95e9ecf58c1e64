"""Results depend on the ranks of a job, not on the workers that run them, nor on who died when."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.client import LocalTransport
from ps.errors import ProtocolError, ShardLostError
from ps.step_message import StepMessage
from tests.support.jobs import every_optimizer_job, with_ranks, with_recovery, write_examples
from tests.support.local_job import LocalJob, Waiting, in_threads
from workers.config import JobConfig
from workers.modes import in_rank_order, ranks_of
from workers.ranks import Ranks

RANKS, STEPS = 6, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("ranks"), rows=130)


def job_of(
    data: Path, workers: int, lookahead: int, boundary: int = 0, prefetch: int = 0
) -> JobConfig:
    """Two epochs of four steps, six ranks, two shards."""
    job = with_ranks(every_optimizer_job(data), RANKS, workers)
    if boundary:
        job = with_recovery(job, "snapshots", snapshot_every=boundary)
    return replace(
        job,
        train=replace(job.train, batch_size=30, lookahead=lookahead),
        data=replace(job.data, prefetch=prefetch),
    )


def wanted(data: Path, lookahead: int, boundary: int = 0, end: int = STEPS) -> list[bytes]:
    """What a worker for each rank gives."""
    run = LocalJob(job_of(data, RANKS, lookahead, boundary))
    run.run(run.workers(), end)
    assert run.version == end
    assert all(np.isfinite(np.frombuffer(part, np.float32)).all() for part in run.contents())
    return run.contents()


@pytest.mark.parametrize("boundary", [0, 3])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_any_number_of_workers_gives_the_same_bits(
    data: Path, lookahead: int, boundary: int
) -> None:
    want = wanted(data, lookahead, boundary)
    for workers in (1, 2, 3, 4):  # 4: two of them have two ranks
        run = LocalJob(job_of(data, workers, lookahead, boundary))
        actors = run.workers()
        assert [list(a.where()) for a in actors] == [
            list(ranks_of(w, workers, RANKS)) for w in range(workers)
        ]
        run.run(actors, STEPS, seed=workers)
        assert run.contents() == want


def test_other_ranks_are_other_numbers(data: Path) -> None:
    job = job_of(data, 1, 0)
    run = LocalJob(with_ranks(job, 3, 1))
    run.run(run.workers(), STEPS)
    assert run.contents() != wanted(data, 0)


class Bounded(LocalTransport):
    """Asks a shard whether it is done before it has too many pushes of this rank, as wires do."""

    def __init__(self, run: LocalJob, rank: int, max_pushes: int) -> None:
        super().__init__(run.shards)
        self._rank = rank
        self._room = max_pushes
        self._under_way: list[deque[int]] = [deque() for _ in run.shards]
        self.asked = 0

    def push(self, message: StepMessage) -> None:
        for shard, pushes in zip(self._shards, self._under_way, strict=True):
            if len(pushes) >= self._room:
                self.asked += 1
                answers: list[int] = []
                shard.flush(self._rank, answers.append)
                assert answers, "nobody else would make this shard done with the older pushes"
                pushes.clear()
            pushes.append(message.step)
        super().push(message)


@pytest.mark.parametrize("max_pushes", [1, 4])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_ranks_of_one_worker_do_not_wait_for_each_other(
    data: Path, lookahead: int, max_pushes: int
) -> None:
    """However few pushes may be under way; `LocalTransport` raises where a worker would wait."""
    run = LocalJob(with_ranks(replace(job_of(data, 1, lookahead), name="four"), 5, 1))
    transports = {rank: Bounded(run, rank, max_pushes) for rank in range(5)}
    run.run(run.workers(transports=transports), STEPS)
    assert run.version == STEPS
    assert all(t.asked for t in transports.values()), "there was something to wait for"


@pytest.mark.parametrize("lookahead", [0, 2])
def test_ranks_that_did_not_keep_step_would_wait(data: Path, lookahead: int) -> None:
    run = LocalJob(job_of(data, 1, lookahead))
    loop = run.loop(0, 0)
    with pytest.raises(ProtocolError, match="nobody else will make it"):
        loop.run_to(STEPS)
    assert loop.step == lookahead + 1


# --- in threads, which wait for each other


@pytest.mark.parametrize(("workers", "lookahead", "boundary"), [(3, 0, 0), (2, 2, 3), (4, 1, 0)])
def test_workers_that_run_at_once_give_the_same_bits(
    data: Path, workers: int, lookahead: int, boundary: int
) -> None:
    run = LocalJob(job_of(data, workers, lookahead, boundary))
    changed = threading.Condition(threading.RLock())
    transports = {rank: Waiting(run, changed, rank) for rank in range(RANKS)}
    actors = run.workers(transports=transports)
    in_threads([lambda actor=actor: (actor.run_to(STEPS), actor.finish()) for actor in actors])  # type: ignore[misc]
    assert run.contents() == wanted(data, lookahead, boundary)


# --- after a failure


class Dying(LocalTransport):
    """Reaches only some of the shards with the push of one step, and then nobody any more."""

    def __init__(self, run: LocalJob, at: int, reached: int) -> None:
        super().__init__(run.shards)
        self._at = at
        self._reached = reached

    def push(self, message: StepMessage) -> None:
        for k, shard in enumerate(self._shards):
            if message.step == self._at and k >= self._reached:
                raise ShardLostError("gone")
            shard.push(message.push(k))


def died(run: LocalJob, at: dict[int, tuple[int, int]], seed: int) -> None:
    """Run workers in any order until none can go on: ranks die at a step, by shards reached."""
    transports = {rank: Dying(run, *where) for rank, where in at.items()}
    actors, rng, options = run.workers(transports=transports), random.Random(seed), run.options()
    while actors:
        made = min(shard.version for shard in run.shards)
        steps = {actor: min(actor.where().values()) for actor in actors}
        ready = [
            actor
            for actor, step in steps.items()
            if step < STEPS and options.version_of(step, 0) <= made
        ]
        if not ready:
            return
        actor = rng.choice(ready)
        try:
            actor.run_to(steps[actor] + 1)
        except ShardLostError:
            actors.remove(actor)


def in_turn(actors: Sequence[Ranks], steps: range) -> None:
    for step in steps:
        for actor in actors:
            actor.run_to(step + 1)


def missing(run: LocalJob) -> list[int]:
    """The first step of each rank that some shard has no push of."""
    return [min(steps) for steps in zip(*(s._next_step for s in run.shards), strict=True)]


@settings(max_examples=20)
@given(
    workers=st.sampled_from([1, 2, 3, 6]),
    again=st.sampled_from([1, 2, 3, 6]),
    lookahead=st.integers(0, 2),
    boundary=st.sampled_from([0, 3]),
    dead=st.dictionaries(
        st.integers(0, RANKS - 1),
        st.tuples(st.integers(0, STEPS - 1), st.integers(0, 1)),
        min_size=1,
        max_size=2,
    ),
    repeat=st.booleans(),
    seed=st.integers(0, 99),
)
def test_new_workers_go_on_where_the_shards_are(
    data: Path, workers: int, again: int, lookahead: int, boundary: int,
    dead: dict[int, tuple[int, int]], repeat: bool, seed: int,
) -> None:  # fmt: skip
    """Each rank at the step that some shard misses, or at one before: for all shards it is at most
    as far as their version. Those that have its push drop the second one."""
    job = job_of(data, workers, lookahead, boundary)
    run = LocalJob(job, history=2 * lookahead + 2)
    died(run, dead, seed)
    steps = missing(run)
    assert min(steps) < STEPS
    if repeat:
        steps = [min(shard.version for shard in run.shards)] * RANKS
    run.job = with_ranks(job, RANKS, again)
    actors = run.workers(steps)
    in_turn(actors, range(min(steps), STEPS))
    assert run.version == STEPS
    assert run.contents() == wanted(data, lookahead, boundary)


def test_ranks_ahead_wait_for_those_behind(data: Path) -> None:
    run = LocalJob(job_of(data, 2, 0), history=2)
    died(run, {1: (3, 1)}, seed=0)
    steps = missing(run)
    assert set(steps) == {3, 4}
    (even, odd) = run.workers(steps)
    assert even.where() == {rank: steps[rank] for rank in (0, 2, 4)}
    reports = [odd.run_to(4), even.run_to(4)]
    assert [[r.steps for r in of] for of in reports] == [
        [4 - steps[rank] for rank in ranks] for ranks in ((1, 3, 5), (0, 2, 4))
    ]
    assert run.version == 4


def test_reports_and_parts_come_in_order_of_the_ranks(data: Path) -> None:
    run = LocalJob(job_of(data, 4, 0))
    actors = run.workers()
    in_turn(actors, range(3))
    reports = [actor.run_to(4) for actor in actors]
    assert [len(of) for of in reports] == [2, 2, 1, 1]
    assert [r.records[0].step for r in in_rank_order(reports)] == [3] * RANKS
    readers = {rank: run.reader(rank) for rank in range(RANKS)}
    parts = in_rank_order([actor.evaluate(readers, 4) for actor in actors])
    labels = np.concatenate([part[0] for part in parts])
    whole = LocalJob(with_ranks(run.job, 1, 1))
    (in_order,) = (b.labels for b in whole.reader(0).in_order(130))
    assert labels.tobytes() == in_order.tobytes()


def test_where_nothing_is_left_workers_say_so(data: Path) -> None:
    run = LocalJob(job_of(data, 2, 1))
    actors = run.workers()
    in_turn(actors, range(STEPS))
    assert run.version == STEPS
    assert [[r.steps for r in actor.run_to(STEPS + 5)] for actor in actors] == [[0] * 3] * 2
