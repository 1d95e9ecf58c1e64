"""`LookupService`: every kind of input over one opened export, and names that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ps.columns import RawValues
from ps.errors import InputError
from ps.inputs import Bags, Dense, Input, Ragged, Sparse
from serving.lookup import AnyInput, LookupService, Raw, UnknownFeatureError
from tests.support.exports import raw_export, small_export

GENRES = Ragged.from_lists([[0, 1], []], [[0.5, 2], []])


def test_the_service_answers_any_subset_of_the_features(tmp_path: Path) -> None:
    service = LookupService(small_export(tmp_path))
    found = service.lookup(
        {
            "watched": Bags(Ragged.from_lists([[0, 1, 2]])),
            "user": Dense(np.array([4, 0])),
            "genres": Bags(GENRES),
        }
    )
    assert list(found) == ["watched", "user", "genres"]
    np.testing.assert_array_equal(found["watched"], [[[1, 2], [3, 4]]])
    np.testing.assert_array_equal(found["user"], [[9, 10], [1, 2]])
    np.testing.assert_allclose(found["genres"], [[2.6, 3.6], [0, 0]], rtol=1e-6)
    assert service.lookup({}) == {}


def test_each_kind_of_input_has_its_own_rules(tmp_path: Path) -> None:
    service = LookupService(small_export(tmp_path))
    bag = Ragged.from_lists([[2], []])
    coordinates = Sparse(np.array([[0, 0]]), bag.ids, (2, 1))
    bags, sparse, ragged = (
        service.lookup({"raw": value})["raw"].tolist() for value in (Bags(bag), coordinates, bag)
    )
    assert bags == ragged == [[5, 6], [0, 0]]
    assert sparse == [[5, 6]]  # TensorFlow forgets empty examples at the end
    bad = Ragged.from_lists([[2, -1]])
    assert service.lookup({"genres": Bags(bad)})["genres"].tolist() == [[5, 6]]
    with pytest.raises(InputError, match="id -1 is not in"):
        service.lookup({"genres": bad})


def test_the_service_foretells_the_size_of_an_answer(tmp_path: Path) -> None:
    service = LookupService(small_export(tmp_path))
    bag = Ragged.from_lists([[0, 1, 2], []])
    coordinates = Sparse(np.array([[0, 0], [2, 0]]), np.array([0, 1]), (5, 1))
    requests: list[dict[str, Input | Bags]] = [
        {"watched": Bags(bag), "user": Dense(np.array([[4, 0, 1]])), "raw": Bags(bag)},
        {"watched": bag, "raw": bag, "genres": bag},
        {"watched": coordinates, "raw": coordinates, "genres": coordinates},
    ]
    for inputs in requests:
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
        service.lookup({name: Dense(np.array([0]))})


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> LookupService:
    return LookupService(raw_export(tmp_path_factory.mktemp("export")))


@pytest.mark.parametrize(
    "values",
    [
        ["drama", "комедия", None],
        [["drama"], ["комедия"], []],
        np.array(["drama", "комедия", "zz"]),
        np.array([["drama", ""], ["комедия", ""], ["", ""]]),
        pa.array(["drama", "комедия", None]),
        pa.array([["drama"], ["комедия", "zz"], None]),
        RawValues(["drama", "комедия"], np.array([0, 1, 2, 2])),
        RawValues(pa.array(["drama", "комедия"]), np.array([0, 1, 2, 2])),
    ],
)
def test_raw_values_come_in_any_form(raw: LookupService, values: Any) -> None:
    assert raw.lookup({"genre": Raw(values)})["genre"].tolist() == [[1, 2], [3, 4], [0, 0]]
    assert raw.num_values({"genre": Raw(values)}) == 6


def test_weights_of_raw_values_come_in_any_form(raw: LookupService) -> None:
    splits = np.array([0, 2, 2])
    weights: list[Any] = [
        [[2, 3], []],
        pa.array([[2, 3], []], type=pa.list_(pa.float32())),
        RawValues(np.array([2, 3], dtype=np.float32), splits),
    ]
    for given in weights:
        found = raw.lookup({"tag": Raw([[10, 20], []], given)})["tag"]
        np.testing.assert_allclose(found, [[2.2, 3.2], [0, 0]], rtol=1e-6)


def test_sequences_of_raw_values_have_lengths_and_others_have_none(raw: LookupService) -> None:
    several = RawValues(["a", "b", "c"], np.array([0, 2, 3]), np.array([0, 2, 2, 3]))
    inputs: dict[str, AnyInput] = {
        "clicks": Raw([[0, 1, 2, 3], [-1, 4], []]),
        "steps": Raw(several),
        "city": Raw(["Rome"]),
        "user": Dense(np.array([0])),
    }
    outputs, lengths = raw.lookup_with_lengths(inputs)
    assert {name: n.tolist() for name, n in lengths.items()} == {
        "clicks": [3, 2, 0],
        "steps": [1, 1],
    }
    assert outputs["clicks"][1].tolist() == [[0, 0], [9, 10], [0, 0]]
    assert outputs["steps"].tolist() == [[[2, 3], [0, 0]], [[5, 6], [0, 0]]]
    assert list(outputs) == list(inputs)
    assert raw.num_values(inputs) == sum(output.size for output in outputs.values())


def test_a_feature_with_a_column_still_takes_ids(raw: LookupService) -> None:
    inputs = {"genre": Dense(np.array([1])), "steps": Bags(Ragged.from_lists([[4]]))}
    outputs, lengths = raw.lookup_with_lengths(inputs)
    assert outputs["genre"].tolist() == [[3, 4]]
    assert outputs["steps"].tolist() == [[[9, 10], [0, 0]]]
    assert lengths == {}


@pytest.mark.parametrize(
    ("feature", "value", "message"),
    [
        ("user", Raw(["a"]), "feature 'user' takes ids: it has no column"),
        ("genre", Raw([1]), "Column dtype and input dtype must be compatible"),
        ("shop", Raw(["a"]), "Invalid input, not integer. key: shop"),
        ("genre", Raw([[["a"]]]), "Feature genre has rank 3; only sequences have rank 3"),
        ("genre", Raw(["a", 1]), "Feature genre cannot be read"),
        ("genre", Raw(RawValues(["a"], np.array([0, 2]))), "row_splits must start at 0"),
        ("genre", Raw(["a"], [1]), "was given weights, but its column is not a weighted one"),
        ("steps", Raw([["a"]], [[1]]), "was given weights, but its column is not a weighted one"),
        ("tag", Raw([10]), "Feature tag_weight is not in features dictionary"),
        ("tag", Raw([10], np.array([1.0])), "Bad dtype, expected float32, but got float64"),
        ("tag", Raw([[10]], [[1, 2]]), "2 weights do not pair with the 1 values of 'tag'"),
        ("shop", Raw([5]), r"id 5 is not in \[0, 5\) of table 'shop'"),
        ("clicks", Raw([[7]]), r"id 7 is not in \[0, 5\) of table 'clicks'"),
    ],
)
def test_raw_values_that_a_feature_does_not_take_are_refused(
    raw: LookupService, feature: str, value: Raw, message: str
) -> None:
    with pytest.raises(InputError, match=message) as e:
        raw.lookup({feature: value})
    assert e.value.feature == feature
    assert f"feature '{feature}'" in e.value.message


def test_a_single_value_is_no_raw_input(raw: LookupService) -> None:
    with pytest.raises(InputError, match="feature 'shop' must have values for each example, got a"):
        raw.num_values({"shop": Raw(3)})
    with pytest.raises(InputError, match="cannot have rank 0"):
        raw.lookup({"shop": Raw(3)})
