"""Training on Ray learns, counts what it did, and exports what the shards hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ps.export import open_export
from tests.support.jobs import every_optimizer_job, with_lookahead, write_examples
from tests.support.runs import train_steps
from workers.config import JobConfig
from workers.job import Progress, plan_job, running, train
from workers.progress import MetricsFile

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    return every_optimizer_job(write_examples(tmp_path_factory.mktemp("examples")))


class Collect:
    def __init__(self) -> None:
        self.seen: list[Progress] = []

    def progress(self, progress: Progress) -> None:
        self.seen.append(progress)


def test_reports_cover_every_step_and_measure_staleness(job: JobConfig) -> None:
    plan = plan_job(job)
    for lookahead in (0, 1, 2):
        collect = Collect()
        ahead = with_lookahead(job, lookahead)
        with running(ahead) as run:
            train_steps(run, plan, [collect])
            assert {stats.version for stats in run.shards.stats()} == {plan.total_steps}
        assert [p.step for p in collect.seen] == [7, 14, 20]
        assert max(p.staleness for p in collect.seen) == lookahead
        assert collect.seen[-1].examples == 20 * 120
        assert all(len(p.shard_rows_per_s) == 2 for p in collect.seen)
        if lookahead == 0:
            assert collect.seen[-1].loss < collect.seen[0].loss


def test_an_export_holds_exactly_what_the_shards_hold(job: JobConfig, tmp_path: Path) -> None:
    plan = plan_job(job)
    exporting = replace(job, output=replace(job.output, export=tmp_path / "export"))
    with running(exporting) as run:
        train_steps(run, plan, [])
        folder = run.export(plan.total_steps)
        assert folder is not None
        export = open_export(folder, verify=True)
        for name, table in export.tables.items():
            state = run.shards.read_table(name, plan.total_steps)
            np.testing.assert_array_equal(table.rows_VD, state.rows)
        dense, _, averages = run.shards.read_dense(plan.total_steps)
    assert export.step == plan.total_steps
    values = np.concatenate([v.reshape(-1) for v in export.dense_variables().values()])
    np.testing.assert_array_equal(values, np.concatenate([dense, averages]))


def test_a_keras_model_of_the_users_own_trains(job: JobConfig, tmp_path: Path) -> None:
    keras = replace(
        job,
        features={name: job.features[name] for name in ("user", "items", "genre")},
        tables={name: job.tables[name] for name in ("users", "items", "genres")},
        model=replace(job.model, build="tests.support.models:build_keras", params={"units": 8}),
        output=replace(job.output, metrics=tmp_path / "metrics.jsonl"),
    )
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        result = train(keras, [metrics])
    assert train(keras).metrics == result.metrics, "dropout and unseeded layers repeat as well"
    assert 0.5 < result.metrics["rmse"] < 1.5
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["starting", *["progress"] * 3, "finished"]
    assert events[-1]["metrics"] == result.metrics
