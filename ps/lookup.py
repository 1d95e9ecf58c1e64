"""Ids to activations on the CPU: TensorFlow's serving lookup, without TensorFlow.

Equals `tf.tpu.experimental.embedding.serving_embedding_lookup` of TensorFlow 2.21, value for value
and refusal for refusal, for each of its three kinds of input; arithmetic is float32. It knows no
file and no HTTP, and writes to no argument.

Weights w are 1 where none are given. An example's rows e are combined to Σ w·e (sum), Σ w·e / Σ w
(mean) or Σ w·e / √Σ w² (sqrtn), which is 0 for an empty example and where the divisor is 0.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ps.config import Combiner
from ps.errors import ConfigError, InputError
from ps.inputs import Bags, Dense, Input, Sparse
from ps.kernels.combine import COMBINER_CODES
from ps.kernels.dedup import first_out_of_range
from ps.ragged import F32, I64, Ragged
from ps.reader import Rows, TableReader, checked_rows
from ps.spec import FeatureSpec, feature_spec
from ps.structures import pack_like, select
from ps.threads import ONE_THREAD, Threads

Mask = npt.NDArray[np.bool_]

_MAX_INT64 = np.iinfo(np.int64).max


def embedding_lookup(inputs: Any, tables: Mapping[Any, Rows], feature_config: Any) -> Any:
    """Look up every feature of a structure: `serving_embedding_lookup` over NumPy.

    Args:
        inputs: `Dense`, `Sparse` and `Ragged` in any nesting of dicts, lists and tuples; each is
            matched by its path with a feature, and any subset of the features will do.
        tables: rows by the table object that the features name: float32 [V, D], or a list of row
            shards, consecutive ranges of rows in order. V bounds the ids.
        feature_config: FeatureConfig objects, ours or TensorFlow's, in any nesting.

    Returns:
        float32 arrays in the structure of `inputs`; see `lookup` for their shapes.

    Raises:
        KeyError: `tables` lacks a table.
        InputError: an input without a feature, or one that its feature does not take.
        ConfigError: a leaf that is not a FeatureConfig, or its table has a custom combiner.
    """
    outputs = []
    for path, value, config in select(inputs, feature_config):
        feature = feature_spec(path, config)
        if config.table not in tables:
            raise KeyError(f"feature '{feature.name}': `tables` lacks its table '{feature.table}'")
        rows = checked_rows(feature.table, tables[config.table])
        outputs.append(lookup(feature, feature.table, config.table.combiner, rows, value))
    return pack_like(inputs, outputs)


def lookup(
    feature: FeatureSpec,
    table: str,
    combiner: object,
    rows: Rows,
    value: Input | Bags,
    threads: Threads = ONE_THREAD,
) -> F32:
    """The activations of one feature.

    `Dense`: one row per id, shape of `ids` + [D].

    `Sparse`: examples are the leading dimensions, shape `dense_shape[:-1]` + [D]. Ids < 0 are
    dropped and, unless the combiner is sum, weights that are not > 0 with their ids. Without
    `validate_weights_and_indices` and up to rank 2 nothing is dropped, the first coordinate must
    not fall, and the answer ends with the last example that has an id. With `max_sequence_length`
    L, without `output_shape`, and of rank 2: [B, L, D], each row at its coordinate, those of one
    coordinate added up; entries outside are not looked at.

    `Ragged`: [B, D]; nothing is dropped whatever the feature says. With `max_sequence_length` L
    [B, L, D], cut or padded with zeros. With an `output_shape` of P vectors `output_shape` + [D]:
    combined if P is B; if P is a larger multiple of B, each example fills P/B positions, weights
    ignored. Ids that are cut off are checked too.

    `Bags`: as `Sparse`, but always B examples.

    Args:
        feature: the options.
        table: its name, for error messages.
        combiner: of the table.
        rows: float32 [V, D], or row shards.
        value: the ids.
        threads: that a big lookup is cut between.

    Raises:
        IdRangeError: an id that counts is outside [0, V).
        InputError: an input that the feature does not take; the message says what is wrong.
        ConfigError: a custom combiner, which only training has.
    """
    if not isinstance(combiner, str) or combiner not in COMBINER_CODES:
        raise ConfigError(
            f"table '{table}': a lookup combines by one of {sorted(COMBINER_CODES)}, "
            f"not by {combiner!r}"
        )
    name = cast("Combiner", combiner)
    reader = TableReader(feature.name, table, rows, threads)
    if isinstance(value, Bags):
        return _bags(feature, reader, name, value.entries)
    if isinstance(value, Dense):
        found = _dense(feature, reader, value)
    elif isinstance(value, Sparse):
        found = _sparse(feature, reader, name, value)
    elif isinstance(value, Ragged):
        found = _ragged(feature, reader, name, value)
    else:
        raise InputError(
            f"Input {feature.name} is {value!r}; Dense, Sparse or Ragged expected", feature.name
        )
    return found.reshape(lookup_shape(feature, reader.dim, value))


def lookup_shape(feature: FeatureSpec, dim: int, value: Input | Bags) -> tuple[int, ...]:
    """Shape of what `lookup` returns for this input, if it returns.

    Raises:
        InputError: a `Ragged` whose number of examples does not fit `output_shape`.
    """
    if isinstance(value, Dense):
        return (*value.ids.shape, dim)
    if isinstance(value, Ragged) and feature.output_shape is not None:
        _positions(feature, value)
        return (*cast("tuple[int, ...]", feature.output_shape), dim)
    if isinstance(value, Sparse):
        if not (is_sequence(feature) and value.rank == 2):
            leading = (_num_segments(value),) if _is_raw(feature, value) else value.dense_shape[:-1]
            return (*leading, dim)
        num_examples = value.dense_shape[0]
    else:
        num_examples = (value.entries if isinstance(value, Bags) else value).num_examples
    if is_sequence(feature):
        return (num_examples, feature.max_sequence_length, dim)
    return (num_examples, dim)


def is_sequence(feature: FeatureSpec) -> bool:
    """Whether bags of the feature become [B, L, D] rather than one vector per example."""
    return feature.max_sequence_length > 0 and feature.output_shape is None


def _dense(feature: FeatureSpec, reader: TableReader, value: Dense) -> F32:
    if feature.max_sequence_length > 0:
        raise _refusal(
            feature,
            "is a sequence feature but a dense tensor of ids was given; "
            "it needs one list of ids per example",
        )
    return reader.gather(value.ids.reshape(-1))


def _bags(feature: FeatureSpec, reader: TableReader, combiner: Combiner, bag: Ragged) -> F32:
    _check_weights(feature, bag.weights)
    if is_sequence(feature):
        _check_kept_ids(reader, bag, feature.max_sequence_length)
        return reader.place(bag, feature.max_sequence_length)
    if feature.validate_weights_and_indices:
        bag = pruned(bag, combiner)
    return reader.combine(bag, combiner)


def _sparse(feature: FeatureSpec, reader: TableReader, combiner: Combiner, value: Sparse) -> F32:
    _check_weights(feature, value.weights)
    if is_sequence(feature) and value.rank == 2:
        return reader.combine(_cells(value, feature.max_sequence_length), "sum")
    if _is_raw(feature, value):
        return reader.combine(_segments(feature, value), combiner)
    return reader.combine(_valid_entries(feature, combiner, value), combiner)


def _ragged(feature: FeatureSpec, reader: TableReader, combiner: Combiner, bag: Ragged) -> F32:
    _check_weights(feature, bag.weights)
    length = feature.max_sequence_length
    if feature.output_shape is not None:
        length = _positions(feature, bag)
    if length == 0:
        return reader.combine(bag, combiner)
    reader.check(bag.ids)
    return reader.place(bag, length)


def _check_weights(feature: FeatureSpec, weights: F32 | None) -> None:
    if feature.max_sequence_length > 0 and weights is not None:
        raise InputError(
            f"weights were given for '{feature.name}', but this is a sequence feature",
            feature.name,
        )


def _check_kept_ids(reader: TableReader, bag: Ragged, length: int) -> None:
    if first_out_of_range(bag.ids, reader.num_rows) >= 0:  # else no need to know what is cut off
        reader.check(bag.ids[bag.positions < length])


def _keep(combiner: Combiner, ids: I64, weights: F32 | None) -> Mask:
    """What `tf.nn.safe_embedding_lookup_sparse` does not prune."""
    keep = ids >= 0
    if weights is not None and combiner != "sum":
        keep &= weights > 0  # False for NaN
    return keep


def pruned(bag: Ragged, combiner: Combiner) -> Ragged:
    """The bag without ids < 0 and, for mean and sqrtn, what has a weight <= 0 or NaN."""
    keep = _keep(combiner, bag.ids, bag.weights)
    if keep.all():
        return bag
    kept_before = np.zeros(keep.size + 1, dtype=np.int64)
    np.cumsum(keep, out=kept_before[1:])
    weights = None if bag.weights is None else bag.weights[keep]
    return Ragged(bag.ids[keep], kept_before[bag.row_splits], weights)


def _positions(feature: FeatureSpec, bag: Ragged) -> int:
    """Positions that each example fills in `output_shape`; 0 if examples are combined.

    Raises:
        InputError: the number of examples does not fit the shape.
    """
    shape = feature.output_shape or ()
    if None in shape:
        raise _refusal(feature, f"has a partially known output_shape, {list(shape)}")
    size, num_examples = math.prod(cast("tuple[int, ...]", shape)), bag.num_examples
    if size == num_examples:
        return 0
    if num_examples == 0 or size < num_examples or size % num_examples:
        raise _refusal(
            feature,
            "does not fit its input: Output shape set in the FeatureConfig should be the factor of "
            f"the number of examples; got output shape {list(shape)}, {num_examples} examples",
        )
    return size // num_examples


def _is_raw(feature: FeatureSpec, value: Sparse) -> bool:
    return not feature.validate_weights_and_indices and value.rank <= 2


def _num_segments(value: Sparse) -> int:
    """Rows of an unvalidated lookup: up to the last entry's, whatever `dense_shape` says."""
    return max(0, int(value.indices[-1, 0]) + 1) if value.ids.size else 0


