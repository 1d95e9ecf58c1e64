"""Distinct ids, their shards and the range check give what their plain twins give.

Calls are made with arrays of all kinds: ordinary, read-only, at odd addresses, against inaccessible
pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.kernels import dedup
from ps.ragged import I64
from tests.support import reference as twin
from tests.support.guarded import guarded
from tests.support.strategies import frozen, unaligned

IDS = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3), max_size=40)
BLOCK = 512
"""Ids that the range check looks at in one go."""
FIBONACCI = (75025, 196418, 433494437, 1134903170, 7540113804746346429)
"""Multiples of these lie in one heap when hashed by the golden ratio alone."""


def call(kernel: Callable[..., Any], ids: I64, *args: Any) -> Any:
    """The kernel's result, which is the same for arrays of every kind."""
    wanted = kernel(ids.copy(), *args)
    for array in (frozen(ids), unaligned(ids), guarded(ids, "start"), guarded(ids, "end")):
        got = kernel(array, *args)
        if isinstance(wanted, tuple):
            assert_equal(got, wanted)
        else:
            assert got == wanted
    return wanted


def assert_equal(got: Any, want: Any) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def i64(*values: int) -> I64:
    return np.array(values, dtype=np.int64)


@given(ids=IDS, num_rows=st.integers(1, 2**62))
def test_range_check_finds_the_first_bad_id_without_wrapping(ids: list[int], num_rows: int) -> None:
    want = twin.first_out_of_range(i64(*ids), num_rows)
    assert call(dedup.first_out_of_range, i64(*ids), num_rows) == want


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_range_check_looks_at_every_id(size: int) -> None:
    good = np.arange(size) % 5
    assert call(dedup.first_out_of_range, good, 5) == -1
    for place in {0, size // 2, size - 1, min(size - 1, BLOCK)}:
        ids = good.copy()
        ids[place:] = 5
        assert call(dedup.first_out_of_range, ids, 5) == place


@pytest.mark.parametrize("bad", [-1, 5, 2**31, 2**32, 2**40, -(2**63), 2**63 - 1])
def test_ids_beyond_32_bits_are_out_of_range(bad: int) -> None:
    assert dedup.first_out_of_range(i64(0, 4, bad, -7), 5) == 2


@given(ids=IDS)
def test_distinct_ids_equal_their_twin(ids: list[int]) -> None:
    unique, inverse = call(dedup.distinct_ids, i64(*ids))
    assert_equal((unique, inverse), twin.distinct_ids(i64(*ids)))
    np.testing.assert_array_equal(unique[inverse], i64(*ids))


@settings(max_examples=40)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 30_000), st.integers(1, 2**40), st.booleans()), max_size=4
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_mix_of_old_and_new_ids_equals_the_twin(
    parts: list[tuple[int, int, bool]], seed: int
) -> None:
    """The table grows to what the ids so far foretell, whatever comes then."""
    rng = np.random.default_rng(seed)
    ids = np.concatenate(
        [i64()]
        + [
            rng.integers(0, most, size) if random else np.arange(size) * most
            for size, most, random in parts
        ]
    )
    assert_equal(dedup.distinct_ids(ids), twin.distinct_ids(ids))
    got = dedup.distinct_by_shard(ids, i64(0, ids.size), i64(1024), i64(1), 3)
    assert_equal(of_table(got, 0, i64(0, ids.size)), twin.distinct_by_shard(ids, 1024, 1, 3))


def test_new_ids_after_many_equal_ones_find_room() -> None:
    ids = np.concatenate([np.zeros(60_000, dtype=np.int64), np.arange(60_000) << 32])
    assert_equal(dedup.distinct_ids(ids), twin.distinct_ids(ids))


def test_ids_that_fall_into_one_slot_stay_apart() -> None:
    ids = np.arange(200_000, dtype=np.int64)
    slots = np.array([dedup._hash(i) >> np.uint64(56) for i in ids.tolist()])
    heap = ids[slots == 255]
    assert heap.size > 500
    mixed = np.concatenate([heap, heap[::-1], heap + 1])
    assert_equal(call(dedup.distinct_ids, mixed), twin.distinct_ids(mixed))


@pytest.mark.parametrize("stride", [1, 2, 1000, 2**20, 2**32, 2**45, *FIBONACCI])
def test_ids_at_equal_distances_are_spread_over_the_table(stride: int) -> None:
    num_ids, bits = 2000, 13
    hashes = [dedup._hash(i * stride % 2**63) for i in range(num_ids)]
    used = len({int(h) >> (64 - bits) for h in hashes})
    expected = 2**bits * (1 - (1 - 2**-bits) ** num_ids)
    assert used > 0.95 * expected


TABLE = st.tuples(st.lists(st.integers(0, 2**62), max_size=40), st.sampled_from([1, 2, 64, 2**15]))


@given(
    tables=st.lists(TABLE, max_size=4), num_shards=st.integers(1, 9), seed=st.integers(0, 2**32 - 1)
)
def test_distinct_ids_by_shard_equal_their_twin(
    tables: list[tuple[list[int], int]], num_shards: int, seed: int
) -> None:
    offsets = np.random.default_rng(seed).integers(0, num_shards, len(tables))
    ids, bounds = laid([of_t for of_t, _ in tables])
    slab_rows = i64(*(rows for _, rows in tables))
    got = call(dedup.distinct_by_shard, ids, bounds, slab_rows, offsets, num_shards)
    assert got[2][-1] == got[0].size == got[1].size
    for t, (of_t, rows) in enumerate(tables):
        want = twin.distinct_by_shard(i64(*of_t), rows, int(offsets[t]), num_shards)
        assert_equal(of_table(got, t, bounds), want)


@given(tables=st.lists(st.tuples(IDS, st.integers(1, 2**62)), max_size=4))
def test_the_first_id_outside_its_table_is_found(tables: list[tuple[list[int], int]]) -> None:
    ids, bounds = laid([of_t for of_t, _ in tables])
    num_rows = i64(*(size for _, size in tables))
    found = [twin.first_out_of_range(i64(*of_t), size) for of_t, size in tables]
    want = next((bounds[t] + place for t, place in enumerate(found) if place >= 0), -1)
    assert call(dedup.first_out_of_tables, ids, bounds, num_rows) == want


def laid(parts: list[list[int]]) -> tuple[I64, I64]:
    """All ids, one table after the other, and the bounds of the tables."""
    return i64(*(i for part in parts for i in part)), np.cumsum([0, *map(len, parts)])


def of_table(got: Any, t: int, bounds: I64) -> Any:
    """(ids, local rows, shard splits, inverse) of one table."""
    ids, local, distinct, splits, inverse = got
    part = slice(distinct[t], distinct[t + 1])
    return ids[part], local[part], splits[t], inverse[bounds[t] : bounds[t + 1]]
