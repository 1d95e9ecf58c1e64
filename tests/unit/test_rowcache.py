"""`RowCache` keeps and drops what its dict twin does, and never gives a row past its age."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.config import FeatureConfig, TableConfig
from ps.errors import ConfigError
from ps.partition import DistinctRows, Placement, distinct_rows
from ps.ragged import F32, I64
from ps.spec import resolve
from tests.support.reference_cache import ReferenceCache
from workers.rowcache import Lookup, RowCache, filled, looked_up, row_caches

V, D = 60, 3


def batch_of(*ids: int, num_shards: int = 1) -> DistinctRows:
    placement = Placement(V, 4, num_shards, num_shards - 1)
    return distinct_rows(np.array(ids, dtype=np.int64), placement)[0]


def rows_at(ids: I64, step: int) -> F32:
    """What the shards have of rows at a step: everybody can see which row, and how old."""
    rows = np.empty((ids.size, D), dtype=np.float32)
    rows[:, 0], rows[:, 1], rows[:, 2] = ids, step, ids * 1000 + step
    return rows


def step_of(cache: RowCache, ids: list[int], step: int) -> tuple[list[int], list[int]]:
    """One batch, pulled at once: (ids that were missing, age of every row that it got)."""
    lookup = cache.lookup(batch_of(*ids), step)
    missing = lookup.missing.ids.tolist()
    rows = cache.fill(lookup, rows_at(lookup.missing.ids, step))
    assert rows[:, 0].tolist() == ids
    return missing, (step - rows[:, 1]).astype(int).tolist()


IDS = st.lists(st.integers(0, 9) | st.integers(0, V - 1), max_size=12)
"""Some ids are hot."""


@settings(max_examples=150)
@given(
    batches=st.lists(st.tuples(st.integers(1, 3), IDS), max_size=12),
    lookahead=st.integers(0, 2),
    capacity=st.sampled_from([1, 2, 7, 20, 40, 60]),
    max_age=st.integers(0, 4),
    num_shards=st.integers(1, 3),
)
def test_a_cache_equals_its_twin_and_gives_no_row_past_its_age(
    batches: list[tuple[int, list[int]]],
    lookahead: int,
    capacity: int,
    max_age: int,
    num_shards: int,
) -> None:
    """Lookups run ahead of the pulls that they make; steps may be left out."""
    cache, twin = RowCache(D, capacity, max_age), ReferenceCache(capacity, max_age)
    ahead: deque[tuple[DistinctRows, Lookup]] = deque()

    def fill_oldest() -> None:
        batch, lookup = ahead.popleft()
        pulled = rows_at(lookup.missing.ids, lookup.step)
        twin.fill(lookup.missing.ids, pulled, lookup.step)
        pulled.flags.writeable = False
        rows = cache.fill(lookup, pulled)
        assert rows[:, 0].tolist() == batch.ids.tolist()
        assert (rows[:, 2] == rows[:, 0] * 1000 + rows[:, 1]).all()
        assert ((lookup.step - rows[:, 1] >= 0) & (lookup.step - rows[:, 1] <= max_age)).all()
        assert (len(cache), cache.evictions) == (len(twin), twin.evictions)
        assert len(cache) <= capacity

    step = 0
    for gap, ids in batches:
        step += gap
        batch = batch_of(*ids, num_shards=num_shards)
        lookup = cache.lookup(batch, step)
        found = twin.lookup(batch.ids, step)
        missing = lookup.missing
        for shard in range(num_shards):
            own = slice(*batch.shard_splits[shard : shard + 2])
            want = [
                (row, i)
                for row, i in zip(batch.local_rows[own], batch.ids[own], strict=True)
                if i not in found
            ]
            got = slice(*missing.shard_splits[shard : shard + 2])
            assert list(zip(missing.of_shard(shard), missing.ids[got], strict=True)) == want
        assert batch.ids[lookup.places].tolist() == missing.ids.tolist()
        assert (cache.hits, cache.misses) == (twin.hits, twin.misses)
        ahead.append((batch, lookup))
        if len(ahead) > lookahead:
            fill_oldest()
    while ahead:
        fill_oldest()


@pytest.mark.parametrize(("capacity", "max_age"), [(16, 2), (20, 5), (33, 9)])
def test_a_long_run_equals_the_twin(capacity: int, max_age: int) -> None:
    """Many turns of the hand, past rows of all ages, used and unused."""
    cache, twin = RowCache(D, capacity, max_age), ReferenceCache(capacity, max_age)
    rng = np.random.default_rng(capacity)
    for step in range(300):
        batch = batch_of(*(V * rng.random(rng.integers(1, 10)) ** 3).astype(int))
        lookup, found = cache.lookup(batch, step), twin.lookup(batch.ids, step)
        missing = lookup.missing.ids
        assert missing.tolist() == [i for i in batch.ids.tolist() if i not in found]
        pulled = rows_at(missing, step)
        twin.fill(missing, pulled, step)
        rows = cache.fill(lookup, pulled)
        want = [found[i] if i in found else rows_at(np.array([i]), step)[0] for i in batch.ids]
        np.testing.assert_array_equal(rows, want)
        assert cache.evictions == twin.evictions


def test_a_row_is_pulled_again_when_its_age_is_up() -> None:
    cache = RowCache(D, 10, max_age=2)
    assert step_of(cache, [4, 5], 0) == ([4, 5], [0, 0])
    assert step_of(cache, [5, 6], 2) == ([6], [2, 0])
    assert step_of(cache, [4, 5, 6], 3) == ([4, 5], [0, 0, 1])
    assert (cache.hits, cache.misses, cache.evictions) == (2, 5, 0)


def test_rows_in_use_stay_when_others_must_go() -> None:
    cache = RowCache(D, 4, max_age=9)
    step_of(cache, [0, 1, 2, 3], 0)
    step_of(cache, [0, 2], 1)
    step_of(cache, [7, 8], 2)
    assert step_of(cache, [0, 2, 7, 8], 3) == ([], [3, 3, 1, 1])
    assert (len(cache), cache.evictions) == (4, 2)


def test_rows_past_their_age_get_no_second_chance() -> None:
    cache = RowCache(D, 4, max_age=2)
    step_of(cache, [0, 1], 0)
    step_of(cache, [2, 3], 1)
    step_of(cache, [0, 1, 2, 3], 2)
    step_of(cache, [8, 9], 3)
    assert cache.evictions == 2
    assert step_of(cache, [2, 3, 8, 9], 3) == ([], [2, 2, 0, 0])


def test_a_batch_may_be_bigger_than_the_cache() -> None:
    cache = RowCache(D, 2, max_age=5)
    assert step_of(cache, [1, 2, 3, 4, 5], 0)[0] == [1, 2, 3, 4, 5]
    assert step_of(cache, [1, 2, 3, 4, 5], 1)[0] == [3, 4, 5]
    assert len(cache) == 2


def test_a_lookup_keeps_its_rows_when_the_cache_drops_them() -> None:
    cache = RowCache(D, 2, max_age=9)
    step_of(cache, [1, 2], 0)
    before, after = cache.lookup(batch_of(1, 2), 1), cache.lookup(batch_of(3, 4), 2)
    cache.fill(after, rows_at(after.missing.ids, 2))
    assert cache.fill(before, rows_at(before.missing.ids, 1))[:, 0].tolist() == [1, 2]


def test_tables_have_caches_of_their_own() -> None:
    big, small = TableConfig(V, 3, name="big"), TableConfig(4, 2, name="small")
    spec = resolve({"a": FeatureConfig(big), "b": FeatureConfig(small)})
    caches = row_caches(spec, 30, max_age=1)
    assert {n: c.size_bytes for n, c in caches.items()} == {"big": 30 * 12, "small": 4 * 8}
    distinct = {"big": batch_of(7, 8), "small": batch_of(0)}
    lookups = looked_up(caches, distinct, 0)
    pulled = {"big": rows_at(distinct["big"].ids, 0), "small": np.ones((1, 2), dtype=np.float32)}
    rows = filled(caches, lookups, pulled)
    assert rows["big"][:, 0].tolist() == [7, 8]
    assert [x.missing.ids.tolist() for x in looked_up(caches, distinct, 1).values()] == [[], []]


@pytest.mark.parametrize(("capacity", "max_age"), [(0, 1), (5, -1)])
def test_a_cache_needs_room_and_an_age(capacity: int, max_age: int) -> None:
    with pytest.raises(ConfigError, match="at least"):
        RowCache(D, capacity, max_age)
