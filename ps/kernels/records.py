"""Whole records of a table, each a row and its slots side by side: copied, kept aside, taken apart.

One machine code serves records of any length: these copies wait for memory, not for the loop.
Whoever calls has checked the indices.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ps.kernels.compiled import inline, kernel
from ps.kernels.vector import CACHE_LINE, Address, load, prefetch, prefetch_to_write, store
from ps.ragged import F32, I64

U32 = npt.NDArray[np.uint32]

_LANES = 16
_LINES_AHEAD, _MOST_ROWS_AHEAD = 128, 64
_ONE, _NEVER = np.uint64(1), np.uint32(0)

# Places are unsigned in all loops, or numba would look for those that count from the end; addresses
# are signed, so that numba keeps them integers where a size is added.


@kernel(writes=("out_NW",))
def gather_records(records_VW: F32, index_N: I64, out_NW: F32) -> None:
    """out[i] = records[index_i]."""
    size = 4 * records_VW.shape[1]
    records, out = np.int64(records_VW.ctypes.data), np.int64(out_NW.ctypes.data)
    ahead, last = _ahead(size), np.uint64(index_N.size - 1)
    for i in range(np.uint64(index_N.size)):
        _prefetch(records + index_N[min(i + ahead, last)] * size, size)
        _copy(records + index_N[i] * size, out, size)
        out += size


@kernel(writes=("records_VW",))
def scatter_records(new_NW: F32, index_N: I64, records_VW: F32) -> None:
    """records[index_i] = new[i], in order."""
    size = 4 * records_VW.shape[1]
    records, new = np.int64(records_VW.ctypes.data), np.int64(new_NW.ctypes.data)
    ahead, last = _ahead(size), np.uint64(index_N.size - 1)
    for i in range(np.uint64(index_N.size)):
        _prefetch_to_write(records + index_N[min(i + ahead, last)] * size, size)
        _copy(new, records + index_N[i] * size, size)
        new += size


@kernel(writes=("places_V", "saved_VW"))
def save_records(
    records_VW: F32, index_N: I64, passed: int, places_V: U32, count: int, saved_VW: F32
) -> int:
    """Copy records that are about to change behind the `count` saved ones; returns the new count.

    Those below `passed` and those that are saved already are left out; rows may repeat. Row r is
    saved as `saved[places[r] - 1]`; places of rows that are not are 0, so that memory nobody has
    written to says so.
    """
    size = 4 * records_VW.shape[1]
    records, saved = np.int64(records_VW.ctypes.data), np.int64(saved_VW.ctypes.data)
    places = np.int64(places_V.ctypes.data)
    ahead, last = _ahead(size), np.uint64(index_N.size - 1)
    first, number = np.uint64(passed), np.uint64(count)
    for i in range(np.uint64(index_N.size)):
        soon = index_N[min(i + ahead, last)]
        _prefetch(records + soon * size, size)
        prefetch_to_write(places + 4 * soon)
        row = np.uint64(index_N[i])
        if row >= first and places_V[row] == _NEVER:
            _copy(records + index_N[i] * size, saved + np.int64(number) * size, size)
            number += _ONE
            places_V[row] = number
    return int(np.int64(number))


@kernel(writes=("out_AND",))
def split_records(records_VW: F32, first: int, out_AND: F32) -> None:
    """out[a, i] = array a (the row, then its slots) of record first + i."""
    if out_AND.shape[2] < _LANES:
        _split_short(records_VW, np.uint64(first), out_AND)
        return
    num_arrays, num_rows, row_bytes = out_AND.shape[0], out_AND.shape[1], 4 * out_AND.shape[2]
    size, array_bytes = 4 * records_VW.shape[1], num_rows * row_bytes
    source = np.int64(records_VW.ctypes.data) + first * size
    out = np.int64(out_AND.ctypes.data)
    for _ in range(num_rows):
        part, target = source, out
        for _ in range(num_arrays):
            _copy(part, target, row_bytes)
            part += row_bytes
            target += array_bytes
        source += size
        out += row_bytes


@kernel(writes=("out_AND",))
def patch_saved(places_V: U32, saved_VW: F32, first: int, out_AND: F32) -> None:
    """out[a, i] = array a of record first + i as `save_records` saved it, where it did."""
    num_arrays, num_rows, row_bytes = out_AND.shape[0], out_AND.shape[1], 4 * out_AND.shape[2]
    size, array_bytes = 4 * saved_VW.shape[1], num_rows * row_bytes
    saved, out = np.int64(saved_VW.ctypes.data), np.int64(out_AND.ctypes.data)
    for i in range(np.uint64(num_rows)):
        place = places_V[np.uint64(first) + i]
        if place != _NEVER:
            part = saved + (np.int64(place) - 1) * size
            target = out + np.int64(i) * row_bytes
            for _ in range(num_arrays):
                _copy(part, target, row_bytes)
                part += row_bytes
                target += array_bytes


@inline
def _split_short(records_VW: F32, first: np.uint64, out_AND: F32) -> None:
    """`split_records` for rows of a few numbers, where a copy by address takes longer to start."""
    dim, column = np.uint64(out_AND.shape[2]), np.uint64(0)
    for a in range(np.uint64(out_AND.shape[0])):
        for i in range(np.uint64(out_AND.shape[1])):
            for d in range(dim):
                out_AND[a, i, d] = records_VW[first + i, column + d]
        column += dim


@inline
def _ahead(size: int) -> np.uint64:
    """How many rows of so many bytes to ask for ahead of time."""
    return np.uint64(max(1, min(_MOST_ROWS_AHEAD, _LINES_AHEAD * CACHE_LINE // max(1, size))))


@inline
def _prefetch(record: Address, size: int) -> None:
    for at in range(0, size, CACHE_LINE):
        prefetch(record + at)


@inline
def _prefetch_to_write(record: Address, size: int) -> None:
    for at in range(0, size, CACHE_LINE):
        prefetch_to_write(record + at)


@inline
def _copy(source: Address, target: Address, size: int) -> None:
    whole = size - size % (4 * _LANES)
    for at in range(0, whole, 4 * _LANES):
        store(target + at, load(source + at, _LANES))
    for at in range(whole, size, 4):
        store(target + at, load(source + at, 1))
