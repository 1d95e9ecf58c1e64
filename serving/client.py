"""`LookupClient` and `AsyncLookupClient`: lookups over HTTP as NumPy arrays in and out.

Needs httpx, orjson and NumPy; neither Ray nor Arrow nor the tables' code is imported.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
import numpy.typing as npt
import orjson

from ps.errors import InputError, ServerError, ServerUnavailableError
from ps.ragged import F32, I64, Ragged

Value = int | str | None
"""An id, or a raw value of a feature with a column; None is no raw value."""
Ids = Sequence[Value] | Sequence[Sequence[Value]] | npt.NDArray[Any] | Ragged | Mapping[str, object]
"""One value per example (flat), or bags (nested lists, `Ragged`, columns as JSON has them)."""
Weights = Mapping[str, Sequence[float | None] | Sequence[Sequence[float | None]]]
_POLL_S = 0.1
_JSON = {"Content-Type": "application/json"}


class LookupClient:
    """Asks a lookup server; use as a context manager, from any number of threads.

    >>> with LookupClient("http://127.0.0.1:8000") as client:  # doctest: +SKIP
    ...     client.lookup({"user": [1, 2], "genres": [[4, 7], []]})["genres"].shape
    (2, 16)
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = 10.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def lookup(self, inputs: Mapping[str, Ids], weights: Weights | None = None) -> dict[str, F32]:
        """Activations of the given features.

        Args:
            inputs: ids, or raw values of features with a column, by feature: a flat list or array
                is one per example; nested lists, a `Ragged` of ids or a dict of `values` and
                `row_splits` are bags.
            weights: weights of lists, in the same nesting; those of a `Ragged` are in it, those of
                a dict are its `weights`.

        Returns:
            float32 [B, D] by feature, [B, L, D] for a sequence feature. What the server computed
            as infinite or NaN is NaN.

        Raises:
            InputError: ids that JSON cannot carry, or an array of more than one dimension.
            ServerError: the server refused; its `detail` says why.
            ServerUnavailableError: no answer.
        """
        return self.lookup_with_lengths(inputs, weights)[0]

    def lookup_with_lengths(
        self, inputs: Mapping[str, Ids], weights: Weights | None = None
    ) -> tuple[dict[str, F32], dict[str, I64]]:
        """`lookup`, and the lengths of sequences of raw values.

        Returns:
            (what `lookup` returns, int64 [B] by feature, only of those that are sequences of raw
            values: steps up to the last one with a value, at most L).

        Raises:
            as `lookup`.
        """
        answer = self._request("POST", "/v1/lookup", encode_request(inputs, weights))
        outputs, lengths = decode_outputs(answer)
        if any(output.size == 0 for output in outputs.values()):
            outputs = with_shapes(outputs, self.model())
        return outputs, lengths

    def tables(self) -> list[dict[str, Any]]:
        """The served tables: name, vocabulary_size, dim, combiner, size_bytes, features."""
        tables: list[dict[str, Any]] = self._request("GET", "/v1/tables")["tables"]
        return tables

    def model(self) -> dict[str, Any]:
        """What is served: version, step, job, created, features, dense_model."""
        return self._request("GET", "/v1/model")

    def ready(self) -> bool:
        """Whether lookups are answered now."""
        try:
            self._request("GET", "/readyz")
        except (ServerError, ServerUnavailableError):
            return False
        return True

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when lookups are answered.

        Raises:
            ServerUnavailableError: not within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while not self.ready():
            if time.monotonic() > deadline:
                raise _not_ready(self._http.base_url, timeout_s)
            time.sleep(_POLL_S)

    def _request(self, method: str, path: str, content: bytes | None = None) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, content=content, headers=_JSON)
        except httpx.TransportError as e:
            raise _unavailable(self._http.base_url, e) from e
        return decode(response)


