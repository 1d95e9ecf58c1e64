"""The clients: NumPy in and out, one typed error for a refusal and one for no answer."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ps.errors import InputError, ServerError, ServerUnavailableError
from ps.export import Export
from ps.ragged import F32, Ragged
from serving.app import create_app
from serving.client import AsyncLookupClient, LookupClient
from serving.commands import example_lookup
from serving.lookup import LookupService
from tests.support.exports import raw_export, small_export

URL = "http://manta"


class Bridge(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Hands requests of both clients to an ASGI app."""

    def __init__(self, app: Any) -> None:
        self._inner = httpx.ASGITransport(app)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def run() -> httpx.Response:
            response = await self.handle_async_request(request)
            content = await response.aread()
            return httpx.Response(response.status_code, headers=response.headers, content=content)

        return asyncio.run(run())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._inner.handle_async_request(request)


Transport = Bridge | httpx.MockTransport
Call = Callable[..., Any]


def sync_call(transport: Transport, method: str, *args: Any) -> Any:
    with LookupClient(URL, transport=transport) as client:
        return getattr(client, method)(*args)


def async_call(transport: Transport, method: str, *args: Any) -> Any:
    async def run() -> Any:
        async with AsyncLookupClient(URL, transport=transport) as client:
            return await getattr(client, method)(*args)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Bridge:
    return Bridge(create_app(LookupService(small_export(tmp_path_factory.mktemp("export")))))


@pytest.fixture(scope="module")
def raw_service(tmp_path_factory: pytest.TempPathFactory) -> LookupService:
    return LookupService(raw_export(tmp_path_factory.mktemp("export")))


@pytest.fixture(scope="module")
def raw_server(raw_service: LookupService) -> Bridge:
    return Bridge(create_app(raw_service))


@pytest.fixture(params=[sync_call, async_call], ids=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    found: Call = request.param
    return found


def check(found: Mapping[str, F32], wanted: Mapping[str, object]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], np.array(value, np.float32), rtol=1e-6)


def test_lists_arrays_and_bags_are_looked_up(server: Bridge, call: Call) -> None:
    inputs = {
        "user": np.array([0, 4], dtype=np.int32),
        "genres": [[0, 1], [], [2]],
        "words": Ragged.from_lists([[0, 1], []]),
        "tags": Ragged.from_lists([[0, 1]], [[0.5, 2]]),
        "watched": [[0, 1, 2], []],
    }
    found = call(server, "lookup", inputs, {"genres": [[0.5, 2], [], [3]]})
    check(
        found,
        {
            "user": [[1, 2], [9, 10]],
            "genres": [[2.6, 3.6], [0, 0], [5, 6]],
            "words": [[4, 6], [0, 0]],
            "tags": [[3.152963, 4.365642]],
            "watched": [[[1, 2], [3, 4]], [[0, 0], [0, 0]]],
        },
    )


@pytest.mark.parametrize(
    "ids",
    [
        [0, 4],
        (0, 4),
        [np.int64(0), np.int32(4)],
        np.array([0, 9, 4])[::2],
        np.array([0, 4], dtype=np.uint8),
        np.array([0, 4], dtype=">i8"),
    ],
)
def test_ids_may_come_in_any_integer_form(server: Bridge, call: Call, ids: Any) -> None:
    check(call(server, "lookup", {"user": ids}), {"user": [[1, 2], [9, 10]]})


@pytest.mark.parametrize(
    "values",
    [
        ["drama", "комедия", "zz", None],
        ("drama", "комедия", "zz", ""),
        np.array(["drama", "комедия", "zz", ""]),
        np.array(["drama", "комедия", "zz", ""], dtype=np.dtypes.StringDType()),
        np.array(["drama", "комедия", "zz", None], dtype=object),
        [["drama"], ["комедия"], ["zz", "zzz"], []],
        {"values": ["drama", "комедия"], "row_splits": np.array([0, 1, 2, 2, 2])},
    ],
)
def test_strings_may_come_in_any_form(raw_server: Bridge, call: Call, values: Any) -> None:
    found = call(raw_server, "lookup", {"genre": values})
    check(found, {"genre": [[1, 2], [3, 4], [0, 0], [0, 0]]})


def test_raw_integers_and_their_weights_are_looked_up(raw_server: Bridge, call: Call) -> None:
    inputs = {"shop": np.array([4, -1], dtype=np.int32), "tag": [[10, 20], []]}
    found = call(raw_server, "lookup", inputs, {"tag": [[2, 3], []]})
    check(found, {"shop": [[9, 10], [0, 0]], "tag": [[2.2, 3.2], [0, 0]]})


def test_lengths_of_sequences_are_asked_for_with_the_activations(
    raw_server: Bridge, call: Call
) -> None:
    inputs = {"steps": [["a", "b", "c"], [], ["zz"]], "user": [0], "clicks": []}
    outputs, lengths = call(raw_server, "lookup_with_lengths", inputs)
    shapes = {name: output.shape for name, output in outputs.items()}
    assert shapes == {"steps": (3, 2, 2), "user": (1, 2), "clicks": (0, 3, 2)}
    assert {name: (n.dtype, n.tolist()) for name, n in lengths.items()} == {
        "steps": (np.int64, [2, 0, 1]),
        "clicks": (np.int64, []),
    }
    assert call(raw_server, "lookup_with_lengths", {"user": [0]})[1] == {}


