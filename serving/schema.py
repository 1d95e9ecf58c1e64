"""The bodies as pydantic models, for the OpenAPI description only.

Requests are checked by `json_body` and answers are rendered from arrays; a test sends what these
models describe. Only this module uses pydantic.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


_Value = int | str | None
"""An id, or a raw value of the kind that `/v1/model` tells; null is no raw value, and no id."""


class Columns(_Body):
    """Bags as columns: example b owns `values[row_splits[b]:row_splits[b + 1]]`."""

    values: list[_Value]
    row_splits: list[int] = Field(min_length=1, description="Starts at 0, ends at len(values).")
    weights: list[float | None] | None = Field(
        None,
        description="One per value; absent is all ones, unless the feature's column is weighted. "
        "Null goes with a raw value that is null.",
    )


class LookupRequest(_Body):
    """Ids or raw values by feature; any subset of the model's features."""

    inputs: dict[str, list[_Value] | list[list[_Value]] | Columns] = Field(
        description="A list is one id or value per example; a list of lists, or columns, is bags. "
        "Strings, or integers for ids, as `values` in `/v1/model` tells; null is no raw value.",
        examples=[{"user": [1, 2], "genres": [[4, 7], []], "city": ["Rome", None]}],
    )
    weights: dict[str, list[float | None] | list[list[float | None]] | None] | None = Field(
        None,
        description="Weights of features given as lists, in the same nesting; flat lists of ids "
        "have none. Null goes with a raw value that is null.",
    )


class LookupResponse(_Body):
    """Activations by feature: [B][D], or [B][L][D] for bags of a sequence feature."""

    version: str
    step: int
    outputs: dict[str, list[list[float | None]] | list[list[list[float | None]]]] = Field(
        description="NaN and infinities, which JSON cannot express, are null."
    )
    lengths: dict[str, list[int]] = Field(
        default_factory=dict,
        description="Of sequences of raw values: steps up to the last one with a value, at most L. "
        "Absent if there are none.",
    )


class Table(_Body):
    """One embedding table."""

    name: str
    vocabulary_size: int
    dim: int
    combiner: str
    size_bytes: int
    features: list[str]


class Tables(_Body):
    """All tables of the version that is served."""

    version: str
    tables: list[Table]


class Feature(_Body):
    """One feature and what its answer looks like."""

    name: str
    table: str
    dim: int
    max_sequence_length: int
    shape: list[int | None] = Field(description="Of the answer to bags; null is their number.")
    values: Literal["ids", "strings", "integers"] = Field(
        description="What it takes: ids of its table, or raw strings or integers."
    )


class Model(_Body):
    """What is served."""

    version: str
    step: int = Field(description="Training step.")
    job: str
    created: str = Field(description="UTC, ISO 8601.")
    features: list[Feature]
    dense_model: str | None


class Status(_Body):
    """Health of this process."""

    status: str


class Problem(_Body):
    """An error, RFC 9457."""

    type: str = Field(examples=["urn:manta:problem:id-out-of-range"])
    title: str
    status: int
    detail: str
    feature: str | None = None
    field: str | None = None


_MODELS: tuple[type[_Body], ...] = (
    LookupRequest, LookupResponse, Tables, Model, Status, Problem,
)  # fmt: skip


def components() -> dict[str, Any]:
    """All bodies as OpenAPI component schemas."""
    _, schema = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    definitions: dict[str, Any] = schema["$defs"]
    return definitions


def request_body(model: str) -> dict[str, Any]:
    """OpenAPI's description of a JSON request body."""
    return {"requestBody": {"required": True, "content": _content("application/json", model)}}


def answers(model: str, *error_statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of the answers: one model, and a problem for each error status."""
    good = {"description": "Success", "content": _content("application/json", model)}
    bad = {"description": "Problem", "content": _content("application/problem+json", "Problem")}
    return {200: good, **dict.fromkeys(error_statuses, bad)}


def _content(media_type: str, model: str) -> dict[str, Any]:
    return {media_type: {"schema": {"$ref": f"#/components/schemas/{model}"}}}
