"""Small exports to serve from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import ps.columns as fc
from ps.config import FeatureConfig, TableConfig
from ps.export import Export, ExportWriter, open_export, write_rows
from ps.ragged import F32
from ps.spec import EmbeddingSpec, resolve

ROWS_VD = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
"""The table of the reference's examples: row i is [2i + 1, 2i + 2]."""


def write_export(
    root: Path,
    features: Mapping[str, FeatureConfig],
    rows: Mapping[str, F32],
    *,
    step: int = 7,
    transforms: Mapping[str, fc.Transform] | None = None,
) -> Path:
    """Export the rows of every table by name; returns the version folder."""
    spec = resolve(features)
    with ExportWriter(root, spec, step=step, job="test", transforms=transforms) as writer:
        for table in spec.tables:
            write_rows(writer.row_file(table.name), 0, rows[table.name])
        return writer.commit()


def small_features() -> dict[str, FeatureConfig]:
    """One feature of each kind over three tables of `ROWS_VD`, one per combiner."""
    tables = {c: TableConfig(5, 2, combiner=c, name=c) for c in ("sum", "mean", "sqrtn")}
    return {
        "user": FeatureConfig(tables["mean"]),
        "genres": FeatureConfig(tables["mean"]),
        "words": FeatureConfig(tables["sum"]),
        "tags": FeatureConfig(tables["sqrtn"]),
        "raw": FeatureConfig(tables["sum"], validate_weights_and_indices=False),
        "watched": FeatureConfig(tables["sum"], max_sequence_length=2),
    }


def small_spec() -> EmbeddingSpec:
    """`small_features`, resolved."""
    return resolve(small_features())


def small_export(root: Path) -> Export:
    """An export of `small_features`, opened."""
    write_export(root, small_features(), dict.fromkeys(("sum", "mean", "sqrtn"), ROWS_VD))
    return open_export(root)


def raw_columns() -> list[fc.EmbeddingColumn]:
    """A column of each kind, every one over five rows."""

    def embed(column: Any, combiner: str = "mean", **options: Any) -> fc.EmbeddingColumn:
        return fc.embedding_column(column, 2, combiner, **options)

    steps = fc.sequence_categorical_column_with_vocabulary_list("steps", [*"abcde"])
    clicks = fc.sequence_categorical_column_with_identity("clicks", 5)
    return [
        embed(fc.categorical_column_with_identity("shop", 5)),
        embed(fc.categorical_column_with_identity("safe", 5, default_value=4)),
        embed(fc.categorical_column_with_identity("strict", 5), use_safe_embedding_lookup=False),
        embed(fc.categorical_column_with_hash_bucket("city", 5), "sum"),
        embed(fc.categorical_column_with_hash_bucket("code", 5, "int64")),
        embed(fc.categorical_column_with_vocabulary_list("genre", ["drama", "комедия", "", "🎬"])),
        embed(
            fc.weighted_categorical_column(
                fc.categorical_column_with_vocabulary_list("tag", [10, 20, 30], num_oov_buckets=2),
                "tag_weight",
            )
        ),
        embed(steps, max_sequence_length=2),
        embed(clicks, max_sequence_length=3),
    ]


def raw_export(root: Path) -> Export:
    """An export of `raw_columns` and of "user", which takes ids; tables are `ROWS_VD`."""
    configs = fc.configs_from_columns(raw_columns())
    features = dict(configs.feature_config)
    features["user"] = FeatureConfig(TableConfig(5, 2, name="users"))
    rows = {t.name: ROWS_VD[: t.vocabulary_size] for t in resolve(features).tables}
    write_export(root, features, rows, transforms=configs.transforms)
    return open_export(root)
