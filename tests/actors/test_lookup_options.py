"""Lookup options of training through a whole job: Ray actors, two workers, Parquet in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ps.config import Adagrad, CustomCombiner, QuantizationConfig
from ps.errors import ConfigError
from tests.support.jobs import every_optimizer_job, write_examples
from tests.support.runs import evaluated, train_steps
from workers.config import FeatureEntry, JobConfig, TableEntry
from workers.job import plan_job, running

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_session")]

ADAGRAD = Adagrad(0.05)
TABLES = {
    "items": TableEntry(vocabulary_size=900, dim=8, combiner="sum", optimizer=ADAGRAD),
    "attended": TableEntry(
        vocabulary_size=900,
        dim=8,
        optimizer=ADAGRAD,
        combiner=CustomCombiner("tests.support.combiners:attention", 4),
    ),
    "coarse": TableEntry(
        vocabulary_size=900,
        dim=4,
        optimizer=ADAGRAD,
        quantization_config=QuantizationConfig(17, -1.0, 1.0),
    ),
}
FEATURES = {
    "core": FeatureEntry(table="items", column="items", tensor_core_shape=(None, 3)),
    "host": FeatureEntry(table="items", column="recent"),
    "sequence": FeatureEntry(
        table="items", column="items", weights="item_weights", max_sequence_length=2
    ),
    "attended": FeatureEntry(table="attended", column="recent"),
    "coarse": FeatureEntry(table="coarse", column="recent", output_shape=(60, 2)),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    data = write_examples(tmp_path_factory.mktemp("examples"), rows=480)
    job = every_optimizer_job(data)
    return replace(job, tables=TABLES, features=FEATURES, train=replace(job.train, epochs=1))


def test_a_job_with_every_lookup_option_trains_all_its_tables(job: JobConfig) -> None:
    plan = plan_job(job)
    with running(job) as run:
        before = {table: run.shards.read_table(table, 0).rows.copy() for table in TABLES}
        train_steps(run, plan, ())
        assert np.isfinite(evaluated(run, plan)["rmse"])
        for table in TABLES:
            rows = run.shards.read_table(table, plan.total_steps).rows
            assert np.isfinite(rows).all()
            assert (rows != before[table]).any()


def test_a_custom_combiner_that_is_not_there_ends_the_job_by_name(job: JobConfig) -> None:
    missing = replace(TABLES["attended"], combiner=CustomCombiner("no.such.module:function", 4))
    job = replace(job, tables=TABLES | {"attended": missing})
    with (
        pytest.raises(ConfigError, match=r"tables.attended.combiner no.such.module:function"),
        running(job),
    ):
        pass
