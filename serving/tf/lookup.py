"""`serving_embedding_lookup`: TensorFlow's serving lookup, for its configs and ours.

Owns the matching of inputs to features, the checks, and the lookup with TensorFlow's own operators.
`serving.tf.mapped` looks up in NumPy arrays with the kernels of `ps.lookup`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import tensorflow as tf

from ps.errors import ConfigError, InputError
from ps.inputs import Dense, Ragged, Sparse
from ps.partition import div_splits
from ps.spec import FeatureSpec, feature_spec
from ps.structures import check_same_structure, flatten, pack_like, select
from serving.tf.mapped import as_tensors, lookup_mapped

_log = logging.getLogger(__name__)


@tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
def serving_embedding_lookup(
    inputs: Any, weights: Any, tables: Mapping[Any, Any], feature_config: Any
) -> Any:
    """Look up features as `tf.tpu.experimental.embedding.serving_embedding_lookup` does.

    The kind of table decides how:

    * `tf.Variable`, `tf.Tensor` and NumPy arrays of another dtype than float32 go through
      TensorFlow's operators: differentiable, traceable, fit for a SavedModel. Activations have the
      table's dtype.
    * A float32 NumPy array, such as the memory-mapped `rows_VD` of an opened export, is read in
      place by our own kernels: only the rows that are looked up are touched, no matter how large
      the table is. In a `tf.function` that is a `tf.numpy_function`, which has no gradient and
      cannot be loaded from a SavedModel.
    * A list of either is a table in row shards: consecutive ranges of rows ("div"), the first
      V mod n shards one row longer than the others.

    Where TensorFlow has a defect, this function does the right thing instead: weights of another
    numeric dtype are cast to the table's; tensors, arrays and shards serve sparse sequences; shards
    of ragged input are "div" too; ragged `output_shape` works while tracing; a custom combiner,
    which only training has, is refused for every kind of input, not only for sparse.

    Args:
        inputs: `tf.Tensor`, `tf.SparseTensor`, `tf.RaggedTensor`, or `ps.inputs.Dense`, `Sparse`,
            `Ragged`, integer ids, in any nesting; a subset of the features.
        weights: None, or the structure of `inputs`: for each sparse or ragged leaf, numbers of the
            same form, or None.
        tables: rows [V, D] by the TableConfig objects of `feature_config`.
        feature_config: FeatureConfig objects, ours or TensorFlow's, in any nesting. A leaf of
            `inputs` belongs to the one with the same path.

    Returns:
        Tensors packed like `inputs`. Dense ids: their shape + [D]. Sparse ids of shape
        [d_0, …, d_n]: [d_0, …, d_n-1, D]; or, where validation is off, as many rows as the last
        one with an id asks for. Ragged ids: [B, D]. Sequences: [B, L, D]. Ragged ids with an
        `output_shape`: that + [D].

    Raises:
        InputError: inputs without a feature, weights that do not fit, a leaf or shape that the
            feature does not take. (A ValueError, and nothing but one while tracing.)
        ConfigError: a custom combiner. (Likewise.)
        TypeError: `weights` has other containers than `inputs`.
        KeyError: `tables` lacks a table.
        tf.errors.InvalidArgumentError: an id is outside its table, or sparse indices are wrong.
    """
    try:
        return _look_up_all(inputs, weights, tables, feature_config)
    except (InputError, ConfigError) as e:
        if tf.executing_eagerly():
            raise
        # While tracing, AutoGraph lets only the built-in classes through as they are.
        raise ValueError(str(e)) from e


def _look_up_all(inputs: Any, weights: Any, tables: Mapping[Any, Any], feature_config: Any) -> Any:
    if weights is not None:
        check_same_structure(inputs, weights)
    leaves = select(inputs, feature_config)
    flat_weights = [None] * len(leaves) if weights is None else [w for _, w in flatten(weights)]
    outputs = [
        _look_up(path, ids, weight, config, tables)
        for (path, ids, config), weight in zip(leaves, flat_weights, strict=True)
    ]
    return pack_like(inputs, outputs)


def _look_up(path: str, ids: Any, weights: Any, config: Any, tables: Mapping[Any, Any]) -> Any:
    table, dim, combiner = tables[config.table], config.table.dim, config.table.combiner
    feature = feature_spec(path, config)
    if isinstance(ids, Dense | Sparse | Ragged) and weights is None:
        ids, weights = as_tensors(ids)
    _check(feature, ids, weights)
    if not isinstance(combiner, str):
        raise ConfigError(
            f"feature '{path}': serving combines by mean, sum or sqrtn, not by {combiner!r}"
        )
    if _is_mapped(table):
        return lookup_mapped(feature, combiner, table, dim, ids, weights)
    operators = _Operators(feature, _shards(table), dim, combiner)
    if isinstance(ids, tf.SparseTensor):
        return operators.sparse(ids, weights)
    if isinstance(ids, tf.RaggedTensor):
        return operators.ragged(ids, weights)
    return tf.nn.embedding_lookup(operators.shards, ids)


def _check(feature: FeatureSpec, ids: Any, weights: Any) -> None:
    """TensorFlow's checks of types, in its order."""
    path, kind = feature.name, type(ids)
    if weights is not None:
        if isinstance(ids, tf.Tensor | Dense):
            raise InputError(f"Weight specified for {path}, but input is dense.", path)
        if type(weights) is not kind:
            raise InputError(
                f"Weight for {path} is of type {type(weights)} but it does not match type of the "
                f"input which is {kind}.",
                path,
            )
        if feature.max_sequence_length > 0:
            raise InputError(f"Weight specified for {path}, but this is a sequence feature.", path)
    if isinstance(ids, tf.Tensor) and feature.max_sequence_length > 0:
        raise InputError(
            f"Feature {path} is a sequence feature but a dense tensor was passed.", path
        )
    if not isinstance(ids, tf.Tensor | tf.SparseTensor | tf.RaggedTensor):
        raise InputError(
            f"Input {path} is type {kind}. Tensor, SparseTensor or RaggedTensor expected.", path
        )
    if isinstance(ids, tf.RaggedTensor) and ids.shape.rank != 2:
        raise InputError(
            f"Only rank 2 ragged tensor is supported, but got rank {ids.shape.rank}", path
        )


