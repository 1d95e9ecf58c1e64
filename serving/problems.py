"""Error answers: `application/problem+json` (RFC 9457), one kind per cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import orjson
from starlette.responses import Response

from ps.errors import IdRangeError, InputError
from serving.lookup import UnknownFeatureError

MEDIA_TYPE = "application/problem+json"
_LONGEST = 400
"""Characters of a request that an answer repeats."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of problems; clients may branch on `slug`, which never changes its meaning."""

    slug: str
    title: str
    status: int


MALFORMED_JSON = Kind("malformed-json", "Malformed JSON", 400)
NOT_FOUND = Kind("not-found", "Not found", 404)
METHOD_NOT_ALLOWED = Kind("method-not-allowed", "Method not allowed", 405)
TOO_LARGE = Kind("too-large", "Request too large", 413)
UNSUPPORTED_MEDIA_TYPE = Kind("unsupported-media-type", "Unsupported media type", 415)
INVALID_INPUT = Kind("invalid-input", "Invalid input", 422)
UNKNOWN_FEATURE = Kind("unknown-feature", "Unknown feature", 422)
ID_OUT_OF_RANGE = Kind("id-out-of-range", "Id out of range", 422)
INTERNAL_ERROR = Kind("internal-error", "Internal error", 500)


class ProblemError(Exception):
    """Ends a request with a problem body."""

    def __init__(
        self, kind: Kind, detail: str, feature: str | None = None, field: str | None = None
    ) -> None:
        super().__init__(kind, detail, feature, field)
        self.kind = kind
        self.detail = detail
        self.feature = feature
        self.field = field


def from_input_error(e: InputError) -> ProblemError:
    """The problem that a refused lookup is."""
    kind = INVALID_INPUT
    if isinstance(e, IdRangeError):
        kind = ID_OUT_OF_RANGE
    elif isinstance(e, UnknownFeatureError):
        kind = UNKNOWN_FEATURE
    return ProblemError(kind, str(e), e.feature)


def problem_response(e: ProblemError, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that failed; `feature` and `field` only when known."""
    body: dict[str, str | int] = {
        "type": f"urn:manta:problem:{e.kind.slug}",
        "title": e.kind.title,
        "status": e.kind.status,
        "detail": _short(e.detail),
    }
    if e.feature is not None:
        body["feature"] = _short(e.feature)
    if e.field is not None:
        body["field"] = _short(e.field)
    return Response(orjson.dumps(body), e.kind.status, dict(headers or {}), MEDIA_TYPE)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
