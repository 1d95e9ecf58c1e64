"""What a cache of rows does once per row: which are fresh, and copies from place to place."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from ps.kernels.compiled import Kernel, kernel
from ps.kernels.vector import CACHE_LINE, prefetch, prefetch_to_write
from ps.ragged import F32, I64

_LINES_AHEAD, _MOST_ROWS_AHEAD = 128, 64
_ONE = np.uint64(1)

# Places are unsigned in all loops, or numba would look for those that count from the end.


@kernel(writes=("used_C", "fresh_U", "missing_U"))
def split_fresh(
    kept_U: I64,
    pulled_at_C: I64,
    oldest: int,
    used_C: npt.NDArray[np.bool_],
    fresh_U: I64,
    missing_U: I64,
) -> int:
    """Tell kept rows pulled at `oldest` or later from all others, and mark them as used.

    `kept_U` has rows of the cache, -1 where there is none. Writes the places of fresh rows to the
    front of `fresh_U`, those of the others to the front of `missing_U`, both ascending; what is
    behind them is undefined. Returns how many are fresh.
    """
    fresh, missing = np.uint64(0), np.uint64(0)
    for u in range(np.uint64(kept_U.size)):
        row = np.uint64(max(kept_U[u], 0))
        is_fresh = (kept_U[u] >= 0) & (pulled_at_C[row] >= oldest)
        used_C[row] |= is_fresh
        fresh_U[fresh] = missing_U[missing] = u
        fresh += np.uint64(is_fresh)
        missing += _ONE - np.uint64(is_fresh)
    return int(np.int64(fresh))


def copy_rows(rows_VD: F32, from_N: I64, out_WD: F32, to_N: I64) -> None:
    """out[to_i] = rows[from_i], in order."""
    _copy_for(out_WD.shape[1])(rows_VD, from_N, out_WD, to_N)


@functools.cache
def _copy_for(width: int) -> Kernel[..., None]:
    size = 4 * width
    ahead = np.uint64(max(1, min(_MOST_ROWS_AHEAD, _LINES_AHEAD * CACHE_LINE // max(1, size))))

    @kernel(writes=("out_WD",))
    def copy(rows_VD: F32, from_N: I64, out_WD: F32, to_N: I64) -> None:
        last = np.uint64(to_N.size) - _ONE
        rows, out = rows_VD.ctypes.data, out_WD.ctypes.data
        for i in range(np.uint64(to_N.size)):
            soon = min(i + ahead, last)
            source, target = rows + from_N[soon] * size, out + to_N[soon] * size
            for at in range(0, size, CACHE_LINE):
                prefetch(source + at)
                prefetch_to_write(target + at)
            row, place = np.uint64(from_N[i]), np.uint64(to_N[i])
            for column in range(width):
                out_WD[place, column] = rows_VD[row, column]

    return copy
