"""Gradients of rows are, bit for bit, those of the plain twins.

Every call is made with arrays of all kinds (ordinary, read-only, at odd addresses, against
inaccessible pages) and must write nothing but its output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.kernels.combine import COMBINER_CODES
from ps.kernels.gradients import add_rows, combine_gradients, entry_gradients
from ps.ragged import F32, I64, Ragged
from ps.threads import Threads
from tests.support import reference as twin
from tests.support.guarded import EVERY_KIND, Canaries, guarded
from tests.support.reference import same_bits
from tests.support.strategies import bags

DIMS = st.sampled_from([1, 3, 8, 17, 40, 64, 128])
COMBINERS = st.sampled_from(["sum", "mean", "sqrtn"])
HARD = [0.0, -0.0, 1.0, -1.5, 1e-45, -1e-38, 3e38, -3e38, np.inf, -np.inf, np.nan, 0.1, 16777216.0]
NO_WEIGHTS = np.zeros(0, dtype=np.float32)
few = settings(max_examples=40)


def rows(data: Any, *shape: int) -> F32:
    """Where every number may be a hard one."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    hard = rng.choice(np.array(HARD, dtype=np.float32), shape)
    share = data.draw(st.sampled_from([0, 0.1]))
    return np.where(rng.random(shape) < share, hard, rng.normal(size=shape)).astype(np.float32)


