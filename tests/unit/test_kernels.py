"""Every compiled kernel gives, bit for bit, what its plain twin in `tests.support.reference` gives.

Each call is made twice: with ordinary arrays, which must come back unchanged, and with read-only
ones, as they arrive through Ray (a kernel that wrote to them would not compile).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.kernels import combine as kernels
from ps.kernels import dedup
from ps.kernels.combine import COMBINER_CODES
from ps.ragged import F32, I64, Ragged
from tests.support import reference as twin
from tests.support.reference import same_bits
from tests.support.strategies import DIMS, bags, frozen, rows

COMBINERS = st.sampled_from(["sum", "mean", "sqrtn"])
IDS = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3), max_size=40)
few = settings(max_examples=60)


def run(kernel: Callable[..., Any], *args: Any, out: F32) -> F32:
    """The kernel's output, after checking that it only wrote there and never cares for flags."""
    plain = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
    results = []
    for inputs in (plain, [frozen(a) for a in args]):
        result = out.copy()
        kernel(*inputs, result)
        results.append(result)
    for before, after in zip(args, plain, strict=True):
        if isinstance(before, np.ndarray):
            assert before.tobytes() == after.tobytes(), "an input was written to"
    assert same_bits(*results)
    return results[0]


def call(kernel: Callable[..., Any], *args: Any) -> Any:
    """As `run`, for kernels that return arrays."""
    results = [kernel(*args), kernel(*(frozen(a) for a in args))]
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    return results[0]


def weights_of(bag: Ragged) -> F32:
    return np.zeros(0, dtype=np.float32) if bag.weights is None else bag.weights


def garbage(*shape: int) -> F32:
    """An output buffer whose old content must not show."""
    return np.full(shape, np.nan, dtype=np.float32)


def i64(*values: int) -> I64:
    return np.array(values, dtype=np.int64)


@few
@given(data=st.data(), num_rows=st.integers(1, 6), dim=DIMS, combiner=COMBINERS)
def test_combine_equals_its_twin(data: Any, num_rows: int, dim: int, combiner: str) -> None:
    table, bag = data.draw(rows(num_rows, dim)), data.draw(bags(num_rows))
    code = COMBINER_CODES[combiner]
    args = (table, bag.ids, bag.row_splits, weights_of(bag), code)
    got = run(kernels.combine_rows, *args, out=garbage(bag.num_examples, dim))
    want = twin.combine_rows(table, bag.ids, bag.row_splits, bag.weights, combiner)
    assert same_bits(got, want)


@few
@given(data=st.data(), num_rows=st.integers(1, 6), dim=DIMS, length=st.integers(1, 6))
def test_sequences_equal_their_twin(data: Any, num_rows: int, dim: int, length: int) -> None:
    table, bag = data.draw(rows(num_rows, dim)), data.draw(bags(num_rows, weighted=False))
    args = (table, bag.ids, bag.row_splits)
    got = run(kernels.scatter_sequences, *args, out=garbage(bag.num_examples, length, dim))
    assert same_bits(got, twin.scatter_sequences(*args, length))


@few
@given(data=st.data(), num_rows=st.integers(1, 6), dim=DIMS, combiner=COMBINERS)
def test_combined_gradients_equal_their_twin(
    data: Any, num_rows: int, dim: int, combiner: str
) -> None:
    bag, start = data.draw(bags(num_rows)), data.draw(rows(num_rows, dim))
    grads = data.draw(rows(bag.num_examples, dim))
    args = (grads, bag.ids, bag.row_splits, weights_of(bag), COMBINER_CODES[combiner])
    got = run(kernels.combine_gradients, *args, out=start)
    want = twin.combine_gradients(grads, bag.ids, bag.row_splits, bag.weights, combiner, start)
    assert same_bits(got, want)


@few
@given(data=st.data(), dim=DIMS, combiner=COMBINERS)
def test_entry_gradients_equal_their_twin(data: Any, dim: int, combiner: str) -> None:
    bag = data.draw(bags(6))
    grads = data.draw(rows(bag.num_examples, dim))
    args = (grads, bag.row_splits, weights_of(bag), COMBINER_CODES[combiner])
    got = run(kernels.entry_gradients, *args, out=garbage(bag.ids.size, dim))
    assert same_bits(got, twin.entry_gradients(grads, bag.row_splits, bag.weights, combiner))


@few
@given(data=st.data(), num_rows=st.integers(1, 6), dim=DIMS)
def test_gather_and_add_equal_their_twins(data: Any, num_rows: int, dim: int) -> None:
    table = data.draw(rows(num_rows, dim))
    index = i64(*data.draw(st.lists(st.integers(0, num_rows - 1), max_size=12)))
    gathered = run(kernels.gather_rows, table, index, out=garbage(index.size, dim))
    assert same_bits(gathered, twin.gather_rows(table, index))
    added = run(kernels.add_rows, gathered, index, out=table)
    assert same_bits(added, twin.add_rows(gathered, index, table))


