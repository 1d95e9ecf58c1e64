"""JSON bodies: request bytes to ids, bags and raw values, activations to response bytes.

A flat list is one id, or one raw value, per example; a list of lists, or an object of columns, is
bags. Values are checked a column at a time, because a validator per number costs more than the
lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import orjson
import pyarrow as pa

from ps.columns import RawValues, Transform
from ps.errors import InputError
from ps.inputs import Bags, Dense
from ps.ragged import F32, I64, Ragged
from serving.lookup import Raw
from serving.problems import INVALID_INPUT, MALFORMED_JSON, TOO_LARGE, ProblemError

Place = Callable[[int], str]
"""Where in the body the i-th number of a column stands."""
_JSON_NAMES = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
_INT64 = np.iinfo(np.int64)
_SPARE_VALUES = 65_536
"""JSON values, and objects, that a request may hold besides its ids, bags and weights."""


def parse_request(
    body: bytes, max_ids: int, transforms: Mapping[str, Transform]
) -> dict[str, Dense | Bags | Raw]:
    """The inputs of a lookup request.

    Args:
        body: `{"inputs": {feature: values}, "weights": {feature: weights}}`.
        max_ids: ids or raw values, plus bags, allowed over all features.
        transforms: of the features that take raw values; all others take ids.

    Raises:
        ProblemError: with the status, feature and field that are wrong.
    """
    _check_density(body, max_ids)
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise ProblemError(MALFORMED_JSON, f"the body is not JSON: {e}") from None
    _check_keys(request, ("inputs", "weights"), ("inputs",), "", None)
    inputs = _object(request["inputs"], "inputs")
    weights = request.get("weights")
    weights = {} if weights is None else _object(weights, "weights")
    for name in weights:
        if name not in inputs:
            raise _invalid(name, f"weights.{name}", "weights were given, but no ids in `inputs`")
    reader = _Reader(max_ids, transforms)
    return {name: reader.read(name, value, weights.get(name)) for name, value in inputs.items()}


def _check_density(body: bytes, max_ids: int) -> None:
    """Refuse what would fill memory when parsed: 16 MiB of `{},` become 600 MiB of objects.

    Every JSON value stands behind a comma or an opening bracket. An id takes one, a bag two, and
    their weights as many again. Commas and brackets inside strings count too: telling them apart
    would cost as much as parsing.
    """
    num_objects = body.count(b"{")
    num_values = body.count(b",") + body.count(b"[") + num_objects
    if num_objects > _SPARE_VALUES or num_values > 4 * max_ids + _SPARE_VALUES:
        detail = f"the request has more values than {max_ids} ids and bags need; send fewer"
        raise ProblemError(TOO_LARGE, detail)


def render_response(
    version: str, step: int, outputs: Mapping[str, F32], lengths: Mapping[str, I64]
) -> bytes:
    """The answer; NaN and infinities, which JSON cannot express, become null.

    Args:
        version: of the export.
        step: of the export.
        outputs: activations by feature.
        lengths: of sequences of raw values; the key is left out if there are none.
    """
    answer = {"version": version, "step": step, "outputs": outputs}
    if lengths:
        answer["lengths"] = lengths
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


class _Reader:
    """Reads feature after feature and counts their ids and raw values."""

    def __init__(self, max_ids: int, transforms: Mapping[str, Transform]) -> None:
        self._max_ids = max_ids
        self._left = max_ids
        self._transforms = transforms

    def read(self, name: str, value: object, weights: object) -> Dense | Bags | Raw:
        """One feature's ids or raw values."""
        transform = self._transforms.get(name)
        column = _Ids(name) if transform is None else _RawColumn(name, transform.takes_strings)
        if isinstance(value, dict):
            if weights is not None:
                raise _invalid(name, f"weights.{name}", "weights of columns belong beside `values`")
            return self._columns(column, value)
        if not isinstance(value, list):
            raise _invalid(
                name, f"inputs.{name}", f"must be a list or an object, got {_show(value)}"
            )
        kinds = set(map(type, value))
        if kinds == {list}:
            return self._bags(column, value, weights)
        if list in kinds:
            _refuse_mixture(name, value, column.noun)
        self._count(len(value), name)
        return column.flat(value, weights)

    def _bags(
        self, column: _Ids | _RawColumn, rows: list[list[Any]], weights: object
    ) -> Bags | Raw:
        name, splits = column.name, _splits(rows)
        self._count(int(splits[-1]) + len(rows), name)
        values = column.values(list(chain.from_iterable(rows)), _nested(f"inputs.{name}", splits))
        if weights is None:
            return column.bags(values, splits, None)
        field = f"weights.{name}"
        if not isinstance(weights, list) or any(type(row) is not list for row in weights):
            raise _invalid(name, field, f"must be a list of lists, like the {column.noun}s")
        self._count(len(weights), name)
        if not np.array_equal(_splits(weights), splits):
            raise _invalid(name, field, _mismatch(rows, weights, column.noun))
        flat = list(chain.from_iterable(weights))
        return column.bags(values, splits, column.weights(flat, _nested(field, splits)))

    def _columns(self, column: _Ids | _RawColumn, columns: dict[str, Any]) -> Bags | Raw:
        name, field = column.name, f"inputs.{column.name}"
        required = ("values", "row_splits")
        _check_keys(columns, (*required, "weights"), required, field + ".", name)
        for key, numbers in columns.items():
            if not isinstance(numbers, list) and not (key == "weights" and numbers is None):
                raise _invalid(name, f"{field}.{key}", f"must be a list, got {_show(numbers)}")
        self._count(len(columns["values"]) + len(columns["row_splits"]), name)
        values = column.values(columns["values"], lambda i: f"{field}.values[{i}]")
        splits = _ids(columns["row_splits"], name, lambda i: f"{field}.row_splits[{i}]")
        weights = columns.get("weights")
        if weights is not None:
            weights = column.weights(weights, lambda i: f"{field}.weights[{i}]")
        try:
            return column.bags(values, splits, weights)
        except InputError as e:
            raise _invalid(name, field, e.message) from None

    def _count(self, num_ids: int, name: str) -> None:
        self._left -= num_ids
        if self._left < 0:
            detail = f"the request has more than {self._max_ids} ids and bags; send fewer at a time"
            raise ProblemError(TOO_LARGE, detail, name)


