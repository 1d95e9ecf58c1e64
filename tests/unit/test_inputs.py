"""An input that exists is well-formed: the lookup indexes by it without looking again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ps.errors import InputError
from ps.inputs import Dense, Ragged, Sparse

PLACES = np.array([[0, 0], [0, 1]])
IDS = np.array([3, 4])
TOO_BIG = np.array([2**63], dtype=np.uint64)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 2)])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint64])
def test_dense_ids_of_any_shape_become_int64(shape: tuple[int, ...], dtype: Any) -> None:
    value = Dense(np.ones(shape, dtype=dtype))
    assert (value.ids.dtype, value.ids.shape) == (np.int64, shape)
    assert value.ids.flags.c_contiguous


def test_ids_beyond_int32_keep_their_value() -> None:
    big: Any = [2**31, 2**40, 2**63 - 1, -(2**63)]
    assert Dense(big).ids.tolist() == big
    assert Dense(np.array([2**63 - 1], dtype=np.uint64)).ids.tolist() == [2**63 - 1]
    assert Sparse(np.zeros((4, 1)).astype(int), big, (1,)).ids.tolist() == big


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([1.0]), "ids must be integers, got float64"),
        (np.array([True]), "ids must be integers, got bool"),
        (np.array(["1"]), "ids must be integers, got <U1"),
        (TOO_BIG, "ids must fit int64, got 9223372036854775808"),
        ([2**70], "ids must be integers, got object"),
        ([[1], [1, 2]], "ids must be an array of integers"),
    ],
)
def test_ids_that_are_not_int64_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Dense(ids)
    if np.ndim(ids if isinstance(ids, np.ndarray) else 0) == 1:
        with pytest.raises(InputError, match=message):
            Sparse(np.array([[0]]), ids, (1,))
        with pytest.raises(InputError, match=message):
            Ragged(ids, np.array([0, 1]))


def test_sparse_fields_are_cast() -> None:
    lists: Any = {"indices": [[0, 0], [0, 1]], "ids": [3, 4], "dense_shape": [2, 5]}
    weights: Any = [1, 2]
    value = Sparse(**lists, weights=weights)
    assert value.indices.dtype == value.ids.dtype == np.int64
    assert (value.dense_shape, value.rank) == ((2, 5), 2)
    assert value.weights is not None
    assert value.weights.dtype == np.float32
    assert Sparse(PLACES, IDS, (2, 5), np.array([0.1, 2], np.float64)).weights is not None


def test_an_empty_sparse_input_may_have_untyped_arrays() -> None:
    empty: Any = []
    value = Sparse(np.zeros((0, 3)), empty, (2, 0, 3), empty)
    assert (value.indices.shape, value.ids.dtype) == ((0, 3), np.int64)


def test_coordinates_may_lie_anywhere() -> None:
    assert Sparse(np.array([[9, 9], [-1, 0]]), IDS, (1, 1)).indices.tolist() == [[9, 9], [-1, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PLACES[:1], IDS, (2, 5)), r"indices must have shape \[2, 2\].*got \[1, 2\]"),
        ((PLACES, IDS, (2, 5, 1)), r"indices must have shape \[2, 3\].*got \[2, 2\]"),
        ((PLACES[0], IDS, (2,)), r"indices must have shape \[2, 1\].*got \[2\]"),
        ((PLACES * 0.5, IDS, (2, 5)), "indices must be integers, got float64"),
        ((PLACES.astype(np.uint64) + TOO_BIG, IDS, (2, 5)), "indices must fit int64"),
        ((PLACES, IDS, ()), r"dense_shape must hold one size or more, >= 0, got \[\]"),
        ((PLACES, IDS, (2, -1)), r"dense_shape must hold .*, got \[2, -1\]"),
        ((PLACES, IDS, (2.5, 1)), "dense_shape must be integers, got float64"),
        ((PLACES, IDS, 2), r"dense_shape must have one dimension, got shape \[\]"),
        ((PLACES, PLACES, (2, 5)), r"ids must have one dimension, got shape \[2, 2\]"),
        ((PLACES, IDS, (2, 5), [1.0]), "got 1 weights for 2 ids"),
        ((PLACES, IDS, (2, 5), [[1.0, 2.0]]), r"weights must have one dimension"),
        ((PLACES, IDS, (2, 5), ["a", "b"]), "weights must be numbers, got <U1"),
        ((PLACES, IDS, (2, 5), [True, False]), "weights must be numbers, got bool"),
    ],
)
def test_sparse_input_that_does_not_fit_together_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sparse(*arguments)


def test_row_splits_are_named_when_they_are_wrong() -> None:
    with pytest.raises(InputError, match="row_splits must be integers, got float64"):
        Ragged(IDS, np.array([0.0, 2.0]))


@pytest.mark.parametrize("value", [Dense(IDS), Sparse(PLACES, IDS, (2, 5))])
def test_inputs_are_frozen(value: Any) -> None:
    with pytest.raises(AttributeError):
        value.ids = IDS
