"""Training lookups once more, in plain TensorFlow over whole tables.

One padded gather per feature and the formulas as published; nothing of Manta's kernels, and no
`tf.vectorized_map`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from ps.config import CustomCombiner, QuantizationConfig
from ps.ragged import Ragged
from ps.spec import FeatureSpec, TableSpec
from workers.model import find_function


def width_of(table: TableSpec, feature: FeatureSpec, batch: int) -> int | None:
    """Ids of an example that count; None for all."""
    if feature.tensor_core_width is not None:
        return feature.tensor_core_width
    if feature.output_shape is not None and np.prod(feature.output_shape) != batch:
        return int(np.prod(feature.output_shape)) // batch
    if feature.output_shape is None and feature.max_sequence_length:
        return feature.max_sequence_length
    return table.combiner.max_valency if isinstance(table.combiner, CustomCombiner) else None


def activation(rows: Any, table: TableSpec, feature: FeatureSpec, bag: Ragged) -> tf.Tensor:
    """What the feature gives to the model."""
    batch = bag.num_examples
    rows = quantized(rows, table.quantization_config)
    width = width_of(table, feature, batch)
    if width is None:
        out = _combine(rows, *_sparse(bag), table.combiner)
    else:
        ids = tf.RaggedTensor.from_row_splits(bag.ids, bag.row_splits)
        padded = ids.to_tensor(-1, shape=[None, width])
        valid = padded >= 0
        found = tf.where(valid[..., None], tf.gather(rows, tf.maximum(padded, 0)), 0.0)
        count = tf.reduce_sum(tf.cast(valid, tf.int32), axis=1)
        out = _of_padded(found, count, table, feature, bag, batch)
    shape = feature.output_shape
    return out if shape is None else tf.reshape(out, [*shape, table.dim])


def _of_padded(
    found: Any, count: Any, table: TableSpec, feature: FeatureSpec, bag: Ragged, batch: int
) -> tf.Tensor:
    """`found`: float32 [B, width, D], zeros behind `count`."""
    if feature.tensor_core_width is not None:
        divisor = tf.maximum(tf.cast(count, tf.float32), 1.0)[:, None]
        return tf.reduce_sum(found, 1) / (divisor if table.combiner == "mean" else 1.0)
    sequence = feature.output_shape is None and feature.max_sequence_length > 0
    if isinstance(table.combiner, CustomCombiner) and not sequence:
        function = find_function(str(table.combiner.combiner_computation), "combiner")
        return tf.stack([function(count[b], found[b]) for b in range(batch)])
    if not sequence or bag.weights is None:
        return found
    w = tf.RaggedTensor.from_row_splits(bag.weights, bag.row_splits)
    w = w.to_tensor(0.0, shape=[None, feature.max_sequence_length])
    divisor = {"sum": tf.ones_like(w), "mean": w, "sqrtn": tf.sqrt(w * w)}[str(table.combiner)]
    return tf.math.divide_no_nan(w, divisor)[..., None] * found


def quantized(rows: Any, config: QuantizationConfig | None) -> Any:
    """The rows rounded to the nearest bucket; the gradient is that of the rows."""
    if config is None:
        return rows
    rows = tf.convert_to_tensor(rows)
    q = (config.upper - config.lower) / (config.num_buckets - 1)
    bucket = tf.floor((tf.clip_by_value(rows, config.lower, config.upper) - config.lower) / q + 0.5)
    return rows + tf.stop_gradient(bucket * q + config.lower - rows)


def used_ids(bag: Ragged, width: int | None) -> np.ndarray:
    """All ids that count, one after the other."""
    return np.array([i for ids in bag.to_lists() for i in ids[:width]], np.int64)


def _sparse(bag: Ragged) -> tuple[tf.SparseTensor, tf.SparseTensor | None]:
    counts = np.diff(bag.row_splits)
    columns = np.arange(bag.ids.size) - np.repeat(bag.row_splits[:-1], counts)
    indices = np.stack([np.repeat(np.arange(counts.size), counts), columns], axis=1)
    shape = [counts.size, max(1, counts.max(initial=0))]
    weights = None if bag.weights is None else tf.SparseTensor(indices, bag.weights, shape)
    return tf.SparseTensor(indices, bag.ids, shape), weights


def _combine(
    table: Any, ids: tf.SparseTensor, weights: tf.SparseTensor | None, combiner: str
) -> tf.Tensor:
    """`tf.nn.embedding_lookup_sparse`, padded to all rows; weights used as they are."""
    found = tf.nn.embedding_lookup_sparse(table, ids, weights, combiner=combiner)
    missing = ids.dense_shape[0] - tf.shape(found, tf.int64)[0]
    return tf.pad(found, [[0, missing], [0, 0]])
