"""Lookup semantics: the numeric vectors of the reference, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.config import Combiner
from ps.errors import IdRangeError, InputError
from ps.lookup import lookup_dense, lookup_ragged
from ps.ragged import F32, I64, Ragged
from ps.spec import FeatureSpec
from serving.lookup import LookupService, UnknownFeatureError
from tests.support.exports import ROWS_VD, small_export

NAN, INF = float("nan"), float("inf")
COMBINERS: tuple[Combiner, ...] = ("sum", "mean", "sqrtn")


def feature(**options: Any) -> FeatureSpec:
    return FeatureSpec(name="f", table="t", **options)


def combine(
    ids: list[list[int]],
    combiner: Combiner = "sum",
    weights: list[list[float]] | None = None,
    **options: Any,
) -> F32:
    bag = Ragged.from_lists(ids, weights)
    return lookup_ragged(feature(**options), "t", combiner, ROWS_VD, bag)


def check(found: F32, wanted: object) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.array(wanted, dtype=np.float32), rtol=1e-6)


SAFE_AND_RAW = pytest.mark.parametrize("validate", [True, False], ids=["safe", "raw"])


@SAFE_AND_RAW
@pytest.mark.parametrize(
    ("weights", "combiner", "wanted"),
    [
        (None, "sum", [[4, 6], [0, 0], [5, 6]]),
        (None, "mean", [[2, 3], [0, 0], [5, 6]]),
        (None, "sqrtn", [[2.828427, 4.242641], [0, 0], [5, 6]]),
        ([[0.5, 2], [], [3]], "sum", [[6.5, 9], [0, 0], [15, 18]]),
        ([[0.5, 2], [], [3]], "mean", [[2.6, 3.6], [0, 0], [5, 6]]),
        ([[0.5, 2], [], [3]], "sqrtn", [[3.152963, 4.365642], [0, 0], [5, 6]]),
    ],
)
def test_bags_combine_as_in_the_reference(
    validate: bool, weights: list[list[float]] | None, combiner: Combiner, wanted: object
) -> None:
    found = combine([[0, 1], [], [2]], combiner, weights, validate_weights_and_indices=validate)
    check(found, wanted)


@pytest.mark.parametrize(
    ("combiner", "safe", "raw"),
    [
        ("sum", [[5, 6], [-14, -16], [0, 0]], [[5, 6], [-14, -16], [0, 0]]),
        ("mean", [[3, 4], [0, 0], [0, 0]], [[5, 6], [7, 8], [0, 0]]),
        ("sqrtn", [[3, 4], [0, 0], [0, 0]], [[2.236068, 2.683281], [-7, -8], [0, 0]]),
    ],
)
def test_weights_that_are_not_positive_count_only_without_validation_or_in_a_sum(
    combiner: Combiner, safe: object, raw: object
) -> None:
    ids, weights = [[0, 1, 2], [3], [4]], [[-1.0, 2.0, 0.0], [-2.0], [0.0]]
    check(combine(ids, combiner, weights), safe)
    check(combine(ids, combiner, weights, validate_weights_and_indices=False), raw)


@pytest.mark.parametrize(
    ("weights", "combiner", "safe", "raw"),
    [
        ([1, -1], "sum", [-2, -2], [-2, -2]),
        ([1, -1], "mean", [1, 2], [0, 0]),
        ([1, -1], "sqrtn", [1, 2], [-1.414214, -1.414214]),
        ([NAN, 1], "sum", [NAN, NAN], [NAN, NAN]),
        ([NAN, 1], "mean", [3, 4], [NAN, NAN]),
        ([NAN, 1], "sqrtn", [3, 4], [NAN, NAN]),
        ([INF, 1], "sum", [INF, INF], [INF, INF]),
        ([INF, 1], "mean", [NAN, NAN], [NAN, NAN]),
        ([INF, 1], "sqrtn", [NAN, NAN], [NAN, NAN]),
    ],
)
def test_weights_at_the_edge_do_as_the_reference(
    weights: list[float], combiner: Combiner, safe: object, raw: object
) -> None:
    check(combine([[0, 1]], combiner, [weights]), [safe])
    check(combine([[0, 1]], combiner, [weights], validate_weights_and_indices=False), [raw])


@pytest.mark.parametrize("combiner", COMBINERS)
def test_negative_ids_are_dropped_with_validation(combiner: Combiner) -> None:
    check(combine([[-1, 1], [-7]], combiner), [[3, 4], [0, 0]])


def test_a_dropped_id_takes_its_weight_along() -> None:
    check(combine([[-1, 1], [-7]], "sum", [[5, 2], [1]]), [[6, 8], [0, 0]])


def test_negative_ids_raise_without_validation() -> None:
    with pytest.raises(IdRangeError, match=r"feature 'f': id -1 is not in \[0, 5\) of table 't'"):
        combine([[-1, 1], [-7]], validate_weights_and_indices=False)


@SAFE_AND_RAW
@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("bad_id", [5, 2**31, 2**40, 2**63 - 1])
def test_an_id_beyond_the_table_always_raises(
    validate: bool, combiner: Combiner, bad_id: int
) -> None:
    with pytest.raises(IdRangeError) as e:
        combine([[0], [1, bad_id]], combiner, validate_weights_and_indices=validate)
    assert (e.value.feature, e.value.bad_id, e.value.num_rows) == ("f", bad_id, 5)


@pytest.mark.parametrize("combiner", ["mean", "sqrtn"])
def test_an_id_beyond_the_table_passes_when_its_weight_is_dropped(combiner: Combiner) -> None:
    check(combine([[0, 5]], combiner, [[1, 0]]), [[1, 2]])
    with pytest.raises(IdRangeError):
        combine([[0, 5]], combiner, [[1, 0]], validate_weights_and_indices=False)


def test_an_id_beyond_the_table_with_weight_zero_raises_in_a_sum() -> None:
    with pytest.raises(IdRangeError):
        combine([[0, 5]], "sum", [[1, 0]])


@pytest.mark.parametrize(
    ("combiner", "wanted"),
    [("sum", [7, 10]), ("mean", [2.333333, 3.333333]), ("sqrtn", [4.041452, 5.773503])],
)
def test_repeated_ids_count_repeatedly(combiner: Combiner, wanted: object) -> None:
    check(combine([[1, 1, 0]], combiner), [wanted])


@SAFE_AND_RAW
def test_empty_examples_at_the_end_stay(validate: bool) -> None:
    found = combine([[0], [1], [], []], validate_weights_and_indices=validate)
    check(found, [[1, 2], [3, 4], [0, 0], [0, 0]])
    assert combine([[], [], []], validate_weights_and_indices=validate).shape == (3, 2)
    assert combine([], validate_weights_and_indices=validate).shape == (0, 2)


def test_a_sequence_is_cut_and_filled_with_zeros() -> None:
    wanted = [[[1, 2], [3, 4]], [[0, 0], [0, 0]], [[7, 8], [0, 0]]]
    check(combine([[0, 1, 2], [], [3]], max_sequence_length=2), wanted)


def test_ids_behind_the_end_of_a_sequence_are_not_checked() -> None:
    check(combine([[0, 1, 99], [4, 3, -1]], max_sequence_length=2)[:, 0], [[1, 2], [9, 10]])


@pytest.mark.parametrize("bad_id", [-1, 5])
@SAFE_AND_RAW
def test_a_kept_id_of_a_sequence_must_be_in_the_table(validate: bool, bad_id: int) -> None:
    with pytest.raises(IdRangeError, match=f"id {bad_id} is not in"):
        combine(
            [[0, 1, 99], [3, bad_id]], max_sequence_length=2, validate_weights_and_indices=validate
        )


@pytest.mark.parametrize("output_shape", [None, (4,)])
def test_a_sequence_takes_no_weights(output_shape: tuple[int, ...] | None) -> None:
    with pytest.raises(InputError, match="but this is a sequence feature"):
        combine([[0]], "sum", [[1]], max_sequence_length=2, output_shape=output_shape)


def test_an_output_shape_turns_the_sequence_off_for_bags() -> None:
    found = combine([[0, 1, 2], [3]], max_sequence_length=2, output_shape=(4,))
    check(found, [[9, 12], [7, 8]])


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2), (1, 0, 3)])
def test_dense_ids_keep_their_shape(shape: tuple[int, ...]) -> None:
    ids = np.arange(np.prod(shape, dtype=int), dtype=np.int64).reshape(shape)
    found = lookup_dense(feature(), "t", ROWS_VD, ids)
    assert found.shape == (*shape, 2)
    check(found, ROWS_VD[ids])


@pytest.mark.parametrize("bad_id", [-1, 5, 2**40])
@SAFE_AND_RAW
def test_every_dense_id_is_checked(validate: bool, bad_id: int) -> None:
    spec = feature(validate_weights_and_indices=validate)
    with pytest.raises(IdRangeError, match=rf"id {bad_id} is not in \[0, 5\)"):
        lookup_dense(spec, "t", ROWS_VD, np.array([0, bad_id]))


@pytest.mark.parametrize("output_shape", [None, (3,)])
def test_a_sequence_refuses_dense_ids(output_shape: tuple[int, ...] | None) -> None:
    spec = feature(max_sequence_length=2, output_shape=output_shape)
    with pytest.raises(InputError, match="is a sequence feature but a dense tensor"):
        lookup_dense(spec, "t", ROWS_VD, np.array([0]))


def test_read_only_arrays_are_enough() -> None:
    rows = ROWS_VD.copy()
    bag = Ragged.from_lists([[0, -1]], [[1, 2]])
    for array in (rows, bag.ids, bag.row_splits, bag.weights):
        assert array is not None
        array.flags.writeable = False
    check(lookup_ragged(feature(), "t", "mean", rows, bag), [[1, 2]])


def test_the_service_answers_any_subset_of_the_features(tmp_path: Path) -> None:
    service = LookupService(small_export(tmp_path))
    found = service.lookup(
        {
            "watched": Ragged.from_lists([[0, 1, 2]]),
            "user": np.array([4, 0]),
            "genres": Ragged.from_lists([[0, 1], []], [[0.5, 2], []]),
        }
    )
    assert list(found) == ["watched", "user", "genres"]
    check(found["watched"], [[[1, 2], [3, 4]]])
    check(found["user"], [[9, 10], [1, 2]])
    check(found["genres"], [[2.6, 3.6], [0, 0]])
    assert service.lookup({}) == {}


def test_the_service_foretells_the_size_of_an_answer(tmp_path: Path) -> None:
    service = LookupService(small_export(tmp_path))
    inputs: dict[str, I64 | Ragged] = {
        "watched": Ragged.from_lists([[0, 1, 2], []]),
        "user": np.array([[4, 0, 1]]),
        "raw": Ragged.from_lists([[], [], []]),
    }
    outputs = service.lookup(inputs)
    assert service.num_values(inputs) == sum(output.size for output in outputs.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("genre", r"^unknown feature 'genre'; did you mean 'genres'"),
        ("zzzz", r"^unknown feature 'zzzz'; the model has 'genres', 'raw'"),
        ("x" * 10_000_000, r"^unknown feature 'x{200}…'; the model has"),
    ],
)
def test_an_unknown_feature_is_answered_with_near_names(
    tmp_path: Path, name: str, message: str
) -> None:
    service = LookupService(small_export(tmp_path))
    with pytest.raises(UnknownFeatureError, match=message):
        service.lookup({name: np.array([0])})