class _Ids:
    """The values of a feature that takes ids."""

    noun = "id"
    """For error messages; of raw values it is "value"."""

    def __init__(self, name: str) -> None:
        self.name = name

    def flat(self, values: list[Any], weights: object) -> Dense:
        """One id per example."""
        name = self.name
        if weights is not None:
            raise _invalid(
                name, f"weights.{name}", f"Weight specified for {name}, but input is dense"
            )
        return Dense(self.values(values, lambda i: f"inputs.{name}[{i}]"))

    def values(self, values: list[Any], place: Place) -> I64:
        """Checked ids."""
        return _ids(values, self.name, place)

    def weights(self, weights: list[Any], place: Place) -> Any:
        """float32, checked."""
        return _weights(weights, self.name, place)

    def bags(self, values: I64, splits: I64, weights: F32 | None) -> Bags:
        """What `values` and `weights` gave, in CSR form."""
        return Bags(Ragged(values, splits, weights))


class _RawColumn:
    """The values of a feature with a transform: strings or integers, null for none.

    A flat list is a dense input of `ps.columns.raw`, bags are a sparse one. Weights stay a list,
    because an array's dtype would have to be the one that the column declares.
    """

    noun = "value"

    def __init__(self, name: str, strings: bool) -> None:
        self.name = name
        self._strings = strings

    def flat(self, values: list[Any], weights: object) -> Raw:
        """At most one value per example."""
        name, field = self.name, f"weights.{self.name}"
        array = self.values(values, lambda i: f"inputs.{name}[{i}]")
        if weights is None:
            return Raw(array)
        if not isinstance(weights, list) or len(weights) != len(values):
            raise _invalid(name, field, f"must be a list of {len(values)} weights, like the values")
        return Raw(array, self.weights(weights, lambda i: f"{field}[{i}]"))

    def values(self, values: list[Any], place: Place) -> pa.Array:
        """Checked values."""
        wanted = str if self._strings else int
        if not set(map(type, values)) <= {wanted, type(None)}:
            i = next(i for i, v in enumerate(values) if type(v) not in (wanted, type(None)))
            if not self._strings:
                _refuse_id(values[i], self.name, place(i))
            raise _invalid(self.name, place(i), f"must be a string, got {_show(values[i])}")
        try:
            return pa.array(values, type=pa.large_string() if self._strings else pa.int64())
        except OverflowError:
            numbers = enumerate(values)
            i = next(i for i, v in numbers if v is not None and v > _INT64.max)
            _refuse_id(values[i], self.name, place(i))

    def weights(self, weights: list[Any], place: Place) -> Any:
        """The list, checked; null goes with a value that is null."""
        _weights([0 if w is None else w for w in weights], self.name, place)
        return weights

    def bags(self, values: pa.Array, splits: I64, weights: list[Any] | None) -> Raw:
        """What `values` and `weights` gave, in CSR form.

        Raises:
            InputError: the splits or weights do not fit the values.
        """
        Ragged(np.zeros(len(values), dtype=np.int64), splits)  # refuses what does not fit
        if weights is None:
            return Raw(RawValues(values, splits))
        if len(weights) != len(values):
            raise InputError(f"got {len(weights)} weights for {len(values)} values")
        return Raw(RawValues(values, splits), RawValues(weights, splits))


