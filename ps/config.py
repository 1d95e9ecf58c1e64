"""Tables and features: what is looked up, and where the rows come from.

`TableConfig`, `FeatureConfig` and the optimizers have TensorFlow's names, argument order, defaults
and checks (`tf.tpu.experimental.embedding` of TensorFlow 2.21). `resolve` turns a structure of
them into the flat, named `EmbeddingSpec` that shards, workers and exports share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast
from urllib.parse import quote

from ps.errors import ConfigError
from ps.initializers import Initializer, TruncatedNormal
from ps.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam, Optimizer

__all__ = [
    "FTRL",
    "SGD",
    "Adagrad",
    "AdagradMomentum",
    "Adam",
    "EmbeddingSpec",
    "FeatureConfig",
    "FeatureSpec",
    "TableConfig",
    "TableSpec",
    "resolve",
]

Combiner = Literal["mean", "sum", "sqrtn"]
MAX_QUOTED_NAME = 240
"""Bytes of a table's name, percent-quoted, that fit a file name with its ending."""
COMBINERS: tuple[Combiner, ...] = ("mean", "sum", "sqrtn")


@dataclass(frozen=True, eq=False)
class TableConfig:
    """One embedding table. Two tables are the same only if they are the same object."""

    vocabulary_size: int
    """Number of rows V, at least 1."""
    dim: int
    """Length of a row D, at least 1."""
    initializer: Callable[..., Any] | None = None
    """First value of the rows; None is TruncatedNormal(0, 1/√dim)."""
    optimizer: Optimizer | None = None
    """Overrides the job's embedding optimizer for this table."""
    combiner: str = "mean"
    """How the rows of one example become one vector: mean, sum or sqrtn."""
    name: str | None = None
    """Unique name; None becomes `table_<i>` in order of first use."""
    quantization_config: object | None = None
    """Must be None: simulated quantization is not implemented yet."""
    layout: object | None = None
    """Must be None: rows are placed in slabs over the shards."""
    dtype: object = "float32"
    """float32 (`numpy.float32` or the name)."""

    def __post_init__(self) -> None:
        _check_int("TableConfig", "vocabulary_size", self.vocabulary_size, 1)
        _check_int("TableConfig", "dim", self.dim, 1)
        if self.initializer is not None and not callable(self.initializer):
            raise ConfigError(
                f"TableConfig: `initializer` must be callable or None, got {self.initializer!r}"
            )
        if self.combiner not in COMBINERS:
            raise ConfigError(
                f"TableConfig: `combiner` must be one of {list(COMBINERS)}, got {self.combiner!r}"
            )
        if _dtype_name(self.dtype) != "float32":
            raise ConfigError(f"TableConfig: `dtype` must be float32, got {self.dtype!r}")
        for argument in ("quantization_config", "layout"):
            if getattr(self, argument) is not None:
                raise ConfigError(f"TableConfig: `{argument}` is not implemented; leave it None")


@dataclass(frozen=True, eq=False)
class FeatureConfig:
    """One model input that looks up one table; several features may share a table."""

    table: TableConfig
    """The table that the feature's ids index."""
    max_sequence_length: int = 0
    """L > 0 makes it a sequence feature: activations [B, L, D] instead of combined [B, D]."""
    validate_weights_and_indices: bool = True
    """At serving: drop ids < 0 and, for mean and sqrtn, weights <= 0 (`lookup` says more)."""
    output_shape: int | Sequence[int | None] | None = None
    """Shape of the activation without D; None is [B]."""
    name: str | None = None
    """As in TensorFlow, a label only: a feature is found by its path in the configuration. It
    names a feature that stands alone, without a path."""

    def __post_init__(self) -> None:
        if not isinstance(self.table, TableConfig):
            raise ConfigError(f"FeatureConfig: `table` must be a TableConfig, got {self.table!r}")
        _check_int("FeatureConfig", "max_sequence_length", self.max_sequence_length, 0)
        if not isinstance(self.validate_weights_and_indices, bool):
            raise ConfigError(
                "FeatureConfig: `validate_weights_and_indices` must be a bool, "
                f"got {self.validate_weights_and_indices!r}"
            )
        object.__setattr__(self, "output_shape", _shape(self.output_shape))


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
    from ps.convert import feature_config_from_tensorflow  # lazy: only for TensorFlow's objects

    return feature_config_from_tensorflow(leaf, seen)


def _table_spec(config: TableConfig, index: int, default: Optimizer | None) -> TableSpec:
    name = config.name or f"table_{index}"
    optimizer: object = config.optimizer if config.optimizer is not None else default
    if optimizer is None:
        optimizer = SGD()
    if not isinstance(optimizer, Optimizer):
        from ps.convert import optimizer_from_tensorflow

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
    from ps.convert import initializer_from_tensorflow

    try:
        return initializer_from_tensorflow(config.initializer)
    except ConfigError as e:
        raise ConfigError(f"table '{name}': {e}") from None


def _check_int(owner: str, argument: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"{owner}: `{argument}` must be an int >= {least}, got {value!r}")


def _dtype_name(dtype: object) -> str:
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or dtype
    return str(name)


def _shape(shape: object) -> tuple[int | None, ...] | None:
    if shape is None:
        return None
    if isinstance(shape, int):
        shape = (shape,)
    sizes = tuple(cast("Sequence[object]", shape))
    for size in sizes:
        if size is not None and not isinstance(size, int):
            raise TypeError(f"FeatureConfig: `output_shape` holds {size!r}, not an int or None")
        if size is not None and size < 0:
            raise ConfigError(f"FeatureConfig: `output_shape` holds {size}, below 0")
    return cast("tuple[int | None, ...]", sizes)
