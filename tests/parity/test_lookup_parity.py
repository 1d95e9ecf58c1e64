"""TensorFlow is the oracle of what HTTP sends: the same numbers, and errors where it errs.

Tolerance: rtol 1e-5, atol 1e-6·max(1, n/50) for n ids per example. The reference itself is not
bit-stable between its paths.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tensorflow as tf
from fastapi import FastAPI
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ps.config import COMBINERS, Combiner, FeatureConfig, TableConfig
from ps.errors import InputError
from ps.export import open_export
from ps.inputs import Bags, Dense
from ps.lookup import lookup
from ps.ragged import F32, Ragged
from ps.spec import FeatureSpec
from serving.app import create_app
from serving.lookup import LookupService
from tests.support.exports import write_export

pytestmark = pytest.mark.parity

DIM = 3
SIZES = (1, 13)
MAX_LENGTH = 3
KINDS: dict[str, dict[str, Any]] = {
    "safe": {},
    "raw": {"validate_weights_and_indices": False},
    "sequence": {"max_sequence_length": MAX_LENGTH},
    "shaped": {"max_sequence_length": MAX_LENGTH, "output_shape": (4,)},
}
WEIGHTS = [-2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 3.0]
"""Few bits each, so that no sum of them is nearly but not quite 0."""
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def table_name(num_rows: int, combiner: Combiner) -> str:
    return f"{combiner}{num_rows}"


def table_rows(num_rows: int) -> F32:
    rng = np.random.default_rng(num_rows)
    return rng.normal(0, 1 / np.sqrt(32), size=(num_rows, DIM)).astype(np.float32)


ROWS = {size: table_rows(size) for size in SIZES}


@dataclass(frozen=True)
class Case:
    """One lookup of one feature: ids are nested lists or a dense array."""

    num_rows: int
    combiner: Combiner
    kind: str
    ids: Any
    weights: list[list[float]] | None = None

    @property
    def dense(self) -> bool:
        return isinstance(self.ids, np.ndarray)

    @property
    def feature(self) -> str:
        return f"{table_name(self.num_rows, self.combiner)}/{self.kind}"

    @property
    def longest(self) -> int:
        return 1 if self.dense else max([1, *map(len, self.ids)])


@st.composite
def bag_cases(draw: st.DrawFn, weights: list[float]) -> Case:
    size = draw(st.sampled_from(SIZES))
    usual = st.integers(0, size - 1)
    edge = st.sampled_from([-1, -(2**40), size, 2**31, 2**40])
    any_id = usual if draw(st.integers(0, 2)) else st.one_of(usual, usual, edge)
    ids = draw(st.lists(st.lists(any_id, max_size=6), min_size=1, max_size=5))
    drawn = None
    if draw(st.booleans()):
        drawn = [[draw(st.sampled_from(weights)) for _ in row] for row in ids]
    kind = draw(st.sampled_from(list(KINDS)))
    return Case(size, draw(st.sampled_from(COMBINERS)), kind, ids, drawn)


@st.composite
def dense_cases(draw: st.DrawFn, max_rank: int) -> Case:
    size = draw(st.sampled_from(SIZES))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=max_rank, min_size=max_rank == 1)))
    num_ids = int(np.prod(shape, dtype=int))
    any_id = st.sampled_from([*range(size)] * 3 + [-1, size, 2**40])
    ids = draw(st.lists(any_id, min_size=num_ids, max_size=num_ids))
    array = np.array(ids, dtype=np.int64).reshape(shape)
    weights = [[1.0]] if draw(st.integers(0, 9)) == 0 else None
    kind = draw(st.sampled_from(list(KINDS)))
    return Case(size, draw(st.sampled_from(COMBINERS)), kind, array, weights)


def sparse(rows: list[list[Any]], dtype: Any) -> Any:
    places = [(b, i) for b, row in enumerate(rows) for i in range(len(row))]
    values = [value for row in rows for value in row]
    return tf.SparseTensor(
        np.array(places, dtype=np.int64).reshape(-1, 2),
        np.array(values, dtype=dtype),
        (len(rows), max([1, *map(len, rows)])),
    )


def reference(case: Case) -> F32 | None:
    """TensorFlow's answer with always B rows, or None where it raises."""
    embedding = tf.tpu.experimental.embedding
    table = embedding.TableConfig(case.num_rows, DIM, combiner=case.combiner, name="t")
    feature = embedding.FeatureConfig(table, **KINDS[case.kind])
    ids = tf.constant(case.ids) if case.dense else sparse(case.ids, np.int64)
    weights = None if case.weights is None else {"f": sparse(case.weights, np.float32)}
    variable = tf.Variable(ROWS[case.num_rows])
    try:
        found = embedding.serving_embedding_lookup(
            {"f": ids}, weights, {table: variable}, {"f": feature}
        )["f"].numpy()
    except (ValueError, tf.errors.InvalidArgumentError):
        return None
    if not case.dense and len(found) < len(case.ids):
        assert case.kind == "raw"  # it forgets empty examples at the end
        missing = len(case.ids) - len(found)
        found = np.concatenate([found, np.zeros((missing, *found.shape[1:]), np.float32)])
    return found  # type: ignore[no-any-return]


