"""Arrays as the kernels like them: starting at a cache line, on huge pages when they are big.

A row of 16 float32 is one cache line; in an array that starts elsewhere every row straddles two.
Random rows of gigabytes miss the TLB with pages of 4 KiB; NumPy asks for huge pages for every
array of 4 MiB and more, where the system grants them on request (Linux:
`/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or `always`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

CACHE_LINE = 64


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """An array of any content that starts at a cache line."""
    kind = np.dtype(dtype)
    return _from_line(np.empty(_room(shape, kind), dtype=np.uint8), shape, kind)


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """An array of zeros that starts at a cache line; takes no memory before it is written."""
    kind = np.dtype(dtype)
    return _from_line(np.zeros(_room(shape, kind), dtype=np.uint8), shape, kind)


def _room(shape: tuple[int, ...], kind: np.dtype[Any]) -> int:
    return math.prod(shape) * kind.itemsize + CACHE_LINE


def _from_line(
    room: npt.NDArray[np.uint8], shape: tuple[int, ...], kind: np.dtype[Any]
) -> npt.NDArray[Any]:
    return np.ndarray(shape, kind, room, -room.ctypes.data % CACHE_LINE)  # buffer, offset
