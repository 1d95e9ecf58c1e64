"""Bags in another order: how examples are mixed before training.

Bags lie one after the other, so that each is copied as one run. Where the next ones lie is looked
up, and their first lines are asked for, well before they are copied.
"""

from __future__ import annotations

import numpy as np

from ps.kernels.compiled import kernel
from ps.kernels.vector import CACHE_LINE, prefetch
from ps.ragged import F32, I64

_ONE = np.uint64(1)
_SPLITS_AHEAD, _BAGS_AHEAD = np.uint64(32), np.uint64(16)
_MOST_BYTES_AHEAD = 4 * CACHE_LINE
"""Of one bag; the hardware foresees the rest."""


@kernel(writes=("ids_out_N", "weights_out_N"))
def take_bags(
    ids_N: I64,
    splits_B1: I64,
    weights_N: F32,
    order_M: I64,
    ids_out_N: I64,
    weights_out_N: F32,
) -> None:
    """Bag order[0], bag order[1], …, one after the other; no weights for size 0."""
    at, last = np.uint64(0), np.uint64(order_M.size) - _ONE
    ids, weights, weighted = ids_N.ctypes.data, weights_N.ctypes.data, weights_N.size > 0
    # Places are unsigned, or numba would look for those that count from the end.
    for m in range(np.uint64(order_M.size)):
        prefetch(splits_B1.ctypes.data + 8 * order_M[min(m + _SPLITS_AHEAD, last)])
        soon = np.uint64(order_M[min(m + _BAGS_AHEAD, last)])
        first, count = splits_B1[soon], splits_B1[soon + _ONE] - splits_B1[soon]
        for byte in range(0, min(8 * count, _MOST_BYTES_AHEAD), CACHE_LINE):
            prefetch(ids + 8 * first + byte)
        bag = np.uint64(order_M[m])
        start = np.uint64(splits_B1[bag])
        size = np.uint64(splits_B1[bag + _ONE]) - start
        for i in range(size):
            ids_out_N[at + i] = ids_N[start + i]
        if weighted:
            for byte in range(0, min(4 * count, _MOST_BYTES_AHEAD), CACHE_LINE):
                prefetch(weights + 4 * first + byte)
            for i in range(size):
                weights_out_N[at + i] = weights_N[start + i]
        at += size
