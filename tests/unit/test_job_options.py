"""Lookup options of a job: from YAML to the spec, or one line that names the key."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from ps.config import CustomCombiner, QuantizationConfig
from ps.errors import ConfigError
from ps.loading import build
from workers.config import JobConfig, OutputConfig, TrainConfig
from workers.recovery_config import RecoveryConfig

QUANTIZATION = {"num_buckets": 256, "lower": -1, "upper": "1e0"}
COMBINER = {"combiner_computation": "package.module:function", "max_valency": 8}


def job_of(
    table: dict[str, Any] | None = None, feature: dict[str, Any] | None = None, **changes: Any
) -> JobConfig:
    """A job of one table and one feature, batch size 32, two workers."""
    value = {
        "name": "test",
        "data": {"train": "train.parquet", "label": "y"},
        "tables": {"t": {"vocabulary_size": 10, "dim": 4} | (table or {})},
        "features": {"f": {"table": "t"} | (feature or {})},
        "model": {"build": "two_tower"},
        "train": {"batch_size": 32},
        "cluster": {"workers": 2},
    }
    job: JobConfig = build(JobConfig, value | changes)
    job.embedding_spec()
    return job


def test_lookup_options_reach_the_spec() -> None:
    quantized = job_of({"quantization_config": QUANTIZATION}).embedding_spec()
    assert quantized.tables[0].quantization_config == QuantizationConfig(256, -1.0, 1.0)
    custom = job_of({"combiner": COMBINER}).embedding_spec()
    assert custom.tables[0].combiner == CustomCombiner("package.module:function", 8)
    shaped = job_of(feature={"output_shape": [16, 3]}).embedding_spec()
    assert shaped.features[0].output_shape == (16, 3)
    assert job_of(feature={"output_shape": 16}).embedding_spec().features[0].output_shape == (16,)
    core = job_of(feature={"tensor_core_shape": [None, 5]}).embedding_spec()
    assert core.features[0].tensor_core_width == 5


def test_a_sequence_may_have_weights() -> None:
    job = job_of(feature={"weights": "w", "max_sequence_length": 3})
    assert job.embedding_spec().features[0].max_sequence_length == 3


@pytest.mark.parametrize(
    ("table", "feature", "fragments"),
    [
        ({}, {"output_shape": [33]}, ["feature 'f'", "multiple of the 16 examples"]),
        ({}, {"output_shape": [-16]}, ["features.f", "`output_shape`", "-16"]),
        ({}, {"output_shape": ["a"]}, ["features.f.output_shape"]),
        ({}, {"output_shape": [16, 2], "weights": "w"}, ["features.f.weights", "no difference"]),
        ({}, {"tensor_core_shape": [None, 2], "weights": "w"}, ["features.f.weights"]),
        ({"combiner": COMBINER}, {"weights": "w"}, ["features.f.weights", "no difference"]),
        ({}, {"tensor_core_shape": [2]}, ["features.f", "must be size 2"]),
        ({}, {"max_sequence_length": -1}, ["features.f", "`max_sequence_length`"]),
        ({"quantization_config": QUANTIZATION | {"num_buckets": 1}}, {}, ["tables.t.quant", "2"]),
        ({"quantization_config": {"num_buckets": 4}}, {}, ["quantization_config.lower: missing"]),
        ({"combiner": COMBINER | {"max_valence": 8}}, {}, ["tables.t.combiner.max_valence"]),
        ({"combiner": "meen"}, {}, ["tables.t.combiner", "did you mean 'mean'"]),
    ],
    ids=str,
)
def test_a_wrong_lookup_option_is_named(
    table: dict[str, Any], feature: dict[str, Any], fragments: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        job_of(table, feature)
    message = str(caught.value)
    assert "\n" not in message
    assert all(fragment in message for fragment in fragments), message


def test_what_serving_cannot_run_is_not_exported() -> None:
    with pytest.raises(ConfigError, match=r"output\.export: .*custom combiner of table 't'"):
        job_of({"combiner": COMBINER}, output={"export": "somewhere"})


def test_params_that_no_manifest_can_hold_are_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"model.*params must be JSON values, got \{'since'"):
        job_of(model={"build": "package.module:function", "params": {"since": date(2024, 1, 1)}})


# --- ranks


def test_ranks_are_workers_unless_set() -> None:
    assert (job_of().num_ranks, job_of().worker_batch_size) == (2, 16)
    four = job_of(train={"batch_size": 32, "ranks": 4})
    assert (four.num_ranks, four.cluster.workers, four.worker_batch_size) == (4, 2, 8)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"batch_size": 31}, r"train\.batch_size 31 is not a multiple of cluster\.workers 2"),
        (
            {"batch_size": 32, "ranks": 5},
            r"train\.batch_size 32 is not a multiple of train\.ranks 5",
        ),
        ({"batch_size": 32, "ranks": 1}, r"cluster\.workers 2 is more than train\.ranks 1"),
        ({"batch_size": 32, "ranks": 0}, r"train\.ranks must be at least 1, got 0"),
        ({"batch_size": 32, "ranks": "two"}, r"train\.ranks: wanted a whole number"),
    ],
)
def test_a_batch_is_cut_into_equal_parts_for_everybody(train: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job_of(train=train)


# --- recovery, and where snapshots are


def recovering(snapshot: str | None = "runs/s", **recovery: Any) -> JobConfig:
    output = {} if snapshot is None else {"snapshot": snapshot}
    return job_of(output=output, recovery=recovery)


def test_nothing_is_kept_unless_asked() -> None:
    recovery = job_of().recovery
    assert (recovery.durability, recovery.durable, recovery.boundary_every) == ("none", False, 0)
    assert recovery.log_folder(job_of().output) is None
    assert not recovering(None, retries=5, step_deadline_s=300).recovery.durable  # the defaults


def test_a_durability_says_where_everything_goes() -> None:
    snapshot = recovering(durability="snapshot", snapshot_every=10, keep=2)
    assert (snapshot.recovery.boundary_every, snapshot.recovery.keep) == (10, 2)
    assert snapshot.recovery.log_folder(snapshot.output) is None
    log = recovering(durability="log", step_deadline_s=5)
    assert (log.recovery.boundary_every, log.recovery.step_deadline_s) == (1000, 5.0)
    assert log.recovery.log_folder(log.output) == Path("runs/s/log")
    apart = recovering(durability="log", log="logs").with_absolute_paths()
    assert apart.recovery.log_folder(apart.output) == Path.cwd() / "logs"
    assert apart.output.snapshot == Path.cwd() / "runs" / "s"
    remote = recovering("s3://bucket/a?endpoint_override=x:1", durability="log", log="/logs")
    assert remote.recovery.log_folder(remote.output) == Path("/logs")
    assert remote.with_absolute_paths().output.snapshot == "s3://bucket/a?endpoint_override=x:1"


@pytest.mark.parametrize(
    ("snapshot", "recovery", "message"),
    [
        (
            None,
            {"durability": "snapshot"},
            r"recovery\.durability: snapshot needs output\.snapshot",
        ),
        (None, {"durability": "log", "log": "x"}, r"recovery\.durability: log needs output\.snap"),
        ("s3://b/x", {"durability": "log"}, r"recovery\.log: .*output\.snapshot is 's3://b/x'"),
        ("x", {"durability": "log", "log": "s3://b/x"}, r"recovery: log must be a folder"),
        ("x", {"durability": "snapshot", "log": "y"}, r"recovery: log is for durability log"),
        ("x", {"durability": "logs"}, r"recovery\.durability: 'logs' .*did you mean 'log'"),
        ("x", {"snapshot_every": 10}, r"recovery: snapshot_every would have no effect"),
        ("x", {"keep": 1}, r"recovery: keep would have no effect"),
        ("x", {"log": "y"}, r"recovery: log would have no effect"),
        ("x", {"retries": 1}, r"recovery: retries would have no effect"),
        ("x", {"step_deadline_s": 1}, r"recovery: step_deadline_s would have no effect"),
        ("x", {"orphan_timeout_s": 1}, r"recovery: orphan_timeout_s would have no effect"),
        (
            "x",
            {"durability": "log", "snapshot_every": 0},
            "snapshot_every must be at least 1, got 0",
        ),
        ("x", {"durability": "log", "keep": 0}, "keep must be at least 1, got 0"),
        ("x", {"retries": 0}, "retries must be at least 1, got 0"),
        ("x", {"step_deadline_s": 0}, "step_deadline_s must be above 0, got 0"),
        ("x", {"orphan_timeout_s": "nan"}, "orphan_timeout_s must be above 0, got nan"),
        (
            "x",
            {"snapshots_every": 5},
            r"recovery\.snapshots_every: .*did you mean 'snapshot_every'",
        ),
    ],
    ids=str,
)
def test_a_recovery_that_would_not_work_is_refused(
    snapshot: str | None, recovery: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recovering(snapshot, **recovery)


@pytest.mark.parametrize("place", ["s3://bucket", "s3://bucket/a/b", "gs://b/x?anonymous=true"])
def test_places_in_object_stores_stay_as_they_are(place: str) -> None:
    train = {"batch_size": 32, "start_from": place}
    job = job_of(output={"snapshot": place}, train=train).with_absolute_paths()
    assert (job.output.snapshot, job.train.start_from) == (place, place)


@pytest.mark.parametrize("place", ["runs/x", "/abs/x", "a b/ü", "s3", "x:y"])
def test_all_other_places_are_folders(place: str) -> None:
    job = job_of(output={"snapshot": place}, train={"batch_size": 32, "start_from": place})
    assert (job.output.snapshot, job.train.start_from) == (Path(place), Path(place))
    absolute = job.with_absolute_paths()
    assert (absolute.output.snapshot, absolute.train.start_from) == (Path(place).absolute(),) * 2


@pytest.mark.parametrize(
    "place", ["hdfs://x/y", "http://x", "s3:/bucket/x", "s3://", "s3:///x", Path("s3://bucket/x")]
)
def test_a_place_that_nobody_can_write_to_is_refused(place: Any) -> None:
    with pytest.raises(ConfigError, match=r"snapshot: wanted a folder, s3://bucket/folder or gs:"):
        OutputConfig(snapshot=place)
    with pytest.raises(ConfigError, match=r"start_from: wanted a folder, s3://bucket/folder or gs"):
        TrainConfig(start_from=place)


def test_a_recovery_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="snapshot_every must be at least 1"):
        RecoveryConfig(durability="log", snapshot_every=0)
