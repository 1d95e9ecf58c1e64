"""`TrainWorker` without Ray: connected, aborted, connected anew; and what random layers draw."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.errors import JobAborted
from tests.support.jobs import every_optimizer_job, with_ranks, with_recovery, write_examples
from tests.support.local_job import PATIENCE_S, LocalJob, Waiting, in_threads
from workers.config import JobConfig
from workers.ranks import Noise
from workers.worker import TrainWorker

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("worker"), rows=130)


def job_of(data: Path, workers: int, prefetch: int = 0) -> JobConfig:
    """Two epochs of four steps, six ranks, lookahead 1."""
    job = with_ranks(every_optimizer_job(data), 6, workers)
    return replace(
        job,
        train=replace(job.train, batch_size=30, lookahead=1),
        data=replace(job.data, prefetch=prefetch),
    )


class Access:
    """Hands out transports, and keeps them."""

    format = None

    def __init__(self, run: LocalJob) -> None:
        self._run = run
        self.changed = threading.Condition(threading.RLock())
        self.made: list[Waiting] = []
        self.calls: list[tuple[Any, ...]] = []

    def connect(self, rank: int, *arguments: Any, **options: Any) -> Waiting:
        self.calls.append((rank, *arguments, options))
        self.made.append(Waiting(self._run, self.changed, rank))
        return self.made[-1]


def worker_of(job: JobConfig, worker: int, run: LocalJob) -> TrainWorker:
    """With a model in NumPy."""
    made = TrainWorker(job, worker)
    made._dense = run.model  # type: ignore[assignment]
    return made


def input_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name in ("input", "windows")}


@pytest.fixture
def connected(data: Path) -> Iterator[tuple[TrainWorker, Access, LocalJob]]:
    """Worker 1 of 2, connected; the other one does nothing."""
    before = input_threads()
    run = LocalJob(job_of(data, 2, prefetch=2))
    worker, access = worker_of(run.job, 1, run), Access(run)
    worker.connect(access, run.layout, {1: 0, 3: 0, 5: 0})  # type: ignore[arg-type]
    yield worker, access, run
    worker._disconnect()
    assert input_threads() <= before, "threads that read ahead have ended"


def aborted(worker: TrainWorker, end: int) -> threading.Thread:
    """Runs steps in a thread, which ends with `JobAborted`."""

    def run() -> None:
        with pytest.raises(JobAborted, match="shard 0 is new"):
            worker.run_to(end)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_worker_that_waits_for_others_is_aborted_and_connected_anew(
    connected: tuple[TrainWorker, Access, LocalJob],
) -> None:
    worker, access, run = connected
    thread = aborted(worker, STEPS)
    with access.changed:  # lookahead 1: its ranks make two steps, then they wait
        assert access.changed.wait_for(lambda: set(worker.where().values()) == {2}, PATIENCE_S)
    worker.abort("shard 0 is new")
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    with pytest.raises(JobAborted, match="shard 0 is new"):
        worker.run_to(STEPS)
    with pytest.raises(JobAborted, match="shard 0 is new"):
        worker.finish()
    first, threads = list(access.made), input_threads()
    anew = LocalJob(run.job)
    again = Access(anew)
    worker.connect(again, anew.layout, {1: 0, 3: 0, 5: 0})  # type: ignore[arg-type]
    assert all(transport.closed for transport in first)
    assert not threads & input_threads(), "threads that read for the old loops have ended"
    assert worker.where() == {1: 0, 3: 0, 5: 0}
    other = worker_of(run.job, 0, anew)
    other.connect(again, anew.layout, {0: 0, 2: 0, 4: 0})  # type: ignore[arg-type]
    in_threads([lambda w=w: (w.run_to(STEPS), w.finish()) for w in (worker, other)])  # type: ignore[misc]
    other._disconnect()
    undisturbed = LocalJob(run.job)
    undisturbed.run(undisturbed.workers(), STEPS)
    assert anew.contents() == undisturbed.contents()


def test_an_abort_while_a_worker_connects_is_not_lost(
    connected: tuple[TrainWorker, Access, LocalJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, access, run = connected
    connect = access.connect

    def and_abort(rank: int, *arguments: Any, **options: Any) -> Waiting:
        transport = connect(rank, *arguments, **options)
        worker.abort("shard 0 is new")
        return transport

    monkeypatch.setattr(access, "connect", and_abort)
    with pytest.raises(JobAborted, match="shard 0 is new"):
        worker.connect(access, run.layout, {1: 0, 3: 0, 5: 0})  # type: ignore[arg-type]
    with pytest.raises(JobAborted, match="shard 0 is new"):
        worker.run_to(1)


@pytest.mark.parametrize(
    ("durability", "timeout_s", "options"),
    [
        ("none", 300.0, {"reconnect_s": 0.0, "max_pushes": 4}),
        ("snapshot", 28.0, {"reconnect_s": 14.0, "max_pushes": 4}),
        ("log", 28.0, {"reconnect_s": 14.0, "max_pushes": 32}),
    ],
)
def test_a_driver_that_can_mend_things_decides_before_its_workers(
    data: Path, durability: str, timeout_s: float, options: dict[str, Any]
) -> None:
    job = job_of(data, 2)
    if durability != "none":
        job = with_recovery(job, data.parent / "snapshots", durability, step_deadline_s=7.0)
    run = LocalJob(job)
    worker, access = worker_of(job, 0, run), Access(run)
    assert worker.where() == {}
    worker.connect(access, run.layout, {0: 0, 2: 0, 4: 0})  # type: ignore[arg-type]
    worker._disconnect()
    assert access.calls == [(rank, "auto", True, timeout_s, options) for rank in (0, 2, 4)]


# --- random layers


class Variable:
    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = np.array(value)

    def numpy(self) -> np.ndarray:
        return self.value.copy()

    def assign(self, value: np.ndarray) -> None:
        assert (value.shape, value.dtype) == (self.value.shape, self.value.dtype)
        self.value = value


def test_what_a_layer_draws_depends_on_rank_and_step_alone() -> None:
    first, second = (Variable("seed_generator_state", [k, 0]) for k in (77, 78))
    other = Variable("seen", [5])
    noise = Noise([first, other, second])

    def states(rank: int, step: int) -> tuple[bytes, ...]:
        draw = noise.of_rank(rank)
        assert draw is not None
        draw(step)
        found = first.numpy(), second.numpy()
        first.value = second.value = np.array([1, 2])  # drawing moves them on
        assert all(0 <= word < 2**31 for state in found for word in state)
        return tuple(state.tobytes() for state in found)

    places = [(rank, step) for rank in range(3) for step in (0, 1, 10**9)]
    seen = [states(*place) for place in places]
    assert len({state for both in seen for state in both}) == 2 * len(places)
    random.Random(0).shuffle(places)
    again = {place: states(*place) for place in places}
    assert [again[rank, step] for rank in range(3) for step in (0, 1, 10**9)] == seen
    assert other.numpy().tolist() == [5]
    assert Noise([other]).of_rank(0) is None
