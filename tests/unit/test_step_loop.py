"""`StepLoop`: wherever it starts, it does what it would have done there, had it begun earlier."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import JobAborted
from tests.support.jobs import every_optimizer_job, with_ranks, with_recovery, write_examples
from tests.support.local_job import LocalJob
from workers.batches import Batch
from workers.config import JobConfig
from workers.step import StepOptions

STEPS = 12
"""Two epochs of six steps."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("steps"), rows=155)


def job_of(data: Path, lookahead: int = 0, boundary: int = 0, prefetch: int = 0) -> JobConfig:
    """Two ranks on one worker, two shards."""
    job = with_ranks(every_optimizer_job(data), 2, 1)
    if boundary:
        job = with_recovery(job, "snapshots", snapshot_every=boundary)
    return replace(
        job,
        train=replace(job.train, batch_size=24, lookahead=lookahead),
        data=replace(job.data, prefetch=prefetch, shuffle_rows=20),
    )


def trained(job: JobConfig, end: int = STEPS, history: int = 0) -> LocalJob:
    run = LocalJob(job, history=history)
    run.run(run.workers(), end)
    assert run.version == end
    return run


@settings(max_examples=25)
@given(
    lookahead=st.integers(0, 2),
    boundary=st.sampled_from([0, 1, 4, 5]),
    at=st.integers(0, STEPS),
    prefetch=st.integers(0, 2),
)
def test_new_loops_go_on_at_any_step(
    data: Path, lookahead: int, boundary: int, at: int, prefetch: int
) -> None:
    """The shards live, and have the history that loops at that step may still ask for."""
    job = job_of(data, lookahead, boundary, prefetch)
    want = trained(job).contents()
    run = trained(job, at, history=2 * lookahead + 2)
    run.run(run.workers(), STEPS)
    assert run.contents() == want


@pytest.mark.parametrize(
    ("lookahead", "boundary", "starts"),
    [
        (0, 0, range(STEPS)),
        (1, 4, (0, 4, 8)),
        (2, 4, (4, 8)),
        (2, 1, range(STEPS)),
        (2, 5, (5, 10)),
    ],
)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_state_at_a_boundary_needs_nothing_older(
    data: Path, lookahead: int, boundary: int, starts: range, num_shards: int
) -> None:
    """Restored on other shards, which have no history."""
    job = job_of(data, lookahead, boundary)
    want = trained(job).contents()
    for start in starts:
        other = replace(job, cluster=replace(job.cluster, shards=num_shards))
        run = trained(job, start).restored(other)
        run.run(run.workers(), STEPS)
        assert run.contents() == want


def test_a_state_between_boundaries_can_be_gone_on_from(data: Path) -> None:
    """With other bits than the run would have had, but from one version for all."""
    job = job_of(data, lookahead=2, boundary=5)
    run = trained(job, 7).restored(job)
    loops = [run.loop(rank, 7, oldest=7) for rank in range(2)]
    for _ in range(7, STEPS):
        for loop in loops:
            assert loop.run_one() is not None
    assert run.version == STEPS


def test_the_input_begins_with_the_run_not_with_step_0(data: Path) -> None:
    def labels(first_step: int, step: int) -> list[bytes]:
        run = LocalJob(job_of(data), version=step)
        loops = [run.loop(rank, step, first_step=first_step) for rank in range(2)]
        while all(loop.run_one() is not None for loop in loops):
            pass
        assert run.version == first_step + STEPS
        return [batch.labels.tobytes() for batch in run.model.seen]

    want = labels(0, 0)
    assert len(set(want)) == len(want) == 2 * STEPS
    assert labels(40, 40) == want
    for behind in (1, 5, 6, 9):
        assert labels(40, 40 + behind) == want[2 * behind :]


def test_the_version_of_a_step_does_not_depend_on_where_a_loop_began() -> None:
    for lookahead in range(3):
        for boundary in (0, 1, 3, 4):
            options = StepOptions(batch_size=1, lookahead=lookahead, boundary_every=boundary)
            for first_step in (0, 2, 4):
                versions = [options.version_of(t, first_step) for t in range(first_step, 30)]
                assert versions == sorted(versions)
                for step, version in enumerate(versions, first_step):
                    assert max(first_step, step - lookahead) <= version <= step
                    if boundary:
                        assert version >= min(step, max(first_step, step // boundary * boundary))


class Stuck:
    """A reader whose second batch never comes."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._first = next(batches)
        self.asked = threading.Event()
        self.over = threading.Event()

    def steps_per_epoch(self, batch_size: int) -> int:
        return 2

    def epoch(self, epoch: int, batch_size: int, first_batch: int = 0) -> Iterator[Batch]:
        yield self._first
        self.asked.set()
        assert self.over.wait(30.0)


def test_a_loop_that_waits_for_its_input_can_be_aborted(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LocalJob(with_ranks(job_of(data, prefetch=1), 1, 1))
    stuck = Stuck(run.reader(0).epoch(0, 24))
    monkeypatch.setattr(run, "reader", lambda rank: stuck)
    loop = run.loop(0, 0)
    assert loop.run_one() is not None
    assert stuck.asked.wait(30.0)
    errors: list[BaseException] = []

    def step() -> None:
        try:
            loop.run_one()
        except JobAborted as e:
            errors.append(e)

    thread = threading.Thread(target=step)
    thread.start()
    loop.abort(JobAborted("no more"))
    thread.join(30.0)
    assert not thread.is_alive()
    assert [str(e) for e in errors] == ["no more"]
    with pytest.raises(JobAborted, match="no more"):
        loop.run_one()
    stuck.over.set()
    loop.close()


def test_an_aborted_loop_runs_no_step_that_is_ready(data: Path) -> None:
    run = LocalJob(with_ranks(job_of(data), 1, 1))
    loop = run.loop(0, 0)
    assert loop.run_one() is not None
    loop.abort(JobAborted("no more"))
    with pytest.raises(JobAborted):
        loop.run_to(5)
    assert (loop.step, run.version) == (1, 1)


def test_a_bunch_ends_where_it_is_told_and_with_the_input(data: Path) -> None:
    run = LocalJob(with_ranks(job_of(data), 1, 1))
    loop = run.loop(0, 3 - 3)
    assert loop.run_to(5).steps == 5
    assert loop.run_to(5).steps == 0
    assert loop.run(2).steps == 2
    report = loop.run_to(1000)
    assert (report.steps, loop.step) == (STEPS - 7, STEPS)
    assert [record.step for record in report.records] == list(range(7, STEPS))
