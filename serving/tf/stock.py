"""Our configuration objects as TensorFlow's, for the parts of TensorFlow that take only its own.

`ps.convert` goes the other way. An object that is TensorFlow's already stays itself, so that
TensorFlow may change it as it does without us.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from ps.config import CustomCombiner, CustomOptimizer, FeatureConfig, TableConfig
from ps.initializers import Initializer, table_key
from ps.optimizers import Optimizer

_stock = tf.tpu.experimental.embedding


class StockTables:
    """TensorFlow's table for each of ours; the same one whenever ours is the same object."""

    def __init__(self) -> None:
        self._stock: dict[TableConfig, Any] = {}

    def feature_config(self, feature: Any) -> Any:
        """A FeatureConfig as TensorFlow's; anything that is not ours comes back as it is."""
        if not isinstance(feature, FeatureConfig):
            return feature
        return _stock.FeatureConfig(
            self.table(feature.table),
            feature.max_sequence_length,
            feature.validate_weights_and_indices,
            feature.output_shape,
            feature.name,
        )

    def table(self, table: Any) -> Any:
        """A TableConfig as TensorFlow's; anything that is not ours comes back as it is."""
        if not isinstance(table, TableConfig):
            return table
        if table not in self._stock:
            self._stock[table] = _table(table)
        return self._stock[table]


def stock_optimizer(optimizer: Any) -> Any:
    """An optimizer as TensorFlow's; anything that is not ours comes back as it is."""
    if isinstance(optimizer, CustomOptimizer):
        return _stock.CustomOptimizer(
            optimizer.custom_computation,
            optimizer.learning_rate,
            list(optimizer.slot_names),
            [tf.constant_initializer(value) for value in optimizer.slot_initial_values],
            list(optimizer.hyperparameters),
            list(optimizer.slot_dims),
        )
    if not isinstance(optimizer, Optimizer):
        return optimizer
    arguments = {
        field.name: getattr(optimizer, field.name)
        for field in dataclasses.fields(optimizer)  # type: ignore[arg-type]
    }
    return getattr(_stock, type(optimizer).__name__)(**arguments)


def _table(table: TableConfig) -> Any:
    stock = _stock.TableConfig(
        vocabulary_size=table.vocabulary_size,
        dim=table.dim,
        optimizer=stock_optimizer(table.optimizer),
        combiner=_combiner(table.combiner),
        name=table.name,
        quantization_config=table.quantization_config,
    )
    if table.initializer is not None:
        stock.initializer = _initializer(table.initializer, stock)
    return stock


def _combiner(combiner: str | CustomCombiner) -> Any:
    if isinstance(combiner, str):
        return combiner
    return _stock.CustomCombiner(
        combiner.combiner_computation,
        combiner.max_valency,
        combiner.num_weights,
        combiner.initializer,
        combiner.combiner_weights_learning_rate,
    )


def _initializer(initializer: Callable[..., Any], stock_table: Any) -> Callable[..., Any]:
    """First rows as training makes them with seed 0, so that no two tables start alike."""
    if not isinstance(initializer, Initializer):
        return initializer

    def rows(shape: Any, dtype: Any = tf.float32) -> Any:
        num_rows, dim = shape
        ids = np.arange(num_rows, dtype=np.int64)
        # TensorFlow has named the table by now.
        return tf.cast(initializer.rows(table_key(0, stock_table.name), ids, dim), dtype)

    return rows