def run(function: Callable[..., None], *args: Any, out: F32) -> F32:
    """What becomes of `out`, the same for arrays of every kind, after a look around it."""
    results = []
    for change, offset in EVERY_KIND:
        given_args = [change(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        guard = Canaries(out.shape, offset=offset)
        guard.array[...] = out
        function(*given_args, guard.array)
        assert guard.intact, "written outside the output"
        for before, after in zip(args, given_args, strict=True):
            if isinstance(before, np.ndarray):
                assert before.tobytes() == after.tobytes(), "an input was written to"
        results.append(guard.array.copy())
    at_the_end = guarded(out, "end")
    function(*args, at_the_end)
    for result in (*results[1:], at_the_end):
        assert same_bits(result, results[0])
    return results[0]


def weights_of(bag: Ragged) -> F32:
    return NO_WEIGHTS if bag.weights is None else bag.weights


def i64(*values: int) -> I64:
    return np.array(values, dtype=np.int64)


def check_combined(bag: Ragged, grads: F32, start: F32, combiner: str) -> None:
    args = (grads, bag.ids, bag.row_splits, weights_of(bag), COMBINER_CODES[combiner])
    want = twin.combine_gradients(grads, bag.ids, bag.row_splits, bag.weights, combiner, start)
    assert same_bits(run(combine_gradients, *args, out=start), want)


@few
@given(data=st.data(), num_rows=st.integers(1, 6), dim=DIMS, combiner=COMBINERS)
def test_combined_gradients_equal_their_twin(
    data: Any, num_rows: int, dim: int, combiner: str
) -> None:
    bag = data.draw(bags(num_rows))
    check_combined(bag, rows(data, bag.num_examples, dim), rows(data, num_rows, dim), combiner)


@few
@given(data=st.data(), dim=DIMS, combiner=COMBINERS)
def test_entry_gradients_equal_their_twin(data: Any, dim: int, combiner: str) -> None:
    bag = data.draw(bags(6))
    grads = rows(data, bag.num_examples, dim)
    args = (grads, bag.row_splits, weights_of(bag), COMBINER_CODES[combiner])
    got = run(entry_gradients, *args, out=np.full((bag.ids.size, dim), np.nan, dtype=np.float32))
    assert same_bits(got, twin.entry_gradients(grads, bag.row_splits, bag.weights, combiner))


@few
@given(data=st.data(), num_rows=st.integers(1, 6), dim=DIMS)
def test_added_rows_equal_their_twin(data: Any, num_rows: int, dim: int) -> None:
    index = i64(*data.draw(st.lists(st.integers(0, num_rows - 1), max_size=12)))
    grads, start = rows(data, index.size, dim), rows(data, num_rows, dim)
    assert same_bits(run(add_rows, grads, index, out=start), twin.add_rows(grads, index, start))


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("dim", [1, 8, 40, 128])
def test_long_inputs_equal_their_twins(dim: int, combiner: str) -> None:
    """More entries than are asked for ahead, and bags of every length around the unrolling."""
    rng = np.random.default_rng(dim)
    counts = np.concatenate([np.arange(20), np.ones(150, dtype=np.int64), [97]])
    splits = np.concatenate([[0], np.cumsum(counts)])
    weights = rng.normal(size=splits[-1]).astype(np.float32)
    index = rng.integers(0, 150, splits[-1])
    grads = rng.normal(size=(counts.size, dim)).astype(np.float32)
    start = rng.normal(size=(150, dim)).astype(np.float32)
    for bag in (Ragged(index, splits), Ragged(index, splits, weights)):
        check_combined(bag, grads, start, combiner)
    entries = rng.normal(size=(index.size, dim)).astype(np.float32)
    assert same_bits(run(add_rows, entries, index, out=start), twin.add_rows(entries, index, start))


def test_sums_are_taken_in_the_order_of_the_entries() -> None:
    big = np.array([[1e8], [1.0], [-1e8]], dtype=np.float32)
    for order, want in [([0, 1, 2], 0.0), ([0, 2, 1], 1.0)]:
        zero = np.zeros((1, 1), dtype=np.float32)
        assert run(add_rows, big[order], i64(0, 0, 0), out=zero) == want
        splits = i64(0, 1, 2, 3)
        args = (big[order], i64(0, 0, 0), splits, NO_WEIGHTS, COMBINER_CODES["mean"])
        assert run(combine_gradients, *args, out=zero) == want


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
    got = run(combine_gradients, *args, out=np.zeros((6, 2), dtype=np.float32))
    np.testing.assert_allclose(got[3], row_3, rtol=1e-6)
    np.testing.assert_allclose(got[5], row_5 or row_3, rtol=1e-6)
    assert not got[[0, 1, 2, 4]].any()


def test_counting_stops_where_float32_does() -> None:
    count = 2**24 + 2
    args = (np.ones((1, 1), dtype=np.float32), np.zeros(count, dtype=np.int64), i64(0, count))
    out = np.zeros((1, 1), dtype=np.float32)
    combine_gradients(*args, NO_WEIGHTS, COMBINER_CODES["mean"], out)
    assert out == 1, "each of them weighs 2⁻²⁴"


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_the_error_of_a_sum_is_that_of_its_roundings(combiner: str) -> None:
    """Against float64: (k + n + 4)·2⁻²⁴·Σ|c·g| for k entries of a row from bags of n entries.

    c·g has n + 3 roundings at most (n of the divisor, its root, the quotient, the product).
    """
    rng = np.random.default_rng(3)
    num_bags, n, num_rows, dim = 500, 20, 50, 17
    index, splits = rng.integers(0, num_rows, num_bags * n), np.arange(0, num_bags * n + 1, n)
    weights = rng.random(index.size, dtype=np.float32) + np.float32(0.1)
    grads = rng.normal(size=(num_bags, dim)).astype(np.float32)
    got = np.zeros((num_rows, dim), dtype=np.float32)
    combine_gradients(grads, index, splits, weights, COMBINER_CODES[combiner], got)
    w = weights.astype(np.float64).reshape(num_bags, n)
    divisor = {
        "sum": np.ones((num_bags, 1)),
        "mean": w.sum(axis=1, keepdims=True),
        "sqrtn": np.sqrt((w * w).sum(axis=1, keepdims=True)),
    }[combiner]
    entries = np.repeat(grads.astype(np.float64), n, axis=0) * (w / divisor).reshape(-1, 1)
    want, size = np.zeros((num_rows, dim)), np.zeros((num_rows, dim))
    np.add.at(want, index, entries)
    np.add.at(size, index, np.abs(entries))
    k = np.bincount(index, minlength=num_rows)[:, None]
    assert (np.abs(got - want) <= (k + n + 4) * 2.0**-24 * size).all()


@pytest.mark.parametrize("cuts", [[0, 64], [0, 32, 64], [0, 16, 40, 64]])
def test_cores_may_share_the_work_by_columns(cuts: list[int]) -> None:
    rng = np.random.default_rng(5)
    index, splits = rng.integers(0, 40, 3000), np.arange(0, 3001, 3)
    upstream = rng.normal(size=(1000, 64)).astype(np.float32)
    entries = rng.normal(size=(3000, 64)).astype(np.float32)
    start = rng.normal(size=(40, 64)).astype(np.float32)
    combined, added = start.copy(), start.copy()
    pieces = [slice(a, b) for a, b in pairwise(cuts)]
    mean = COMBINER_CODES["mean"]
    Threads(len(pieces)).run(
        [
            partial(combine_gradients, upstream, index, splits, NO_WEIGHTS, mean, combined, piece)
            for piece in pieces
        ]
    )
    Threads(len(pieces)).run([partial(add_rows, entries, index, added, p) for p in pieces])
    want = twin.combine_gradients(upstream, index, splits, None, "mean", start)
    assert same_bits(combined, want)
    assert same_bits(added, twin.add_rows(entries, index, start))
