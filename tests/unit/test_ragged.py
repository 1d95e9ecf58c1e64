"""A `Ragged` that exists is well-formed: kernels index by it without looking again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.errors import InputError
from ps.ragged import Ragged, as_ids, as_weights
from tests.support.strategies import frozen

LISTS = st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), max_size=6)


@given(ids=LISTS)
def test_lists_come_back_as_they_went_in(ids: list[list[int]]) -> None:
    bag = Ragged.from_lists(ids)
    assert bag.num_examples == len(ids)
    assert bag.to_lists() == ids
    assert bag.ids.dtype == bag.row_splits.dtype == np.int64


@given(ids=LISTS, data=st.data())
def test_a_slice_holds_those_examples(ids: list[list[int]], data: Any) -> None:
    weights = [[float(i % 7) for i in row] for row in ids]
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    for w in (None, weights):
        part = Ragged.from_lists(ids, w).slice(start, stop)
        want = Ragged.from_lists(ids[start:stop], None if w is None else w[start:stop])
        np.testing.assert_array_equal(part.ids, want.ids)
        np.testing.assert_array_equal(part.row_splits, want.row_splits)
        np.testing.assert_array_equal(part.weights, want.weights)


def test_a_slice_copies_neither_ids_nor_weights() -> None:
    bag = Ragged.from_lists([[1, 2], [3], [4]], [[1, 2], [3], [4]])
    part = bag.slice(1, 3)
    assert np.shares_memory(part.ids, bag.ids)
    assert np.shares_memory(part.weights, bag.weights)


def test_dense_ids_are_one_id_per_example() -> None:
    assert Ragged.from_dense([5, 3]).to_lists() == [[5], [3]]
    assert Ragged.from_dense([]).num_examples == 0


def test_fields_are_cast_and_read_only_arrays_are_welcome() -> None:
    bag = Ragged(
        frozen(np.array([1, 2], dtype=np.uint16)),
        frozen(np.array([0, 2], dtype=np.int32)),
        frozen(np.array([1.5, 2.0])),
    )
    assert (bag.ids.dtype, bag.row_splits.dtype) == (np.int64, np.int64)
    assert bag.weights is not None
    assert bag.weights.dtype == np.float32
    strided = Ragged(np.arange(6)[::2], [0, 3], np.arange(6, dtype=np.float32)[::2])
    assert strided.ids.flags.c_contiguous
    assert strided.weights is not None
    assert strided.weights.flags.c_contiguous


@pytest.mark.parametrize(
    "splits",
    [
        [],
        [0],
        [1, 2],
        [0, 1],
        [0, 3],
        [0, 3, 2],
        [0, -1, 2],
        [-1, 2],
        [[0, 2]],
        [0.0, 2.0],
        [0, 2**63],
    ],
    ids=str,
)
def test_malformed_row_splits_are_refused(splits: Any) -> None:
    with pytest.raises(InputError):
        Ragged(np.array([7, 8]), splits)


def test_row_splits_whose_differences_overflow_are_refused() -> None:
    """Steps of 2⁶² all rise modulo 2⁶⁴; a kernel would read far outside the array."""
    with pytest.raises(InputError, match="row_splits must not fall"):
        Ragged(np.zeros(0, dtype=np.int64), [0, 2**62, -(2**63), -(2**62), 0])


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]], ["a", "b"], [True, False]]
)
def test_weights_of_another_size_or_kind_are_refused(weights: Any) -> None:
    with pytest.raises(InputError, match="weights"):
        Ragged(np.array([7, 8]), [0, 2], weights)


@pytest.mark.parametrize("weights", [[[1.0], [2.0]], [[1.0, 2.0]], [[], [1.0, 2.0], []]])
def test_weights_in_another_nesting_are_refused(weights: Any) -> None:
    with pytest.raises(InputError, match="same nesting"):
        Ragged.from_lists([[7, 8], []], weights)


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [1.5, 2],
        ["1"],
        [None],
        [True],
        [[1, 2]],
        [[1], [2, 3]],
        3,
        [2**63],
        [2**64],
        [-(2**63) - 1],
        [2**63, -1],
    ],
    ids=str,
)
def test_ids_that_are_no_int64_list_are_refused_not_wrapped(values: Any) -> None:
    with pytest.raises(InputError, match=r"ids? "):
        as_ids(values)


def test_the_ends_of_int64_are_ids() -> None:
    np.testing.assert_array_equal(as_ids([2**63 - 1, -(2**63)]), [2**63 - 1, -(2**63)])
    np.testing.assert_array_equal(as_ids(np.array([2**63 - 1], dtype=np.uint64)), [2**63 - 1])
    assert as_ids([]).dtype == np.int64


def test_weights_become_float32() -> None:
    for values in ([1, 2], np.array([1.0, 2.0]), np.array([1, 2], dtype=np.float16)):
        got = as_weights(values)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, [1, 2])
    assert as_weights([]).dtype == np.float32
    for bad in ([1j], ["a"], [[1.0], [1.0, 2.0]], 1.0, [None]):
        with pytest.raises(InputError, match="weights"):
            as_weights(bad)
