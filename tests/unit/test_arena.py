"""The arena: memory comes back when the last array on it is gone, and can be trusted by a shard."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import JobError, ProtocolError
from ps.wire.arena import (
    MIN_BLOCK_BYTES,
    MIN_SEGMENT_BYTES,
    Arena,
    PrivateMemory,
    Segment,
    address,
    available,
    place,
    room,
    segment_and_offset,
)

pytestmark = pytest.mark.skipif(not available(), reason="this system has no memfd_create")

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(64 * MIB, lambda *_: None)
    yield arena
    arena.close()


def segments_of(max_bytes: int = 64 * MIB) -> tuple[Arena, list[tuple[int, int, int]]]:
    """An arena, and what it says of its segments."""
    told: list[tuple[int, int, int]] = []
    return Arena(max_bytes, lambda *segment: told.append(segment)), told


# --- blocks


def views_of(array: Any) -> dict[str, Any]:
    return {
        "the array": array,
        "a slice": array[3:5],
        "a slice of a slice": array[1:][2:4][:1],
        "reshaped": array.reshape(-1, 2)[1:],
        "another dtype": array.view(np.uint8)[4:],
        "transposed": array.reshape(2, -1).T,
        "a row": array.reshape(4, -1)[2],
        "broadcast": np.broadcast_to(array, (3, array.size)),
        "a memoryview": memoryview(array),
        "from a memoryview": np.frombuffer(memoryview(array), np.float32),
        "an empty slice": array[:0],
    }


@pytest.mark.parametrize("name", views_of(np.zeros(8, np.float32)))
def test_a_block_returns_when_the_last_view_on_it_is_gone(arena: Arena, name: str) -> None:
    block = arena.block(100)
    array, start = block.take((8,), np.float32)
    view = views_of(array)[name]
    del array, block
    other, elsewhere = arena.block(100).take((8,), np.float32)
    assert elsewhere != start, "somebody still looks at it"
    del other, view
    again = {arena.block(100).take((8,), np.float32)[1] for _ in range(2)}
    assert start in again


def test_two_blocks_never_overlap(arena: Arena) -> None:
    blocks = [arena.block(5000) for _ in range(20)]
    arrays = [block.take((5000,), np.uint8)[0] for block in blocks]
    for i, array in enumerate(arrays):
        array[:] = i
    assert [set(array.tolist()) for array in arrays] == [{i} for i in range(20)]


@settings(max_examples=30)
@given(st.data())
def test_any_use_of_blocks_keeps_their_contents_apart(data: Any) -> None:
    arena = Arena(512 * MIB, lambda *_: None)
    sizes = st.sampled_from([0, 1, 4096, 4097, 70_000, MIB, 5 * MIB])
    live: dict[int, Any] = {}
    for number in range(data.draw(st.integers(1, 25))):
        if live and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(live)))
            del live[gone]
        size = data.draw(sizes)
        array, _ = arena.block(size).take((size,), np.uint8)
        array[:1], array[-1:] = number, number
        live[number] = array
    spans = sorted((address(a), address(a) + a.size) for a in live.values() if a.size)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for number, array in live.items():
        assert set(array[[0, -1]].tolist() if array.size else []) <= {number}
    arena.close()


def test_the_same_work_again_takes_no_more_memory(arena: Arena) -> None:
    def step() -> None:
        kept = [arena.block(size).take((size,), np.uint8)[0] for size in (100, 70_000, 3 * MIB)]
        assert len(kept) == 3

    step()
    size = arena.size_bytes
    for _ in range(100):
        step()
    assert arena.size_bytes == size


def test_arrays_of_a_block_start_at_cache_lines_and_know_their_place() -> None:
    arena, told = segments_of()
    block = arena.block(room(12) + room(0) + room(800) + room(8))
    taken = [block.take(s, d) for s, d in (((3,), "f4"), ((0, 7), "f4"), ((10, 10), "i8"))]
    taken.append(block.take((1,), np.int64))
    ((_, fd, size),) = told
    mapped = Segment(fd, size)
    for i, (array, where) in enumerate(taken):
        array[...] = i + 1
        assert address(array) % 64 == 0
        number, offset = segment_and_offset(where)
        seen = np.ndarray(array.shape, array.dtype, mapped.pages, offset)
        assert number == 0
        assert seen.tobytes() == array.tobytes()
    arena.close()


def test_a_block_cannot_give_more_than_it_has(arena: Arena) -> None:
    block = arena.block(MIN_BLOCK_BYTES)
    block.take((MIN_BLOCK_BYTES,), np.uint8)
    block.take((0, 64), np.float32)
    with pytest.raises(TypeError):
        block.take((1,), np.uint8)


@given(st.integers(0, 4095), st.integers(0, 2**40 - 1))
def test_a_place_is_its_segment_and_offset(segment: int, offset: int) -> None:
    assert segment_and_offset(place(segment, offset)) == (segment, offset)
    assert place(segment, offset) < 2**63


# --- growth and limits


def test_an_arena_grows_by_whole_segments_and_says_so() -> None:
    arena, told = segments_of(1 << 30)
    assert told == []
    kept = [arena.block(size) for size in (1, 3 * MIB, 9 * MIB, 100)]
    assert [number for number, _, _ in told] == list(range(len(told)))
    assert told[0][2] == MIN_SEGMENT_BYTES
    assert sum(size for _, _, size in told) == arena.size_bytes
    assert all(os.fstat(fd).st_size == size for _, fd, size in told)
    again: list[tuple[int, int, int]] = []
    arena.announce(lambda *segment: again.append(segment))
    assert again == told
    del kept
    arena.close()


def test_the_rest_of_a_segment_is_used_before_memory_is_added() -> None:
    arena, told = segments_of()
    kept = [arena.block(3 * MIB), arena.block(6 * MIB)]  # the first leaves nothing, being 4 MiB
    kept += [arena.block(size) for size in (MIB, 64 * 1024, 4096)]
    size = arena.size_bytes
    kept += [arena.block(4096) for _ in range(100)]
    assert arena.size_bytes <= size + MIN_SEGMENT_BYTES
    assert len(told) <= 4
    del kept
    arena.close()


def test_beyond_its_limit_an_arena_says_what_is_in_use() -> None:
    arena, told = segments_of(10 * MIB)
    kept = [arena.block(4 * MIB)]
    with pytest.raises(JobError, match=r"need more than 10485760 bytes.*4194304 are in use"):
        arena.block(8 * MIB)
    kept.append(arena.block(4 * MIB))
    assert len(told) == 2
    kept.clear()
    arena.block(4 * MIB)
    arena.close()


def test_a_machine_without_memory_is_an_error_there_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(fd: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    arena, told = segments_of()
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(JobError, match="no 4194304 bytes of shared memory: No space left"):
        arena.block(10)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert told == []


def test_a_closed_arena_leaves_no_file_and_no_mapping() -> None:
    gc.collect()
    before = mappings()
    arena, told = segments_of()
    array, _ = arena.block(5 * MIB).take((100,), np.float32)
    array[:] = 7
    assert mappings() == before + len(told)
    arena.close()
    for _, fd, _ in told:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    assert (array == 7).all(), "an array outlives its arena"
    del array, arena
    assert mappings() == before


def mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:manta-arena" in line for line in maps)


# --- what a shard takes


def test_a_segment_cannot_change_its_size() -> None:
    arena, told = segments_of()
    arena.block(1)
    ((_, fd, size),) = told
    for other in (0, size - 1, size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, other)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", size)
    assert Segment.attached(fd, size).size == size
    arena.close()


def test_what_one_side_writes_the_other_sees() -> None:
    arena, told = segments_of()
    array, where = arena.block(4000).take((1000,), np.float32)
    ((_, fd, size),) = told
    theirs = np.ndarray((1000,), np.float32, Segment.attached(fd, size).pages, where)
    array[:] = 3
    assert (theirs == 3).all()
    theirs[:] = 4
    assert (array == 4).all()
    arena.close()


def memfd(seals: int, size: int, written: bool = True) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if written:
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


SHRINK, GROW, SEAL = 2, 4, 1
WRONG: dict[str, tuple[Callable[[], int], int, str]] = {
    "not sealed": (lambda: memfd(0, 8192), 8192, "sealed"),
    "may shrink": (lambda: memfd(GROW | SEAL, 8192), 8192, "sealed"),
    "may grow": (lambda: memfd(SHRINK | SEAL, 8192), 8192, "sealed"),
    "smaller": (lambda: memfd(SHRINK | GROW | SEAL, 4096), 8192, "has 4096 bytes, not 8192"),
    "bigger": (lambda: memfd(SHRINK | GROW | SEAL, 8192), 4096, "has 8192 bytes, not 4096"),
    "huge claim": (lambda: memfd(SHRINK | GROW | SEAL, 8192), 2**63, "not 9223372036854775808"),
    "empty": (lambda: memfd(SHRINK | GROW | SEAL, 0, written=False), 0, "has 0 bytes"),
    "a pipe": (lambda: os.pipe()[0], 4096, "sealed"),
    "a file": (lambda: os.open(__file__, os.O_RDONLY), 4096, "sealed"),
    "nothing behind it": (
        lambda: memfd(SHRINK | GROW | SEAL, 1 << 24, written=False), 1 << 24, "reserved",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "size", "message"), WRONG.values(), ids=WRONG)
def test_a_shard_refuses_any_other_file(make: Callable[[], int], size: int, message: str) -> None:
    fd = make()
    try:
        with pytest.raises(ProtocolError, match=message):
            Segment.attached(fd, size)
    finally:
        os.close(fd)


# --- private memory


def test_private_memory_gives_arrays_at_cache_lines() -> None:
    block = PrivateMemory().block(room(400) + room(0) + room(8))
    arrays = [block.take(s, np.float32)[0] for s in ((10, 10), (0,), (2,))]
    for i, array in enumerate(arrays):
        array[...] = i
        assert address(array) % 64 == 0
    assert (arrays[0] == 0).all()


def test_a_closed_arena_gives_nothing() -> None:
    arena = Arena(1 << 30, lambda number, fd, size: None)
    array, _ = arena.block(100).take((10,), np.float32)
    array[...] = 1
    arena.close()
    for size in (100, 1 << 24):
        with pytest.raises(JobError, match="arena of this transport is closed"):
            arena.block(size)
    assert array.sum() == 10, "what there is stays"
