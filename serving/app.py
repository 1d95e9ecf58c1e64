"""`create_app`: a `LookupService` behind HTTP. Knows no Ray; runs under any ASGI server.

The handlers take and give bytes: FastAPI routes and describes, but does not validate or serialize.
Each request answers from one service, so version and rows of an answer always belong together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ps.errors import InputError
from ps.inputs import Bags, Dense
from serving import problems, schema
from serving.json_body import parse_request, render_response
from serving.limits import Limits
from serving.lookup import LookupService, Raw, activation_shape
from serving.problems import ProblemError, from_input_error, problem_response

LARGE_BODY_BYTES = 64 * 1024
"""From here on parsing leaves the event loop to others and runs in a thread."""
LARGE_ANSWER_VALUES = 64 * 1024
"""Likewise lookup and rendering."""
LARGE_AT_A_TIME = 2
"""Large requests in work at one time; others wait."""
T = TypeVar("T")
_log = logging.getLogger(__name__)
_Inputs = dict[str, Dense | Bags | Raw]


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The description, with the bodies that the routes refer to."""
        if self.openapi_schema is None:
            described = super().openapi()
            described.setdefault("components", {})["schemas"] = schema.components()
        return super().openapi()


def create_app(service: LookupService, limits: Limits | None = None) -> FastAPI:
    """The HTTP face of a service.

    Args:
        service: answers the lookups.
        limits: bounds of one request.

    Returns:
        An ASGI application: `POST /v1/lookup`, `GET /v1/tables`, `/v1/model`, `/healthz`,
        `/readyz`, and its description at `/openapi.json`. Every error is a problem body.
    """
    app = _App(title="Manta", version="1", redirect_slashes=False, docs_url=None, redoc_url=None)
    routes = _Routes(service, limits or Limits())
    app.add_api_route(
        "/v1/lookup",
        routes.lookup,
        methods=["POST"],
        response_model=None,
        openapi_extra=schema.request_body("LookupRequest"),
        responses=schema.answers("LookupResponse", 400, 413, 415, 422, 500),
    )
    gets: list[tuple[str, Callable[..., Any], str]] = [
        ("/v1/tables", routes.tables, "Tables"),
        ("/v1/model", routes.model, "Model"),
        ("/healthz", routes.healthz, "Status"),
        ("/readyz", routes.readyz, "Status"),
    ]
    for path, handler, model in gets:
        app.add_api_route(
            path,
            handler,
            methods=["GET"],
            response_model=None,
            responses=schema.answers(model),
        )
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    return app


