"""Lookup semantics: the numeric vectors of the reference, and what is refused.

The table is `ROWS_VD`: row i is [2i + 1, 2i + 2].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ps.config import COMBINERS, Combiner
from ps.errors import IdRangeError, InputError
from ps.inputs import Bags, Dense, Input, Ragged, Sparse
from ps.lookup import lookup, lookup_shape
from ps.ragged import F32
from ps.spec import FeatureSpec
from tests.support.exports import ROWS_VD

NAN, INF = float("nan"), float("inf")
Z = [0, 0]
RAW = {"validate_weights_and_indices": False}
KINDS = ("sparse", "bags", "ragged")
Rows = list[list[int]]
Weights = list[list[float]] | None


def run(value: Input | Bags, combiner: Combiner = "sum", **options: Any) -> F32:
    feature = FeatureSpec(name="f", table="t", **options)
    found = lookup(feature, "t", combiner, ROWS_VD, value)
    assert found.shape == lookup_shape(feature, 2, value)
    return found


def bags(kind: str, ids: Rows, weights: Weights = None) -> Input | Bags:
    """One list of ids per example, in each of the three forms that hold such."""
    ragged = Ragged.from_lists(ids, weights)
    if kind == "ragged":
        return ragged
    if kind == "bags":
        return Bags(ragged)
    rows = np.repeat(np.arange(len(ids)), np.diff(ragged.row_splits))
    shape = (len(ids), max([1, *map(len, ids)]))
    return Sparse(np.stack([rows, ragged.positions], 1), ragged.ids, shape, ragged.weights)


def sparse(
    entries: dict[tuple[int, ...], int] | Sequence[tuple[tuple[int, ...], int]],
    shape: tuple[int, ...],
    weights: list[float] | None = None,
) -> Sparse:
    pairs = list(entries.items()) if isinstance(entries, dict) else list(entries)
    indices = np.array([place for place, _ in pairs]).reshape(-1, len(shape))
    return Sparse(indices, np.array([i for _, i in pairs]), shape, weights)


def check(found: F32, wanted: object) -> None:
    assert found.dtype == np.float32
    expected = np.array(wanted, dtype=np.float32)
    assert found.shape == expected.shape or not expected.size
    np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-6)


EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
BOTH_WAYS = pytest.mark.parametrize("validate", [True, False], ids=["safe", "raw"])


@EVERY_KIND
@BOTH_WAYS
@pytest.mark.parametrize(
    ("weights", "combiner", "wanted"),
    [
        (None, "sum", [[4, 6], Z, [5, 6]]),
        (None, "mean", [[2, 3], Z, [5, 6]]),
        (None, "sqrtn", [[2.828427, 4.242641], Z, [5, 6]]),
        ([[0.5, 2], [], [3]], "sum", [[6.5, 9], Z, [15, 18]]),
        ([[0.5, 2], [], [3]], "mean", [[2.6, 3.6], Z, [5, 6]]),
        ([[0.5, 2], [], [3]], "sqrtn", [[3.152963, 4.365642], Z, [5, 6]]),
    ],
)
def test_examples_combine_as_in_the_reference(
    kind: str, validate: bool, weights: Weights, combiner: Combiner, wanted: object
) -> None:
    value = bags(kind, [[0, 1], [], [2]], weights)
    check(run(value, combiner, validate_weights_and_indices=validate), wanted)


SAFE_OR_RAW = [
    # ids, weights, combiner, with validation, without
    ([[0, 1, 2], [3], [4]], [[-1, 2, 0], [-2], [0]], "sum",
     [[5, 6], [-14, -16], Z], [[5, 6], [-14, -16], Z]),
    ([[0, 1, 2], [3], [4]], [[-1, 2, 0], [-2], [0]], "mean",
     [[3, 4], Z, Z], [[5, 6], [7, 8], Z]),
    ([[0, 1, 2], [3], [4]], [[-1, 2, 0], [-2], [0]], "sqrtn",
     [[3, 4], Z, Z], [[2.236068, 2.683281], [-7, -8], Z]),
    ([[0, 1]], [[1, -1]], "sum", [[-2, -2]], [[-2, -2]]),
    ([[0, 1]], [[1, -1]], "mean", [[1, 2]], [Z]),
    ([[0, 1]], [[1, -1]], "sqrtn", [[1, 2]], [[-1.414214, -1.414214]]),
    ([[0, 1]], [[NAN, 1]], "sum", [[NAN, NAN]], [[NAN, NAN]]),
    ([[0, 1]], [[NAN, 1]], "mean", [[3, 4]], [[NAN, NAN]]),
    ([[0, 1]], [[NAN, 1]], "sqrtn", [[3, 4]], [[NAN, NAN]]),
    ([[0, 1]], [[INF, 1]], "sum", [[INF, INF]], [[INF, INF]]),
    ([[0, 1]], [[INF, 1]], "mean", [[NAN, NAN]], [[NAN, NAN]]),
    ([[0, 1]], [[INF, 1]], "sqrtn", [[NAN, NAN]], [[NAN, NAN]]),
    ([[1, 1, 0]], None, "sum", [[7, 10]], [[7, 10]]),
    ([[1, 1, 0]], None, "mean", [[2.333333, 3.333333]], [[2.333333, 3.333333]]),
    ([[1, 1, 0]], None, "sqrtn", [[4.041452, 5.773503]], [[4.041452, 5.773503]]),
]  # fmt: skip


@EVERY_KIND
@pytest.mark.parametrize(("ids", "weights", "combiner", "safe", "raw"), SAFE_OR_RAW)
def test_validation_drops_weights_except_in_sums_and_in_ragged_input(
    kind: str, ids: Rows, weights: Weights, combiner: Combiner, safe: object, raw: object
) -> None:
    value = bags(kind, ids, weights)
    check(run(value, combiner), raw if kind == "ragged" else safe)
    check(run(value, combiner, **RAW), raw)


@pytest.mark.parametrize("kind", ["sparse", "bags"])
@pytest.mark.parametrize("combiner", COMBINERS)
def test_negative_ids_are_dropped_with_validation(kind: str, combiner: Combiner) -> None:
    check(run(bags(kind, [[-1, 1], [-7]]), combiner), [[3, 4], Z])
    check(run(bags(kind, [[-1, 1], [-7]], [[5, 2], [1]])), [[6, 8], Z])


@EVERY_KIND
def test_negative_ids_raise_without_validation_and_always_in_ragged_input(kind: str) -> None:
    value = bags(kind, [[-1, 1], [-7]])
    for options in [RAW, {}] if kind == "ragged" else [RAW]:
        with pytest.raises(
            IdRangeError, match=r"feature 'f': id -1 is not in \[0, 5\) of table 't'"
        ):
            run(value, **options)


@EVERY_KIND
@BOTH_WAYS
@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("bad_id", [5, 2**31, 2**32, 2**40, 2**63 - 1])
def test_an_id_beyond_the_table_always_raises(
    kind: str, validate: bool, combiner: Combiner, bad_id: int
) -> None:
    with pytest.raises(IdRangeError) as e:
        run(bags(kind, [[0], [1, bad_id]]), combiner, validate_weights_and_indices=validate)
    assert (e.value.feature, e.value.bad_id, e.value.num_rows) == ("f", bad_id, 5)


@EVERY_KIND
@pytest.mark.parametrize("combiner", COMBINERS)
def test_an_id_beyond_the_table_passes_only_when_its_weight_is_dropped(
    kind: str, combiner: Combiner
) -> None:
    value = bags(kind, [[0, 5]], [[1, 0]])
    if kind != "ragged" and combiner != "sum":
        check(run(value, combiner), [[1, 2]])
    else:
        with pytest.raises(IdRangeError):
            run(value, combiner)
    with pytest.raises(IdRangeError):
        run(value, combiner, **RAW)


@EVERY_KIND
@pytest.mark.parametrize("output_shape", [None, (2,)])
def test_a_sequence_takes_no_weights(kind: str, output_shape: tuple[int, ...] | None) -> None:
    value = bags(kind, [[0], []], [[1], []])
    with pytest.raises(InputError, match="but this is a sequence feature"):
        run(value, max_sequence_length=2, output_shape=output_shape)


@EVERY_KIND
@BOTH_WAYS
def test_a_sequence_is_cut_and_filled_with_zeros(kind: str, validate: bool) -> None:
    value = bags(kind, [[0, 1, 2], [], [3]])
    found = run(value, "mean", max_sequence_length=2, validate_weights_and_indices=validate)
    check(found, [[[1, 2], [3, 4]], [Z, Z], [[7, 8], Z]])


@pytest.mark.parametrize("kind", ["sparse", "bags"])
def test_ids_behind_the_end_of_a_sequence_are_not_checked(kind: str) -> None:
    found = run(bags(kind, [[0, 1, 99], [4, 3, -1]]), max_sequence_length=2)
    check(found[:, 0], [[1, 2], [9, 10]])


def test_ids_behind_the_end_of_a_ragged_sequence_are_checked() -> None:
    with pytest.raises(IdRangeError, match="id 99 is not in"):
        run(bags("ragged", [[0, 1, 99]]), max_sequence_length=2)


@EVERY_KIND
@BOTH_WAYS
@pytest.mark.parametrize("bad_id", [-1, 5])
def test_a_kept_id_of_a_sequence_must_be_in_the_table(
    kind: str, validate: bool, bad_id: int
) -> None:
    value = bags(kind, [[0, 1, 4], [3, bad_id]])
    with pytest.raises(IdRangeError, match=f"id {bad_id} is not in"):
        run(value, max_sequence_length=2, validate_weights_and_indices=validate)


@pytest.mark.parametrize("kind", ["sparse", "bags"])
def test_an_output_shape_only_turns_the_sequence_off_unless_ragged(kind: str) -> None:
    found = run(bags(kind, [[0, 1, 2], [3]]), max_sequence_length=2, output_shape=(7, None))
    check(found, [[9, 12], [7, 8]])


@BOTH_WAYS
def test_bags_keep_their_empty_examples(validate: bool) -> None:
    options = {"validate_weights_and_indices": validate}
    check(run(bags("bags", [[0], [1], [], []]), **options), [[1, 2], [3, 4], Z, Z])
    assert run(bags("bags", [[], [], []]), **options).shape == (3, 2)
    assert run(bags("bags", []), **options).shape == (0, 2)


SPARSE = [
    # input, combiner, with validation, without
    (sparse({(0, 0): 0, (1, 1): 1}, (4, 2)), "sum", [[1, 2], [3, 4], Z, Z], [[1, 2], [3, 4]]),
    (sparse({}, (3, 2)), "sum", [Z, Z, Z], np.zeros((0, 2))),
    (sparse({(0,): 0, (2,): 1}, (3,)), "sum", [4, 6], [[1, 2], Z, [3, 4]]),
    (sparse({(0,): 0, (2,): 1}, (3,)), "mean", [2, 3], [[1, 2], Z, [3, 4]]),
    (sparse({(1, 0): 0, (0, 0): 1}, (2, 2)), "sum", [[3, 4], [1, 2]],
     "segment ids are not increasing"),
    (sparse({(3, 0): 0}, (2, 2)), "sum", "outside its dense_shape", [Z, Z, Z, [1, 2]]),
    (sparse({(-1, 0): 0}, (2, 2)), "sum", "outside its dense_shape", "must be >= 0"),
    (sparse({(0, 9): 0}, (2, 2)), "sum", [[1, 2], Z], [[1, 2]]),
    (sparse([((0, 0), 0), ((0, 0), 1)], (1, 1)), "sum", [[4, 6]], [[4, 6]]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "combiner", "safe", "raw"), SPARSE)
def test_sparse_input_with_and_without_validation(
    value: Sparse, combiner: Combiner, safe: object, raw: object
) -> None:
    for wanted, options in ((safe, {}), (raw, RAW)):
        if isinstance(wanted, str):
            with pytest.raises(InputError, match=f"^feature 'f' .*{wanted}"):
                run(value, combiner, **options)
        else:
            check(run(value, combiner, **options), wanted)


CUBE = {(0, 0, 0): 0, (0, 0, 1): 1, (1, 1, 0): 2}


@BOTH_WAYS
@pytest.mark.parametrize(
    ("weights", "combiner", "wanted"),
    [
        (None, "sum", [[[4, 6], Z], [Z, [5, 6]]]),
        ([1, 3, 2], "sum", [[[10, 14], Z], [Z, [10, 12]]]),
        ([1, 3, 2], "mean", [[[2.5, 3.5], Z], [Z, [5, 6]]]),
    ],
)
def test_leading_dimensions_stay_and_rank_3_is_always_validated(
    validate: bool, weights: list[float] | None, combiner: Combiner, wanted: object
) -> None:
    options = {"validate_weights_and_indices": validate}
    check(run(sparse(CUBE, (2, 2, 2), weights), combiner, **options), wanted)
    dropped = sparse({**CUBE, (0, 1, 0): -1}, (2, 2, 2), weights and [*weights, 1.0])
    check(run(dropped, combiner, **options), wanted)


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ((0, 2, 0), [[Z, Z], [[1, 2], Z]]),  # beyond a dimension: goes on in the next row
        ((0, 0, 3), [[Z, [1, 2]], [Z, Z]]),
        ((1, 0, -1), [[Z, [1, 2]], [Z, Z]]),
        ((0, 0, -1), [[[1, 2], Z], [Z, Z]]),  # rounded towards 0
        ((0, 5, 0), None),
        ((-1, 0, 0), None),
        ((2**62, 2, 0), None),  # would wrap to a place inside
        ((2**62, 0, 0), None),
    ],
)
def test_coordinates_of_rank_3_count_through_the_shape(
    place: tuple[int, ...], wanted: object
) -> None:
    if wanted is None:
        with pytest.raises(InputError, match=r"outside its dense_shape \[2, 2, 2\]"):
            run(sparse({place: 0}, (2, 2, 2)))
    else:
        check(run(sparse({place: 0}, (2, 2, 2))), wanted)


@pytest.mark.parametrize("shape", [(1, 2**40, 2**40), (0, 2, 2), (2, 2, 0)])
def test_an_entry_of_rank_3_needs_a_shape_that_counts(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="outside its dense_shape"):
        run(sparse({(0, 0, 0): 0}, shape))


def test_unsorted_entries_keep_their_weights() -> None:
    value = sparse({(1, 0): 0, (0, 1): 2, (0, 0): 1}, (2, 2), [3, 1, 2])
    check(run(value), [[11, 14], [3, 6]])


def test_a_dropped_entry_may_lie_anywhere() -> None:
    check(run(sparse({(9, 0): -1, (0, 0): 1}, (1, 1))), [[3, 4]])
    check(run(sparse({(9, 0): 4, (0, 0): 1}, (1, 1), [0, 1]), "mean"), [[3, 4]])


SEQUENCES = [
    ({(0, 1): 4, (1, 0): 3}, [[Z, [9, 10]], [[7, 8], Z]]),
    ({(1, 0): 3, (0, 1): 4}, [[Z, [9, 10]], [[7, 8], Z]]),
    ([((0, 0), 0), ((1, 1), 2), ((0, 0), 1)], [[[4, 6], Z], [Z, [5, 6]]]),
    ({(0, 2): 99, (2, 0): 99, (-1, 0): 99, (0, -1): 99}, [[Z, Z], [Z, Z]]),
]


@pytest.mark.parametrize(("entries", "wanted"), SEQUENCES)
@pytest.mark.parametrize("shape", [(2, 2), (2, 1), (2, 5)])
def test_sparse_sequences_put_rows_at_coordinates_and_add_up_what_meets(
    entries: Any, wanted: object, shape: tuple[int, int]
) -> None:
    check(run(sparse(entries, shape), "mean", max_sequence_length=2), wanted)


@pytest.mark.parametrize("shape", [(3,), (1, 3, 1)])
def test_only_rank_2_makes_a_sparse_sequence(shape: tuple[int, ...]) -> None:
    value = sparse({(0,) * len(shape): 1}, shape)
    check(run(value, max_sequence_length=2), run(value))


FOUR = [[0, 1, 2], [3], [], [4]]
RAGGED_SHAPES = [
    # ids, weights, output_shape, wanted
    (FOUR, None, (4, 2), [[[1, 2], [3, 4]], [[7, 8], Z], [Z, Z], [[9, 10], Z]]),
    (FOUR, [[9, 9, 9], [9], [], [9]], (4, 2),
     [[[1, 2], [3, 4]], [[7, 8], Z], [Z, Z], [[9, 10], Z]]),
    (FOUR, None, (2, 4),
     [[[1, 2], [3, 4], [7, 8], Z], [Z, Z, [9, 10], Z]]),
    (FOUR, None, (12,),
     [[1, 2], [3, 4], [5, 6], [7, 8], Z, Z, Z, Z, Z, [9, 10], Z, Z]),
    ([[0, 1], [2, 3], [], [4]], None, (2, 2), [[[4, 6], [12, 14]], [Z, [9, 10]]]),
    ([[0, 1], [2, 3], [], [4]], [[1, 2], [3, 4], [], [5]], (2, 2),
     [[[7, 10], [43, 50]], [Z, [45, 50]]]),
    ([[0, 1]], None, (), [4, 6]),
    ([], None, (0, 3), np.zeros((0, 3, 2))),
]  # fmt: skip


@pytest.mark.parametrize(("ids", "weights", "output_shape", "wanted"), RAGGED_SHAPES)
def test_ragged_input_takes_its_output_shape(
    ids: Rows, weights: Weights, output_shape: tuple[int, ...], wanted: object
) -> None:
    length = 0 if weights else 7  # ignored beside an output shape
    value = Ragged.from_lists(ids, weights)
    check(run(value, output_shape=output_shape, max_sequence_length=length), wanted)


@pytest.mark.parametrize(
    ("ids", "output_shape", "message"),
    [
        ([[0], [1]], (3,), r"should be the factor of the number of examples; got .*\[3\], 2 ex"),
        ([[0], [1]], (1,), "Output shape set in the FeatureConfig should be the factor"),
        ([[0], [1]], (), "Output shape set in the FeatureConfig should be the factor"),
        ([[0], [1]], (0,), "Output shape set in the FeatureConfig should be the factor"),
        ([], (3,), "Output shape set in the FeatureConfig should be the factor"),
        ([[0]], (None, 1), r"partially known output_shape, \[None, 1\]"),
    ],
)
def test_ragged_input_that_does_not_fit_its_output_shape_is_refused(
    ids: Rows, output_shape: tuple[int | None, ...], message: str
) -> None:
    with pytest.raises(InputError, match=f"^feature 'f' .*{message}"):
        run(Ragged.from_lists(ids), output_shape=output_shape)


def test_ids_cut_off_by_an_output_shape_are_checked() -> None:
    with pytest.raises(IdRangeError, match="id 9 is not in"):
        run(Ragged.from_lists([[0, 1, 9]]), output_shape=(2,))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2), (1, 0, 3)])
def test_dense_ids_keep_their_shape(shape: tuple[int, ...]) -> None:
    ids = np.arange(np.prod(shape, dtype=int), dtype=np.int64).reshape(shape)
    found = run(Dense(ids), output_shape=(9,))
    assert found.shape == (*shape, 2)
    check(found, ROWS_VD[ids])


@BOTH_WAYS
@pytest.mark.parametrize("bad_id", [-1, 5, 2**40])
def test_every_dense_id_is_checked(validate: bool, bad_id: int) -> None:
    with pytest.raises(IdRangeError, match=rf"id {bad_id} is not in \[0, 5\)"):
        run(Dense(np.array([[0, bad_id]])), validate_weights_and_indices=validate)


@pytest.mark.parametrize("output_shape", [None, (3,)])
def test_a_sequence_refuses_dense_ids(output_shape: tuple[int, ...] | None) -> None:
    with pytest.raises(InputError, match="is a sequence feature but a dense tensor"):
        run(Dense(np.array([0])), max_sequence_length=2, output_shape=output_shape)
