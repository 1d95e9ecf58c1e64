"""Ids to activations on the CPU: TensorFlow's serving lookup over a table held as one array.

Equals `tf.tpu.experimental.embedding.serving_embedding_lookup` of TensorFlow 2.21. Bags of ids
follow its rules for sparse input, with one difference: the result always has as many rows as there
are examples (TensorFlow without `validate_weights_and_indices` loses empty examples at the end).
Arithmetic is float32. The module knows no file and no HTTP; both arrays and bags are read-only.

`output_shape` only matters to TensorFlow's ragged input; as with sparse input it is ignored here,
and bags of a feature that sets it are combined even if it sets `max_sequence_length` too.
"""

from __future__ import annotations

import numpy as np

from ps.config import Combiner
from ps.errors import IdRangeError, InputError
from ps.kernels.combine import COMBINER_CODES, combine_rows, gather_rows, scatter_sequences
from ps.kernels.dedup import first_out_of_range
from ps.ragged import F32, I64, Ragged
from ps.spec import FeatureSpec

NO_WEIGHTS: F32 = np.zeros(0, dtype=np.float32)


def is_sequence(feature: FeatureSpec) -> bool:
    """Whether bags of the feature become [B, L, D] rather than one vector per example."""
    return feature.max_sequence_length > 0 and feature.output_shape is None


def lookup_shape(feature: FeatureSpec, dim: int, ids: I64 | Ragged) -> tuple[int, ...]:
    """Shape of the activations that a lookup of these ids gives."""
    if not isinstance(ids, Ragged):
        return (*ids.shape, dim)
    if is_sequence(feature):
        return (ids.num_examples, feature.max_sequence_length, dim)
    return (ids.num_examples, dim)


def lookup_dense(feature: FeatureSpec, table_name: str, rows_VD: F32, ids: I64) -> F32:
    """One row per id: `tf.gather`.

    Args:
        feature: must not be a sequence feature.
        table_name: for error messages.
        rows_VD: float32 [V, D].
        ids: int64 of any shape; every id is checked.

    Returns:
        float32, shape of `ids` + [D].

    Raises:
        IdRangeError: an id outside [0, V).
        InputError: a sequence feature.
    """
    if feature.max_sequence_length > 0:
        raise InputError(
            f"feature '{feature.name}' is a sequence feature but a dense tensor of ids was given; "
            "it needs one list of ids per example",
            feature.name,
        )
    ids_N = np.ascontiguousarray(ids, dtype=np.int64).reshape(-1)
    _check_ids(feature, table_name, ids_N, rows_VD.shape[0])
    out_ND = np.empty((ids_N.size, rows_VD.shape[1]), dtype=np.float32)
    gather_rows(rows_VD, ids_N, out_ND)
    return out_ND.reshape(lookup_shape(feature, rows_VD.shape[1], ids))


def lookup_ragged(
    feature: FeatureSpec, table_name: str, combiner: Combiner, rows_VD: F32, bag: Ragged
) -> F32:
    """One vector per example, or L of them for a sequence feature.

    With weights w (default 1) and rows e of an example: sum Σ w·e; mean Σ w·e / Σ w; sqrtn
    Σ w·e / √Σ w²; 0 for an empty example or where the divisor is 0. With
    `validate_weights_and_indices` ids < 0 are dropped first and, for mean and sqrtn, weights <= 0
    and NaN with their ids; without it every id must be in [0, V) and every weight counts.

    A sequence feature takes the first L ids of each example and fills up with zeros; ids behind
    the L-th are not checked.

    Args:
        feature: says whether it is a sequence and what is validated.
        table_name: for error messages.
        combiner: of the table.
        rows_VD: float32 [V, D].
        bag: ids and weights of B examples.

    Returns:
        float32 [B, D], or [B, L, D] for a sequence feature.

    Raises:
        IdRangeError: an id that counts is outside [0, V).
        InputError: weights although `max_sequence_length` is set.
    """
    _check_weights(feature, bag)
    out = np.empty(lookup_shape(feature, rows_VD.shape[1], bag), dtype=np.float32)
    if is_sequence(feature):
        _check_sequence_ids(feature, table_name, bag, rows_VD.shape[0])
        scatter_sequences(rows_VD, bag.ids, bag.row_splits, out)
        return out
    if feature.validate_weights_and_indices:
        bag = _drop_invalid(bag, combiner)
    _check_ids(feature, table_name, bag.ids, rows_VD.shape[0])
    weights = NO_WEIGHTS if bag.weights is None else bag.weights
    combine_rows(rows_VD, bag.ids, bag.row_splits, weights, COMBINER_CODES[combiner], out)
    return out


def _check_weights(feature: FeatureSpec, bag: Ragged) -> None:
    if feature.max_sequence_length > 0 and bag.weights is not None:
        raise InputError(
            f"weights were given for '{feature.name}', but this is a sequence feature",
            feature.name,
        )


def _drop_invalid(bag: Ragged, combiner: Combiner) -> Ragged:
    """The bag without what `tf.nn.safe_embedding_lookup_sparse` prunes."""
    keep = bag.ids >= 0
    if bag.weights is not None and combiner != "sum":
        keep &= bag.weights > 0  # False for NaN
    if keep.all():
        return bag
    kept_before = np.zeros(keep.size + 1, dtype=np.int64)
    np.cumsum(keep, out=kept_before[1:])
    weights = None if bag.weights is None else bag.weights[keep]
    return Ragged(bag.ids[keep], kept_before[bag.row_splits], weights)


def _check_ids(feature: FeatureSpec, table_name: str, ids_N: I64, num_rows: int) -> None:
    bad = first_out_of_range(ids_N, num_rows)
    if bad >= 0:
        raise IdRangeError(feature.name, table_name, int(ids_N[bad]), num_rows)


def _check_sequence_ids(feature: FeatureSpec, table_name: str, bag: Ragged, num_rows: int) -> None:
    if first_out_of_range(bag.ids, num_rows) < 0:
        return  # the usual case: no need to know which ids are cut off
    kept = bag.ids[bag.positions < feature.max_sequence_length]
    _check_ids(feature, table_name, kept, num_rows)
