"""Rows of a table to vectors: combined by bag, gathered, or placed in sequences.

`index_N` says which row of `rows` an entry reads: the id itself at serving, the place in the
pulled buffer in training. Rows are float32 [V, D] or `QuantizedRows`, whose numbers become float32
as they are read. Sums run in float32, entry by entry in the given order.

A kernel is compiled for a row format and a dim, so that a row is a SIMD value and a bag's sum
stays in registers; other dims are done in blocks of columns, each of a dim that has a kernel.
Random rows are asked for well before they are read, and outputs too big to stay in the caches are
written past them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ps.kernels.compiled import Kernel, inline, kernel
from ps.kernels.rows import (
    QuantizedRows,
    RowFormat,
    load_columns,
    number_bytes,
    prefetch_row,
    record_bytes,
)
from ps.kernels.vector import CACHE_LINE, Vector, splat, store, stream, stream_fence
from ps.ragged import F32, I64

COMBINER_CODES = {"sum": 0, "mean": 1, "sqrtn": 2}
_SUM, _MEAN = 0, 1
_ZERO = np.float32(0.0)
_MAX_COUNT = np.uint64(1 << 24)
"""Where counting in float32 stops: 2²⁴ + 1 is not one of its numbers."""

_BLOCKS = (*range(256, 0, -8), 4, 2, 1)
"""Dims that have kernels of their own, biggest first."""

_LINES_AHEAD = 192
"""How far ahead of being read rows are asked for, in cache lines: with fewer the memory waits,
with more they are gone from the first-level cache again."""

_STREAMED_BYTES = 1 << 24
"""Outputs from this size on are written past the caches: half a server's last-level cache. Below
it whoever reads them next would pay more than is saved here."""


def combine_rows(
    rows: F32 | QuantizedRows,
    index_N: I64,
    splits_B1: I64,
    weights_N: F32,
    combiner: int,
    out_BD: F32,
) -> None:
    """out[b] = (Σ_{i in bag b} w_i · rows[index_i]) / divisor_b.

    The divisor is 1 (sum), Σw (mean) or √Σw² (sqrtn), in float32. 0 for an empty bag and where
    the divisor is 0. `weights_N` of size 0 means all ones. Equals
    `tf.nn.embedding_lookup_sparse`. A sum of n entries is within (n + 1) · 2⁻²⁴ · Σ|w_i · rows|
    of that in real numbers.
    """
    format, dim, records = _records(rows)
    streamed = out_BD.nbytes >= _STREAMED_BYTES and _whole_lines(out_BD)
    for first, combine in _kernels(_combine_for, format, dim):
        combine(records, first, index_N, splits_B1, weights_N, combiner, streamed, out_BD)


def gather_rows(rows: F32 | QuantizedRows, index_N: I64, out_ND: F32) -> None:
    """out[i] = rows[index_i]; of longer float32 rows their first D columns."""
    format, dim, records = _records(rows)
    num_columns = out_ND.shape[1]
    assert num_columns == dim or (format == "float32" and num_columns < dim)
    streamed = out_ND.nbytes >= _STREAMED_BYTES and _whole_lines(out_ND)
    for first, gather in _kernels(_gather_for, format, num_columns, num_columns == dim):
        gather(records, first, index_N, streamed, out_ND)


def scatter_sequences(
    rows: F32 | QuantizedRows, index_N: I64, splits_B1: I64, out_BLD: F32
) -> None:
    """out[b, l] = rows of the l-th id of example b, cut or zero-padded to L positions."""
    format, dim, records = _records(rows)
    streamed = out_BLD.nbytes >= _STREAMED_BYTES and _whole_lines(out_BLD)
    for first, scatter in _kernels(_scatter_for, format, dim):
        scatter(records, first, index_N, splits_B1, streamed, out_BLD)


def _records(
    rows: F32 | QuantizedRows,
) -> tuple[RowFormat, int, npt.NDArray[np.float32] | npt.NDArray[np.uint8]]:
    if isinstance(rows, QuantizedRows):
        return rows.format, rows.dim, rows.records
    return "float32", rows.shape[1], rows


def _whole_lines(out: F32) -> bool:
    """Whether every row is whole cache lines: only such can be written past the caches."""
    return out.ctypes.data % CACHE_LINE == 0 and 4 * out.shape[-1] % CACHE_LINE == 0


def _blocks(dim: int) -> list[tuple[int, int]]:
    """(first column, number of columns) of the blocks that a row is read in."""
    blocks, first = [], 0
    for lanes in _BLOCKS:
        while dim - first >= lanes:
            blocks.append((first, lanes))
            first += lanes
    return blocks


@functools.cache
def _kernels(
    kernel_for: Callable[[RowFormat, int, bool], Kernel[..., None]],
    format: RowFormat,
    dim: int,
    whole: bool = True,
) -> list[tuple[int, Kernel[..., None]]]:
    """(first column, kernel) of the blocks of the first `dim` columns, if not of whole rows."""
    return [(first, kernel_for(format, n, whole and n == dim)) for first, n in _blocks(dim)]


@inline
def _prefetch_entry(columns: int, step: int, size: int, index_N: I64, place: np.uint64) -> None:
    """Ask for `size` bytes of the row that an entry reads, or of the last entry's."""
    # Places are unsigned, or numba would look for those that count from the end.
    row = index_N[min(place, np.uint64(index_N.size - 1))]
    prefetch_row(columns + row * step, size)


