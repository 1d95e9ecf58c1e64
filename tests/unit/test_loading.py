"""YAML to a job: every mistake is one line that names the key, what was seen and what is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ps.errors import ConfigError
from ps.initializers import Constant, RandomUniform, TruncatedNormal
from ps.loading import build, load_yaml
from ps.optimizers import FTRL, SGD, Adagrad, Adam, ExponentialDecay, LinearDecay, Optimizer
from workers.config import JobConfig, load_job

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

JOB: dict[str, Any] = {
    "name": "test",
    "data": {"train": "train.parquet", "label": "rating"},
    "tables": {name: {"vocabulary_size": 10, "dim": 4} for name in ("users", "items")},
    "features": {"user": {"table": "users"}, "item": {"table": "items", "column": "ids"}},
    "model": {"build": "two_tower", "params": {"user": ["user"], "item": ["item"]}},
}

LINEAR = {"name": "LinearDecay", "initial": 1, "final": 0, "steps": 9}
EXPONENTIAL = {"name": "ExponentialDecay", "initial": "1e-1", "rate": 0.5, "steps": 9}


def job_of(tmp_path: Path, *overrides: str, **changes: Any) -> JobConfig:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | changes))
    return load_job(path, overrides)


def failure(tmp_path: Path, *overrides: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        job_of(tmp_path, *overrides, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- whole jobs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    job = load_job(path)
    spec = job.embedding_spec()
    assert job.name
    assert {t.name for t in spec.tables} == set(job.tables)
    assert {f.name for f in spec.features} == set(job.features)


def test_there_are_shipped_configs() -> None:
    assert CONFIGS


def test_defaults_are_those_of_the_classes(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    assert (job.seed, job.train.epochs, job.cluster.shards) == (0, 1, 2)
    assert job.train.optimizer == SGD()
    assert job.data.train == Path("train.parquet")
    assert job.data.test is None
    assert job.worker_batch_size == job.train.batch_size
    assert job.features["item"].column == "ids"


def test_a_job_names_its_tables_and_features(tmp_path: Path) -> None:
    overrides = ["tables.users.optimizer=FTRL", "train.optimizer=Adam", "tables.items.combiner=sum"]
    spec = job_of(tmp_path, *overrides).embedding_spec()
    assert spec.table("users").optimizer == FTRL()
    assert spec.table("items").optimizer == Adam()
    assert spec.table("items").combiner == "sum"
    assert [(f.name, f.table) for f in spec.features] == [("item", "items"), ("user", "users")]


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("features.user.table=userz", ["features.user.table", "'userz'", "users"]),
        ("tables.extra={vocabulary_size: 1, dim: 1}", ["tables.extra", "no feature uses"]),
        ("features={}", ["features", "at least one"]),
        ("cluster.workers=3", ["train.batch_size 1024", "cluster.workers 3"]),
        ("cluster.workers=0", ["cluster", "workers", "at least 1"]),
        ("cluster.shards=0", ["cluster", "shards", "at least 1"]),
        ("cluster.threads_per_worker=-1", ["threads_per_worker", "at least 1"]),
        ("cluster.threads_per_shard=2", ["threads_per_shard: 2", "asks for CPU: 1"]),
        ("train.epochs=0", ["train", "epochs", "at least 1"]),
        ("train.batch_size=0", ["train", "batch_size", "at least 1"]),
        ("train.report_every=0", ["report_every", "at least 1"]),
        ("train.lookahead=3", ["lookahead", "0, 1 or 2", "3"]),
        ("train.lookahead=-1", ["lookahead", "0, 1 or 2"]),
        ("train.clip_predictions=[1]", ["clip_predictions", "[low, high]"]),
        ("cluster.step_timeout_s=0", ["step_timeout_s", "above 0"]),
        ("cluster.shard_resources={CPU: -1}", ["shard_resources.CPU", "-1"]),
        ("train.loss=mae", ["train.loss", "'mae'", "mse", "bce"]),
        ("train.reduction=max", ["train.reduction", "'max'", "mean"]),
        ("data.shuffle_rows=-1", ["shuffle_rows", "-1"]),
        ("tables.users.combiner=summ", ["tables.users.combiner", "'summ'", "'sum'"]),
        ("tables.users.vocabulary_size=0", ["`vocabulary_size`", "0"]),
        ("tables.users.dim=-1", ["`dim`", "-1"]),
        ("features.user.max_sequence_length=-1", ["`max_sequence_length`", "-1"]),
    ],
)
def test_a_contradiction_is_named(tmp_path: Path, override: str, fragments: list[str]) -> None:
    message = failure(tmp_path, override)
    assert all(fragment in message for fragment in fragments), message


def test_a_bad_table_is_named_among_many(tmp_path: Path) -> None:
    assert "items" in failure(tmp_path, "tables.items.vocabulary_size=0")
    assert "user" in failure(tmp_path, "features.user.max_sequence_length=-1")


def test_a_batch_is_split_evenly_over_the_workers(tmp_path: Path) -> None:
    job = job_of(tmp_path, "cluster.workers=3", "train.batch_size=999")
    assert job.worker_batch_size == 333


# --- strictness


@pytest.mark.parametrize(
    ("override", "path", "hint"),
    [
        ("trian={}", "trian", "'train'"),
        ("train.bach_size=3", "train.bach_size", "'batch_size'"),
        ("tables.users.vocab_size=3", "tables.users.vocab_size", "'vocabulary_size'"),
        ("features.user.tabel=users", "features.user.tabel", "'table'"),
        ("train.optimizer={name: SGD, momentum: 0.9}", "train.optimizer.momentum", "known: "),
        ("train.optimizer={name: Adam, beta1: 0.9}", "train.optimizer.beta1", "'beta_1'"),
        ("cluster.zzz=1", "cluster.zzz", "known: "),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_known_one(
    tmp_path: Path, override: str, path: str, hint: str
) -> None:
    message = failure(tmp_path, override)
    assert message.startswith(f"{path}: unknown key")
    assert hint in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1.5", "seed: wanted a whole number, got 1.5"),
        ("seed=true", "seed: wanted a whole number, got True"),
        ("seed=one", "seed: wanted a whole number, got 'one'"),
        ("name=5", "name: wanted text, got 5"),
        ("data.train=[a]", "data.train: wanted a path, got ['a']"),
        ("data.dense=price", "data.dense: wanted a list, got 'price'"),
        ("data.dense=[a, 1]", "data.dense[1]: wanted text, got 1"),
        ("tables=[users]", "tables: wanted a mapping, got ['users']"),
        ("tables.users=10", "tables.users: wanted a mapping, got 10"),
        ("tables.users.dim=4.0", "tables.users.dim: wanted a whole number, got 4.0"),
        ("train=null", "train: wanted a mapping, got None"),
        ("cluster.start_timeout_s=soon", "cluster.start_timeout_s: wanted a number, got 'soon'"),
        ("cluster.start_timeout_s=true", "cluster.start_timeout_s: wanted a number, got True"),
        ("cluster.shard_resources={A: x}", "cluster.shard_resources.A: wanted a number, got 'x'"),
        (
            "features.user.validate_weights_and_indices=1",
            "features.user.validate_weights_and_indices: wanted true or false, got 1",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path: Path, override: str, message: str) -> None:
    assert failure(tmp_path, override) == message


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("name", "name: missing"),
        ("data", "data: missing"),
        ("model", "model: missing"),
        ("features", "features: at least one is needed"),
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, key: str, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in JOB.items() if k != key}))
    with pytest.raises(ConfigError, match=f"^{message}$"):
        load_job(file)


def test_a_missing_key_within_is_named_by_its_path(tmp_path: Path) -> None:
    assert failure(tmp_path, data={"train": "x"}) == "data.label: missing"
    assert failure(tmp_path, "tables.users={dim: 4}") == "tables.users.vocabulary_size: missing"


# --- files and overrides


def test_overrides_replace_and_add_values(tmp_path: Path) -> None:
    job = job_of(
        tmp_path, "name=other", "train.epochs=3", "model.params.x.y=[1, a=b]", "data.test=t=1"
    )
    assert (job.name, job.train.epochs) == ("other", 3)
    assert job.model.params["x"] == {"y": [1, "a=b"]}
    assert job.data.test == Path("t=1")


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("train.epochs", "path.to.key=value"),
        ("=3", "path.to.key=value"),
        ("name.x=1", "'name' is not a mapping"),
        ("train.epochs.x.y=1", "'epochs' is not a mapping"),
        ("train.epochs=[1", "not YAML"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, fragment: str) -> None:
    message = failure(tmp_path, override, train={"epochs": 1})
    assert message.startswith(f"--set {override}: ")
    assert fragment in message


@pytest.mark.parametrize("text", ["", "[1, 2]", "just text", "a: [1", "\t- x", "a: b: c"])
def test_a_file_that_is_no_yaml_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"job\.yaml: .") as caught:
        load_yaml(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"PAR1\xff\xfe\x80")
    for name in ("absent.yaml", "binary.yaml", "."):
        with pytest.raises(ConfigError, match="config "):
            load_yaml(tmp_path / name)


# --- optimizers, schedules, initializers by name


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ("Adagrad", Adagrad()),
        ({"name": "Adagrad"}, Adagrad()),
        ({"name": "Adagrad", "learning_rate": 1}, Adagrad(1.0)),
        ({"name": "SGD", "learning_rate": "1e-3"}, SGD(1e-3)),
        ({"name": "SGD", "clipvalue": 0.5}, SGD(clipvalue=0.5)),
        ({"name": "SGD", "clipvalue": [None, 2]}, SGD(clipvalue=(None, 2.0))),
        ({"name": "SGD", "clipvalue": None}, SGD()),
        ({"name": "Adam", "lazy_adam": False}, Adam(lazy_adam=False)),
        (
            {"name": "SGD", "learning_rate": LINEAR},
            SGD(LinearDecay(1.0, 0.0, 9)),
        ),
        (
            {"name": "FTRL", "learning_rate": EXPONENTIAL},
            FTRL(ExponentialDecay(0.1, 0.5, 9)),
        ),
    ],
    ids=str,
)
def test_optimizers_are_built_by_name(value: Any, want: Optimizer) -> None:
    assert build(Optimizer, value, "train.optimizer") == want


@pytest.mark.parametrize(
    ("value", "fragments"),
    [
        ("Adagrd", ["o.name", "'Adagrd' is not one of", "'Adagrad'"]),
        ({"learning_rate": 0.1}, ["o.name", "None is not one of", "SGD"]),
        ({"name": 7}, ["o.name", "7 is not one of"]),
        (None, ["o", "None"]),
        (["SGD"], ["o", "['SGD']"]),
        ({"name": ["SGD"]}, ["o", "['SGD']"]),
        ({"name": "SGD", "learning_rate": "fast"}, ["o.learning_rate", "a number", "'fast'"]),
        ({"name": "SGD", "learning_rate": True}, ["o.learning_rate", "a number", "True"]),
        ({"name": "SGD", "learning_rate": {"name": "Linear"}}, ["o.learning_rate", "LinearDecay"]),
        (
            {"name": "SGD", "learning_rate": {"name": "LinearDecay", "initial": 1}},
            ["o.learning_rate", "missing"],
        ),
        (
            {"name": "SGD", "learning_rate": LINEAR | {"steps": 0}},
            ["o.learning_rate", "`steps`"],
        ),
        ({"name": "SGD", "clipvalue": [1]}, ["o", "clipvalue"]),
        ({"name": "Adam", "beta_1": 2}, ["o", "`beta_1`", "2"]),
        ({"name": "Adam", "lazy_adam": "no"}, ["o.lazy_adam", "true or false"]),
    ],
    ids=str,
)
def test_a_wrong_optimizer_is_named(value: Any, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Optimizer, value, "o")
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_initializers_are_built_by_name(tmp_path: Path) -> None:
    overrides = [
        "tables.users.initializer={name: TruncatedNormal, stddev: 1e-2}",
        "tables.items.initializer=Constant",
    ]
    spec = job_of(tmp_path, *overrides).embedding_spec()
    assert spec.table("users").initializer == TruncatedNormal(0.0, 0.01)
    assert spec.table("items").initializer == Constant(0.0)
    message = failure(tmp_path, "tables.users.initializer={name: RandomUniform, minval: 2}")
    assert "tables.users.initializer" in message
    assert "minval" in message
    assert RandomUniform().minval == -0.05


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\ndata: &d {x: 1}\nmore: {<<: *d, x: 2}\nname: b\n")
    with pytest.raises(ConfigError, match=r"key 'name' stands twice .*line 4"):
        load_yaml(path)
    path.write_text("data: &d {x: 1}\nmore: {<<: *d, x: 2}\n")
    assert load_yaml(path)["more"] == {"x": 2}
