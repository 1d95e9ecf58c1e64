"""Async mode, and the variants that save bytes, on real shards and workers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.jobs import every_optimizer_job, write_examples
from tests.support.runs import train_steps
from workers.config import JobConfig
from workers.job import TrainResult, plan_job, running, train
from workers.progress import MetricsFile

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    return every_optimizer_job(write_examples(tmp_path_factory.mktemp("examples")))


def run_of(job: JobConfig, folder: Path, **options: Any) -> tuple[TrainResult, list[Any]]:
    path = folder / "metrics.jsonl"
    job = replace(
        job,
        train=replace(job.train, **options),
        output=replace(job.output, metrics=path, metrics_every_step=True),
    )
    with MetricsFile(path) as metrics:
        result = train(job, [metrics])
    return result, [json.loads(line) for line in path.read_text().splitlines()]


def test_async_applies_every_push_once_within_its_staleness(job: JobConfig, tmp_path: Path) -> None:
    result, events = run_of(
        job, tmp_path, mode="async", max_staleness=2, cached_rows=200, cache_max_age=2
    )
    assert [shard.version for shard in result.shards] == [20, 20]
    for shard in result.shards:
        assert shard.duplicates_dropped == 0
        assert sum(shard.staleness) == 2 * 20, "every push of both workers"
        # A worker is at most 2 steps ahead, so others applied at most 2 + 1 + 2 meanwhile.
        assert len(shard.staleness) <= 6
    steps = [e for e in events if e["event"] == "step"]
    assert sorted((e["worker"], e["step"]) for e in steps) == [
        (worker, step) for worker in (0, 1) for step in range(20)
    ]
    assert sum(sum(e["shard_rows"]) for e in steps) < sum(e["rows"] for e in steps), "rows kept"
    progress = [e for e in events if e["event"] == "progress"]
    assert progress[-1]["loss"] < progress[0]["loss"]
    assert sum(map(sum, (e["push_staleness_counts"] for e in progress))) <= 2 * 2 * 20


def test_shards_combine_bags_and_narrow_numbers_travel(job: JobConfig) -> None:
    plan = plan_job(job)
    jobs = {"exact": job, "narrow": replace(job, train=replace(job.train, wire_dtype="bfloat16"))}
    for name in ("narrow", "exact"):
        users = replace(job.tables["users"], combine_on="shard")
        jobs[f"{name}, combined"] = replace(jobs[name], tables={**job.tables, "users": users})
    del jobs["narrow"]
    found = {}
    for name, run_job in jobs.items():
        with running(run_job) as run:
            train_steps(run, plan, [])
            found[name] = [run.shards.read_table(t, 20).rows for t in ("users", "plain")]
    (users, plain), (combined, _) = found["exact"], found["exact, combined"]
    np.testing.assert_allclose(combined, users, atol=2e-5)
    # Of the table that SGD trains: Adam makes full steps of gradients that are nearly 0.
    assert 1e-6 < np.abs(found["narrow, combined"][1] - plain).max() < 0.02