@inline
def _write(address: int, row: Vector, streamed: bool) -> None:
    if streamed:
        stream(address, row)
    else:
        store(address, row)


@inline
def _row_bytes(array: npt.NDArray[Any]) -> int:
    size: int = array.shape[array.ndim - 1] * array.itemsize
    return size


@functools.cache
def _combine_for(format: RowFormat, lanes: int, whole: bool) -> Kernel[..., None]:
    size, number = record_bytes(format, lanes), number_bytes(format)
    ahead, one = np.uint64(_LINES_AHEAD * CACHE_LINE // size), np.uint64(1)

    @kernel(writes=("out_BD",))
    def combine(
        records_VD: F32,
        first: int,
        index_N: I64,
        splits_B1: I64,
        weights_N: F32,
        combiner: int,
        streamed: bool,
        out_BD: F32,
    ) -> None:
        rows, step = records_VD.ctypes.data, size if whole else _row_bytes(records_VD)
        columns, out = rows + first * number, out_BD.ctypes.data + 4 * first
        weighted = weights_N.size > 0
        i = np.uint64(splits_B1[0])
        for b in range(splits_B1.size - 1):
            stop = np.uint64(splits_B1[b + 1])
            count = stop - i
            total, weight, squares = splat(_ZERO, lanes), _ZERO, _ZERO
            if not weighted and count == one:  # spares the commonest bag the unrolled loop
                _prefetch_entry(columns, step, size, index_N, i + ahead)
                total = total + load_columns(format, rows + index_N[i] * step, first, lanes)
                i = stop
            while i < stop:
                _prefetch_entry(columns, step, size, index_N, i + ahead)
                row = load_columns(format, rows + index_N[i] * step, first, lanes)
                if weighted:
                    w = weights_N[i]
                    weight += w
                    squares += w * w
                    row = row * w
                total = total + row
                i += one
            if combiner != _SUM:
                if not weighted:
                    weight = squares = np.float32(min(count, _MAX_COUNT))
                divisor = weight if combiner == _MEAN else np.sqrt(squares)
                total = total / divisor if divisor != _ZERO else splat(_ZERO, lanes)
            _write(out, total, streamed)
            out += _row_bytes(out_BD)
        if streamed:
            stream_fence()

    return combine


@functools.cache
def _gather_for(format: RowFormat, lanes: int, whole: bool) -> Kernel[..., None]:
    size, number = record_bytes(format, lanes), number_bytes(format)
    ahead = np.uint64(_LINES_AHEAD * CACHE_LINE // size)

    @kernel(writes=("out_ND",))
    def gather(records_VD: F32, first: int, index_N: I64, streamed: bool, out_ND: F32) -> None:
        rows, step = records_VD.ctypes.data, size if whole else _row_bytes(records_VD)
        columns, out = rows + first * number, out_ND.ctypes.data + 4 * first
        for i in range(np.uint64(index_N.size)):
            _prefetch_entry(columns, step, size, index_N, i + ahead)
            row = load_columns(format, rows + index_N[i] * step, first, lanes)
            _write(out, row, streamed)
            out += _row_bytes(out_ND)
        if streamed:
            stream_fence()

    return gather


@functools.cache
def _scatter_for(format: RowFormat, lanes: int, whole: bool) -> Kernel[..., None]:
    size, number = record_bytes(format, lanes), number_bytes(format)
    ahead = np.uint64(_LINES_AHEAD * CACHE_LINE // size)

    @kernel(writes=("out_BLD",))
    def scatter(
        records_VD: F32, first: int, index_N: I64, splits_B1: I64, streamed: bool, out_BLD: F32
    ) -> None:
        rows, step = records_VD.ctypes.data, size if whole else _row_bytes(records_VD)
        columns, out = rows + first * number, out_BLD.ctypes.data + 4 * first
        for b in range(splits_B1.size - 1):
            start, stop = splits_B1[b], splits_B1[b + 1]
            for i in range(start, start + out_BLD.shape[1]):
                row = splat(_ZERO, lanes)
                if i < stop:
                    place = np.uint64(i)
                    _prefetch_entry(columns, step, size, index_N, place + ahead)
                    row = load_columns(format, rows + index_N[place] * step, first, lanes)
                _write(out, row, streamed)
                out += _row_bytes(out_BLD)
        if streamed:
            stream_fence()

    return scatter
