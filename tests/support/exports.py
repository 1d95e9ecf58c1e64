"""Small exports to serve from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

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
) -> Path:
    """Export the rows of every table by name; returns the version folder."""
    spec = resolve(features)
    with ExportWriter(root, spec, step=step, job="test") as writer:
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
