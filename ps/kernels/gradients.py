"""Gradients of vectors back to rows: the transpose of `ps.kernels.combine`.

`index_N` says which of the U rows an entry adds to. Rows sum up in float32, entry by entry in the
given order, where they lie; the row that an entry adds to is asked for well before. Sorting the
entries by row first, so that a row is summed in registers and written once, costs more than it
saves.

Kernels are compiled for a number of columns and can start at any: columns do not depend on one
another, so that cores may share the work by columns and get the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types
from numba.core.typing.templates import signature

from ps.kernels.compiled import Kernel, inline, kernel
from ps.kernels.vector import (
    CACHE_LINE,
    _intrinsic,
    load,
    load_scalar,
    prefetch,
    prefetch_to_write,
    store,
)
from ps.ragged import F32, I64

_SUM, _MEAN = 0, 1
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_MAX_COUNT = np.uint64(1 << 24)
"""Where counting in float32 stops: 2²⁴ + 1 is not one of its numbers."""

_LANES = 16
_LINES_AHEAD, _MOST_ROWS_AHEAD = 256, 128
_GRADS_AHEAD, _SHORT_ROW = 16, 128
"""Gradients are read in order, which the hardware foresees by itself if they are short."""


def combine_gradients(
    grads_BD: F32,
    index_N: I64,
    splits_B1: I64,
    weights_N: F32,
    combiner: int,
    out_UD: F32,
    columns: slice = slice(None),
) -> None:
    """out[index_i] += (w_i / divisor_b) · grads[b] for every entry i of bag b, in entry order.

    The divisor is that of `ps.kernels.combine.combine_rows`; w/0 counts as 0. `weights_N` of size 0
    means all ones. `out_UD` is added to, so that several features of one table sum up. Only the
    given columns are done.
    """
    first, stop, _ = columns.indices(out_UD.shape[1])
    combine = _combine_for(stop - first, weights_N.size > 0)
    combine(grads_BD, index_N, splits_B1, weights_N, combiner, first, out_UD)


def add_rows(grads_ND: F32, index_N: I64, out_UD: F32, columns: slice = slice(None)) -> None:
    """out[index_i] += grads[i], in order. Only the given columns are done."""
    first, stop, _ = columns.indices(out_UD.shape[1])
    _add_for(stop - first)(grads_ND, index_N, first, out_UD)


def entry_gradients(
    grads_BD: F32, splits_B1: I64, weights_N: F32, combiner: int, out_ND: F32
) -> None:
    """out[i] = (w_i / divisor_b) · grads[b] for every entry i of bag b, not summed by row."""
    write = _entries_for(out_ND.shape[1], weights_N.size > 0)
    write(grads_BD, splits_B1, weights_N, combiner, out_ND)


@functools.cache
def _combine_for(width: int, weighted: bool) -> Kernel[..., None]:
    size, ahead, grads_ahead = _measures(width)
    one = np.uint64(1)

    @kernel(writes=("out_UD",))
    def combine(
        grads_BD: F32,
        index_N: I64,
        splits_B1: I64,
        weights_N: F32,
        combiner: int,
        first: int,
        out_UD: F32,
    ) -> None:
        step = 4 * out_UD.shape[1]
        rows, grad = out_UD.ctypes.data + 4 * first, grads_BD.ctypes.data + 4 * first
        # Places are unsigned, or numba would look for those that count from the end.
        last = np.uint64(index_N.size - 1)
        for b in range(splits_B1.size - 1):
            start, stop = np.uint64(splits_B1[b]), np.uint64(splits_B1[b + 1])
            if grads_ahead:
                _prefetch_gradient(grad + grads_ahead * step, size)
            if not weighted and stop - start == one:  # the commonest bag; its divisor is 1
                _prefetch_row(rows + index_N[min(start + ahead, last)] * step, size, step)
                _add_scaled(rows + index_N[start] * step, grad, _ONE, width)
            else:
                divisor = _divisor(weights_N.ctypes.data, weighted, start, stop, combiner)
                share = _quotient(_ONE, divisor)
                for i in range(start, stop):
                    _prefetch_row(rows + index_N[min(i + ahead, last)] * step, size, step)
                    if weighted:
                        share = _quotient(weights_N[i], divisor)
                    _add_scaled(rows + index_N[i] * step, grad, share, width)
            grad += step

    return combine


@functools.cache
def _add_for(width: int) -> Kernel[..., None]:
    size, ahead, grads_ahead = _measures(width)

    @kernel(writes=("out_UD",))
    def add(grads_ND: F32, index_N: I64, first: int, out_UD: F32) -> None:
        step = 4 * out_UD.shape[1]
        rows, grad = out_UD.ctypes.data + 4 * first, grads_ND.ctypes.data + 4 * first
        last = np.uint64(index_N.size - 1)
        for i in range(np.uint64(index_N.size)):
            _prefetch_row(rows + index_N[min(i + ahead, last)] * step, size, step)
            if grads_ahead:
                _prefetch_gradient(grad + grads_ahead * step, size)
            _add_scaled(rows + index_N[i] * step, grad, _ONE, width)
            grad += step

    return add


@functools.cache
def _entries_for(width: int, weighted: bool) -> Kernel[..., None]:
    size = 4 * width

    @kernel(writes=("out_ND",))
    def entries(grads_BD: F32, splits_B1: I64, weights_N: F32, combiner: int, out_ND: F32) -> None:
        for b in range(splits_B1.size - 1):
            start, stop = np.uint64(splits_B1[b]), np.uint64(splits_B1[b + 1])
            divisor = _divisor(weights_N.ctypes.data, weighted, start, stop, combiner)
            share = _quotient(_ONE, divisor)
            grad = grads_BD.ctypes.data + b * size
            for i in range(start, stop):
                if weighted:
                    share = _quotient(weights_N[i], divisor)
                _write_scaled(out_ND.ctypes.data + i * size, grad, share, width)

    return entries


def _measures(width: int) -> tuple[int, np.uint64, int]:
    """(bytes of so many columns, rows and gradients to prefetch ahead; 0 gradients for none)."""
    size = 4 * width
    ahead = max(1, min(_MOST_ROWS_AHEAD, _LINES_AHEAD * CACHE_LINE // max(1, size)))
    return size, np.uint64(ahead), _GRADS_AHEAD if size > _SHORT_ROW else 0


@inline
def _prefetch_row(row: int, size: int, step: int) -> None:
    """Ask for `size` bytes of a row that will change, where rows are `step` bytes apart."""
    for at in range(0, size, CACHE_LINE):
        prefetch_to_write(row + at)
    if (size - 1) % CACHE_LINE >= step & -step:  # some of them reach into one line more
        prefetch_to_write(row + size - 1)


@inline
def _prefetch_gradient(grad: int, size: int) -> None:
    for at in range(0, size, CACHE_LINE):
        prefetch(grad + at)


@inline
def _divisor(
    weights: int, weighted: bool, start: np.uint64, stop: np.uint64, combiner: int
) -> np.float32:
    """1 (sum), Σw (mean) or √Σw² (sqrtn) of a bag's weights, which lie at an address, if any."""
    if combiner == _SUM:
        return _ONE
    total = np.float32(min(stop - start, _MAX_COUNT))
    if weighted:
        total = _ZERO
        for i in range(start, stop):
            w = load_scalar(weights + 4 * i)
            total += w if combiner == _MEAN else w * w
    return total if combiner == _MEAN else np.sqrt(total)