class _Routes:
    """The handlers."""

    def __init__(self, service: LookupService, limits: Limits) -> None:
        self._service = service
        self._limits = limits
        self._large = anyio.CapacityLimiter(LARGE_AT_A_TIME)

    async def lookup(self, request: Request) -> Response:
        """Look up the activations of any subset of the features."""
        service = self._service
        try:
            _check_headers(request)
            body = await self._body(request)
            large = len(body) >= LARGE_BODY_BYTES
            inputs = await self._in_thread(self._parse, body) if large else self._parse(body)
            num_values = service.num_values(inputs)
            self._check_size(num_values)
            if large or num_values >= LARGE_ANSWER_VALUES:
                return await self._in_thread(_answer, service, inputs)
            return _answer(service, inputs)
        except InputError as e:
            return problem_response(from_input_error(e))
        except ProblemError as e:
            return problem_response(e)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception as e:
            return await _internal_error(request, e)

    async def tables(self) -> Response:
        """The tables of the version that is served."""
        export = self._service.export
        tables = [
            {
                "name": table.name,
                "vocabulary_size": table.vocabulary_size,
                "dim": table.dim,
                "combiner": table.combiner,
                "size_bytes": table.size_bytes,
                "features": [f.name for f in export.features.values() if f.table == table.name],
            }
            for table in export.tables.values()
        ]
        return _json(self._service, {"version": export.version, "tables": tables})

    async def model(self) -> Response:
        """What is served: version, training step, features and what they take."""
        export = self._service.export
        dense = export.dense_model
        features = [
            {
                "name": feature.name,
                "table": feature.table,
                "dim": self._service.dim(feature),
                "max_sequence_length": feature.max_sequence_length,
                "shape": activation_shape(feature, self._service.dim(feature)),
                "values": self._values(feature.name),
            }
            for feature in export.features.values()
        ]
        body = {
            "version": export.version,
            "step": export.step,
            "job": export.job,
            "created": export.created,
            "features": features,
            "dense_model": None if dense is None else dense.get("name"),
        }
        return _json(self._service, body)

    async def healthz(self) -> Response:
        """Whether the process is alive."""
        return _json(self._service, {"status": "ok"})

    async def readyz(self) -> Response:
        """Whether lookups are answered; the tables were opened before the app existed."""
        return _json(self._service, {"status": "ready"})

    def _values(self, feature: str) -> str:
        transform = self._service.export.transforms.get(feature)
        if transform is None:
            return "ids"
        return "strings" if transform.takes_strings else "integers"

    async def _body(self, request: Request) -> bytes:
        announced = request.headers.get("content-length", "")
        if announced.isdecimal():
            self._check_length(int(announced))
        body = bytearray()
        async for chunk in request.stream():
            self._check_length(len(body) + len(chunk))
            body += chunk
        return bytes(body)

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        """Large requests run beside the event loop, a few at a time: each may fill memory."""
        return await anyio.to_thread.run_sync(function, *args, limiter=self._large)

    def _parse(self, body: bytes) -> _Inputs:
        return parse_request(body, self._limits.max_ids, self._service.export.transforms)

    def _check_length(self, size: int) -> None:
        limit = self._limits.max_body_bytes
        if size > limit:
            raise ProblemError(problems.TOO_LARGE, f"the body is longer than {limit} bytes")

    def _check_size(self, num_values: int) -> None:
        limit = self._limits.max_values
        if num_values > limit:
            detail = f"the answer would hold {num_values} numbers, more than {limit}; ask for fewer"
            raise ProblemError(problems.TOO_LARGE, detail)


def _check_headers(request: Request) -> None:
    media_type = request.headers.get("content-type", "")
    if media_type.partition(";")[0].strip().lower() != "application/json":
        detail = f"content-type must be application/json, got '{media_type}'"
        raise ProblemError(problems.UNSUPPORTED_MEDIA_TYPE, detail)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        detail = f"content-encoding must be identity, got '{encoding}'"
        raise ProblemError(problems.UNSUPPORTED_MEDIA_TYPE, detail)


def _answer(service: LookupService, inputs: _Inputs) -> Response:
    export = service.export
    outputs, lengths = service.lookup_with_lengths(inputs)
    return _respond(service, render_response(export.version, export.step, outputs, lengths))


def _json(service: LookupService, body: dict[str, Any]) -> Response:
    return _respond(service, orjson.dumps(body))


def _respond(service: LookupService, body: bytes) -> Response:
    export = service.export
    headers = {"Manta-Version": export.version, "Manta-Step": str(export.step)}
    return Response(body, 200, headers, "application/json")


async def _http_error(request: Request, e: Exception) -> Response:
    """What the router refuses: unknown path, wrong method."""
    assert isinstance(e, HTTPException)
    known = {404: problems.NOT_FOUND, 405: problems.METHOD_NOT_ALLOWED}
    kind = known.get(e.status_code)
    if kind is None:
        kind = problems.Kind("http-error", str(e.detail), e.status_code)
    detail = f"{request.method} {request.url.path}: {kind.title.lower()}"
    return problem_response(ProblemError(kind, detail), e.headers)


async def _internal_error(request: Request, e: Exception) -> Response:
    """Our bug: the log has the stack trace, the answer does not."""
    _log.error("%s %s failed", request.method, request.url.path, exc_info=e)
    detail = "the server failed on this request; its log says why"
    return problem_response(ProblemError(problems.INTERNAL_ERROR, detail))
