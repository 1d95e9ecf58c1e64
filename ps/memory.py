"""Arrays as the kernels like them: starting at a cache line, on huge pages when they are big.

A row of 16 float32 is one cache line; in an array that starts elsewhere every row straddles two.
Random rows of gigabytes miss the TLB with pages of 4 KiB; NumPy asks for huge pages for every
array of 4 MiB and more, where the system grants them on request (Linux:
`/sys/kernel/mm/transparent_hugepage/enabled` says `madvise` or `always`).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

CACHE_LINE = 64
_MAPPED_BYTES = 1 << 30
_MAP_NORESERVE = 0x4000  # of Linux on x86-64 and arm64; `mmap` has it from Python 3.13 on


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """An array of any content that starts at a cache line."""
    kind = np.dtype(dtype)
    return _from_line(np.empty(_room(shape, kind), dtype=np.uint8), shape, kind)


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """An array of zeros that starts at a cache line; takes no memory before it is written."""
    kind = np.dtype(dtype)
    size = _room(shape, kind)
    if size >= _MAPPED_BYTES:
        return np.ndarray(shape, kind, _mapped_zeros(size))
    return _from_line(np.zeros(size, dtype=np.uint8), shape, kind)


def _mapped_zeros(size: int) -> mmap.mmap:
    """Linux refuses to reserve more than it has at once, which a sparse table never needs."""
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _room(shape: tuple[int, ...], kind: np.dtype[Any]) -> int:
    return math.prod(shape) * kind.itemsize + CACHE_LINE


def _from_line(
    room: npt.NDArray[np.uint8], shape: tuple[int, ...], kind: np.dtype[Any]
) -> npt.NDArray[Any]:
    return np.ndarray(shape, kind, room, -room.ctypes.data % CACHE_LINE)  # buffer, offset
