"""Tables and features as everybody below the configuration sees them: flat, named, complete.

`resolve` makes them from `TableConfig` and `FeatureConfig` objects, ours or TensorFlow's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote

from ps.config import (
    Combiner,
    CustomCombiner,
    FeatureConfig,
    QuantizationConfig,
    TableConfig,
    dtype_name,
)
from ps.convert import (
    feature_config_from_tensorflow,
    initializer_from_tensorflow,
    optimizer_from_tensorflow,
    quantization_from_tensorflow,
)
from ps.errors import ConfigError
from ps.initializers import Initializer, TruncatedNormal
from ps.optimizers import SGD, Optimizer
from ps.structures import flatten

MAX_QUOTED_NAME = 240
"""Bytes of a table's name, percent-quoted, that fit a file name with its ending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpec:
    """A table with every default filled in."""

    name: str
    vocabulary_size: int
    dim: int
    combiner: Combiner | CustomCombiner
    initializer: Initializer
    optimizer: Optimizer
    quantization_config: QuantizationConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSpec:
    """A feature with a name, and its table by name."""

    name: str
    table: str
    max_sequence_length: int = 0
    validate_weights_and_indices: bool = True
    output_shape: tuple[int | None, ...] | None = None
    tensor_core_width: int | None = None
    """W: the accelerator combines the first W rows of an example; None for the host."""


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
        ConfigError: two tables with one name, an unsupported optimizer or initializer, int32 rows.
    """
    tables: dict[TableConfig, TableSpec] = {}
    features: list[FeatureSpec] = []
    seen: dict[int, TableConfig] = {}
    for path, leaf in flatten(feature_config):
        config = _as_feature_config(leaf, seen)
        if config.table not in tables:
            tables[config.table] = _table_spec(config.table, len(tables), optimizer)
        features.append(feature_spec(path, config, tables[config.table].name))
    _check_names([spec.name for spec in tables.values()], [f.name for f in features])
    return EmbeddingSpec(tuple(tables.values()), tuple(features))


def feature_spec(path: str, config: Any, table: str | None = None) -> FeatureSpec:
    """The options of one FeatureConfig.

    Args:
        path: of the feature in its structure, which is its name; "" if it stands alone.
        config: ours or TensorFlow's, whose options have the same names.
        table: name of the feature's table; None for the one that its config has.

    Raises:
        ConfigError: not a FeatureConfig.
    """
    if type(config).__name__ != "FeatureConfig" or not hasattr(config, "table"):
        raise ConfigError(f"feature '{path}': wanted a FeatureConfig, got {config!r}")
    shape = config.output_shape
    if hasattr(shape, "rank"):  # TensorFlow's TensorShape
        shape = None if shape.rank is None else tuple(shape.as_list())
    core = getattr(config, "tensor_core_shape", None)
    return FeatureSpec(
        name=path or config.name or "feature_0",
        table=str(config.table.name) if table is None else table,
        max_sequence_length=int(config.max_sequence_length),
        validate_weights_and_indices=config.validate_weights_and_indices,
        output_shape=shape,
        tensor_core_width=None if core is None else core[1],
    )


def _check_names(names: Sequence[str], paths: Sequence[str]) -> None:
    for name in names:
        if len(quote(name, safe="")) > MAX_QUOTED_NAME:
            raise ConfigError(f"table name '{name[:80]}…' is too long for a file name")
    if len(set(names)) != len(names):
        raise ConfigError(f"Tables must have a unique name, got {names}")
    if len(set(paths)) != len(paths):
        raise ConfigError(f"Features must have a unique name, got {paths}")


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
    try:
        optimizer = optimizer.for_shards()
    except ConfigError as e:
        raise ConfigError(f"table '{name}': {e}") from None
    if dtype_name(config.dtype) != "float32":
        raise ConfigError(f"table '{name}': `dtype` must be float32, got {config.dtype!r}")
    return TableSpec(
        name=name,
        vocabulary_size=int(config.vocabulary_size),
        dim=int(config.dim),
        combiner=cast("Combiner | CustomCombiner", config.combiner),
        initializer=_initializer(config, name),
        optimizer=optimizer,
        quantization_config=_quantization(config, name),
    )


def _quantization(config: TableConfig, name: str) -> QuantizationConfig | None:
    stock = config.quantization_config
    if stock is None or isinstance(stock, QuantizationConfig):
        return stock
    try:
        return quantization_from_tensorflow(stock)
    except ConfigError as e:
        raise ConfigError(f"table '{name}': {e}") from None


def _initializer(config: TableConfig, name: str) -> Initializer:
    if config.initializer is None:
        return TruncatedNormal(0.0, 1.0 / math.sqrt(config.dim))
    if isinstance(config.initializer, Initializer):
        return config.initializer
    try:
        return initializer_from_tensorflow(config.initializer)
    except ConfigError as e:
        raise ConfigError(f"table '{name}': {e}") from None