def direct(case: Case) -> F32 | None:
    """Our answer, or None where it raises."""
    rows = ROWS[case.num_rows]
    feature = FeatureSpec(name="f", table="t", **KINDS[case.kind])
    try:
        if case.dense:
            return lookup(feature, "t", case.combiner, rows, Dense(case.ids))
        bags = Bags(Ragged.from_lists(case.ids, case.weights))
        return lookup(feature, "t", case.combiner, rows, bags)
    except InputError:
        return None


def check(case: Case, found: F32 | None) -> None:
    wanted = reference(case)
    assert (found is None) == (wanted is None), (found, wanted)
    if found is not None and wanted is not None:
        assert found.shape == wanted.shape
        atol = 1e-6 * max(1, case.longest / 50)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=atol)


@settings(max_examples=300, deadline=None)
@given(case=bag_cases(WEIGHTS * 3 + NOT_FINITE))
@example(case=Case(13, "mean", "safe", [[0, 13]], [[1.0, 0.0]]))  # dropped before it is checked
@example(case=Case(13, "sum", "safe", [[0, 13]], [[1.0, 0.0]]))
@example(case=Case(13, "sum", "sequence", [[0, 1, 2, 13], [5]]))  # cut off before it is checked
@example(case=Case(13, "sum", "sequence", [[0, 1, 13, 2], [5]]))
def test_bags_give_what_tensorflow_gives(case: Case) -> None:
    check(case, direct(case))


@settings(max_examples=100, deadline=None)
@given(dense_cases(max_rank=3).filter(lambda case: case.weights is None))
def test_dense_ids_give_what_tensorflow_gives(case: Case) -> None:
    check(case, direct(case))


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("kind", ["safe", "raw"])
@pytest.mark.parametrize("num_ids", [100, 5000])
def test_long_examples_stay_within_the_tolerance(
    combiner: Combiner, kind: str, num_ids: int
) -> None:
    rng = np.random.default_rng(num_ids)
    ids = rng.integers(0, 13, size=(2, num_ids)).tolist()
    weights = rng.uniform(0.1, 1, size=(2, num_ids)).tolist()
    check(case := Case(13, combiner, kind, ids), direct(case))
    check(case := Case(13, combiner, kind, ids, weights), direct(case))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    root: Path = tmp_path_factory.mktemp("export")
    features, rows = {}, {}
    for size in SIZES:
        for combiner in COMBINERS:
            name = table_name(size, combiner)
            table = TableConfig(size, DIM, combiner=combiner, name=name)
            rows[name] = ROWS[size]
            for kind, options in KINDS.items():
                features[f"{name}/{kind}"] = FeatureConfig(table, **options)
    write_export(root, features, rows)
    return create_app(LookupService(open_export(root)))


def over_http(app: FastAPI, case: Case) -> F32 | None:
    """The app's answer to the same lookup as JSON, or None where it refuses."""
    body: dict[str, Any] = {"inputs": {case.feature: case.ids.tolist() if case.dense else case.ids}}
    if case.weights is not None:
        body["weights"] = {case.feature: case.weights}

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://manta") as http:
            headers = {"content-type": "application/json"}
            return await http.post("/v1/lookup", content=json.dumps(body), headers=headers)

    response = asyncio.run(run())
    if response.status_code == 422:
        return None
    assert response.status_code == 200
    found = np.array(response.json()["outputs"][case.feature], dtype=np.float32)
    return found if found.size else found.reshape(0, DIM)


@settings(max_examples=300, deadline=None)
@given(case=st.one_of(bag_cases(WEIGHTS), bag_cases(WEIGHTS), dense_cases(max_rank=1)))
@example(case=Case(13, "mean", "safe", [[0, 13]], [[1.0, 0.0]]))  # dropped before it is checked
@example(case=Case(13, "sum", "safe", [[0, 13]], [[1.0, 0.0]]))
@example(case=Case(13, "sum", "sequence", [[0, 1, 2, 13], [5]]))  # cut off before it is checked
@example(case=Case(13, "sum", "sequence", [[0, 1, 13, 2], [5]]))
def test_http_gives_what_tensorflow_gives(app: FastAPI, case: Case) -> None:
    check(case, over_http(app, case))
