"""Arrays start at a cache line, and zeros take no memory."""

from __future__ import annotations

import os
import resource

import numpy as np
import pytest

from ps import memory
from ps.memory import CACHE_LINE, empty, zeros


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, np.float16])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (1, 1), (3, 5), (1000, 16), (300_000, 16)])
def test_arrays_start_at_a_cache_line(shape: tuple[int, ...], dtype: type) -> None:
    for array in (empty(shape, dtype), zeros(shape, dtype)):
        assert array.size == 0 or array.ctypes.data % CACHE_LINE == 0
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.flags.aligned


def test_zeros_take_no_memory_before_they_are_written() -> None:
    def resident_pages() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    before = resident_pages()
    array = zeros((1 << 16, 256))
    grown = (resident_pages() - before) * resource.getpagesize()
    assert grown < array.nbytes / 8
    assert not array[::4096].any()


def test_zeros_may_be_more_than_the_machine_has() -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    array = zeros((machine // 64 + 1, 32))
    array[[0, -1], 5] = 1
    assert array[[0, 1, -1], 5].tolist() == [1, 0, 1]
    assert array.ctypes.data % CACHE_LINE == 0


def test_big_arrays_take_over_memory_of_those_that_are_gone() -> None:
    def addresses(count: int = 4) -> set[int]:
        arrays = [empty((1 << 19, 9)) for _ in range(count)]
        assert all(array.ctypes.data % CACHE_LINE == 0 for array in arrays)
        return {array.ctypes.data for array in arrays}

    memory._pool.clear()
    first = empty((1 << 20, 8))
    view, address = first[5:], first.ctypes.data
    assert address not in addresses()
    del first
    assert address not in addresses(), "a view still uses it"
    del view
    assert address in addresses(count=5)


def test_the_memory_that_is_kept_is_bounded() -> None:
    arrays = [empty((1 << 25,), np.uint8) for _ in range(20)]
    del arrays
    assert 0 < sum(map(len, memory._pool)) <= 1 << 28
