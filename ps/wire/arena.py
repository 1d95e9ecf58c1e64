"""Memory that a worker shares with the shards on its host.

An `Arena` belongs to a worker. It is made of segments: anonymous files (`memfd_create`) whose
descriptors travel over the shards' Unix sockets. They have no name, so nobody else can open them,
and the system frees them with the last process that has them, however it ends. A segment never
changes its size, and is sealed against it: a shard that reads one cannot be made to fault. Its
pages are reserved when it is made, so that a full machine gives an error there and then.

The worker alone allocates: a `Block` is taken for each message and returns to the arena when the
last array on it is gone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ps.errors import JobError, ProtocolError
from ps.memory import CACHE_LINE, empty

U8 = npt.NDArray[np.uint8]

MIN_SEGMENT_BYTES = 1 << 22
MIN_BLOCK_BYTES = 1 << 12
MAX_SEGMENTS = 1 << 12
_BLOCK_BYTES = 512  # the unit of `st_blocks`

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def available() -> bool:
    """Whether this system has anonymous shared files."""
    return hasattr(os, "memfd_create")


class Segment:
    """One mapped piece of shared memory."""

    def __init__(self, fd: int, size: int) -> None:
        """Map a file of that size; `fd` stays the caller's."""
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self.size = size
        self.pages = mmap.mmap(fd, size, flags)

    @classmethod
    def attached(cls, fd: int, size: int) -> Segment:
        """Map a segment that another process made, after a look at it.

        Raises:
            ProtocolError: it has another size, could change it, or has no memory behind it.
        """
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        except OSError:  # an ordinary file
            sealed = False
        if not sealed:
            raise ProtocolError("a segment of shared memory must be a memfd sealed against resize")
        status = os.fstat(fd)
        if status.st_size != size or size < 1:
            raise ProtocolError(
                f"a segment of shared memory has {status.st_size} bytes, not {size}"
            )
        if status.st_blocks * _BLOCK_BYTES < size:  # mapping it would take memory for it
            raise ProtocolError(f"a segment of shared memory has not reserved its {size} bytes")
        return cls(fd, size)


class Block:
    """A piece of memory that is cut into arrays, one after the other."""

    __slots__ = ("_free", "_memory", "_place")

    def __init__(self, memory: U8, place: int) -> None:
        self._memory = memory
        self._place = place
        """Of the first byte; see `place`. 0 in private memory, where nobody asks."""
        self._free = 0

    def take(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[Any, int]:
        """The next array of the block, at a cache line, and its place in the arena."""
        start = self._free
        array = np.ndarray(shape, dtype, self._memory, start)
        self._free = start + room(array.nbytes)
        return array, self._place + start


class Memory(Protocol):
    """Where messages are put together."""

    def block(self, size: int) -> Block:
        """At least `size` bytes of any content."""
        ...


def place(segment: int, offset: int) -> int:
    """How messages name a byte of an arena: segment · 2⁴⁰ + offset."""
    return segment << 40 | offset


def segment_and_offset(place: int) -> tuple[int, int]:
    """What `place` was made of."""
    return place >> 40, place & ((1 << 40) - 1)


def address(array: npt.NDArray[np.generic]) -> int:
    """Of an array's first byte."""
    return int(array.__array_interface__["data"][0])


def room(size: int) -> int:
    """Bytes that an array takes in a block."""
    return -(-size // CACHE_LINE) * CACHE_LINE


class _Lease(np.ndarray[Any, np.dtype[np.uint8]]):
    """The memory of a block; `weakref.finalize` would cost five times as much."""

    give_back: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.give_back is not None:
            self.give_back()


class Arena:
    """A worker's segments, and the blocks in use."""

    def __init__(self, max_bytes: int, on_segment: Callable[[int, int, int], None]) -> None:
        """`on_segment(number, fd, size)` is called with each new segment, to tell the shards."""
        self._max_bytes = max_bytes
        self._on_segment = on_segment
        self._segments: list[Segment] = []
        self._fds: list[int] = []
        self._used_of_last = 0
        self._free: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        self._closed = False
        self.size_bytes = 0

    def block(self, size: int) -> Block:
        """A block of at least `size` bytes, of any content.

        Raises:
            JobError: the arena would grow beyond its limit, or the machine has no memory left, or
                it is closed.
        """
        size = max(MIN_BLOCK_BYTES, 1 << (size - 1).bit_length())
        free = self._free[size]
        segment, offset = free.pop() if free else self._carved(size)
        try:
            pages = self._segments[segment].pages
        except IndexError:
            self._check_open()  # another thread may have closed it just now
            raise
        # NumPy follows the bases of views down to this very array, so that it lives as long as any
        # array on the block.
        memory: _Lease = np.ndarray.__new__(_Lease, (size,), np.uint8, pages, offset)
        memory.give_back = partial(free.append, (segment, offset))
        return Block(memory, place(segment, offset))

    def _carved(self, size: int) -> tuple[int, int]:
        segments = self._segments
        if not segments or self._used_of_last + size > segments[-1].size:
            self._grow(max(size, MIN_SEGMENT_BYTES, 1 << (self.size_bytes // 2).bit_length()))
        offset = self._used_of_last
        self._used_of_last += size
        return len(self._segments) - 1, offset

    def _check_open(self) -> None:
        if self._closed:
            raise JobError("the arena of this transport is closed")

    def _grow(self, size: int) -> None:
        self._check_open()
        self._leave_no_rest()
        if self.size_bytes + size > self._max_bytes or len(self._segments) == MAX_SEGMENTS:
            raise JobError(
                f"the messages under way need more than {self._max_bytes} bytes of shared memory "
                f"({self.size_bytes} are in use, {size} more are wanted); use smaller batches"
            )
        fd = os.memfd_create("manta-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            segment = Segment(fd, size)
        except OSError as e:
            os.close(fd)
            raise JobError(f"no {size} bytes of shared memory: {e.strerror}") from None
        self._segments.append(segment)
        self._fds.append(fd)
        self._used_of_last = 0
        self.size_bytes += size
        self._on_segment(len(self._segments) - 1, fd, size)

    def _leave_no_rest(self) -> None:
        """What the last segment has left becomes free blocks."""
        if not self._segments:
            return
        number, end = len(self._segments) - 1, self._segments[-1].size
        while self._used_of_last < end:
            left = end - self._used_of_last
            size = 1 << (left.bit_length() - 1)
            self._free[size].append((number, self._used_of_last))
            self._used_of_last += size

    def announce(self, tell: Callable[[int, int, int], None]) -> None:
        """Call `tell(number, fd, size)` for every segment that there is."""
        for number, (fd, segment) in enumerate(zip(self._fds, self._segments, strict=True)):
            tell(number, fd, segment.size)

    def close(self) -> None:
        """Close the files; the memory goes with the last array on it."""
        self._closed = True
        for fd in self._fds:
            os.close(fd)
        # New ones: another thread may have these in hand.
        self._fds, self._segments, self._free = [], [], defaultdict(list)


class PrivateMemory:
    """Blocks for a worker that shares no memory with any shard."""

    def block(self, size: int) -> Block:
        """See `Arena.block`."""
        return Block(empty((size,), np.uint8), 0)
