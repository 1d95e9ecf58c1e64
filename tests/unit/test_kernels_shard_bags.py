"""Bags cut by shard, their sums and divisors are, bit for bit, those of the plain twins.

Every call is made with arrays of all kinds (ordinary, read-only, at odd addresses, against
inaccessible pages) and must write nothing but its output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.kernels.combine import COMBINER_CODES, combine_rows
from ps.kernels.shard_bags import bag_divisors, bags_by_shard, divide_weights, sum_bags
from ps.ragged import F32, Ragged
from ps.threads import Threads
from tests.support import reference_shard_bags as twin
from tests.support.guarded import EVERY_KIND, Canaries
from tests.support.reference import same_bits
from tests.support.strategies import bags

COMBINERS = st.sampled_from(["sum", "mean", "sqrtn"])
NO_WEIGHTS = np.zeros(0, dtype=np.float32)
few = settings(max_examples=40)


def run(function: Callable[..., None], *args: Any, shape: tuple[int, ...]) -> F32:
    """The output, the same for arrays of every kind, after a look at everything around it."""
    results = []
    for change, offset in EVERY_KIND:
        given_args = [change(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        out = Canaries(shape, offset=offset)
        function(*given_args, out.array)
        assert out.intact, "written outside the output"
        for before, after in zip(args, given_args, strict=True):
            if isinstance(before, np.ndarray):
                assert before.tobytes() == after.tobytes(), "an input was written to"
        results.append(out.array.copy())
    for result in results[1:]:
        assert same_bits(result, results[0])
    return results[0]


def weights_of(bag: Ragged) -> F32:
    return NO_WEIGHTS if bag.weights is None else bag.weights


def check_sums(records: F32, bag: Ragged, dim: int) -> None:
    args = (records, bag.ids, bag.row_splits, weights_of(bag))
    got = run(sum_bags, *args, shape=(bag.num_examples, dim))
    assert same_bits(got, twin.sum_bags(*args[:3], bag.weights, dim))


def check_cut(bag: Ragged, slab_rows: int, num_shards: int, offset: int) -> None:
    place = slab_rows, num_shards, offset
    want = twin.bags_by_shard(bag.ids, bag.row_splits, bag.weights, *place)
    for change, _ in EVERY_KIND:
        arrays = [change(a) for a in (bag.ids, bag.row_splits, weights_of(bag))]
        got = bags_by_shard(*arrays, *place)
        for mine, theirs in zip(got, want, strict=True):
            assert mine.dtype == theirs.dtype
            assert mine.shape == theirs.shape
            assert mine.tobytes() == theirs.tobytes()


@few
@given(
    data=st.data(),
    num_rows=st.integers(1, 6),
    dim=st.sampled_from([3, 17, 64]),
    others=st.sampled_from([0, 1, 64]),
)
def test_sums_of_the_first_columns_equal_their_twin(
    data: Any, num_rows: int, dim: int, others: int
) -> None:
    """`others` are the columns of slots behind a row."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    records = rng.normal(size=(num_rows, dim + others)).astype(np.float32)
    hard = rng.random(records.shape) < data.draw(st.sampled_from([0, 0.1]))
    records[hard] = rng.choice([0.0, -0.0, 1e-45, 3e38, np.inf, np.nan], np.count_nonzero(hard))
    check_sums(records, data.draw(bags(num_rows)), dim)


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_long_bags_equal_their_twin(weighted: bool) -> None:
    """More entries than are asked for ahead; threads may take spans of bags."""
    rng = np.random.default_rng(4)
    splits = np.concatenate([[0], np.cumsum([*range(20), 97, 0, 400])])
    index = rng.integers(0, 150, splits[-1])
    weights = rng.normal(size=index.size).astype(np.float32) if weighted else None
    bag, records = Ragged(index, splits, weights), rng.normal(size=(150, 120)).astype(np.float32)
    check_sums(records, bag, 40)
    out = np.full((splits.size - 1, 40), np.nan, dtype=np.float32)
    call = partial(sum_bags, records, index)
    spans = [slice(0, 9), slice(9, 21), slice(21, splits.size - 1)]
    Threads(3).run(
        [partial(call, splits[s.start : s.stop + 1], weights_of(bag), out[s]) for s in spans]
    )
    assert same_bits(out, twin.sum_bags(records, index, splits, weights, 40))


@few
@given(
    data=st.data(),
    slab_bits=st.integers(0, 3),
    num_shards=st.integers(1, 5),
    offset=st.integers(0, 4),
)
def test_bags_are_cut_as_their_twin_cuts_them(
    data: Any, slab_bits: int, num_shards: int, offset: int
) -> None:
    check_cut(data.draw(bags(40)), 1 << slab_bits, num_shards, offset % num_shards)


@few
@given(bag=bags(30), slab_bits=st.integers(0, 3), num_shards=st.integers(1, 5))
def test_every_entry_is_on_one_shard_in_its_bag(
    bag: Ragged, slab_bits: int, num_shards: int
) -> None:
    """Local rows turned back to ids: the shards' bags together hold what the bag held."""
    slab, found = 1 << slab_bits, [[] for _ in range(bag.num_examples)]
    arrays = bag.ids, bag.row_splits, weights_of(bag)
    local, row_splits, _, shard_splits = bags_by_shard(*arrays, slab, num_shards, 0)
    ids = local // slab * num_shards * slab + local % slab
    for k in range(num_shards):
        own = ids[shard_splits[k] : shard_splits[k + 1]] + k * slab
        for b, entries in enumerate(np.split(own, row_splits[k, 1:-1])[: bag.num_examples]):
            found[b] += entries.tolist()
    assert [sorted(ids) for ids in found] == [sorted(ids) for ids in bag.to_lists()]


@few
@given(bag=bags(9), combiner=COMBINERS)
def test_divisors_equal_their_twin(bag: Ragged, combiner: str) -> None:
    args = (bag.row_splits, weights_of(bag), COMBINER_CODES[combiner])
    divisors = run(bag_divisors, *args, shape=(bag.num_examples,))
    assert same_bits(divisors, twin.bag_divisors(bag.row_splits, bag.weights, combiner))
    if bag.weights is not None:
        args = (bag.row_splits, bag.weights, divisors)
        got = run(divide_weights, *args, shape=(bag.ids.size,))
        assert same_bits(got, twin.divide_weights(*args))


@few
@given(bag=bags(9), combiner=COMBINERS)
def test_a_sum_by_its_divisor_is_what_combine_makes(bag: Ragged, combiner: str) -> None:
    rows = np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)
    weights, code = weights_of(bag), COMBINER_CODES[combiner]
    sums, want = (np.empty((bag.num_examples, 8), dtype=np.float32) for _ in range(2))
    divisors = np.empty(bag.num_examples, dtype=np.float32)
    sum_bags(rows, bag.ids, bag.row_splits, weights, sums)
    bag_divisors(bag.row_splits, weights, code, divisors)
    combine_rows(rows, bag.ids, bag.row_splits, weights, code, want)
    with np.errstate(all="ignore"):
        got = np.where(divisors[:, None] == 0, np.float32(0), sums / divisors[:, None])
    assert same_bits(got, want)


def test_counting_stops_where_float32_does() -> None:
    splits = np.array([0, 2**24, 2**25 + 2], dtype=np.int64)
    out = np.empty(2, dtype=np.float32)
    bag_divisors(splits, NO_WEIGHTS, COMBINER_CODES["mean"], out)
    assert out.tolist() == [2**24, 2**24]