def test_sums_are_taken_in_the_order_of_the_entries() -> None:
    big = np.array([[1e8], [1.0], [-1e8]], dtype=np.float32)
    weights, splits = np.zeros(0, dtype=np.float32), i64(0, 3)
    for order, want in [(i64(0, 1, 2), 0.0), (i64(0, 2, 1), 1.0)]:
        args = (big, order, splits, weights, COMBINER_CODES["sum"])
        assert run(kernels.combine_rows, *args, out=garbage(1, 1)) == want
        assert run(kernels.add_rows, big[order], i64(0, 0, 0), out=big[:1] * 0) == want


@pytest.mark.parametrize(
    ("weights", "combiner", "want"),
    [
        (None, "sum", [[4, 6], [0, 0], [5, 6]]),
        (None, "mean", [[2, 3], [0, 0], [5, 6]]),
        (None, "sqrtn", [[2.828427, 4.242641], [0, 0], [5, 6]]),
        ([0.5, 2, 3], "sum", [[6.5, 9], [0, 0], [15, 18]]),
        ([0.5, 2, 3], "mean", [[2.6, 3.6], [0, 0], [5, 6]]),
        ([0.5, 2, 3], "sqrtn", [[3.152963, 4.365642], [0, 0], [5, 6]]),
        ([1, -1, -2], "mean", [[0, 0], [0, 0], [5, 6]]),
        ([1, -1, -2], "sqrtn", [[-1.414214, -1.414214], [0, 0], [-5, -6]]),
    ],
)
def test_combine_gives_the_reference_numbers(
    weights: list[float] | None, combiner: str, want: list[list[float]]
) -> None:
    table = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    w = np.array([] if weights is None else weights, dtype=np.float32)
    args = (table, i64(0, 1, 2), i64(0, 2, 2, 3), w, COMBINER_CODES[combiner])
    got = run(kernels.combine_rows, *args, out=garbage(3, 2))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("combiner", "row_3", "row_5"),
    [
        ("sum", [3, 30], [3, 30]),
        ("mean", [0.5, 5], [0.5, 5]),
        ("sqrtn", [0.8017837, 8.017838], None),
    ],
)
def test_combined_gradients_give_the_reference_numbers(
    combiner: str, row_3: list[float], row_5: list[float] | None
) -> None:
    weights, upstream = np.float32([1, 2, 3]), np.float32([[1, 10]])
    args = (upstream, i64(3, 3, 5), i64(0, 3), weights, COMBINER_CODES[combiner])
    got = run(kernels.combine_gradients, *args, out=np.zeros((6, 2), dtype=np.float32))
    np.testing.assert_allclose(got[3], row_3, rtol=1e-6)
    np.testing.assert_allclose(got[5], row_5 or row_3, rtol=1e-6)
    assert not got[[0, 1, 2, 4]].any()


@few
@given(ids=IDS, num_rows=st.integers(1, 2**62))
def test_range_check_finds_the_first_bad_id_without_wrapping(ids: list[int], num_rows: int) -> None:
    array = i64(*ids)
    assert dedup.first_out_of_range(array, num_rows) == twin.first_out_of_range(array, num_rows)
    assert dedup.first_out_of_range(frozen(array), num_rows) == twin.first_out_of_range(
        array, num_rows
    )


@pytest.mark.parametrize("bad", [-1, 5, 2**31, 2**32, 2**40, -(2**63), 2**63 - 1])
def test_ids_beyond_32_bits_are_out_of_range(bad: int) -> None:
    assert dedup.first_out_of_range(i64(0, 4, bad, -7), 5) == 2


@given(ids=IDS)
def test_distinct_ids_equal_their_twin(ids: list[int]) -> None:
    unique, inverse = call(dedup.distinct_ids, i64(*ids))
    want_unique, want_inverse = twin.distinct_ids(i64(*ids))
    np.testing.assert_array_equal(unique, want_unique)
    np.testing.assert_array_equal(inverse, want_inverse)
    np.testing.assert_array_equal(unique[inverse], i64(*ids))


@pytest.mark.parametrize("count", [7, 8, 9, 1000, 1024, 1025])
def test_distinct_ids_survive_a_full_hash_table(count: int) -> None:
    ids = np.random.default_rng(count).permutation(np.arange(count, dtype=np.int64) << 32)
    unique, inverse = dedup.distinct_ids(np.concatenate([ids, ids[::-1]]))
    np.testing.assert_array_equal(unique, ids)
    np.testing.assert_array_equal(inverse, [*range(count), *range(count - 1, -1, -1)])


@given(
    ids=st.lists(st.integers(0, 2**40), max_size=40),
    slab_rows=st.sampled_from([1, 2, 64, 2**15]),
    num_shards=st.integers(1, 9),
    data=st.data(),
)
def test_shard_major_order_equals_its_twin(
    ids: list[int], slab_rows: int, num_shards: int, data: Any
) -> None:
    offset = data.draw(st.integers(0, num_shards - 1))
    args = (*twin.distinct_ids(i64(*ids)), slab_rows, num_shards, offset)
    for got, want in zip(call(dedup.shard_major, *args), twin.shard_major(*args), strict=True):
        np.testing.assert_array_equal(got, want)
