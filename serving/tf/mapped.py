"""Lookups of TensorFlow's tensors in NumPy tables, by the kernels of `ps.lookup`.

Owns the way between tensors and `ps.inputs`, in both directions, and what makes a NumPy lookup
part of a graph. It copies ids and weights, never a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ps.errors import InputError
from ps.inputs import Dense, Input, Ragged, Sparse
from ps.lookup import is_sequence, lookup, lookup_shape
from ps.ragged import F32
from ps.reader import Rows, checked_rows
from ps.spec import FeatureSpec


def as_tensors(value: Input) -> tuple[Any, Any]:
    """Ids, and weights or None, as TensorFlow has them."""
    if isinstance(value, Dense):
        return tf.constant(value.ids), None
    both = (value.ids, value.weights)
    if isinstance(value, Sparse):
        ids, weights = (
            None if v is None else tf.SparseTensor(value.indices, v, value.dense_shape)
            for v in both
        )
        return ids, weights
    ids, weights = (
        None if v is None else tf.RaggedTensor.from_row_splits(v, value.row_splits) for v in both
    )
    return ids, weights


def lookup_mapped(
    feature: FeatureSpec, combiner: object, rows: Rows, dim: int, ids: Any, weights: Any
) -> Any:
    """The activations of one feature, float32, from a NumPy table.

    Args:
        feature: the options.
        combiner: of the table.
        rows: float32 [V, D], or row shards.
        dim: D.
        ids: Tensor, SparseTensor, or RaggedTensor of rank 2, eager or of a graph.
        weights: of the type of `ids`, or None.

    Raises:
        InputError: the input does not fit the feature, whatever the values.
        tf.errors.InvalidArgumentError: an id or a coordinate is wrong; in a graph, all errors.
    """
    _check_shapes(feature, dim, ids, weights)
    if isinstance(ids, tf.SparseTensor) and ids.shape.rank is None:  # as TensorFlow decides
        feature = dataclasses.replace(feature, validate_weights_and_indices=True)
    rows, parts = checked_rows(feature.table, rows), _parts(ids, weights)

    def run(*arrays: Any) -> F32:
        return lookup(feature, feature.table, combiner, rows, _input(ids, arrays))

    if any(map(tf.is_symbolic_tensor, parts)):
        found = tf.numpy_function(run, parts, tf.float32)
        return tf.ensure_shape(found, _static_shape(feature, dim, ids))
    try:
        return tf.constant(run(*(part.numpy() for part in parts)))
    except InputError as e:
        raise tf.errors.InvalidArgumentError(None, None, str(e)) from e


def _check_shapes(feature: FeatureSpec, dim: int, ids: Any, weights: Any) -> None:
    """Refuse what is wrong whatever the values, as far as it is known."""
    if isinstance(ids, tf.SparseTensor) and weights is not None:
        count, wanted = weights.values.shape, ids.values.shape
        if not count.is_compatible_with(wanted):
            raise InputError(f"got {count} weights for {wanted} ids", feature.name)
        raw = not feature.validate_weights_and_indices and ids.shape.rank in (1, 2)
        if raw and not weights.indices.shape.is_compatible_with(ids.indices.shape):
            raise InputError(
                f"weights of shape {weights.shape} do not have the rank of the ids, {ids.shape}: "
                "without validation they are incompatible",
                feature.name,
            )
    shape = feature.output_shape
    if isinstance(ids, tf.RaggedTensor) and shape is not None:
        batch = ids.shape[0]
        if batch is not None or None in shape:
            no_ids = np.zeros(0, dtype=np.int64)
            lookup_shape(feature, dim, Ragged(no_ids, np.zeros((batch or 0) + 1, dtype=np.int64)))


def _parts(ids: Any, weights: Any) -> list[Any]:
    """Plain tensors that say all of them; `_input` reads them again."""
    if isinstance(ids, tf.SparseTensor):
        return [ids.indices, ids.values, ids.dense_shape] + (
            [] if weights is None else [weights.values]
        )
    if isinstance(ids, tf.RaggedTensor):
        return [ids.values, ids.row_splits] + (
            [] if weights is None else [weights.values, weights.row_splits]
        )
    return [ids]


def _input(ids: Any, arrays: Sequence[Any]) -> Input:
    if isinstance(ids, tf.SparseTensor):
        indices, values, dense_shape, *weights = arrays
        return Sparse(indices, values, dense_shape, *weights)
    if isinstance(ids, tf.RaggedTensor):
        values, row_splits, *more = arrays
        if more and not np.array_equal(row_splits, more[1]):
            raise InputError("ids and weights have different row_splits")
        return Ragged(values, row_splits, *more[:1])
    return Dense(arrays[0])


def _static_shape(feature: FeatureSpec, dim: int, ids: Any) -> list[int | None] | tf.TensorShape:
    """What is known of the activations' shape while tracing."""
    shape = ids.shape
    if isinstance(ids, tf.Tensor):
        return shape.concatenate([dim])
    if isinstance(ids, tf.RaggedTensor) and feature.output_shape is not None:
        return [*feature.output_shape, dim]
    batch = None if shape.rank is None else shape[0]
    sparse = isinstance(ids, tf.SparseTensor)
    if is_sequence(feature) and not (sparse and shape.rank not in (None, 2)):
        return [batch, feature.max_sequence_length, dim]
    if not sparse:
        return [batch, dim]
    if not feature.validate_weights_and_indices and shape.rank <= 2:
        return [None, dim]
    return tf.TensorShape(None) if shape.rank is None else shape[:-1].concatenate([dim])
