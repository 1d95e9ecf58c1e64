"""`LookupService`: every kind of input over one opened export, and names that are wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ps.errors import InputError
from ps.inputs import Bags, Dense, Input, Ragged, Sparse
from serving.lookup import LookupService, UnknownFeatureError
from tests.support.exports import small_export

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
