"""TensorFlow's embedding configs as ours.

The objects are read by their attributes, so this module never imports TensorFlow itself: whoever
holds a TensorFlow object has already done so.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ps.config import CustomCombiner, FeatureConfig, QuantizationConfig, TableConfig
from ps.custom_optimizer import CustomOptimizer
from ps.errors import ConfigError
from ps.initializers import (
    Constant,
    Initializer,
    RandomNormal,
    RandomUniform,
    RowIdInitializer,
    TruncatedNormal,
)
from ps.optimizers import OPTIMIZERS, Optimizer

_INITIALIZER_ARGUMENTS: dict[str, tuple[type[Initializer], tuple[str, ...]]] = {
    "TruncatedNormal": (TruncatedNormal, ("mean", "stddev")),
    "RandomNormal": (RandomNormal, ("mean", "stddev")),
    "RandomUniform": (RandomUniform, ("minval", "maxval")),
    "Constant": (Constant, ("value",)),
    "RowIdInitializer": (RowIdInitializer, ("offset",)),
}


def feature_config_from_tensorflow(stock: Any, seen: dict[int, TableConfig]) -> FeatureConfig:
    """A `tf.tpu.experimental.embedding.FeatureConfig` as ours.

    Args:
        stock: TensorFlow's object.
        seen: tables converted so far by `id`, so that features that share a table go on sharing it.

    Raises:
        ConfigError: not a FeatureConfig, or it uses something Manta has no counterpart for.
    """
    if type(stock).__name__ != "FeatureConfig" or not hasattr(stock, "table"):
        raise ConfigError(f"wanted a FeatureConfig, got {stock!r}")
    if id(stock.table) not in seen:
        seen[id(stock.table)] = _table(stock.table)
    shape = stock.output_shape
    return FeatureConfig(
        seen[id(stock.table)],
        stock.max_sequence_length,
        stock.validate_weights_and_indices,
        None if shape.rank is None else shape.as_list(),
        stock.name,
    )


def _table(stock: Any) -> TableConfig:
    default_initializer = stock.initializer is None or "initializer=None" in repr(stock)
    return TableConfig(
        vocabulary_size=stock.vocabulary_size,
        dim=stock.dim,
        # TensorFlow's default is TruncatedNormal(0, 1/√dim), as ours; its repr shows it as None.
        initializer=None if default_initializer else initializer_from_tensorflow(stock.initializer),
        optimizer=None if stock.optimizer is None else optimizer_from_tensorflow(stock.optimizer),
        combiner=stock.combiner if isinstance(stock.combiner, str) else _combiner(stock.combiner),
        name=stock.name,
        quantization_config=stock.quantization_config,
        layout=stock.layout,
        dtype=stock.dtype,
    )


def _combiner(stock: Any) -> CustomCombiner:
    return CustomCombiner(
        stock.combiner_computation,
        stock.max_valency,
        stock.num_weights,
        next(iter(stock._slot_initializers()), None),
        stock.combiner_weights_learning_rate,
    )


def quantization_from_tensorflow(stock: Any) -> QuantizationConfig:
    """A `tf.tpu.experimental.embedding.QuantizationConfig` as ours.

    Raises:
        ConfigError: something else.
    """
    if type(stock).__name__ != "QuantizationConfig" or not hasattr(stock, "num_buckets"):
        raise ConfigError(f"`quantization_config` must be a QuantizationConfig, got {stock!r}")
    return QuantizationConfig(stock.num_buckets, stock.lower, stock.upper)


def optimizer_from_tensorflow(stock: Any) -> Optimizer:
    """A `tf.tpu.experimental.embedding` optimizer as ours.

    Raises:
        ConfigError: not one of the six.
    """
    if not type(stock).__module__.startswith("tensorflow"):
        kind: Any = None
    elif type(stock).__name__ == "CustomOptimizer":
        return _custom_optimizer(stock)
    else:
        kind = OPTIMIZERS.get(type(stock).__name__)
    if kind is None:
        raise ConfigError(
            f"{stock!r} is an unsupported optimizer class; "
            f"supported: {', '.join(sorted([*OPTIMIZERS, CustomOptimizer.__name__]))}"
        )
    arguments = {
        field.name: getattr(stock, field.name)
        for field in dataclasses.fields(kind)
        if field.name != "clipvalue"
    }
    bounds = (stock.clip_gradient_min, stock.clip_gradient_max)
    clipvalue = None if bounds == (None, None) else bounds
    converted: Optimizer = kind(**arguments, clipvalue=clipvalue)
    return converted


def _custom_optimizer(stock: Any) -> CustomOptimizer:
    return CustomOptimizer(
        stock.custom_computation,
        stock.learning_rate,
        stock._slot_names(),
        stock._slot_initializers(),
        stock.hyperparameters,
        stock.slot_dims,
    )


def initializer_from_tensorflow(stock: Any) -> Initializer:
    """A TensorFlow or Keras initializer as ours, by its class name and arguments.

    Raises:
        ConfigError: it cannot be computed row by row, from (seed, table, id).
    """
    name = type(stock).__name__
    if name in ("Zeros", "Ones"):
        return Constant(float(name == "Ones"))
    if name not in _INITIALIZER_ARGUMENTS:
        raise ConfigError(
            f"initializer {stock!r} cannot be computed row by row; use one of "
            f"{', '.join(sorted(_INITIALIZER_ARGUMENTS))}, Zeros, Ones, or a subclass of "
            "`manta.Initializer`"
        )
    kind, arguments = _INITIALIZER_ARGUMENTS[name]
    return kind(**{argument: getattr(stock, argument) for argument in arguments})
