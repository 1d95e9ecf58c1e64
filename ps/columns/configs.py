"""Embedding columns as the tables and features of a job.

Each feature key becomes one feature; a column of its own, or a shared collection, one table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ps.columns.embedding import EmbeddingColumn
from ps.columns.layers import embedding_columns
from ps.columns.transform import Transform
from ps.config import FeatureConfig, TableConfig
from ps.errors import ConfigError
from ps.optimizers import Optimizer


@dataclass(frozen=True, slots=True)
class ColumnConfigs:
    """What a job needs to know of its columns."""

    feature_config: Mapping[str, FeatureConfig]
    """By feature key; ready for `resolve`. A feature for the tensor core has its
    `tensor_core_shape`."""
    transforms: Mapping[str, Transform]
    """From raw inputs to ids, by feature key."""
    devices: Mapping[str, str | None]
    """`embedding_lookup_device` by feature key; None is the default."""


def configs_from_columns(
    columns: EmbeddingColumn | Iterable[EmbeddingColumn], optimizer: Optimizer | None = None
) -> ColumnConfigs:
    """Tables and features of a job.

    As in TensorFlow, a feature is known by the name of its categorical column without weights, so
    one raw input cannot be looked up in two tables: give the second one another key.

    Args:
        columns: of `embedding_column` and `shared_embedding_columns`.
        optimizer: of all tables; one with a `learning_rate_fn` gets it in place of its rate. None
            leaves it to the job.

    Raises:
        ConfigError: a feature in two columns, two tables of one name, a rate without an optimizer,
            an unknown combiner, a column that only TensorFlow can compute.
    """
    features: dict[str, FeatureConfig] = {}
    transforms: dict[str, Transform] = {}
    devices: dict[str, str | None] = {}
    tables: dict[str, tuple[Any, TableConfig]] = {}
    for column in embedding_columns(columns):
        key = column.feature_key
        if key in features:
            raise ConfigError(
                f"Feature column {key} is used with multiple embeddings and this is not supported: "
                "a second column needs a raw input of another name"
            )
        features[key] = _feature(column, _table(column, tables, optimizer))
        transforms[key] = column.transform
        devices[key] = column.embedding_lookup_device
    return ColumnConfigs(features, transforms, devices)


def _table(
    column: EmbeddingColumn, tables: dict[str, tuple[Any, TableConfig]], optimizer: Optimizer | None
) -> TableConfig:
    """The column's table, a new one unless it is shared."""
    owner = column.collection or column
    name = column.table_name
    if name not in tables:
        tables[name] = (owner, _new_table(column, optimizer))
    if tables[name][0] is not owner:
        raise ConfigError(
            f"Tables must have a unique name: column '{column.name}' has a table '{name}' of its "
            "own, as another column has"
        )
    return tables[name][1]


def _new_table(column: EmbeddingColumn, optimizer: Optimizer | None) -> TableConfig:
    rate: Any = column.learning_rate_fn
    if rate is not None:
        if optimizer is None:
            raise ConfigError(
                f"column '{column.name}' has a `learning_rate_fn`, which needs an `optimizer` here"
            )
        optimizer = dataclasses.replace(optimizer, learning_rate=rate)  # type: ignore[type-var]
    num_rows, dimension = column.table_size
    try:
        return TableConfig(
            vocabulary_size=num_rows,
            dim=dimension,
            initializer=column.initializer,
            optimizer=optimizer,
            combiner=column.combiner or "mean",
            name=column.table_name,
        )
    except ConfigError as e:
        raise ConfigError(f"column '{column.name}': {e}") from None


def _feature(column: EmbeddingColumn, table: TableConfig) -> FeatureConfig:
    on_core = column.embedding_lookup_device == "tpu_tensor_core"
    try:
        return FeatureConfig(
            table,
            max_sequence_length=column.max_sequence_length,
            validate_weights_and_indices=bool(column.use_safe_embedding_lookup),
            name=column.feature_key,
            tensor_core_shape=column.tensor_core_shape if on_core else None,
        )
    except ConfigError as e:
        raise ConfigError(f"column '{column.name}': {e}") from None
