"""Tables and features: what is looked up, and where the rows come from.

`TableConfig`, `FeatureConfig` and the optimizers have TensorFlow's names, argument order, defaults
and checks (`tf.tpu.experimental.embedding` of TensorFlow 2.21). `ps.spec.resolve` turns a structure
of them into the flat, named form that shards, workers and exports share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ps.errors import ConfigError
from ps.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam, Optimizer

__all__ = [
    "FTRL",
    "SGD",
    "Adagrad",
    "AdagradMomentum",
    "Adam",
    "FeatureConfig",
    "TableConfig",
]

Combiner = Literal["mean", "sum", "sqrtn"]
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
