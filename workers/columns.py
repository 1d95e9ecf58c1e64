"""Arrow columns as NumPy: id bags with weights, and plain numbers.

A missing id is no id: a null in an integer column gives an empty bag, a null list too, and a null
inside a list is left out together with its weight.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ps.errors import DataError
from ps.ragged import F32, I64, Ragged
from workers.config import DataConfig, FeatureEntry


def check_schema(
    schema: pa.Schema, data: DataConfig, features: Mapping[str, FeatureEntry], path: Path
) -> None:
    """Check that every column a job names is there and has a usable type.

    Raises:
        DataError: names the data set, the column, its type and the wanted type.
    """
    for name in (data.label, *data.dense):
        kind = _type_of(schema, name, path)
        if not (
            pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        ):
            raise DataError(f"data set {path}: column '{name}' is {kind}, wanted a number")
    for name, feature in features.items():
        column = feature.column or name
        kind = _type_of(schema, column, path)
        if not pa.types.is_integer(kind.value_type if _is_list(kind) else kind):
            raise DataError(
                f"data set {path}: column '{column}' of feature '{name}' is {kind}, "
                "wanted integers or lists of integers"
            )
        if feature.weights is not None:
            weights = _type_of(schema, feature.weights, path)
            number = weights.value_type if _is_list(weights) else weights
            if not (pa.types.is_integer(number) or pa.types.is_floating(number)):
                raise DataError(
                    f"data set {path}: column '{feature.weights}' with the weights of feature "
                    f"'{name}' is {weights}, wanted numbers or lists of numbers"
                )


def number_column(table: pa.Table, column: str) -> F32:
    """float32 [B] of a number column; may be read-only memory of Arrow's.

    Raises:
        DataError: a null, NaN or infinity.
    """
    values = table[column]
    if values.null_count:
        raise DataError(f"column '{column}' has {values.null_count} nulls, wanted numbers only")
    if values.type != pa.float32():
        values = values.cast(pa.float32(), safe=False)
    numbers: F32 = _whole(values).to_numpy(zero_copy_only=False)
    _check_finite(numbers, column)
    return numbers


def _check_finite(numbers: F32, column: str) -> None:
    finite = np.isfinite(numbers)
    if not finite.all():
        raise DataError(
            f"column '{column}' holds {numbers[~finite][0]}, wanted finite float32 numbers"
        )


def bag_column(table: pa.Table, column: str, weight_column: str | None) -> Ragged:
    """The ids of a column, and the weights of another, for B examples.

    Arrays that need no other type are Arrow's own memory, read-only.

    Raises:
        DataError: lists of different lengths, or weights that are null, NaN or infinite.
    """
    ids, splits, valid = _flat(table, column)
    weights: F32 | None = None
    if weight_column is not None:
        numbers, weight_splits, weight_valid = _flat(table, weight_column)
        if not np.array_equal(splits, weight_splits):
            raise DataError(
                f"columns '{column}' and '{weight_column}' differ in the length of their lists"
            )
        if weight_valid is not None:
            raise DataError(f"column '{weight_column}' has null weights, wanted numbers only")
        weights = numbers.astype(np.float32, copy=False)
        _check_finite(weights, weight_column)
    if valid is not None:
        splits = splits_of(valid)[splits]
        ids = ids[valid]
        weights = None if weights is None else weights[valid]
    return Ragged(ids, splits, weights)


def splits_of(lengths: np.ndarray) -> I64:
    """int64 [B + 1]: row splits of examples of these lengths, of any shape."""
    splits = np.zeros(lengths.size + 1, dtype=np.int64)
    np.cumsum(lengths, out=splits[1:])
    return splits


@functools.lru_cache(maxsize=8)
def one_each(num_examples: int) -> I64:
    """Row splits of examples with one id each: one read-only array that all of them share."""
    splits = np.arange(num_examples + 1, dtype=np.int64)
    splits.flags.writeable = False
    return splits


def _flat(table: pa.Table, column: str) -> tuple[np.ndarray, I64, np.ndarray | None]:
    """(values [N], row_splits [B + 1], bool [N]: not null) of a scalar or list column.

    None in place of the last where nothing is null.
    """
    array = _whole(table[column])
    if _is_list(array.type):
        values, splits = array.flatten(), _list_splits(array)
    else:
        values, splits = array, one_each(len(array))
    valid: np.ndarray | None = None
    if values.null_count:
        valid = values.is_valid().to_numpy(zero_copy_only=False)
        values = values.fill_null(0)
    return values.to_numpy(zero_copy_only=False), splits, valid


def _list_splits(array: pa.Array) -> I64:
    """Row splits of lists as `flatten` lays them out: without what lies behind null lists."""
    if array.null_count or pa.types.is_fixed_size_list(array.type):
        return splits_of(pc.fill_null(pc.list_value_length(array), 0).to_numpy())
    offsets: I64 = array.offsets.to_numpy().astype(np.int64, copy=False)
    return offsets - offsets[0] if offsets[0] else offsets


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """One array; a copy only where there are several."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _type_of(schema: pa.Schema, column: str, path: Path) -> pa.DataType:
    if column not in schema.names:
        raise DataError(
            f"data set {path} has no column '{column}'; it has {', '.join(schema.names)}"
        )
    return schema.field(column).type
