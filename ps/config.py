"""Tables and features: what is looked up, and where the rows come from.

`TableConfig`, `FeatureConfig` and the optimizers have TensorFlow's names, argument order, defaults
and checks (`tf.tpu.experimental.embedding` of TensorFlow 2.21). `ps.spec.resolve` turns a structure
of them into the flat, named form that shards, workers and exports share.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from ps.custom_optimizer import CustomOptimizer
from ps.errors import ConfigError
from ps.initializers import TruncatedNormal
from ps.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam, Optimizer

__all__ = [
    "FTRL",
    "SGD",
    "Adagrad",
    "AdagradMomentum",
    "Adam",
    "CustomCombiner",
    "CustomOptimizer",
    "FeatureConfig",
    "QuantizationConfig",
    "TableConfig",
]

Combiner = Literal["mean", "sum", "sqrtn"]
COMBINERS: tuple[Combiner, ...] = ("mean", "sum", "sqrtn")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationConfig:
    """Simulated quantization of looked-up rows, in training only.

    Before a row is combined, each element becomes
    floor((clip(x, lower, upper) - lower) / q + 0.5)·q + lower with
    q = (upper - lower) / (num_buckets - 1). The gradient passes to the row as it is; rows are
    stored, and served, as float32 without quantization.
    """

    num_buckets: int
    """Number of values that an element can take, at least 2."""
    lower: float
    """Smallest of them."""
    upper: float
    """Largest of them."""

    def __post_init__(self) -> None:
        if self.num_buckets < 2:
            raise ConfigError(
                f"QuantizationConfig: `num_buckets` must be at least 2, got {self.num_buckets!r}"
            )


@dataclass(frozen=True)
class CustomCombiner:
    """A combiner of your own, in training only: serving has no TensorFlow to run it with.

    `combiner_computation(valency, vectors)` gets an int32 scalar and float32 [max_valency, D] and
    returns [D]. `vectors` holds the first `valency` rows of one example, in the order of its ids,
    and zeros behind them; ids behind the `max_valency`-th are left out. TensorFlow vectorises it
    over the batch (`tf.vectorized_map`), so that not every operation is possible. Weights of ids
    are not passed on.
    """

    combiner_computation: Callable[..., Any] | str
    """The function, or `package.module:function`, which only the worker imports."""
    max_valency: int
    """Most ids of an example that count."""
    num_weights: int = 0
    """Length of a trained third argument `weights`; training takes only 0 so far."""
    initializer: Callable[..., Any] | None = None
    """First value of those weights; needed if there are any."""
    combiner_weights_learning_rate: float | Callable[[], float] = 0.01
    """For those weights."""

    def __post_init__(self) -> None:
        if self.num_weights > 0 and self.initializer is None:
            raise ConfigError(
                "CustomCombiner: `initializer` must be set when `num_weights` is above 0"
            )


@dataclass(frozen=True, eq=False, repr=False)
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
    combiner: str | CustomCombiner = "mean"
    """How the rows of one example become one vector: mean, sum, sqrtn, or a function."""
    name: str | None = None
    """Unique name; None becomes `table_<i>` in order of first use, and logs a warning."""
    quantization_config: object | None = None
    """A QuantizationConfig or None; as in TensorFlow, its type is checked only when it is used."""
    layout: object | None = None
    """Must be None. In TensorFlow, where SparseCores keep the rows; here, shards hold slabs."""
    dtype: object = "float32"
    """float32 or int32, by name or as a NumPy or TensorFlow type. Rows are float32 in any case, as
    in TensorFlow's CPU class; so `resolve` refuses int32 rather than train something else."""

    def __post_init__(self) -> None:
        _check_int("TableConfig", "vocabulary_size", self.vocabulary_size, 1)
        _check_int("TableConfig", "dim", self.dim, 1)
        if self.initializer is not None and not callable(self.initializer):
            raise ConfigError(
                f"TableConfig: `initializer` must be callable or None, got {self.initializer!r}"
            )
        if not isinstance(self.combiner, CustomCombiner) and self.combiner not in COMBINERS:
            raise ConfigError(
                f"TableConfig: `combiner` must be one of {list(COMBINERS)} or a CustomCombiner, "
                f"got {self.combiner!r}"
            )
        if dtype_name(self.dtype) not in ("float32", "int32"):
            raise ConfigError(f"TableConfig: `dtype` must be float32 or int32, got {self.dtype!r}")
        if self.layout is not None:
            raise ConfigError("TableConfig: `layout` is not implemented; leave it None")
        if self.name is None:
            _log.warning("A TableConfig without a name gets one by its place: table_<i>.")

    def __repr__(self) -> str:
        """As TensorFlow's, which shows the default initializer as None."""
        start: object = self.initializer
        if isinstance(start, TruncatedNormal) and start.mean == 0.0:
            start = None if math.isclose(start.stddev, 1 / math.sqrt(self.dim)) else start
        return (
            f"TableConfig(vocabulary_size={self.vocabulary_size!r}, dim={self.dim!r}, "
            f"initializer={start!r}, optimizer={self.optimizer!r}, combiner={self.combiner!r}, "
            f"name={self.name!r}, quantization_config={self.quantization_config!r})"
        )


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
    """Shape of the activation without D; None is [B]. Where it asks for more vectors than there
    are examples, a multiple, ids are not combined: every example fills that many positions."""
    name: str | None = None
    """As in TensorFlow, a label only: a feature is found by its path in the configuration. It
    names a feature that stands alone, without a path."""
    tensor_core_shape: Sequence[int | None] | None = field(default=None, kw_only=True)
    """[batch, W] as `tpu_tensor_core` has it in `embedding_column`; the batch is not looked at. In
    training, the accelerator combines the first W rows of an example; weights are ignored."""

    def __post_init__(self) -> None:
        if not isinstance(self.table, TableConfig):
            raise ConfigError(f"FeatureConfig: `table` must be a TableConfig, got {self.table!r}")
        _check_int("FeatureConfig", "max_sequence_length", self.max_sequence_length, 0)
        object.__setattr__(self, "output_shape", _shape(self.output_shape))
        if not isinstance(self.validate_weights_and_indices, bool):
            raise ConfigError(
                "FeatureConfig: `validate_weights_and_indices` must be a bool, "
                f"got {self.validate_weights_and_indices!r}"
            )
        core = self.tensor_core_shape
        if core is None:
            return
        object.__setattr__(self, "tensor_core_shape", tuple(core))
        if len(core) != 2:
            raise ConfigError(
                f"FeatureConfig: `tensor_core_shape` must be size 2, [batch, W], got {list(core)}"
            )
        _check_int("FeatureConfig", "tensor_core_shape[1]", core[1], 1)
        if self.max_sequence_length > 0:
            raise ConfigError("FeatureConfig: `tensor_core_shape` does not support sequences")


def _check_int(owner: str, argument: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"{owner}: `{argument}` must be an int >= {least}, got {value!r}")


def dtype_name(dtype: object) -> str:
    """The name of a dtype given as a name, a NumPy type or TensorFlow's."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or dtype
    return "float32" if name == "float" else str(name)


def _shape(shape: object) -> tuple[int | None, ...] | None:
    """What TensorFlow makes a shape of; an object without a rank is an unknown TensorShape."""
    if shape is None or getattr(shape, "rank", 0) is None:
        return None
    if not isinstance(shape, Iterable):
        shape = (shape,)
    return tuple(_size(size) for size in cast("Iterable[object]", shape))


def _size(size: object) -> int | None:
    if size is None:
        return None
    try:
        value = int(operator.index(cast(Any, size)))
    except TypeError:
        raise TypeError(
            f"FeatureConfig: `output_shape` holds {size!r}, not an int or None"
        ) from None
    if value < 0:
        raise ConfigError(f"FeatureConfig: `output_shape` holds {value}, below 0")
    return value
