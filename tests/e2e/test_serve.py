"""Real Ray Serve, two replicas, real HTTP: the answers are TensorFlow's."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from ray import serve

from ps.config import FeatureConfig, TableConfig
from ps.errors import ConfigError, ExportError, ServerError
from ps.ragged import F32, Ragged
from serving import deployment
from serving.client import AsyncLookupClient, LookupClient
from serving.commands import serve_command
from serving.deployment import deploy, shutdown
from serving.limits import Limits
from tests.support.exports import write_export

pytestmark = pytest.mark.e2e
V, D, L = 1000, 16, 4
COMBINER = {"genres": "mean", "words": "sum", "tags": "sqrtn"}


def features() -> dict[str, FeatureConfig]:
    table = TableConfig(V, D, name="user")
    made = {"user": FeatureConfig(table), "watched": FeatureConfig(table, max_sequence_length=L)}
    for name, combiner in COMBINER.items():
        made[name] = FeatureConfig(TableConfig(V, D, combiner=combiner, name=name))
    return made


@pytest.fixture(scope="module")
def rows() -> dict[str, F32]:
    rng = np.random.default_rng(0)
    names = ("user", *COMBINER)
    return {n: (rng.normal(size=(V, D)) / np.sqrt(32)).astype(np.float32) for n in names}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def url(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory, rows: dict[str, F32]
) -> Iterator[str]:
    root = tmp_path_factory.mktemp("export")
    write_export(root, features(), rows)
    limits = Limits(max_body_bytes=2**20)
    yield deploy(root, port=free_port(), num_replicas=2, limits=limits)
    shutdown()


def batch(num_examples: int, seed: int) -> dict[str, Ragged]:
    """Bags with empty examples, repeats and negative ids; weights for mean and sqrtn."""
    rng = np.random.default_rng(seed)
    made = {}
    for name in ("watched", *COMBINER):
        splits = np.concatenate([[0], np.cumsum(rng.integers(0, 9, num_examples))])
        low = 0 if name == "watched" else -50
        ids = rng.integers(low, V, splits[-1])
        weighted = name in ("genres", "tags")
        weights = rng.uniform(0.1, 2, ids.size).astype(np.float32) if weighted else None
        made[name] = Ragged(ids, splits, weights)
    return made


def tensorflow_answer(inputs: dict[str, Any], rows: dict[str, F32]) -> dict[str, F32]:
    import tensorflow as tf

    embedding = tf.tpu.experimental.embedding
    made = {n: embedding.TableConfig(V, D, combiner=COMBINER.get(n, "mean"), name=n) for n in rows}
    config = {n: embedding.FeatureConfig(made[n]) for n in rows}
    config["watched"] = embedding.FeatureConfig(made["user"], max_sequence_length=L)
    values: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for name, ids in inputs.items():
        if isinstance(ids, Ragged):
            ragged = tf.RaggedTensor.from_row_splits(ids.ids, ids.row_splits)
            values[name] = ragged.to_sparse()
            weights[name] = None
            if ids.weights is not None:
                weights[name] = ragged.with_values(tf.constant(ids.weights)).to_sparse()
        else:
            values[name], weights[name] = tf.constant(ids), None
    tables = {table: tf.Variable(rows[name]) for name, table in made.items()}
    found = embedding.serving_embedding_lookup(values, weights, tables, config)
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("num_examples", [1, 64])
def test_answers_over_http_are_those_of_tensorflow(
    url: str, rows: dict[str, F32], num_examples: int
) -> None:
    inputs: dict[str, Any] = dict(batch(num_examples, seed=num_examples))
    inputs["user"] = np.arange(num_examples)
    wanted = tensorflow_answer(inputs, rows)
    with LookupClient(url) as client:
        found = client.lookup(inputs)
    assert list(found) == list(inputs)
    for name in inputs:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_two_replicas_answer_many_requests_at_once_alike(url: str, rows: dict[str, F32]) -> None:
    replicas = serve.status().applications["manta"].deployments["lookup"].replica_states
    assert replicas == {"RUNNING": 2}

    async def run() -> list[dict[str, F32]]:
        async with AsyncLookupClient(url, timeout_s=60) as client:
            return await asyncio.gather(*(client.lookup({"user": [i]}) for i in range(100)))

    for i, found in enumerate(asyncio.run(run())):
        np.testing.assert_array_equal(found["user"], rows["user"][[i]])


def test_what_is_served_is_told_through_the_proxy(url: str) -> None:
    with LookupClient(url) as client:
        assert client.ready()
        assert client.model()["version"] == "v000001"
        assert {table["name"] for table in client.tables()} == {"user", *COMBINER}
        with pytest.raises(ServerError, match=rf"422 .*id {V} is not in \[0, {V}\)"):
            client.lookup({"user": [V]})


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/nope", b"", 404),
        ("GET", "/v1/lookup", b"", 405),
        ("POST", "/v1/lookup", b"{", 400),
        ("POST", "/v1/lookup", b" " * (2**20 + 1), 413),
    ],
)
def test_errors_are_problem_bodies_through_the_proxy(
    url: str, method: str, path: str, content: bytes, status: int
) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.request(method, url + path, content=content, headers=headers)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == status


def test_a_second_deploy_cannot_move_the_port(
    url: str, tmp_path: Path, rows: dict[str, F32]
) -> None:
    write_export(tmp_path, features(), rows)
    with pytest.raises(ConfigError, match="Serve runs already, but not on"):
        deploy(tmp_path, port=free_port())


def test_a_refused_serve_command_leaves_the_running_application(
    url: str, tmp_path: Path, rows: dict[str, F32]
) -> None:
    write_export(tmp_path, features(), rows)
    with pytest.raises(ConfigError, match="Serve runs already, but not on"):
        serve_command(tmp_path, port=free_port())
    with LookupClient(url) as client:
        assert client.ready()


@pytest.mark.parametrize("host", ["no such host", "203.0.113.1"])
def test_an_address_that_cannot_be_had_is_a_config_error(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        deployment._free_port(host)


def test_a_missing_export_is_found_before_ray_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "ray", None)
    monkeypatch.setattr(deployment, "serve", None)
    with pytest.raises(ExportError, match="no such folder"):
        deploy(tmp_path / "nowhere")


def test_the_server_imports_neither_tensorflow_nor_the_shards() -> None:
    code = (
        "import sys, serving.deployment;"
        "print(sorted({'tensorflow', 'ps.actor', 'workers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
