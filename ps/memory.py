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
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

CACHE_LINE = 64
_MAPPED_BYTES = 1 << 30
_POOLED_BYTES, _POOL_BYTES = 1 << 20, 1 << 28
_pool: list[mmap.mmap] = []
"""Memory of big arrays that are gone, at most `_POOL_BYTES`."""
_MAP_NORESERVE = 0x4000  # of Linux on x86-64 and arm64; `mmap` has it from Python 3.13 on


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """An array of any content that starts at a cache line.

    Big ones take over the memory of big ones that are gone: new memory would be cleared by the
    system first, page by page, which costs more than a kernel takes to fill it.
    """
    kind = np.dtype(dtype)
    size = _room(shape, kind)
    if size >= _POOLED_BYTES:
        return np.ndarray(shape, kind, _pooled(size))
    return _from_line(np.empty(size, dtype=np.uint8), shape, kind)


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """An array of zeros that starts at a cache line; takes no memory before it is written."""
    kind = np.dtype(dtype)
    size = _room(shape, kind)
    if size >= _MAPPED_BYTES:
        return np.ndarray(shape, kind, _mapped_zeros(size))
    return _from_line(np.zeros(size, dtype=np.uint8), shape, kind)


def _pooled(size: int) -> npt.NDArray[np.uint8]:
    for pages in list(_pool):
        if size <= len(pages) <= 2 * size:
            with contextlib.suppress(ValueError):  # another thread was faster
                _pool.remove(pages)
                break
    else:
        pages = _mapped_zeros(size)
    block = np.frombuffer(pages, dtype=np.uint8)
    weakref.finalize(block, _give_back, pages).atexit = False  # arrays on it keep it alive
    return block


def _give_back(pages: mmap.mmap) -> None:
    if sum(map(len, list(_pool))) + len(pages) <= _POOL_BYTES:
        _pool.append(pages)


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