class AsyncLookupClient:
    """`LookupClient` for asyncio; same calls, same errors."""

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = 10.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(base_url=base_url, timeout=timeout_s, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def lookup(
        self, inputs: Mapping[str, Ids], weights: Weights | None = None
    ) -> dict[str, F32]:
        """See `LookupClient.lookup`."""
        return (await self.lookup_with_lengths(inputs, weights))[0]

    async def lookup_with_lengths(
        self, inputs: Mapping[str, Ids], weights: Weights | None = None
    ) -> tuple[dict[str, F32], dict[str, I64]]:
        """See `LookupClient.lookup_with_lengths`."""
        answer = await self._request("POST", "/v1/lookup", encode_request(inputs, weights))
        outputs, lengths = decode_outputs(answer)
        if any(output.size == 0 for output in outputs.values()):
            outputs = with_shapes(outputs, await self.model())
        return outputs, lengths

    async def tables(self) -> list[dict[str, Any]]:
        """See `LookupClient.tables`."""
        tables: list[dict[str, Any]] = (await self._request("GET", "/v1/tables"))["tables"]
        return tables

    async def model(self) -> dict[str, Any]:
        """See `LookupClient.model`."""
        return await self._request("GET", "/v1/model")

    async def ready(self) -> bool:
        """See `LookupClient.ready`."""
        try:
            await self._request("GET", "/readyz")
        except (ServerError, ServerUnavailableError):
            return False
        return True

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """See `LookupClient.wait_ready`."""
        deadline = time.monotonic() + timeout_s
        while not await self.ready():
            if time.monotonic() > deadline:
                raise _not_ready(self._http.base_url, timeout_s)
            await asyncio.sleep(_POLL_S)

    async def _request(
        self, method: str, path: str, content: bytes | None = None
    ) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, content=content, headers=_JSON)
        except httpx.TransportError as e:
            raise _unavailable(self._http.base_url, e) from e
        return decode(response)


def encode_request(inputs: Mapping[str, Ids], weights: Weights | None = None) -> bytes:
    """The JSON body of a lookup; a `Ragged` travels as columns.

    Raises:
        InputError: ids that JSON cannot carry, or an array of more than one dimension.
    """
    body: dict[str, Any] = {"inputs": {name: _encode(name, ids) for name, ids in inputs.items()}}
    if weights is not None:
        body["weights"] = weights
    try:
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as e:
        raise InputError(f"the inputs cannot be sent as JSON: {e}") from None


def decode(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a good answer.

    Raises:
        ServerError: anything else, with what the problem body says.
    """
    try:
        body = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        body = None
    if response.status_code == httpx.codes.OK and isinstance(body, dict):
        return body
    problem = body if isinstance(body, dict) else {}
    title = str(problem.get("title", response.reason_phrase or "Unexpected answer"))
    raise ServerError(response.status_code, title, str(problem.get("detail", response.text[:200])))


def decode_outputs(answer: dict[str, Any]) -> tuple[dict[str, F32], dict[str, I64]]:
    """The activations and lengths of a lookup's answer; null becomes NaN."""
    try:
        outputs = {name: np.array(v, dtype=np.float32) for name, v in answer["outputs"].items()}
        lengths = answer.get("lengths", {}).items()
        return outputs, {name: np.array(v, dtype=np.int64) for name, v in lengths}
    except (KeyError, AttributeError, TypeError, ValueError) as e:
        raise ServerError(200, "Unexpected answer", f"no activations in it: {e!r}") from e


def with_shapes(outputs: dict[str, F32], model: dict[str, Any]) -> dict[str, F32]:
    """Give arrays without examples, which JSON writes `[]`, the shape [0, …, D]."""
    shapes = {feature["name"]: feature["shape"] for feature in model["features"]}
    return {
        name: output if output.size else output.reshape(0, *shapes[name][1:])
        for name, output in outputs.items()
    }


def _encode(name: str, ids: Ids) -> object:
    if isinstance(ids, Ragged):
        columns = {"values": ids.ids, "row_splits": ids.row_splits}
        return columns if ids.weights is None else columns | {"weights": ids.weights}
    if not isinstance(ids, np.ndarray):
        return ids
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iuUTO"):
        raise InputError(
            f"feature '{name}': an array must hold integers or strings in one dimension, got "
            f"{ids.dtype} {list(ids.shape)}; use nested lists or a Ragged for bags",
            name,
        )
    if ids.dtype.kind in "UTO":
        return ids.tolist()  # JSON checks what is in it
    return np.ascontiguousarray(ids, dtype=ids.dtype.newbyteorder("=")) if ids.size else []


def _unavailable(base_url: httpx.URL, e: httpx.TransportError) -> ServerUnavailableError:
    return ServerUnavailableError(f"no answer from {base_url}: {str(e) or type(e).__name__}")


def _not_ready(base_url: httpx.URL, timeout_s: float) -> ServerUnavailableError:
    return ServerUnavailableError(f"{base_url} was not ready after {timeout_s:g} s")
