"""Several features of a request in one call: their tables have one dim and one row format.

The tables come as addresses of their first rows, because a kernel cannot take a list of arrays.
Whoever holds such addresses keeps the C-contiguous arrays alive, as `ps.feature_group` does. Ids
need no check before: nothing but rows of the tables is read.

The entries of all features form one list, along which rows are prefetched: those of a small
request are all on their way before the first is needed.
"""

from __future__ import annotations

import functools

import numpy as np

from ps.kernels.compiled import Kernel, inline, kernel
from ps.kernels.rows import RowFormat, load_columns, prefetch_row, record_bytes
from ps.kernels.vector import CACHE_LINE, splat, store
from ps.ragged import F32, I64

KEEP_ALL, KEEP_IDS, KEEP_WEIGHTED = 0, 1, 2
"""Which entries of a feature count: all; those with an id >= 0; of these, if there are weights,
those with a weight > 0."""

CombineFeatures = Kernel[[I64, F32, I64, I64, I64, I64, I64, F32], bool]
GatherFeatures = Kernel[[I64, I64, I64, F32], bool]

_SUM, _SQRTN = 0, 2
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_NO_WEIGHTS: F32 = np.zeros(0, dtype=np.float32)
_NOWHERE = 0
_LOWEST = -(2**63)
_LINES_AHEAD = 128
_MAX_LANES = 64
"""Wider sums leave the registers of AVX2 (16 of 8 lanes) and NEON (32 of 4)."""


@functools.cache
def combine_features_for(format: RowFormat, dim: int) -> CombineFeatures:
    """The kernel `combine_features` for rows of one format and dim.

    out[f, b] is what `ps.kernels.combine.combine_rows` makes of the entries that count of example b
    of feature f. Other entries may have any id.

    Args of the kernel:
        ids_N: of all features, one after the other; overwritten.
        weights_N: like the ids; of size 0 for all ones.
        splits_FS: int64 [F, B + 1], row splits of each feature, from 0.
        first_row_F: address of each feature's table.
        num_rows_F: rows in it.
        combiner_F: of `COMBINER_CODES`.
        keep_F: `KEEP_ALL`, `KEEP_IDS` or `KEEP_WEIGHTED`.
        out_FBD: float32 [F, B, D].

    The kernel returns whether all ids that count are in their tables; if not, it has read no row
    and written nothing to `out_FBD`.
    """
    size, ahead, lanes, num_pieces = _measures(format, dim)

    @kernel(writes=("ids_N", "out_FBD"))
    def combine_features(
        ids_N: I64,
        weights_N: F32,
        splits_FS: I64,
        first_row_F: I64,
        num_rows_F: I64,
        combiner_F: I64,
        keep_F: I64,
        out_FBD: F32,
    ) -> bool:
        num_examples, stop = out_FBD.shape[1], 0
        for f in range(first_row_F.size):
            start, stop = stop, stop + splits_FS[f, num_examples]
            first_row, num_rows, keep = first_row_F[f], num_rows_F[f], keep_F[f]
            if not _locate(ids_N, weights_N, start, stop, first_row, num_rows, size, keep):
                return False
        _prefetch_first(ids_N, ahead, size)
        stop = 0
        for f in range(first_row_F.size):
            combiner = combiner_F[f]
            for b in range(num_examples):
                start, stop = stop, stop + splits_FS[f, b + 1] - splits_FS[f, b]
                for piece in range(num_pieces):
                    column = min(piece * lanes, dim - lanes)
                    total, divisor = splat(_ZERO, lanes), _ZERO
                    for i in range(np.uint64(start), np.uint64(stop)):
                        soon = i + np.uint64(ahead)
                        if piece == 0 and soon < np.uint64(ids_N.size):
                            prefetch_row(ids_N[soon], size)
                        if ids_N[i] != _NOWHERE:
                            w = weights_N[i] if weights_N.size else _ONE
                            total = total + load_columns(format, ids_N[i], column, lanes) * w
                            divisor += w * w if combiner == _SQRTN else w
                    if combiner == _SQRTN:
                        divisor = np.sqrt(divisor)
                    if combiner != _SUM:
                        total = total / divisor if divisor != _ZERO else splat(_ZERO, lanes)
                    place = (f * num_examples + b) * dim + column
                    store(out_FBD.ctypes.data + 4 * place, total)
        return True

    return combine_features


@functools.cache
def gather_features_for(format: RowFormat, dim: int) -> GatherFeatures:
    """The kernel `gather_features` for rows of one format and dim.

    out[f, b] is the row of the b-th id of feature f. Arguments and result are those of
    `combine_features`, with ids [F, B] in `ids_N`, all of which count.
    """
    size, ahead, lanes, num_pieces = _measures(format, dim)

    @kernel(writes=("ids_N", "out_FBD"))
    def gather_features(ids_N: I64, first_row_F: I64, num_rows_F: I64, out_FBD: F32) -> bool:
        stop = 0
        for f in range(first_row_F.size):
            start, stop = stop, stop + out_FBD.shape[1]
            first_row, num_rows = first_row_F[f], num_rows_F[f]
            if not _locate(ids_N, _NO_WEIGHTS, start, stop, first_row, num_rows, size, KEEP_ALL):
                return False
        _prefetch_first(ids_N, ahead, size)
        for i in range(np.uint64(ids_N.size)):
            soon = i + np.uint64(ahead)
            if soon < np.uint64(ids_N.size):
                prefetch_row(ids_N[soon], size)
            for piece in range(num_pieces):
                column = min(piece * lanes, dim - lanes)
                row = load_columns(format, ids_N[i], column, lanes)
                store(out_FBD.ctypes.data + 4 * (np.int64(i) * dim + column), row)
        return True

    return gather_features


def _measures(format: RowFormat, dim: int) -> tuple[int, int, int, int]:
    """(bytes of a row, rows to prefetch ahead, columns in a piece of a row, pieces).

    LLVM keeps a sum in registers only if its lanes are a power of two. Of other dims, the last
    piece overlaps the one before.
    """
    size = record_bytes(format, dim)
    lanes = min(_MAX_LANES, 1 << (dim.bit_length() - 1))
    return size, max(4, _LINES_AHEAD * CACHE_LINE // size), lanes, -(-dim // lanes)


@inline
def _locate(
    ids_N: I64,
    weights_N: F32,
    start: int,
    stop: int,
    first_row: int,
    num_rows: int,
    size: int,
    keep: int,
) -> bool:
    """Turn the ids of one feature into addresses of rows; whether all that count are in range.

    Indices are unsigned, as in the kernels, or numba would look for places counted from the end;
    without branches for the ids, LLVM makes it SIMD.
    """
    lowest = 0 if keep == KEEP_ALL else _LOWEST
    weighted = keep == KEEP_WEIGHTED and weights_N.size > 0
    num_bad = 0
    for i in range(np.uint64(start), np.uint64(stop)):
        row = ids_N[i] if not weighted or weights_N[i] > _ZERO else -1
        num_bad += (row < lowest) | (row >= num_rows)
        ids_N[i] = first_row + row * size if row >= 0 else _NOWHERE
    return num_bad == 0


@inline
def _prefetch_first(places_N: I64, count: int, size: int) -> None:
    for i in range(min(count, places_N.size)):
        prefetch_row(places_N[i], size)
