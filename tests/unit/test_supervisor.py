"""The driver's loop over a run without actors: what counts as stuck, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ps.errors import JobError
from ps.messages import ShardStats
from workers.recovery_config import RecoveryConfig
from workers.supervisor import Supervisor

DEADLINE_S = 50.0


class Remote:
    """`handle.method`: each call asks `answer` for its result, or for a future."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    def remote(self, *args: Any) -> Any:
        answer = self._answer(*args)
        future = answer if isinstance(answer, Future) else Future[Any]()
        if not isinstance(answer, Future):
            future.set_result(answer)
        return SimpleNamespace(future=lambda: future)


class Clock:
    """Every look at it takes ten seconds; things are due at some moments."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        self.now += 10.0
        for moment, act in [d for d in self.due if d[0] <= self.now]:
            self.due.remove((moment, act))
            act()
        return self.now


def stats() -> ShardStats:
    return ShardStats(0, 3, 0, 0, 0, 0, 0, fences=(3,), expected=(3,), ready=True)


def a_run(clock: Clock, **worker: Remote) -> Any:
    job = SimpleNamespace(
        data=SimpleNamespace(test="somewhere"),
        train=SimpleNamespace(mode="sync", report_every=3, batch_size=1),
        cluster=SimpleNamespace(step_timeout_s=10_000.0),
        output=SimpleNamespace(snapshot=None),
        recovery=RecoveryConfig(),
    )
    handle = SimpleNamespace(stats=Remote(stats))
    replaced: list[frozenset[int]] = []

    def replace_workers(workers: frozenset[int]) -> float:
        replaced.append(workers)
        raise JobError("nobody is there to take its place")

    return SimpleNamespace(
        job=job,
        recovery=SimpleNamespace(
            durability="snapshot", snapshot_every=100, retries=2, step_deadline_s=DEADLINE_S
        ),
        shards=SimpleNamespace(stats=lambda: [stats()], handles=[handle]),
        workers=[SimpleNamespace(**worker)],
        base=None,
        owns_base=False,
        access=SimpleNamespace(endpoints=(), token=b"", fingerprint=0),
        evaluation_timeout_s=lambda plan: 100_000.0,
        metrics=lambda parts: {"examples": float(len(parts[0][0][0]))},
        unanswering=lambda: (frozenset(), frozenset()),
        replace_workers=replace_workers,
        replaced=replaced,
    )


def a_plan(run: Any, last_step: int) -> Any:
    return SimpleNamespace(job=run.job, first_step=0, last_step=last_step, steps_per_epoch=100)


def test_an_evaluation_may_take_longer_than_a_step() -> None:
    clock, found = Clock(), Future[Any]()
    parts = [(np.zeros(7, np.float32), np.zeros(7, np.float32))]
    clock.due.append((20 * DEADLINE_S, lambda: found.set_result(parts)))
    run = a_run(clock, evaluate=Remote(lambda version: found))
    supervisor = Supervisor(run, a_plan(run, 3), [], clock)
    assert supervisor.evaluate() == {"examples": 7.0}
    assert run.replaced == []


def test_a_step_that_takes_too_long_is_put_down_to_its_worker() -> None:
    clock = Clock()
    run = a_run(clock, run_to=Remote(lambda end: Future[Any]()), finish=Remote(lambda: None))
    supervisor = Supervisor(run, a_plan(run, 6), [], clock)
    with pytest.raises(JobError, match="nobody is there"):
        supervisor.train()
    assert run.replaced == [frozenset([0])]
    assert clock.now < 10 * DEADLINE_S


def test_the_first_error_is_raised_while_others_wait() -> None:
    clock, failed = Clock(), Future[Any]()
    failed.set_exception(JobError("no rate for step 3"))
    answers = iter([Future[Any](), failed])
    run = a_run(clock, run_to=Remote(lambda end: []), finish=Remote(lambda: next(answers)))
    run.workers *= 2
    run.recovery.durability = "none"
    supervisor = Supervisor(run, a_plan(run, 3), [], clock)
    with pytest.raises(JobError, match="no rate for step 3"):
        supervisor.train()
