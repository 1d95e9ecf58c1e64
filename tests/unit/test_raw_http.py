"""Raw strings and integers over HTTP: every form, what is refused, and sequences with lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from serving import schema
from serving.app import create_app
from serving.limits import Limits
from serving.lookup import LookupService
from tests.support.exports import ROWS_VD, raw_export, small_export
from tests.support.http import ask

GENRES = ["drama", "комедия", "", "🎬"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> LookupService:
    return LookupService(raw_export(tmp_path_factory.mktemp("export")))


@pytest.fixture(scope="module")
def app(service: LookupService) -> FastAPI:
    return create_app(service, Limits(max_body_bytes=2**20, max_ids=1000, max_values=3000))


def post(app: FastAPI, inputs: Any, weights: Any = None) -> httpx.Response:
    body = {"inputs": inputs, "weights": weights}
    content = json.dumps(body, ensure_ascii=False).encode()
    headers = {"content-type": "application/json"}
    return ask(app, "POST", "/v1/lookup", content=content, headers=headers)


def look_up(app: FastAPI, feature: str, values: Any, weights: Any = None) -> Any:
    """The activations of one feature, after checking body and answer against the schema."""
    given = None if weights is None else {feature: weights}
    schema.LookupRequest.model_validate({"inputs": {feature: values}, "weights": given})
    response = post(app, {feature: values}, given)
    assert response.status_code == 200, response.text
    schema.LookupResponse.model_validate(response.json())
    return response.json()["outputs"][feature]


def refused(response: httpx.Response, feature: str, field: str | None, detail: str) -> None:
    body = response.json()
    schema.Problem.model_validate(body)
    assert (response.status_code, body["status"]) == (422, 422)
    assert (body["feature"], body.get("field")) == (feature, field)
    assert detail in body["detail"]


def columns(values: list[Any], row_splits: list[int], weights: Any = None) -> dict[str, Any]:
    return {"values": values, "row_splits": row_splits, "weights": weights}


@pytest.mark.parametrize(
    ("feature", "values", "wanted"),
    [
        ("genre", ["drama", "🎬", "zz"], [[1, 2], [7, 8], [0, 0]]),
        ("genre", ["комедия", "", None], [[3, 4], [0, 0], [0, 0]]),
        ("genre", [["drama", "комедия"], [], [None, "🎬", "zz"]], [[2, 3], [0, 0], [7, 8]]),
        ("genre", [["", "drama"]], [[3, 4]]),  # in a bag "" is a value, here the third word
        ("genre", columns(["drama", None, "🎬"], [0, 0, 3]), [[0, 0], [4, 5]]),
        ("genre", columns([], [0]), []),
        ("genre", [], []),
        ("genre", [[]], [[0, 0]]),
        ("genre", [None], [[0, 0]]),
        ("shop", [0, -1, None, 4], [[1, 2], [0, 0], [0, 0], [9, 10]]),
        ("shop", [[0, -1, None, 4], [-7]], [[5, 6], [0, 0]]),
        ("shop", columns([3, 1], [0, 1, 2]), [[7, 8], [3, 4]]),
        ("safe", [0, 5, 2**40, -3, -1], [[1, 2], [9, 10], [9, 10], [9, 10], [0, 0]]),
        ("safe", [[0, -1], [None]], [[5, 6], [0, 0]]),  # in a bag -1 is a value, here 4
        ("strict", [[1, None], []], [[3, 4], [0, 0]]),
    ],
)
def test_every_form_of_raw_values_is_answered(
    app: FastAPI, feature: str, values: Any, wanted: Any
) -> None:
    assert look_up(app, feature, values) == wanted


def test_hashed_values_are_the_rows_that_the_transform_says(
    app: FastAPI, service: LookupService
) -> None:
    words = ["Rome", "東京", "a" * 300, "0", "{[,]}"]
    numbers = [0, 7, -2, 2**63 - 1]
    for feature, values in {"city": words, "code": numbers}.items():
        ids = service.export.transforms[feature]({feature: values}).ids
        assert len(set(ids.tolist())) > 1
        assert look_up(app, feature, values) == ROWS_VD[ids].tolist()
        assert look_up(app, feature, [[v] for v in values]) == ROWS_VD[ids].tolist()


@pytest.mark.parametrize(
    ("values", "weights", "wanted"),
    [
        ([[10, 20], [], [30]], [[2, 3.0], [], [-1]], [[2.2, 3.2], [0, 0], [0, 0]]),
        ([[10, None, 20]], [[2, None, 3]], [[2.2, 3.2]]),
        ([[10, 20]], [[0, 3]], [[3, 4]]),
        ([10, -1, 30], [2.5, None, 1], [[1, 2], [0, 0], [5, 6]]),
        ([10, None], [1, 0], [[1, 2], [0, 0]]),
        (columns([10, 20], [0, 2], [2, 3]), None, [[2.2, 3.2]]),
        (columns([10, None], [0, 2], [2, None]), None, [[1, 2]]),
        ([], [], []),
        ([[]], [[]], [[0, 0]]),
    ],
)
def test_weights_come_in_the_form_of_the_values(
    app: FastAPI, values: Any, weights: Any, wanted: Any
) -> None:
    np.testing.assert_allclose(look_up(app, "tag", values, weights), wanted, rtol=1e-6)


def test_sequences_are_padded_cut_and_answered_with_their_lengths(app: FastAPI) -> None:
    inputs = {
        "steps": [["a", "zz", "e"], [None, "b"], ["zz"], []],
        "clicks": columns([0, -1, 2, None, 4, 1], [0, 3, 4, 6]),
        "city": ["Rome"],
    }
    body = post(app, inputs).json()
    schema.LookupResponse.model_validate(body)
    assert body["lengths"] == {"steps": [2, 2, 1, 0], "clicks": [3, 0, 2]}
    zero = [0, 0]
    assert body["outputs"]["steps"] == [[[1, 2], zero], [zero, [3, 4]], [zero, zero], [zero, zero]]
    assert body["outputs"]["clicks"] == [
        [[1, 2], zero, [5, 6]],
        [zero, zero, zero],
        [[9, 10], [3, 4], zero],
    ]


def test_a_flat_list_is_sequences_of_one_step(app: FastAPI) -> None:
    body = post(app, {"steps": ["b", "", None]}).json()
    assert body["outputs"]["steps"] == [[[3, 4], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    assert body["lengths"] == {"steps": [1, 0, 0]}
    empty = post(app, {"steps": []}).json()
    assert (empty["outputs"], empty["lengths"]) == ({"steps": []}, {"steps": []})


def test_lengths_are_absent_without_sequences_of_raw_values(app: FastAPI) -> None:
    assert "lengths" not in post(app, {"city": ["Rome"], "user": [[0]]}).json()


def test_features_without_a_column_take_ids_beside_those_with_one(app: FastAPI) -> None:
    body = post(app, {"user": [4, 0], "genre": ["drama"]}).json()
    assert body["outputs"] == {"user": [[9, 10], [1, 2]], "genre": [[1, 2]]}
    refused(post(app, {"user": ["drama"]}), "user", "inputs.user[0]", "must be an integer, got a s")
    refused(post(app, {"user": [None]}), "user", "inputs.user[0]", "must be an integer, got null")


@pytest.mark.parametrize(
    ("feature", "values", "place", "rule"),
    [
        ("genre", "drama", "", 'must be a list or an object, got a string ("drama")'),
        ("genre", ["a", 3], "[1]", "must be a string, got 3"),
        ("genre", [["a"], [], ["b", None, True]], "[2][2]", "must be a string, got a boolean"),
        ("genre", ["a", {}], "[1]", "must be a string, got an object"),
        ("genre", ["a", ["b"]], "[0]", "must be a list of values, as its neighbours are, got a st"),
        ("genre", [None, ["b"]], "[0]", "must be a list of values, as its neighbours are, got nul"),
        ("genre", columns([1], [0, 1]), ".values[0]", "must be a string, got 1"),
        ("genre", columns(["a"], [0, 2]), "", "row_splits must start at 0 and end at"),
        ("genre", columns(["a"], []), "", "row_splits must start at 0 and end at"),
        ("genre", columns(["a"], [0, None]), ".row_splits[1]", "must be an integer, got null"),
        ("steps", [[["a", "b"]]], "[0][0]", "must be a string, got a list"),
        ("shop", [0, "1"], "[1]", 'must be an integer, got a string ("1")'),
        ("shop", [[0, 1.0]], "[0][1]", "must be an integer, got 1.0"),
        ("shop", [True], "[0]", "must be an integer, got a boolean (true)"),
        ("shop", [None, 2**63], "[1]", "must be an integer of 64 bits, got 9223372036854775808"),
        ("code", [[-(2**63) - 1]], "[0][0]", "must be an integer of 64 bits"),
    ],
)
def test_values_of_a_wrong_form_are_422_with_their_place(
    app: FastAPI, feature: str, values: Any, place: str, rule: str
) -> None:
    refused(post(app, {feature: values}), feature, f"inputs.{feature}{place}", rule)


@pytest.mark.parametrize(
    ("values", "weights", "place", "rule"),
    [
        ([10], [1, 2], "", "must be a list of 1 weights, like the values"),
        ([10], 1, "", "must be a list of 1 weights, like the values"),
        ([10], ["1"], "[0]", 'must be a number, got a string ("1")'),
        ([10], [1e39], "[0]", "must fit float32, got 1e+39"),
        ([[10]], [1], "", "must be a list of lists, like the values"),
        ([[10], [20]], [[1], []], "", "but list 1 has 1 values and 0 weights"),
        ([[10]], [[True]], "[0][0]", "must be a number, got a boolean (true)"),
    ],
)
def test_wrong_weights_are_422_with_their_place(
    app: FastAPI, values: Any, weights: Any, place: str, rule: str
) -> None:
    refused(post(app, {"tag": values}, {"tag": weights}), "tag", f"weights.tag{place}", rule)


@pytest.mark.parametrize(
    ("feature", "values", "weights", "detail"),
    [
        ("tag", [[10]], None, "Feature tag_weight is not in features dictionary."),
        ("tag", [[10, 20]], [[1, None]], "1 weights do not pair with the 2 values of 'tag'"),
        ("tag", [10], [0], "0 weights do not pair with the 1 values of 'tag'"),
        ("genre", [["a"]], [[1]], "was given weights, but its column is not a weighted one"),
        ("steps", [["a"]], [[1]], "was given weights, but its column is not a weighted one"),
    ],
)
def test_weights_that_the_column_does_not_take_are_422(
    app: FastAPI, feature: str, values: Any, weights: Any, detail: str
) -> None:
    given = None if weights is None else {feature: weights}
    refused(post(app, {feature: values}, given), feature, None, detail)


def test_columns_with_other_numbers_of_weights_are_422(app: FastAPI) -> None:
    one_short = columns([10, 20], [0, 2], [1])
    refused(post(app, {"tag": one_short}), "tag", "inputs.tag", "got 1 weights for 2 values")
    beyond = columns([10], [0, 1], [1e39])
    refused(post(app, {"tag": beyond}), "tag", "inputs.tag.weights[0]", "must fit float32")


@pytest.mark.parametrize(
    ("feature", "values", "bad_id"),
    [("shop", [[0, 5]], 5), ("strict", [[-1]], -1), ("clicks", [[0, 9]], 9)],
)
def test_an_identity_out_of_range_names_feature_and_id(
    app: FastAPI, feature: str, values: Any, bad_id: int
) -> None:
    response = post(app, {feature: values})
    assert response.json()["type"] == "urn:manta:problem:id-out-of-range"
    refused(response, feature, None, f"feature '{feature}': id {bad_id} is not in [0, 5) of table")


@pytest.mark.parametrize(
    "inputs",
    [
        {"genre": ["a"] * 501, "user": [0] * 500},
        {"genre": [[]] * 1001},
        {"genre": columns([], [0] * 1001)},
    ],
)
def test_raw_values_and_bags_over_the_limit_are_413(app: FastAPI, inputs: Any) -> None:
    response = post(app, inputs)
    assert response.status_code == 413
    assert "more than 1000 ids and bags" in response.json()["detail"]


def test_an_answer_over_the_limit_is_413_before_values_are_transformed(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.lookup.Transform.steps", None)  # calling it would be a 500
    response = post(app, {"clicks": [[]] * 501})
    assert response.status_code == 413
    assert "3006 numbers, more than 3000" in response.json()["detail"]


@pytest.mark.parametrize("value", ['"",', "null,"])
def test_values_that_would_fill_memory_are_413_before_they_are_parsed(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    body = ('{"inputs":{"genre":[' + value * 80_000 + "null]}}").encode()
    monkeypatch.setattr("serving.json_body.orjson.loads", None)  # calling it would be a 500
    headers = {"content-type": "application/json"}
    assert ask(app, "POST", "/v1/lookup", content=body, headers=headers).status_code == 413


def test_a_large_request_is_answered_from_a_thread_with_the_same_rows(
    service: LookupService,
) -> None:
    values = [GENRES[i % 4] + "." * (i % 2) for i in range(20_000)]
    found = look_up(create_app(service), "genre", [[v] for v in values])
    known = [ROWS_VD[i % 4] * (1 - i % 2) for i in range(20_000)]
    np.testing.assert_array_equal(found, known)


def test_the_model_tells_what_each_feature_takes(app: FastAPI) -> None:
    body = ask(app, "GET", "/v1/model").json()
    schema.Model.model_validate(body)
    features = {feature["name"]: feature for feature in body["features"]}
    assert {name: feature["values"] for name, feature in features.items()} == {
        "user": "ids",
        **dict.fromkeys(("genre", "city", "steps"), "strings"),
        **dict.fromkeys(("shop", "safe", "strict", "code", "tag", "clicks"), "integers"),
    }
    assert features["steps"]["shape"] == [None, 2, 2]


def test_the_description_tells_of_strings_nulls_and_lengths(app: FastAPI) -> None:
    schemas = ask(app, "GET", "/openapi.json").json()["components"]["schemas"]
    item = schemas["Columns"]["properties"]["values"]["items"]
    assert {kind["type"] for kind in item["anyOf"]} == {"integer", "string", "null"}
    assert "lengths" in schemas["LookupResponse"]["properties"]
    assert "lengths" not in schemas["LookupResponse"]["required"]


def test_an_export_without_transforms_takes_ids(tmp_path: Path) -> None:
    app = create_app(LookupService(small_export(tmp_path)))
    assert look_up(app, "user", [0]) == [[1, 2]]
    refused(post(app, {"user": ["a"]}), "user", "inputs.user[0]", "must be an integer")
