"""Every row lives on exactly one shard, and everybody agrees where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.config import FeatureConfig, TableConfig
from ps.partition import (
    Layout,
    Placement,
    distinct_rows,
    distinct_rows_of_tables,
    div_splits,
    slab_rows,
    slices,
)
from ps.spec import EmbeddingSpec, TableSpec, resolve
from tests.support import reference as twin

SIZES = st.integers(1, 3000) | st.sampled_from([1, 63, 64, 65, 127, 128, 4095, 4096, 4097])
SHARDS = st.integers(1, 9)


def spec_of(*sizes: tuple[int, int]) -> EmbeddingSpec:
    return resolve([FeatureConfig(TableConfig(v, d)) for v, d in sizes])


def table_of(num_rows: int, dim: int) -> TableSpec:
    return spec_of((num_rows, dim)).tables[0]


def owners(placement: Placement) -> list[tuple[int, int]]:
    """(shard, local row) of every id, from the slabs."""
    found: dict[int, tuple[int, int]] = {}
    for shard in range(placement.num_shards):
        for slab in placement.slabs(shard):
            for k in range(slab.num_rows):
                assert slab.first_id + k not in found, "two shards own one row"
                found[slab.first_id + k] = (shard, slab.first_local_row + k)
    return [found.pop(i) for i in range(placement.vocabulary_size)] + list(found.values())


@given(num_rows=SIZES, dim=st.sampled_from([1, 8, 64]), num_shards=SHARDS, data=st.data())
def test_slabs_of_all_shards_hold_every_row_once(
    num_rows: int, dim: int, num_shards: int, data: Any
) -> None:
    offset = data.draw(st.integers(0, num_shards - 1))
    rows = slab_rows(table_of(num_rows, dim))
    placement = Placement(num_rows, rows, num_shards, offset)
    places = owners(placement)
    assert len(places) == len(set(places)) == num_rows
    for shard in range(num_shards):
        local = sorted(row for s, row in places if s == shard)
        assert local == list(range(placement.num_local_rows(shard))), "local rows have a gap"
        slabs = list(placement.slabs(shard))
        assert [s.first_local_row for s in slabs] == sorted(s.first_local_row for s in slabs)
    assert places[0][0] == offset


@given(num_rows=SIZES, num_shards=SHARDS, data=st.data())
def test_distinct_rows_agree_with_the_slabs(num_rows: int, num_shards: int, data: Any) -> None:
    offset = data.draw(st.integers(0, num_shards - 1))
    placement = Placement(num_rows, slab_rows(table_of(num_rows, 8)), num_shards, offset)
    ids = np.array(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=50)), dtype=np.int64)
    distinct, index = distinct_rows(ids, placement)
    np.testing.assert_array_equal(distinct.ids[index], ids)
    assert sorted(set(ids.tolist())) == sorted(distinct.ids.tolist())
    assert distinct.shard_splits[0] == 0
    assert distinct.shard_splits[-1] == distinct.ids.size
    places = owners(placement)
    for shard in range(num_shards):
        span = slice(distinct.shard_splits[shard], distinct.shard_splits[shard + 1])
        want = [places[i] for i in distinct.ids[span]]
        assert [(shard, row) for row in distinct.of_shard(shard).tolist()] == want


@given(num_rows=SIZES, num_shards=SHARDS, data=st.data())
def test_split_then_merge_is_identity(num_rows: int, num_shards: int, data: Any) -> None:
    placement = Placement(num_rows, slab_rows(table_of(num_rows, 8)), num_shards, 0)
    table = np.arange(num_rows, dtype=np.float32)[:, None]
    shards = []
    for shard in range(num_shards):
        local = np.full((placement.num_local_rows(shard), 1), -1, dtype=np.float32)
        for slab in placement.slabs(shard):
            part = table[slab.first_id : slab.first_id + slab.num_rows]
            local[slab.first_local_row : slab.first_local_row + slab.num_rows] = part
        shards.append(local)
    ids = np.array(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=50)), dtype=np.int64)
    distinct, index = distinct_rows(ids, placement)
    answers = [shards[k][distinct.of_shard(k)] for k in range(num_shards)]
    np.testing.assert_array_equal(np.concatenate(answers)[index], table[ids])


@given(ids=st.lists(st.integers(0, 2**62), max_size=30), num_shards=SHARDS)
def test_large_ids_keep_their_place(ids: list[int], num_shards: int) -> None:
    placement = Placement(2**62 + 1, 2**12, num_shards, 0)
    distinct, index = distinct_rows(np.array(ids, dtype=np.int64), placement)
    want = twin.distinct_by_shard(np.array(ids, dtype=np.int64), 2**12, 0, num_shards)
    got = (distinct.ids, distinct.local_rows, distinct.shard_splits, index)
    for array, twins in zip(got, want, strict=True):
        np.testing.assert_array_equal(array, twins)


@given(
    tables=st.lists(
        st.tuples(SIZES, st.lists(st.integers(0, 2**31), max_size=20)), min_size=1, max_size=4
    ),
    num_shards=SHARDS,
)
def test_tables_together_have_the_rows_that_each_has_alone(
    tables: list[tuple[int, list[int]]], num_shards: int
) -> None:
    spec = spec_of(*((num_rows, 8) for num_rows, _ in tables))
    placements = list(Layout.of(spec, num_shards).placements.values())
    ids = [np.array(of_t, dtype=np.int64) % num_rows for num_rows, of_t in tables]
    bounds = np.cumsum([0, *map(len, ids)])
    rows, index = distinct_rows_of_tables(np.concatenate(ids), bounds, placements)
    for t, of_t in enumerate(ids):
        alone, places = distinct_rows(of_t, placements[t])
        for name in ("ids", "local_rows", "shard_splits"):
            np.testing.assert_array_equal(getattr(rows[t], name), getattr(alone, name))
        np.testing.assert_array_equal(index[bounds[t] : bounds[t + 1]], places)


@given(num_rows=st.integers(1, 2**40), dim=st.integers(1, 2**15))
def test_slabs_are_powers_of_two_within_256_kib(num_rows: int, dim: int) -> None:
    rows = slab_rows(table_of(num_rows, dim))
    assert rows.bit_count() == 1
    assert rows * dim * 4 <= 256 * 1024
    assert rows == 1 or rows * 64 <= num_rows, "a small table is cut into at least 64 slabs"


@pytest.mark.parametrize(
    ("num_rows", "dim", "rows"),
    [(1, 1, 1), (64, 16, 1), (128, 16, 2), (10**6, 16, 2048), (10**6, 100, 256), (10**9, 1, 2**15)],
)
def test_slab_sizes_stay_what_they_are(num_rows: int, dim: int, rows: int) -> None:
    assert slab_rows(table_of(num_rows, dim)) == rows


@given(sizes=st.lists(st.tuples(SIZES, st.integers(1, 64)), min_size=1, max_size=4))
def test_slabs_do_not_depend_on_the_number_of_shards(sizes: list[tuple[int, int]]) -> None:
    spec = spec_of(*sizes)
    for name, placement in Layout.of(spec, 1).placements.items():
        for num_shards in (2, 3, 8):
            other = Layout.of(spec, num_shards).placements[name]
            assert other.slab_rows == placement.slab_rows
            assert other.vocabulary_size == placement.vocabulary_size


def test_small_tables_do_not_all_start_on_shard_0() -> None:
    layout = Layout.of(spec_of(*[(1, 4)] * 5), 3)
    homes = [next(k for k in range(3) if p.num_local_rows(k)) for p in layout.placements.values()]
    assert homes == [0, 1, 2, 0, 1]


def test_shards_share_a_table_evenly() -> None:
    for num_shards in (2, 3, 7):
        placement = Layout.of(spec_of((100_000, 16)), num_shards).placements["table_0"]
        counts = [placement.num_local_rows(k) for k in range(num_shards)]
        assert max(counts) - min(counts) <= placement.slab_rows


@given(size=st.integers(0, 200), parts=st.integers(1, 30))
def test_div_splits_are_tensorflows_div_partitions(size: int, parts: int) -> None:
    splits = div_splits(size, parts)
    vector = np.arange(size)
    want = np.array_split(vector, parts)
    for got, part in zip(slices(vector, splits), want, strict=True):
        np.testing.assert_array_equal(got, part)


def test_layout_cuts_dense_vectors_for_every_shard() -> None:
    layout = Layout.of(spec_of((10, 2)), 4, dense_size=6, state_size=2)
    assert layout.dense_splits == (0, 2, 4, 5, 6)
    assert layout.state_splits == (0, 1, 2, 2, 2)
