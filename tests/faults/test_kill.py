"""Processes that are really killed: the job ends with a clear error, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from ps.errors import JobError
from tests.support.jobs import every_optimizer_job, write_examples
from tests.support.runs import train_steps
from workers.job import Progress, Run, plan_job, running

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("ray_session")]


class KillAtFirstReport:
    """Sends SIGKILL to an actor's process when the first progress report comes in."""

    def __init__(self, run: Run, victim: str) -> None:
        actor = run.shards.handles[1] if victim == "shard" else run.workers[1]
        self._pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
        self.killed_at = 0.0

    def progress(self, progress: Progress) -> None:
        if not self.killed_at:
            os.kill(self._pid, signal.SIGKILL)
            self.killed_at = time.monotonic()


@pytest.mark.parametrize("victim", ["shard", "worker"])
def test_a_killed_process_ends_the_job_with_an_error_at_once(tmp_path: Path, victim: str) -> None:
    job = every_optimizer_job(write_examples(tmp_path))
    long = replace(
        job,
        train=replace(job.train, epochs=500),
        output=replace(job.output, export=tmp_path / "export"),
    )
    plan = plan_job(long)
    kills: list[KillAtFirstReport] = []

    def run_and_kill() -> None:
        with running(long) as run:
            kills.append(KillAtFirstReport(run, victim))
            train_steps(run, plan, kills)

    with pytest.raises(JobError, match=r"died|unavailable|failed"):
        run_and_kill()
    assert time.monotonic() - kills[0].killed_at < 30
    assert not (tmp_path / "export").exists()
    assert ray.util.list_named_actors(all_namespaces=True) == []
