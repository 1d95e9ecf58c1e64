"""Raw inputs, in whatever form they come, as flat values with row splits.

Two kinds of input, as in TensorFlow. A *dense* one is a NumPy array, a list (of lists, of equal
lengths or not), or a flat or fixed-size-list Arrow array: -1 or "" (0 for weights) means that there
is no value. A *sparse* one is an Arrow list array or `RawValues`: every value counts. A null is
no value in either. The module knows no column.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ps.columns.vocabulary import STRING, integers, string_buffers
from ps.errors import InputError
from ps.ragged import I64, as_ids

MAX_RANK = 3
_PLAIN_TYPES: dict[frozenset[type], pa.DataType] = {
    frozenset((int,)): pa.int64(),
    frozenset((float,)): pa.float64(),
    frozenset((int, float)): pa.float64(),
    frozenset((str,)): STRING,
    frozenset((bytes,)): STRING,
    frozenset((str, bytes)): STRING,
}
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class RawValues:
    """Raw values of B examples in CSR form; a sparse input."""

    values: Any
    """[N] integers, strings or weights: a list, or a NumPy or Arrow array."""
    row_splits: I64
    """int64 [B + 1]: example b owns values, or steps, `row_splits[b]` to `row_splits[b + 1]`."""
    step_splits: I64 | None = None
    """int64 [S + 1], for sequences with several values per step: step s owns values
    `step_splits[s]` to `step_splits[s + 1]`."""


@dataclass(frozen=True, slots=True, eq=False)
class RawInput:
    """A raw input, parsed: any form, one shape."""

    values: pa.Array
    """[N] values, perhaps nulls."""
    splits: tuple[I64, ...]
    """One per dimension after the first one, outermost first; empty for one value per example."""
    dense: bool
    """Whether -1, "" or 0 means no value."""
    typed: bool
    """False for lists, whose numbers have no dtype of their own."""

    @property
    def rank(self) -> int:
        """Number of dimensions, 1 to 3."""
        return len(self.splits) + 1

    def row_splits(self) -> I64:
        """int64 [B + 1] of a rank 1 or 2 input; rank 1 has one value per example."""
        if self.splits:
            return self.splits[0]
        return np.arange(len(self.values) + 1, dtype=np.int64)

    @property
    def is_untyped(self) -> bool:
        """Whether there is no value to tell the type from."""
        return bool(pa.types.is_null(self.values.type))


def parse(raw: Any, key: str) -> RawInput:
    """Any form of raw input.

    Args:
        raw: see the module.
        key: its name, for error messages.

    Raises:
        InputError: a scalar, more than 3 dimensions, mixed types, integers beyond 64 bits, splits
            that do not fit.
    """
    try:
        if isinstance(raw, RawValues):
            found = _from_csr(raw)
        elif isinstance(raw, pa.Array | pa.ChunkedArray):
            found = _from_arrow(raw, typed=True)
        elif isinstance(raw, list | tuple):
            found = _from_list(list(raw))
        else:
            found = _from_numpy(np.asarray(raw))
    except InputError as e:
        raise InputError(f"Feature {key}: {e.message}", key) from None
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError) as e:
        raise InputError(f"Feature {key} cannot be read: {e}", key) from None
    if found.rank > MAX_RANK:
        raise InputError(f"Feature {key} has rank {found.rank}, at most {MAX_RANK} allowed", key)
    return found


def present_values(raw: RawInput, string: bool) -> tuple[Any, Mask]:
    """(values that are there, bool [N]: which of all are there).

    Args:
        raw: strings or integers; the caller has checked which.
        string: whether they are strings.

    Returns:
        an integer array, or a large_binary array without nulls.
    """
    if raw.is_untyped:
        empty = pa.array([], type=STRING) if string else np.zeros(0, dtype=np.int64)
        return empty, np.zeros(len(raw.values), dtype=bool)
    valid = _not_null(raw.values)
    if string:
        strings = raw.values.cast(STRING)
        strings = strings.fill_null(b"") if strings.null_count else strings
        if raw.dense:
            valid &= np.diff(string_buffers(strings)[1]) > 0
        return (strings if valid.all() else strings.filter(pa.array(valid))), valid
    numbers = integers(raw.values)
    if raw.dense and numbers.dtype.kind == "i":
        valid &= numbers != -1
    return numbers[valid], valid


def present_weights(raw: RawInput, dtype: str, key: str) -> tuple[npt.NDArray[Any], Mask]:
    """(float32 weights that are there, bool [N]: which of all are there).

    Raises:
        InputError: not of the dtype that the column declares; a list may hold integers as floats.
    """
    kind = raw.values.type
    if raw.is_untyped:
        return np.zeros(0, dtype=np.float32), np.zeros(len(raw.values), dtype=bool)
    integer, floating = pa.types.is_integer(kind), pa.types.is_floating(kind)
    found = np.dtype(kind.to_pandas_dtype()).name if integer or floating else str(kind)
    same = found == dtype
    if not raw.typed:
        same = integer or (floating and "int" not in dtype)
    if not same:
        raise InputError(f"Bad dtype, expected {dtype}, but got {found}. key: {key}", key)
    valid = _not_null(raw.values)
    values = pc.fill_null(raw.values, 0) if raw.values.null_count else raw.values
    with np.errstate(over="ignore"):  # beyond float32 is infinity, as in TensorFlow
        weights = values.to_numpy(zero_copy_only=False).astype(np.float32)
    if raw.dense:
        valid &= weights != 0
    return weights[valid], valid


def _from_csr(raw: RawValues) -> RawInput:
    values = raw.values
    typed = not isinstance(values, list | tuple)
    if not isinstance(values, pa.Array | pa.ChunkedArray):
        values = _flat_array(np.asarray(values)) if typed else pa.array(values)
    flat = _from_arrow(values, typed)
    if flat.splits:
        raise InputError("values of RawValues must be flat")
    rows = as_ids(raw.row_splits, "row_splits")
    if raw.step_splits is None:
        _check_splits(rows, len(flat.values), "row_splits")
        return RawInput(flat.values, (rows,), False, typed)
    steps = as_ids(raw.step_splits, "step_splits")
    _check_splits(steps, len(flat.values), "step_splits")
    _check_splits(rows, steps.size - 1, "row_splits")
    return RawInput(flat.values, (rows, steps), False, typed)


def _check_splits(splits: I64, total: int, what: str) -> None:
    if splits.size < 1 or splits[0] != 0 or splits[-1] != total or np.any(splits[1:] < splits[:-1]):
        raise InputError(f"{what} must start at 0, never fall and end at {total}")


def _from_list(raw: list[Any]) -> RawInput:
    found = _from_arrow(pa.array(raw, type=_list_type(raw)), typed=False)
    return RawInput(found.values, found.splits, True, False)


def _list_type(raw: list[Any]) -> pa.DataType | None:
    """Arrow's type of plain values in nested lists; None leaves the question to Arrow.

    Arrow looks for pandas whenever it guesses a type, which takes 80 µs where there is none.

    Raises:
        InputError: lists nest too deep, or unevenly.
    """
    flat: list[Any] = raw
    depth = 0
    while (kinds := set(map(type, flat)) - {type(None)}) == {list} and depth < MAX_RANK:
        flat = list(chain.from_iterable(filter(None, flat)))
        depth += 1
    if list in kinds:  # however deep: Arrow would recurse
        raise InputError(f"lists nest deeper than {MAX_RANK} or stand beside values")
    kind = _PLAIN_TYPES.get(frozenset(kinds))
    for _ in range(depth if kind else 0):
        kind = pa.large_list(kind)
    return kind


def _from_numpy(raw: npt.NDArray[Any]) -> RawInput:
    if raw.ndim == 0:
        raise InputError(f"cannot have rank 0. Given: {raw!r:.80}")
    if raw.dtype.kind == "O":
        return _from_list(raw.tolist())
    sizes = np.cumprod(raw.shape)
    splits = tuple(
        np.arange(int(rows) + 1, dtype=np.int64) * width
        for rows, width in zip(sizes[:-1], raw.shape[1:], strict=True)
    )
    return RawInput(_flat_array(raw.reshape(-1)), splits, True, True)


def _flat_array(values: npt.NDArray[Any]) -> pa.Array:
    """[N] as Arrow; an empty array may have any type, as `np.array([])` has."""
    return pa.array(values) if values.size else pa.nulls(0)


def _from_arrow(array: pa.Array, typed: bool) -> RawInput:
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    splits: list[I64] = []
    dense = True
    while _is_list(array.type) and len(splits) < MAX_RANK:
        dense = dense and pa.types.is_fixed_size_list(array.type)
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        splits.append(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        array = array.flatten()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return RawInput(array, tuple(splits), dense, typed)


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _not_null(array: pa.Array) -> Mask:
    if array.null_count == 0:
        return np.ones(len(array), dtype=bool)
    valid: Mask = array.is_valid().to_numpy(zero_copy_only=False)
    return valid.copy()
