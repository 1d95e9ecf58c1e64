"""Training on embedding columns: raw Parquet values end as the same bits as ids made beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from ps.columns import (
    categorical_column_with_hash_bucket,
    categorical_column_with_identity,
    categorical_column_with_vocabulary_list,
    embedding_column,
    sequence_categorical_column_with_vocabulary_list,
    shared_embedding_columns,
    weighted_categorical_column,
)
from ps.export import open_export
from ps.inputs import Bags
from ps.lookup import pruned
from ps.optimizers import Adagrad, Adam, LinearDecay
from ps.ragged import Ragged
from ps.snapshot import export_snapshot, open_snapshot
from serving.lookup import LookupService
from tests.support.runs import evaluated, take_snapshot, train_steps
from workers.config import (
    ClusterConfig,
    DataConfig,
    FeatureEntry,
    JobConfig,
    ModelConfig,
    OutputConfig,
    TableEntry,
    TrainConfig,
)
from workers.job import plan_job, running

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_session")]

WORDS = ["action", "comedy", "drama", "noir"]
RATE = LinearDecay(0.1, 0.01, 10)
GENRE = categorical_column_with_vocabulary_list("genre", WORDS)
USER = categorical_column_with_hash_bucket("user", 50)
ITEM, LAST = (categorical_column_with_identity(key, 40) for key in ("item", "last"))
TAG = weighted_categorical_column(
    categorical_column_with_vocabulary_list("tag", WORDS, num_oov_buckets=3), "tag_weight"
)
WATCHED = sequence_categorical_column_with_vocabulary_list("watched", WORDS)
COLUMNS = (
    embedding_column(GENRE, 4, "sum", learning_rate_fn=RATE),
    embedding_column(USER, 3),
    embedding_column(TAG, 4, "mean", learning_rate_fn=RATE),
    *shared_embedding_columns([LAST, ITEM], 5, "sqrtn"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw values, and under `<name>_ids` (and `tag_w`) what the columns make of them."""
    rng, n = np.random.default_rng(3), 400
    sizes = rng.integers(0, 4, n)
    raw = {
        "genre": pa.array([rng.choice([*WORDS, "unknown"], k).tolist() for k in sizes]),
        "user": pa.array([f"u{i}" if i else "" for i in rng.integers(0, 90, n)]),
        "item": pa.array(rng.integers(-1, 40, n)),
        "last": pa.array([rng.integers(0, 40, k).tolist() for k in sizes]),
        "tag": pa.array([rng.choice([*WORDS, "x", "y"], k).tolist() for k in sizes]),
        "tag_weight": pa.array(
            [rng.uniform(-0.5, 2, k).tolist() for k in sizes], pa.list_(pa.float32())
        ),
        "watched": pa.array([rng.choice([*WORDS, "unknown"], k).tolist() for k in sizes]),
    }
    made = {}
    for column in COLUMNS:
        key = column.feature_key
        bag = pruned(column.transform.bags(raw), column.combiner)
        rows = np.split(bag.ids, bag.row_splits[1:-1])
        made[f"{key}_ids"] = pa.array([r.tolist() for r in rows], pa.list_(pa.int64()))
        if bag.weights is not None:
            weights = np.split(bag.weights, bag.row_splits[1:-1])
            made[f"{key}_w"] = pa.array([w.tolist() for w in weights], pa.list_(pa.float32()))
    labels = {"label": rng.normal(size=n).astype(np.float32)}
    path = tmp_path_factory.mktemp("raw") / "examples.parquet"
    pq.write_table(pa.table({**raw, **made, **labels}), path, row_group_size=64)
    return path


def _job(data: Path, **parts: object) -> JobConfig:
    return JobConfig(
        name="columns",
        seed=5,
        data=DataConfig(train=data, test=data, label="label"),
        model=ModelConfig(build="tests.support.models:build_mlp"),
        train=TrainConfig(batch_size=80, optimizer=Adagrad(0.1), dense_optimizer=Adam(0.01)),
        cluster=ClusterConfig(shards=2, workers=2),
        **parts,  # type: ignore[arg-type]
    )


def _ids_job(data: Path) -> JobConfig:
    """The same tables and features, over ids."""
    fast = Adagrad(RATE)
    tables = {
        "genre": TableEntry(vocabulary_size=4, dim=4, combiner="sum", optimizer=fast),
        "user": TableEntry(vocabulary_size=50, dim=3),
        "tag_weighted_by_tag_weight": TableEntry(vocabulary_size=7, dim=4, optimizer=fast),
        "item_last_shared_embedding": TableEntry(vocabulary_size=40, dim=5, combiner="sqrtn"),
    }
    features = {
        "genre": FeatureEntry(table="genre", column="genre_ids"),
        "user": FeatureEntry(table="user", column="user_ids"),
        "tag": FeatureEntry(table="tag_weighted_by_tag_weight", column="tag_ids", weights="tag_w"),
        "last": FeatureEntry(table="item_last_shared_embedding", column="last_ids"),
        "item": FeatureEntry(table="item_last_shared_embedding", column="item_ids"),
    }
    return _job(data, tables=tables, features=features)


def test_raw_values_train_to_the_bits_of_ids(data: Path) -> None:
    found = []
    for job in (_job(data, columns=COLUMNS), _ids_job(data)):
        with running(job) as run:
            plan = plan_job(job)
            train_steps(run, plan, [])
            tables = [t.name for t in job.embedding_spec().tables]
            rows = {t: run.shards.read_table(t, plan.last_step).rows.tobytes() for t in tables}
            found.append((evaluated(run, plan), rows))
    (metrics, rows), (wanted_metrics, wanted_rows) = found
    assert rows == wanted_rows
    assert metrics == wanted_metrics


def test_exports_and_snapshots_keep_the_transforms_and_sequences_have_lengths(
    data: Path, tmp_path: Path
) -> None:
    sequence = embedding_column(WATCHED, 4, "sum", max_sequence_length=2)
    stock = tf.feature_column.categorical_column_with_vocabulary_list("genre", WORDS)
    job = _job(
        data,
        columns=(embedding_column(stock, 4, "sum"), sequence),
        output=OutputConfig(export=tmp_path / "export", snapshot=tmp_path / "snapshot"),
    )
    job = replace(job, cluster=ClusterConfig(shards=2, workers=1))
    with running(job) as run:
        plan = plan_job(job)
        train_steps(run, plan, [])
        folder = run.export(plan.last_step)
        take_snapshot(run, plan)
    assert folder is not None
    export = open_export(folder, verify=True)
    assert dict(export.transforms) == dict(job.transforms())
    assert export.dense_model is not None
    assert export.dense_model["inputs"]["activations"]["watched_seq_length_"] == []
    again = open_export(export_snapshot(open_snapshot(tmp_path / "snapshot"), tmp_path / "again"))
    assert again.transforms == export.transforms
    bag = export.transforms["genre"].bags({"genre": [["noir", "unknown"], []]})
    found = LookupService(export).lookup({"genre": Bags(Ragged(bag.ids, bag.row_splits))})
    rows = export.tables["genre"].rows_VD
    np.testing.assert_array_equal(found["genre"], [rows[3], np.zeros(4)])