def test_no_examples_keep_the_shape_of_the_others(server: Bridge, call: Call) -> None:
    empty = Ragged.from_lists([])
    inputs = {"user": [], "genres": np.zeros(0), "words": empty, "watched": empty, "raw": [[]]}
    found = call(server, "lookup", inputs)
    assert [found[name].shape for name in inputs] == [(0, 2), (0, 2), (0, 2), (0, 2, 2), (1, 2)]


def test_what_is_served_can_be_asked_for(server: Bridge, call: Call) -> None:
    assert call(server, "ready") is True
    assert call(server, "wait_ready", 0.0) is None
    assert call(server, "model")["version"] == "v000001"
    assert {table["name"] for table in call(server, "tables")} == {"sum", "mean", "sqrtn"}


@pytest.mark.parametrize(
    ("inputs", "title", "detail"),
    [
        ({"user": [5]}, "Id out of range", "feature 'user': id 5 is not in [0, 5)"),
        ({"usr": [0]}, "Unknown feature", "unknown feature 'usr'; did you mean 'user'?"),
        ({"user": [1.5]}, "Invalid input", "must be an integer, got 1.5"),
        ({"genres": Ragged.from_lists([[0]], [[np.nan]])}, "Invalid input", "must be a number"),
    ],
)
def test_a_refusal_is_a_server_error_with_its_detail(
    server: Bridge, call: Call, inputs: Any, title: str, detail: str
) -> None:
    with pytest.raises(ServerError) as e:
        call(server, "lookup", inputs)
    assert (e.value.status, e.value.title) == (422, title)
    assert detail in e.value.detail
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([1.0]), "must hold integers or strings in one dimension, got float64"),
        (np.array([b"a"]), "must hold integers or strings in one dimension, got |S1"),
        (np.array([["a"]]), r"one dimension, got <U1 \[1, 1\]; use nested lists or a Ragged"),
        (np.array([{1}], dtype=object), "cannot be sent as JSON"),
        (np.array([[1]]), r"one dimension, got int64 \[1, 1\]; use nested lists or a Ragged"),
        ([2**70], "cannot be sent as JSON"),
        ([{1}], "cannot be sent as JSON"),
    ],
)
def test_ids_that_cannot_be_sent_are_refused_here(
    server: Bridge, call: Call, ids: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(server, "lookup", {"user": ids})


@pytest.mark.parametrize(
    ("status", "body"),
    [(503, b"no replica"), (500, b""), (404, b"[1]"), (200, b"<html>"), (200, b"[]"), (302, b"{}")],
)
def test_an_answer_of_another_program_is_a_server_error(
    call: Call, status: int, body: bytes
) -> None:
    other = httpx.MockTransport(lambda request: httpx.Response(status, content=body))
    with pytest.raises(ServerError) as e:
        call(other, "model")
    assert e.value.status == status
    assert call(other, "ready") is False


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"outputs": 3}',
        b'{"outputs": {"user": [[1], [2, 3]]}}',
        b'{"outputs": {}, "lengths": 3}',
    ],
)
def test_an_answer_without_activations_is_a_server_error(call: Call, body: bytes) -> None:
    other = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    with pytest.raises(ServerError, match="no activations"):
        call(other, "lookup", {"user": [0]})


@pytest.mark.parametrize(
    "failure", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.ReadError("")]
)
def test_no_answer_is_a_server_unavailable_error(call: Call, failure: httpx.HTTPError) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise failure

    down = httpx.MockTransport(fail)
    with pytest.raises(ServerUnavailableError, match="no answer from http://manta"):
        call(down, "lookup", {"user": [0]})
    assert call(down, "ready") is False
    with pytest.raises(ServerUnavailableError, match="was not ready after 0 s"):
        call(down, "wait_ready", 0.0)


def test_null_becomes_nan(call: Call) -> None:
    body = b'{"outputs": {"user": [[null, 1.5]]}}'
    other = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    check(call(other, "lookup", {"user": [0]}), {"user": [[np.nan, 1.5]]})


@pytest.mark.parametrize("export", [small_export, raw_export])
def test_serve_check_asks_for_an_example_of_every_feature(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    export: Callable[[Path], Export],
) -> None:
    opened = export(tmp_path)
    bridge = Bridge(create_app(LookupService(opened)))
    monkeypatch.setattr("serving.client.LookupClient", partial(LookupClient, transport=bridge))
    example_lookup(URL, opened)
    question, *answers = capsys.readouterr().out.splitlines()
    assert question.startswith(f"LookupClient('{URL}').lookup({{")
    assert {line.split(":")[0].strip() for line in answers} == set(opened.features)
    if opened.transforms:
        assert "'genre': [['drama']]" in question
        assert "'tag': [[1]]" in question
        assert "  genre: float32 [1, 2] [1.0000, 2.0000]" in answers


def test_the_client_imports_neither_ray_nor_arrow_nor_numba_nor_the_server() -> None:
    heavy = "{'ray', 'pyarrow', 'numba', 'tensorflow', 'fastapi', 'pydantic'}"
    code = f"import sys, serving.client; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
