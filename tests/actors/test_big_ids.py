"""Ids beyond 2³¹ through the whole product: training on shards, export, HTTP.

A table whose rows and slots start at zero takes no memory before rows are written, and files have
holes, so these tables of 2³¹ rows and more are real and cost little.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ps import export_file, folders
from ps.config import FeatureConfig, TableConfig
from ps.export import ExportWriter, open_export, write_rows
from ps.initializers import Constant
from ps.optimizers import Adam
from ps.spec import resolve
from serving.app import create_app
from serving.lookup import LookupService
from tests.support.http import ask
from tests.support.jobs import every_optimizer_job, write_examples
from tests.support.runs import evaluated, train_steps
from workers.config import FeatureEntry, JobConfig, TableEntry
from workers.job import plan_job, running

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_session")]

FIRST = 2**31 - 150
"""Where the 300 ids of the small table lie in the big one: across the border of int32."""


def _job(folder: Path, first: int) -> JobConfig:
    """A job whose ids are those of the examples plus `first`, in a table just long enough."""
    examples = pq.read_table(write_examples(folder))
    ids = pa.array(examples["user"].to_numpy() + first)
    path = folder / f"from-{first}.parquet"
    pq.write_table(examples.set_column(0, "user", ids), path, row_group_size=100)
    job = every_optimizer_job(path, workers=1)
    return replace(
        job,
        name=f"ids-from-{first}",
        tables={
            "users": TableEntry(
                vocabulary_size=first + 300,
                dim=2,
                initializer=Constant(0.0),
                optimizer=Adam(0.01),
            )
        },
        features={"user": FeatureEntry(table="users")},
    )


def test_training_on_ids_beyond_int32_gives_the_bits_of_small_ids(tmp_path: Path) -> None:
    metrics = []
    for first in (0, FIRST):
        job = _job(tmp_path, first)
        with running(job) as run:
            plan = plan_job(job)
            train_steps(run, plan, [])
            metrics.append(evaluated(run, plan))
            stats = run.shards.stats()
        assert sum(s.num_rows for s in stats) == first + 300
    assert metrics[0] == metrics[1]
    assert metrics[0]["rmse"] > 0


def test_http_answers_for_ids_beyond_int32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither 8 GiB of disk nor their checksum: the file keeps its holes.
    monkeypatch.setattr(export_file, "_reserve", lambda path: None)
    monkeypatch.setattr(folders, "sha256", lambda path: "0" * 64)
    num_rows = 2**31 + 1000
    spec = resolve({"user": FeatureConfig(TableConfig(num_rows, 1, combiner="sum", name="users"))})
    written = np.arange(1, 1001, dtype=np.float32).reshape(-1, 1)
    with ExportWriter(tmp_path, spec, step=1, job="big") as writer:
        write_rows(writer.row_file("users"), num_rows - 1000, written)
        folder = writer.commit()
    app = create_app(LookupService(open_export(folder)))
    bags = [[2**31, 2**31 + 999], [2**31 - 1], [0]]
    answer, beyond = (
        ask(app, "POST", "/v1/lookup", json={"inputs": {"user": ids}})
        for ids in (bags, [[num_rows]])
    )
    assert answer.json()["outputs"]["user"] == [[1001.0], [0.0], [0.0]]
    assert beyond.status_code == 422
    assert f"id {num_rows} is not in [0, {num_rows})" in beyond.json()["detail"]
