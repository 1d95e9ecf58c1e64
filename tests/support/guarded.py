"""Arrays whose neighbourhood notices a stray access.

A guarded array lies against a page that nobody may touch: reading or writing beyond that end ends
the process. Canaries are bytes around an output that must keep their value.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tests.support.strategies import frozen, unaligned

_PROT_NONE = 0
_CANARY = 0xA5
_MARGIN = 4096

_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(array: npt.NDArray[Any], edge: Literal["start", "end"] = "end") -> npt.NDArray[Any]:
    """A copy that starts right after, or ends right before, an inaccessible page."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    raw = np.frombuffer(memory, dtype=np.uint8)
    for place in (0, size + page):
        if _mprotect(raw.ctypes.data + place, page, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = page if edge == "start" else page + size - array.nbytes
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Canaries:
    """An output array, full of NaN at first, with bytes on both sides that must not change."""

    def __init__(self, shape: tuple[int, ...], *, offset: int = 0) -> None:
        """Make a float32 array that starts `offset` bytes after a cache line's start."""
        size = 4 * int(np.prod(shape))
        self._raw = np.full(size + 2 * _MARGIN, _CANARY, dtype=np.uint8)
        start = _MARGIN // 2
        start += -(self._raw.ctypes.data + start) % 64 + offset
        self._inside = slice(start, start + size)
        self.array: npt.NDArray[np.float32] = (
            self._raw[self._inside].view(np.float32).reshape(shape)
        )
        self.array.fill(np.nan)

    @property
    def intact(self) -> bool:
        """Whether nothing was written outside the array."""
        before, after = self._raw[: self._inside.start], self._raw[self._inside.stop :]
        return bool((before == _CANARY).all() and (after == _CANARY).all())


EVERY_KIND: tuple[tuple[Callable[[npt.NDArray[Any]], npt.NDArray[Any]], int], ...] = (
    (np.copy, 0),
    (frozen, 4),
    (unaligned, 1),
    (lambda a: guarded(a, "start"), 0),
    (lambda a: guarded(a, "end"), 0),
)
"""Kinds of arrays that a kernel is given, each with the offset of the output's `Canaries`."""
