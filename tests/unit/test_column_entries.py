"""Embedding columns in YAML: what they become, and one line for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ps.columns import (
    categorical_column_with_hash_bucket,
    embedding_column,
)
from ps.errors import ConfigError
from ps.initializers import Constant
from ps.optimizers import LinearDecay, evaluate_rate
from workers.column_entries import embedding_columns
from workers.config import JobConfig, load_job

USER = {"name": "categorical_column_with_identity", "key": "user", "num_buckets": 10}
PAGE = {"name": "categorical_column_with_hash_bucket", "key": "page", "hash_bucket_size": 7}
LINEAR = {"name": "LinearDecay", "initial": 1.0, "final": 0.0, "steps": 4}


def job_of(folder: Path, columns: Any, **changes: Any) -> JobConfig:
    path = folder / "job.yaml"
    job = {
        "name": "test",
        "data": {"train": "train.parquet", "label": "rating"},
        "columns": columns,
        "model": {"build": "dlrm"},
    }
    path.write_text(yaml.safe_dump(job | changes))
    return load_job(path)


def test_a_column_becomes_a_table_and_a_feature(tmp_path: Path) -> None:
    job = job_of(
        tmp_path,
        [
            {
                "categorical_column": USER,
                "dimension": 4,
                "combiner": "sum",
                "initializer": {"name": "Constant", "value": 0.5},
                "learning_rate_fn": LINEAR,
            }
        ],
    )
    spec = job.embedding_spec()
    (table,), (feature,) = spec.tables, spec.features
    assert (table.name, table.vocabulary_size, table.dim) == ("user", 10, 4)
    assert (table.combiner, table.initializer) == ("sum", Constant(0.5))
    assert table.optimizer.learning_rate == LinearDecay(1.0, 0.0, 4)
    assert evaluate_rate(table.optimizer.learning_rate, 1) == 0.75
    assert feature.name == "user"
    assert job.transforms()["user"].num_buckets == 10


def test_shared_weighted_and_sequence_columns(tmp_path: Path) -> None:
    weighted = {
        "name": "weighted_categorical_column",
        "categorical_column": USER,
        "weight_feature_key": "w",
    }
    seen = {
        "name": "sequence_categorical_column_with_vocabulary_list",
        "key": "seen",
        "vocabulary_list": ["a", "b"],
    }
    last = {**PAGE, "key": "last"}
    job = job_of(
        tmp_path,
        [
            {"categorical_columns": [PAGE, last], "dimension": 3,
             "shared_embedding_collection_name": "pages"},
            {"categorical_column": weighted, "dimension": 2},
            {"categorical_column": seen, "dimension": 2, "max_sequence_length": 5},
        ],
    )  # fmt: skip
    spec = job.embedding_spec()
    assert {t.name for t in spec.tables} == {"pages", "user_weighted_by_w", "seen"}
    assert {f.name: f.table for f in spec.features} == {
        "page": "pages",
        "last": "pages",
        "user": "user_weighted_by_w",
        "seen": "seen",
    }
    assert {f.name: f.max_sequence_length for f in spec.features}["seen"] == 5


def test_yaml_and_python_make_equal_columns() -> None:
    made = embedding_columns(
        [{"categorical_column": PAGE, "dimension": 3, "embedding_lookup_device": "tpu_tensor_core",
          "tensor_core_shape": [None, 2]}]
    )  # fmt: skip
    wanted = embedding_column(
        categorical_column_with_hash_bucket("page", 7),
        3,
        embedding_lookup_device="tpu_tensor_core",
        tensor_core_shape=[None, 2],
    )
    assert made == (wanted,)
    assert embedding_columns(made) == made


def test_columns_and_features_live_side_by_side(tmp_path: Path) -> None:
    tables = {"items": {"vocabulary_size": 9, "dim": 4}}
    columns = [{"categorical_column": USER, "dimension": 4}]
    job = job_of(tmp_path, columns, tables=tables, features={"item": {"table": "items"}})
    assert {f.name for f in job.embedding_spec().features} == {"item", "user"}


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ([5], r"columns\[0\]: wanted a mapping, got 5"),
        ([{"dimension": 4}], r"columns\[0\]: .*missing.*'categorical_column'"),
        ([{"categorical_column": USER, "dimensions": 4}],
         r"columns\[0\]\.dimensions: unknown key; did you mean 'dimension'"),
        ([{"categorical_column": USER, "dimension": 0}], r"columns\[0\]: Invalid dimension 0"),
        ([{"categorical_column": "user", "dimension": 4}],
         r"columns\[0\]\.categorical_column: wanted a mapping with a `name`, got 'user'"),
        ([{"categorical_column": {"key": "user"}, "dimension": 4}],
         r"categorical_column\.name: no column 'None'"),
        ([{"categorical_column": {**USER, "name": "categorical_column_with_identty"},
           "dimension": 4}], "did you mean 'categorical_column_with_identity'"),
        ([{"categorical_column": {**USER, "buckets": 4}, "dimension": 4}],
         r"categorical_column\.buckets: unknown key"),
        ([{"categorical_column": {**USER, "num_buckets": 0}, "dimension": 4}],
         r"columns\[0\]\.categorical_column: num_buckets 0"),
        ([{"categorical_columns": [], "dimension": 4}],
         r"columns\[0\]\.categorical_columns: wanted a list of columns"),
        ([{"categorical_columns": [USER, PAGE], "dimension": 4}], "same number of buckets"),
        ([{"categorical_column": USER, "dimension": 4, "learning_rate_fn": 0.1}],
         r"columns\[0\]\.learning_rate_fn: wanted a schedule by name, got 0\.1"),
        ([{"categorical_column": USER, "dimension": 4, "initializer": {"name": "Zero"}}],
         r"columns\[0\]\.initializer\.name: 'Zero' is not one of"),
        ([{"categorical_column": USER, "dimension": 4, "combiner": "max"}], "combiner"),
        ([{"categorical_column": {**USER, "name": ["a"]}, "dimension": 4}], "no column"),
        ([{"categorical_column": USER, "dimension": 4, "use_safe_embedding_lookup": "false"}],
         r"columns\[0\]\.use_safe_embedding_lookup: wanted a bool, got 'false'"),
        ([{"categorical_columns": [USER], "dimension": 4, "shared_embedding_collection_name": 5}],
         "shared_embedding_collection_name: wanted a str, got 5"),
        ([{"categorical_column": {
            "name": "categorical_column_with_vocabulary_file", "key": "k", "vocabulary_file": 5},
           "dimension": 4}], "must be a path, got 5"),
        ([{"categorical_column": USER, "dimension": 4, "embedding_lookup_device": "gpu"}],
         "embedding_lookup_device must be in"),
        ([{"categorical_column": USER, "dimension": 4, "embedding_lookup_device": "cpu"}],
         "embedding_lookup_device cpu, which is for serving"),
        ([{"categorical_column": USER, "dimension": 4}] * 2, "user"),
        ([{"categorical_column": {
            "name": "categorical_column_with_vocabulary_file", "key": "k",
            "vocabulary_file": "nowhere.txt"}, "dimension": 4}], "nowhere.txt"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path: Path, columns: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        job_of(tmp_path, columns)
    assert "\n" not in str(caught.value)


def test_a_feature_and_a_column_of_one_name_are_refused(tmp_path: Path) -> None:
    tables = {"users": {"vocabulary_size": 9, "dim": 4}}
    columns = [{"categorical_column": USER, "dimension": 4}]
    with pytest.raises(ConfigError, match=r"features\.user: a column is a feature of that name"):
        job_of(tmp_path, columns, tables=tables, features={"user": {"table": "users"}})


def test_a_job_needs_a_feature_or_a_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="features: at least one is needed"):
        job_of(tmp_path, [])


def test_a_feature_with_the_name_of_a_sequences_lengths_is_refused(tmp_path: Path) -> None:
    seen = {**USER, "name": "sequence_categorical_column_with_identity", "key": "seen"}
    columns = [
        {"categorical_column": seen, "dimension": 4, "max_sequence_length": 3},
        {"categorical_column": {**USER, "key": "seen_seq_length_"}, "dimension": 4},
    ]
    with pytest.raises(
        ConfigError, match=r"features\.seen_seq_length_: the model gets the lengths"
    ):
        job_of(tmp_path, columns)
