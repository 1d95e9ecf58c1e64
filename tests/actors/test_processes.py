"""What actor processes are made of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import ray

from tests.support.jobs import every_optimizer_job, write_examples
from tests.support.runs import train_steps
from workers.job import plan_job, running

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_session")]


def test_shards_and_workers_are_processes_of_their_own_and_shards_have_no_tensorflow(
    tmp_path: Path,
) -> None:
    def look(_: object) -> tuple[int, bool]:
        import os

        return os.getpid(), "tensorflow" in sys.modules

    job = every_optimizer_job(write_examples(tmp_path))
    with running(job) as run:
        train_steps(run, plan_job(job), [])
        shards = ray.get([h.__ray_call__.remote(look) for h in run.shards.handles], timeout=60)
        workers = ray.get([w.__ray_call__.remote(look) for w in run.workers], timeout=60)
        rows = [stats.num_rows for stats in run.shards.stats()]
    assert len({pid for pid, _ in shards + workers}) == 4
    assert [loaded for _, loaded in shards] == [False, False]
    assert [loaded for _, loaded in workers] == [True, True]
    assert sum(rows) == 300 + 900 + 17 + 900 + 300
    assert min(rows) > 0.4 * sum(rows)