def _segments(feature: FeatureSpec, value: Sparse) -> Ragged:
    """Entries by first coordinate, in CSR form, as they are."""
    row_N = value.indices[:, 0]
    if np.any(row_N[1:] < row_N[:-1]):
        raise _refusal(
            feature,
            "has coordinates out of order without validation: segment ids are not increasing",
        )
    if row_N.size and row_N[0] < 0:
        raise _refusal(feature, f"has the coordinate {row_N[0]}: segment ids must be >= 0")
    return _csr(row_N, _num_segments(value), value.ids, value.weights)


def _valid_entries(feature: FeatureSpec, combiner: Combiner, value: Sparse) -> Ragged:
    """Entries that are not pruned, by row, in CSR form."""
    row_N, ids, weights = _row_numbers(feature, value), value.ids, value.weights
    keep = _keep(combiner, ids, weights)
    if not keep.all():
        row_N, ids = row_N[keep], ids[keep]
        weights = None if weights is None else weights[keep]
    num_rows = math.prod(value.dense_shape[:-1])
    if row_N.size and (row_N.min() < 0 or row_N.max() >= num_rows):
        raise _outside(feature, value)
    return _csr(row_N, num_rows, ids, weights)


def _row_numbers(feature: FeatureSpec, value: Sparse) -> I64:
    """int64 [N]: row-major number of each entry's row, not yet checked.

    Rank 2 takes the first coordinate, wherever the second lies. Other ranks count through
    `dense_shape` as `tf.sparse.reshape` does: what is beyond one dimension goes on in the next.
    """
    if value.rank == 2 or not value.ids.size:
        return value.indices[:, 0]
    strides = [math.prod(value.dense_shape[k + 1 :]) for k in range(value.rank)]
    farthest = [max(-int(c.min()), int(c.max())) for c in value.indices.T]
    reach = max(math.prod(value.dense_shape), sum(map(operator.mul, farthest, strides)))
    if 0 in value.dense_shape or reach > _MAX_INT64:  # a wrapped number could look right
        raise _outside(feature, value)
    place_N = value.indices @ np.array(strides, dtype=np.int64)
    row_N: I64 = np.sign(place_N) * (np.abs(place_N) // value.dense_shape[-1])
    return row_N  # rounded towards 0, as in C++


def _cells(value: Sparse, length: int) -> Ragged:
    """Entries within [B, length], one example per coordinate, in CSR form."""
    num_rows = value.dense_shape[0]
    row_N, column_N = value.indices[:, 0], value.indices[:, 1]
    keep = (row_N >= 0) & (row_N < num_rows) & (column_N >= 0) & (column_N < length)
    cell_N = row_N[keep] * length + column_N[keep]
    return _csr(cell_N, num_rows * length, value.ids[keep], None)


def _csr(row_N: I64, num_rows: int, ids: I64, weights: F32 | None) -> Ragged:
    """Entries of the given rows, each in [0, num_rows), in order of row; equal rows keep theirs."""
    if np.any(row_N[1:] < row_N[:-1]):
        order = np.argsort(row_N, kind="stable")
        row_N, ids = row_N[order], ids[order]
        weights = None if weights is None else weights[order]
    splits = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_N, minlength=num_rows), out=splits[1:])
    return Ragged(ids, splits, weights)


def _outside(feature: FeatureSpec, value: Sparse) -> InputError:
    shape = list(value.dense_shape)
    return _refusal(feature, f"has coordinates outside its dense_shape {shape}")


def _refusal(feature: FeatureSpec, what: str) -> InputError:
    return InputError(f"feature '{feature.name}' {what}", feature.name)
