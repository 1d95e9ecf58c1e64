"""The HTTP face: bodies in, bodies out, and one problem body for everything that can be wrong."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from ps.config import FeatureConfig, TableConfig
from ps.errors import ConfigError
from ps.export import open_export
from serving import schema
from serving.app import LARGE_BODY_BYTES, create_app
from serving.limits import Limits
from serving.lookup import LookupService
from tests.support.exports import small_export, write_export
from tests.support.http import ask

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> LookupService:
    return LookupService(small_export(tmp_path_factory.mktemp("export")))


@pytest.fixture(scope="module")
def app(service: LookupService) -> FastAPI:
    return create_app(service, Limits(max_body_bytes=2**20, max_ids=50_000, max_values=60_000))


def post(app: FastAPI, body: object) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ask(app, "POST", "/v1/lookup", content=content, headers=JSON)


def problem(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """The problem body, after checking what every one of them promises."""
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    schema.Problem.model_validate(body)
    assert body["type"] == f"urn:manta:problem:{slug}"
    assert (response.status_code, body["status"]) == (status, status)
    assert "Traceback" not in response.text
    return body


def test_every_form_of_ids_is_answered_in_one_request(app: FastAPI) -> None:
    response = post(
        app,
        {
            "inputs": {
                "user": [0, 4],
                "genres": [[0, 1], [], [2]],
                "words": {"values": [0, 1, 2], "row_splits": [0, 2, 2, 3]},
                "tags": {"values": [0, 1], "row_splits": [0, 2], "weights": [0.5, 2]},
                "watched": [[0, 1, 2], []],
            },
            "weights": {"genres": [[0.5, 2], [], [3]]},
        },
    )
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert (response.headers["manta-version"], response.headers["manta-step"]) == ("v000001", "7")
    body = response.json()
    schema.LookupResponse.model_validate(body)
    assert (body["version"], body["step"]) == ("v000001", 7)
    wanted: dict[str, Any] = {
        "user": [[1, 2], [9, 10]],
        "genres": [[2.6, 3.6], [0, 0], [5, 6]],
        "words": [[4, 6], [0, 0], [5, 6]],
        "tags": [[3.152963, 4.365642]],
        "watched": [[[1, 2], [3, 4]], [[0, 0], [0, 0]]],
    }
    assert list(body["outputs"]) == list(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(body["outputs"][name], value, rtol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ({}, {}),
        ({"user": []}, {"user": []}),
        ({"user": [[]]}, {"user": [[0, 0]]}),
        ({"words": {"values": [], "row_splits": [0]}}, {"words": []}),
        ({"watched": {"values": [], "row_splits": [0, 0]}}, {"watched": [[[0, 0], [0, 0]]]}),
        ({"raw": [[0], []]}, {"raw": [[1, 2], [0, 0]]}),
        ({"words": [[-5, 1]]}, {"words": [[3, 4]]}),
    ],
)
def test_empty_and_dropped_ids_are_answered(app: FastAPI, inputs: Any, outputs: Any) -> None:
    assert post(app, {"inputs": inputs}).json()["outputs"] == outputs


@pytest.mark.parametrize("weights", [None, {}, {"genres": None}])
def test_absent_weights_may_be_spelt_out(app: FastAPI, weights: Any) -> None:
    response = post(app, {"inputs": {"genres": [[0, 1]]}, "weights": weights})
    assert response.json()["outputs"] == {"genres": [[2, 3]]}


def test_a_large_request_is_answered_from_a_thread_with_the_same_rows(app: FastAPI) -> None:
    ids = [i % 5 for i in range(30_000)]
    body = json.dumps({"inputs": {"user": ids}}).encode()
    assert len(body) > LARGE_BODY_BYTES
    found = post(app, body).json()["outputs"]["user"]
    np.testing.assert_array_equal(found, np.arange(1, 11).reshape(5, 2)[ids])


def test_values_that_json_cannot_express_become_null(tmp_path: Path) -> None:
    rows = np.array([[np.nan, 1], [np.inf, -np.inf]], dtype=np.float32)
    features = {"f": FeatureConfig(TableConfig(2, 2, name="t"))}
    write_export(tmp_path, features, {"t": rows})
    app = create_app(LookupService(open_export(tmp_path)))
    assert post(app, {"inputs": {"f": [0, 1]}}).json()["outputs"]["f"] == [[None, 1], [None, None]]


def test_rows_survive_json_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(999, 8)) * 10.0 ** rng.integers(-30, 30, (999, 8))).astype(np.float32)
    write_export(tmp_path, {"f": FeatureConfig(TableConfig(999, 8, name="t"))}, {"t": rows})
    app = create_app(LookupService(open_export(tmp_path)))
    found = post(app, {"inputs": {"f": list(range(999))}}).json()["outputs"]["f"]
    np.testing.assert_array_equal(np.array(found, dtype=np.float32), rows)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"inputs": {"user": [NaN]}}',
        b'{"inputs": {"user": [Infinity]}}',
        b'{"inputs": {"user": [1,]}}',
        b'{"inputs": {"user": ["\\ud800"]}}',
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_not_json_is_400(app: FastAPI, body: bytes) -> None:
    found = problem(post(app, body), 400, "malformed-json")
    assert found["detail"].startswith("the body is not JSON: ")


@pytest.mark.parametrize(
    ("body", "field", "detail"),
    [
        ([], None, "the body must be an object, got a list"),
        (None, None, "the body must be an object, got null"),
        ("x", None, 'the body must be an object, got a string ("x")'),
        ({}, "inputs", "key 'inputs' is missing"),
        ({"inputs": {}, "input": {}}, "input", "unknown key 'input'; known are"),
        ({"inputs": [1]}, "inputs", "`inputs` must be an object with feature names as keys"),
        ({"inputs": {}, "weights": []}, "weights", "`weights` must be an object"),
        ({"inputs": {}, "weights": 0}, "weights", "`weights` must be an object"),
    ],
)
def test_a_body_of_another_form_is_422(
    app: FastAPI, body: object, field: str | None, detail: str
) -> None:
    found = problem(post(app, body), 422, "invalid-input")
    assert found["detail"].startswith(detail)
    assert found.get("field") == field
    assert "feature" not in found


@pytest.mark.parametrize(
    ("ids", "place", "rule"),
    [
        (3, "", "must be a list or an object, got 3"),
        (None, "", "must be a list or an object, got null"),
        ("1", "", 'must be a list or an object, got a string ("1")'),
        ([0, 1.5], "[1]", "must be an integer, got 1.5"),
        ([0, 1.0], "[1]", "must be an integer, got 1.0"),
        ([0, "1"], "[1]", 'must be an integer, got a string ("1")'),
        ([True, 0], "[0]", "must be an integer, got a boolean (true)"),
        ([0, 1, None], "[2]", "must be an integer, got null"),
        ([{}], "[0]", "must be an integer, got an object"),
        ([0, [1]], "[0]", "must be a list of ids, as its neighbours are, got 0"),
        ([[1], 2], "[1]", "must be a list of ids, as its neighbours are, got 2"),
        ([[0], [], [1, 2.5]], "[2][1]", "must be an integer, got 2.5"),
        ([[], [None]], "[1][0]", "must be an integer, got null"),
        ([[[0]]], "[0][0]", "must be an integer, got a list"),
        ([2**63], "[0]", "must be an integer of 64 bits, got 9223372036854775808"),
        ([0, 2**64], "[1]", "must be an integer of 64 bits, got 1.8446744073709552e+19"),
        ([[0, -(2**63) - 1]], "[0][1]", "must be an integer of 64 bits"),
        ({"values": [0], "row_splits": [0, 1], "ids": []}, ".ids", ""),
        ({"values": [0]}, ".row_splits", ""),
        ({"row_splits": [0]}, ".values", ""),
        ({"values": 0, "row_splits": [0]}, ".values", "must be a list, got 0"),
        ({"values": [0.5], "row_splits": [0, 1]}, ".values[0]", "must be an integer, got 0.5"),
        ({"values": [0], "row_splits": [0, None]}, ".row_splits[1]", "must be an integer"),
        ({"values": [0], "row_splits": [0, 2]}, "", "row_splits must start at 0 and end at"),
        ({"values": [0], "row_splits": []}, "", "row_splits must start at 0 and end at"),
        ({"values": [0, 1], "row_splits": [0, 2, 1, 2]}, "", "row_splits must not fall"),
        ({"values": [0], "row_splits": [0, 1], "weights": []}, "", "got 0 weights for 1 ids"),
        ({"values": [0], "row_splits": [0, 1], "weights": ["1"]}, ".weights[0]", "must be a numb"),
        ({"values": [0], "row_splits": [0, 1], "weights": [1e300]}, ".weights[0]", "must fit flo"),
    ],
)
def test_ids_of_a_wrong_form_are_422_with_their_place(
    app: FastAPI, ids: object, place: str, rule: str
) -> None:
    found = problem(post(app, {"inputs": {"genres": ids}}), 422, "invalid-input")
    assert found["feature"] == "genres"
    assert found["field"] == "inputs.genres" + place
    assert rule in found["detail"]


@pytest.mark.parametrize(
    ("ids", "weights", "place", "rule"),
    [
        ([0], [1.0], "", "Weight specified for genres, but input is dense"),
        ([[0]], [1.0], "", "must be a list of lists, like the ids"),
        ([[0]], 1, "", "must be a list of lists, like the ids"),
        ([[0]], [[1], [2]], "", "must have 1 lists, like the ids, got 2"),
        ([[0], [1]], [[1], []], "", "but list 1 has 1 ids and 0 weights"),
        ([[0], [1]], [[1], [None]], "[1][0]", "must be a number, got null"),
        ([[0], [1]], [[True], [1]], "[0][0]", "must be a number, got a boolean (true)"),
        ([[0]], [[[1]]], "[0][0]", "must be a number, got a list"),
        ([[0, 1]], [[1, 1e39]], "[0][1]", "must fit float32, got 1e+39"),
        ({"values": [0], "row_splits": [0, 1]}, [[1]], "", "columns belong beside `values`"),
    ],
)
def test_wrong_weights_are_422_with_their_place(
    app: FastAPI, ids: object, weights: object, place: str, rule: str
) -> None:
    body = {"inputs": {"genres": ids}, "weights": {"genres": weights}}
    found = problem(post(app, body), 422, "invalid-input")
    assert found["feature"] == "genres"
    assert found["field"] == "weights.genres" + place
    assert rule in found["detail"]


def test_weights_without_ids_are_422(app: FastAPI) -> None:
    body = {"inputs": {"user": [0]}, "weights": {"genres": [[1]]}}
    found = problem(post(app, body), 422, "invalid-input")
    assert found["feature"] == "genres"
    assert "no ids in `inputs`" in found["detail"]


@pytest.mark.parametrize("ids", [[0], []])
def test_a_flat_list_for_a_sequence_feature_is_422(app: FastAPI, ids: list[int]) -> None:
    found = problem(post(app, {"inputs": {"watched": ids}}), 422, "invalid-input")
    assert found["feature"] == "watched"
    assert "is a sequence feature but a dense tensor" in found["detail"]


def test_weights_for_a_sequence_feature_are_422(app: FastAPI) -> None:
    body = {"inputs": {"watched": [[0]]}, "weights": {"watched": [[1]]}}
    found = problem(post(app, body), 422, "invalid-input")
    assert "but this is a sequence feature" in found["detail"]


@pytest.mark.parametrize(
    ("feature", "ids", "bad_id"),
    [
        ("user", [0, 5], 5),
        ("user", [-1], -1),
        ("genres", [[0], [2**40]], 2**40),
        ("raw", [[-1]], -1),
    ],
)
def test_an_id_out_of_range_names_feature_id_and_range(
    app: FastAPI, feature: str, ids: object, bad_id: int
) -> None:
    found = problem(post(app, {"inputs": {feature: ids}}), 422, "id-out-of-range")
    assert found["feature"] == feature
    assert f"feature '{feature}': id {bad_id} is not in [0, 5) of table" in found["detail"]


def test_an_unknown_feature_is_answered_with_near_names(app: FastAPI) -> None:
    found = problem(post(app, {"inputs": {"usr": [0]}}), 422, "unknown-feature")
    assert found["feature"] == "usr"
    assert found["detail"] == "unknown feature 'usr'; did you mean 'user'?"


def test_an_endless_name_is_not_repeated_in_full(app: FastAPI) -> None:
    response = post(app, {"inputs": {"x" * 500_000: ["y" * 100_000]}})
    problem(response, 422, "invalid-input")
    assert len(response.content) < 2000


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/v1/lookups"), ("POST", "/v1/lookup/"), ("GET", "/v1/%2e%2e/%ff")],
)
def test_an_unknown_path_is_404(app: FastAPI, method: str, path: str) -> None:
    found = problem(ask(app, method, path), 404, "not-found")
    assert found["detail"].startswith(f"{method} /")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/lookup", "POST"), ("POST", "/v1/tables", "GET"), ("DELETE", "/healthz", "GET")],
)
def test_a_wrong_method_is_405(app: FastAPI, method: str, path: str, allowed: str) -> None:
    response = ask(app, method, path)
    problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/jsonx"},
        {"content-type": ""},
        {},
        JSON | {"content-encoding": "gzip"},
    ],
)
def test_another_content_type_is_415(app: FastAPI, headers: dict[str, str]) -> None:
    response = ask(app, "POST", "/v1/lookup", content=b'{"inputs": {}}', headers=headers)
    problem(response, 415, "unsupported-media-type")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_may_be_spelt_with_parameters(app: FastAPI, content_type: str) -> None:
    headers = {"content-type": content_type}
    response = ask(app, "POST", "/v1/lookup", content=b'{"inputs": {}}', headers=headers)
    assert response.status_code == 200


def test_an_announced_body_over_the_limit_is_413(app: FastAPI) -> None:
    found = problem(post(app, b" " * (2**20 + 1)), 413, "too-large")
    assert found["detail"] == "the body is longer than 1048576 bytes"
    assert post(app, b'{"inputs": {}}'.ljust(2**20)).status_code == 200


def test_a_streamed_body_is_cut_off_at_the_limit(app: FastAPI) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 2**16
            yield b" " * 2**16

    response = ask(app, "POST", "/v1/lookup", content=chunks(), headers=JSON)
    problem(response, 413, "too-large")
    assert sent <= 2**20 + 2 * 2**16


@pytest.mark.parametrize(
    "inputs",
    [
        {"user": [0] * 25_001, "words": [0] * 25_000},
        {"words": [[]] * 50_001},
        {"words": {"values": [], "row_splits": [0] * 50_001}},
    ],
)
def test_ids_and_bags_over_the_limit_are_413(app: FastAPI, inputs: Any) -> None:
    found = problem(post(app, {"inputs": inputs}), 413, "too-large")
    assert "more than 50000 ids and bags" in found["detail"]


def test_an_answer_over_the_limit_is_413(app: FastAPI) -> None:
    found = problem(post(app, {"inputs": {"watched": [[]] * 15_001}}), 413, "too-large")
    assert "60004 numbers, more than 60000" in found["detail"]


def test_a_bug_of_ours_is_500_without_a_stack_trace(
    service: LookupService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: LookupService, inputs: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(LookupService, "lookup_with_lengths", broken)
    response = post(create_app(service), {"inputs": {"user": [0]}})
    problem(response, 500, "internal-error")
    assert "secret" not in response.text
    assert "secret" in caplog.text


def test_a_bug_in_any_handler_is_500_without_a_stack_trace(
    service: LookupService, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(service)
    monkeypatch.setattr(LookupService, "dim", None)
    response = ask(app, "GET", "/v1/model")
    problem(response, 500, "internal-error")
    assert "NoneType" not in response.text


def test_tables_are_described(app: FastAPI, service: LookupService) -> None:
    response = ask(app, "GET", "/v1/tables")
    schema.Tables.model_validate(response.json())
    assert response.headers["manta-version"] == "v000001"
    tables = {table["name"]: table for table in response.json()["tables"]}
    assert tables["mean"] == {
        "name": "mean",
        "vocabulary_size": 5,
        "dim": 2,
        "combiner": "mean",
        "size_bytes": service.export.tables["mean"].size_bytes,
        "features": ["genres", "user"],
    }


def test_the_model_is_described(app: FastAPI) -> None:
    body = ask(app, "GET", "/v1/model").json()
    schema.Model.model_validate(body)
    assert (body["version"], body["step"], body["job"]) == ("v000001", 7, "test")
    assert body["dense_model"] is None
    features = {feature["name"]: feature for feature in body["features"]}
    assert features["watched"]["shape"] == [None, 2, 2]
    assert features["user"] == {
        "name": "user",
        "table": "mean",
        "dim": 2,
        "max_sequence_length": 0,
        "shape": [None, 2],
        "values": "ids",
    }


@pytest.mark.parametrize(("path", "status"), [("/healthz", "ok"), ("/readyz", "ready")])
def test_health_is_answered(app: FastAPI, path: str, status: str) -> None:
    response = ask(app, "GET", path)
    assert (response.status_code, response.json()) == (200, {"status": status})


def test_openapi_describes_every_route_and_every_reference_resolves(app: FastAPI) -> None:
    described = ask(app, "GET", "/openapi.json").json()
    assert set(described["paths"]) == {
        "/v1/lookup",
        "/v1/tables",
        "/v1/model",
        "/healthz",
        "/readyz",
    }
    body = described["paths"]["/v1/lookup"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"] == {"$ref": "#/components/schemas/LookupRequest"}
    text = json.dumps(described)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(described["components"]["schemas"])
    assert "application/problem+json" in text


@pytest.mark.parametrize("options", [{"max_ids": 0}, {"max_body_bytes": 1.5}])
def test_a_senseless_limit_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be an int >= 1"):
        Limits(**options)


@pytest.mark.parametrize("value", ["[]", "{}", '{"":{}}', "0"])
def test_a_body_that_would_fill_memory_is_413_before_it_is_parsed(
    service: LookupService, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    app = create_app(service, Limits(max_ids=100))
    body = ('{"inputs":{"user":[' + ",".join([value] * 80_000) + "]}}").encode()
    monkeypatch.setattr("serving.json_body.orjson.loads", None)  # calling it would be a 500
    problem(post(app, body), 413, "too-large")


def test_the_most_ids_bags_and_weights_allowed_are_answered(service: LookupService) -> None:
    app = create_app(service, Limits(max_ids=200_000))
    bags, weights = [[1]] * 66_000, [[0.5]] * 66_000
    answer = post(app, {"inputs": {"words": bags}, "weights": {"words": weights}})
    assert (answer.status_code, len(answer.json()["outputs"]["words"])) == (200, 66_000)