@inline
def _quotient(w: np.float32, divisor: np.float32) -> np.float32:
    return w / divisor if divisor != _ZERO else _ZERO


@_intrinsic
def _add_scaled(context: Any, row: int, grad: int, share: np.float32, width: int) -> Any:
    """Add share · grad to a row, in `width` columns: a constant where the kernel is compiled."""
    return _scaled(row, grad, share, width, adds=True)


@_intrinsic
def _write_scaled(context: Any, row: int, grad: int, share: np.float32, width: int) -> Any:
    """Write share · grad."""
    return _scaled(row, grad, share, width, adds=False)


def _scaled(row: Any, grad: Any, share: Any, width: Any, *, adds: bool) -> Any:
    tail = width.literal_value % _LANES
    whole = 4 * (width.literal_value - tail)

    def scale(row: int, grad: int, share: np.float32) -> None:
        for at in range(0, whole, 4 * _LANES):
            new = load(grad + at, _LANES) * share
            store(row + at, load(row + at, _LANES) + new if adds else new)
        if tail:
            new = load(grad + whole, tail) * share
            store(row + whole, load(row + whole, tail) + new if adds else new)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        inner = signature(types.void, row, grad, share)
        return context.compile_internal(builder, scale, inner, args[:3])

    return types.void(row, grad, share, width), emit