def _is_mapped(table: Any) -> bool:
    shards = table if isinstance(table, list | tuple) else [table]
    return bool(shards) and all(
        isinstance(shard, np.ndarray) and shard.dtype == np.float32 for shard in shards
    )


def _shards(table: Any) -> list[Any]:
    """Row shards, cut as TensorFlow's operators take them for granted; empty ones left out."""
    parts = table if isinstance(table, list | tuple) else [table]
    shards = [tf.convert_to_tensor(p) if isinstance(p, np.ndarray) else p for p in parts]
    counts = [shard.shape[0] for shard in shards]
    if len(shards) < 2 or None in counts:
        return shards
    wanted = np.diff(div_splits(sum(counts), len(counts))).tolist()
    if counts != wanted:
        raise InputError(
            f"row shards have {counts} rows, wanted {wanted}: equal, longer ones first"
        )
    return [shard for shard, count in zip(shards, counts, strict=True) if count] or shards[:1]


@dataclass(frozen=True, slots=True)
class _Operators:
    """One feature's lookup in a table of tensors or variables, with TensorFlow's operators."""

    feature: FeatureSpec
    shards: list[Any]
    dim: int
    combiner: str

    def sparse(self, ids: Any, weights: Any) -> Any:
        length, rank = self.feature.max_sequence_length, ids.shape.rank
        if length > 0 and self.feature.output_shape is None and rank in (None, 2):
            return self._sparse_sequence(ids)
        if length > 0:
            _log.warning(
                "feature '%s': max_sequence_length is ignored: the ids have rank %s and "
                "output_shape is %s",
                *(self.feature.name, rank, self.feature.output_shape),
            )
        if not self.feature.validate_weights_and_indices and rank is not None and rank <= 2:
            lookup = tf.nn.embedding_lookup_sparse
        else:
            lookup, weights = tf.nn.safe_embedding_lookup_sparse, self._cast(weights)
        return lookup(self.shards, ids, weights, combiner=self.combiner)

    def ragged(self, ids: Any, weights: Any) -> Any:
        if self.feature.output_shape is not None:
            return self._ragged_shaped(ids, weights, self.feature.output_shape)
        if self.feature.max_sequence_length > 0:
            return self._ragged_sequence(ids, ids.shape[0], self.feature.max_sequence_length)
        return self._ragged_combined(ids, weights)

    def _sparse_sequence(self, ids: Any) -> Any:
        """Row id at [r, c] for each entry (r, c) with c < L."""
        batch = tf.shape(ids, tf.int64)[0]
        length = self.feature.max_sequence_length
        kept = tf.sparse.slice(ids, [0, 0], tf.stack([batch, length]))
        if len(self.shards) > 1:
            rows = tf.nn.embedding_lookup(self.shards, kept.values)
        else:  # a variable's own gather takes no int16
            rows = tf.gather(tf.convert_to_tensor(self.shards[0]), kept.values)
        return tf.scatter_nd(kept.indices, rows, tf.stack([batch, length, self.dim]))

    def _ragged_sequence(self, ids: Any, batch: Any, length: Any) -> Any:
        rows = tf.nn.embedding_lookup(self.shards, ids)
        return rows.to_tensor(shape=[batch, length, self.dim])

    def _ragged_combined(self, ids: Any, weights: Any) -> Any:
        """Σ w·e, divided by Σ w for mean and by √Σ w² for sqrtn; 0 where that is 0."""
        if weights is None:
            weights = tf.ones_like(ids, dtype=self.shards[0].dtype)
        weights = tf.expand_dims(self._cast(weights), axis=2)
        total = tf.reduce_sum(tf.nn.embedding_lookup(self.shards, ids) * weights, axis=1)
        if self.combiner == "mean":
            return tf.math.divide_no_nan(total, tf.reduce_sum(weights, axis=1))
        if self.combiner == "sqrtn":
            norm = tf.sqrt(tf.reduce_sum(weights * weights, axis=1))
            return tf.math.divide_no_nan(total, norm)
        return total

    def _ragged_shaped(self, ids: Any, weights: Any, shape: tuple[int | None, ...]) -> Any:
        """Combined if there is a vector for each example, else a sequence of each example."""
        if None in shape:
            raise InputError(f"output_shape {list(shape)} must be fully known", self.feature.name)
        size, batch = math.prod(cast("tuple[int, ...]", shape)), ids.shape[0]
        if batch is None:
            out = self._ragged_shaped_dynamic(ids, weights, size)
        elif size == batch:
            out = self._ragged_combined(ids, weights)
        elif 0 < batch < size and size % batch == 0:
            out = self._ragged_sequence(ids, batch, size // batch)
        else:
            raise InputError(self._not_a_factor(batch), self.feature.name)
        return tf.reshape(out, [*shape, self.dim])

    def _ragged_shaped_dynamic(self, ids: Any, weights: Any, size: int) -> Any:
        """The same while tracing for any batch; a batch that does not fit fails at run time."""
        batch = ids.nrows(tf.int64)
        fits = (batch > 0) & (size % tf.maximum(batch, 1) == 0)
        fits = tf.debugging.Assert(fits | (batch == size), [self._not_a_factor("that is"), batch])
        with tf.control_dependencies([fits]):
            flat = [-1, self.dim]
            return tf.cond(
                batch == size,
                lambda: tf.reshape(self._ragged_combined(ids, weights), flat),
                lambda: tf.reshape(self._ragged_sequence(ids, batch, size // batch), flat),
            )

    def _not_a_factor(self, batch: object) -> str:
        return (
            "Output shape set in the FeatureConfig should be the factor of the input data batch "
            f"size. But instead got output shape {self.feature.output_shape}, "
            f"input data batch size {batch}"
        )

    def _cast(self, weights: Any) -> Any:
        """Numbers as numbers of the table's dtype; TensorFlow refuses them otherwise."""
        dtype = tf.as_dtype(self.shards[0].dtype)
        if weights is None or weights.dtype == dtype or not dtype.is_floating:
            return weights
        numeric = weights.dtype.is_floating or weights.dtype.is_integer
        return tf.cast(weights, dtype) if numeric else weights