def _ids(values: list[Any], name: str, place: Place) -> I64:
    if not set(map(type, values)) <= {int}:
        i = next(i for i, v in enumerate(values) if type(v) is not int)
        _refuse_id(values[i], name, place(i))
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        i = next(i for i, v in enumerate(values) if not _INT64.min <= v <= _INT64.max)
        _refuse_id(values[i], name, place(i))


def _refuse_id(value: object, name: str, field: str) -> NoReturn:
    beyond = isinstance(value, int | float) and abs(value) >= 2**63
    rule = "must be an integer of 64 bits" if beyond else "must be an integer"
    raise _invalid(name, field, f"{rule}, got {_show(value)}")


def _weights(values: list[Any], name: str, place: Place) -> F32:
    if not set(map(type, values)) <= {int, float}:
        i = next(i for i, v in enumerate(values) if type(v) not in (int, float))
        raise _invalid(name, place(i), f"must be a number, got {_show(values[i])}")
    with np.errstate(over="ignore"):
        weights = np.array(values, dtype=np.float64).astype(np.float32)
    finite = np.isfinite(weights)
    if not finite.all():
        i = int(np.argmin(finite))
        raise _invalid(name, place(i), f"must fit float32, got {_show(values[i])}")
    return weights


def _splits(rows: list[list[Any]]) -> I64:
    splits = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)), out=splits[1:])
    return splits


def _nested(field: str, splits: I64) -> Place:
    def place(i: int) -> str:
        row = int(np.searchsorted(splits, i, side="right")) - 1
        return f"{field}[{row}][{i - int(splits[row])}]"

    return place


def _mismatch(rows: list[list[Any]], weights: list[list[Any]], noun: str) -> str:
    if len(rows) != len(weights):
        return f"must have {len(rows)} lists, like the {noun}s, got {len(weights)}"
    i = next(i for i, (row, w) in enumerate(zip(rows, weights, strict=True)) if len(row) != len(w))
    found = f"list {i} has {len(rows[i])} {noun}s and {len(weights[i])} weights"
    return f"must have one weight per {noun}, but {found}"


def _refuse_mixture(name: str, value: list[Any], noun: str) -> NoReturn:
    i = next(i for i, item in enumerate(value) if type(item) is not list)
    rule = f"must be a list of {noun}s, as its neighbours are"
    raise _invalid(name, f"inputs.{name}[{i}]", f"{rule}, got {_show(value[i])}")


def _object(value: object, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        detail = f"`{field}` must be an object with feature names as keys, got {_show(value)}"
        raise ProblemError(INVALID_INPUT, detail, None, field)
    return value


def _check_keys(
    value: object, known: tuple[str, ...], required: tuple[str, ...], prefix: str, name: str | None
) -> None:
    if not isinstance(value, dict):
        raise ProblemError(INVALID_INPUT, f"the body must be an object, got {_show(value)}")
    for key in value:
        if key not in known:
            detail = f"unknown key '{key[:80]}'; known are {list(known)}"
            raise ProblemError(INVALID_INPUT, detail, name, prefix + key[:80])
    for key in required:
        if key not in value:
            raise ProblemError(INVALID_INPUT, f"key '{prefix}{key}' is missing", name, prefix + key)


def _invalid(name: str, field: str, rule: str) -> ProblemError:
    return ProblemError(INVALID_INPUT, f"feature '{name}': `{field}` {rule}", name, field)


def _show(value: object) -> str:
    if value is None:
        return "null"
    kind = _JSON_NAMES.get(type(value))
    if kind in ("a list", "an object"):
        return kind
    text = orjson.dumps(value).decode()
    shown = text if len(text) <= 80 else text[:80] + "…"
    return f"{kind} ({shown})" if kind else shown
