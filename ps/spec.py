"""Tables and features as everybody below the configuration sees them: flat, named, complete.

`resolve` makes them from `TableConfig` and `FeatureConfig` objects, ours or TensorFlow's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote

from ps.config import Combiner, FeatureConfig, TableConfig
from ps.convert import (
    feature_config_from_tensorflow,
    initializer_from_tensorflow,
    optimizer_from_tensorflow,
)
from ps.errors import ConfigError
from ps.initializers import Initializer, TruncatedNormal
from ps.optimizers import SGD, Optimizer

MAX_QUOTED_NAME = 240
"""Bytes of a table's name, percent-quoted, that fit a file name with its ending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpec:
    """A table with every default filled in."""

    name: str
    vocabulary_size: int
    dim: int
    combiner: Combiner
    initializer: Initializer
    optimizer: Optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """A feature with a name, and its table by name."""

    name: str
    table: str
    max_sequence_length: int = 0
    validate_weights_and_indices: bool = True
    output_shape: tuple[int | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """All tables and features of a job, in a fixed order."""

    tables: tuple[TableSpec, ...]
    features: tuple[FeatureSpec, ...]

    def table(self, name: str) -> TableSpec:
        """The table of that name."""
        return next(t for t in self.tables if t.name == name)

    def features_of(self, table: str) -> tuple[FeatureSpec, ...]:
        """The features that look up a table, in order."""
        return tuple(f for f in self.features if f.table == table)


FeatureConfigs = FeatureConfig | Mapping[Any, Any] | Sequence[Any]


def resolve(feature_config: FeatureConfigs, optimizer: Optimizer | None = None) -> EmbeddingSpec:
    """Name tables and features and fill in defaults.

    Args:
        feature_config: FeatureConfig objects (ours or TensorFlow's) in any nesting of dicts, lists
            and tuples.
        optimizer: used by tables without one of their own; SGD() if there is none at all.

    Raises:
        ConfigError: two tables with one name, an unsupported optimizer or initializer.
    """
    tables: dict[TableConfig, TableSpec] = {}
    features: list[FeatureSpec] = []
    seen: dict[int, TableConfig] = {}
    for path, leaf in flatten(feature_config):
        config = _as_feature_config(leaf, seen)
        if config.table not in tables:
            tables[config.table] = _table_spec(config.table, len(tables), optimizer)
        features.append(
            FeatureSpec(
                name=path or config.name or "feature_0",
                table=tables[config.table].name,
                max_sequence_length=int(config.max_sequence_length),
                validate_weights_and_indices=config.validate_weights_and_indices,
                output_shape=cast("tuple[int | None, ...] | None", config.output_shape),
            )
        )
    names = [spec.name for spec in tables.values()]
    for name in names:
        if len(quote(name, safe="")) > MAX_QUOTED_NAME:
            raise ConfigError(f"table name '{name[:80]}…' is too long for a file name")
    if len(set(names)) != len(names):
        raise ConfigError(f"Tables must have a unique name, got {names}")
    paths = [feature.name for feature in features]
    if len(set(paths)) != len(paths):
        raise ConfigError(f"Features must have a unique name, got {paths}")
    return EmbeddingSpec(tuple(tables.values()), tuple(features))


def flatten(structure: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Leaves with their paths joined by "/", dict keys sorted, lists and tuples in order."""
    if isinstance(structure, Mapping):
        items = [(str(key), structure[key]) for key in _sorted_keys(structure)]
    elif isinstance(structure, list | tuple):
        items = [(str(i), item) for i, item in enumerate(structure)]
    else:
        yield path, structure
        return
    for key, item in items:
        yield from flatten(item, f"{path}/{key}" if path else key)


def _sorted_keys(mapping: Mapping[Any, Any]) -> list[Any]:
    """As TensorFlow sorts them: by value, and by text where they cannot be compared."""
    try:
        return sorted(mapping)
    except TypeError:
        return sorted(mapping, key=str)


def _as_feature_config(leaf: object, seen: dict[int, TableConfig]) -> FeatureConfig:
    if isinstance(leaf, FeatureConfig):
        return leaf
    return feature_config_from_tensorflow(leaf, seen)


def _table_spec(config: TableConfig, index: int, default: Optimizer | None) -> TableSpec:
    name = config.name or f"table_{index}"
    optimizer: object = config.optimizer if config.optimizer is not None else default
    if optimizer is None:
        optimizer = SGD()
    if not isinstance(optimizer, Optimizer):
        optimizer = optimizer_from_tensorflow(optimizer)
    if getattr(optimizer, "slot_variable_creation_fn", None) is not None:
        raise ConfigError(
            f"table '{name}': shards make their own slots; leave out `slot_variable_creation_fn`"
        )
    return TableSpec(
        name=name,
        vocabulary_size=int(config.vocabulary_size),
        dim=int(config.dim),
        combiner=cast(Combiner, config.combiner),
        initializer=_initializer(config, name),
        optimizer=optimizer,
    )


def _initializer(config: TableConfig, name: str) -> Initializer:
    if config.initializer is None:
        return TruncatedNormal(0.0, 1.0 / math.sqrt(config.dim))
    if isinstance(config.initializer, Initializer):
        return config.initializer
    try:
        return initializer_from_tensorflow(config.initializer)
    except ConfigError as e:
        raise ConfigError(f"table '{name}': {e}") from None
