"""Lookup options of a job: from YAML to the spec, or one line that names the key."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from ps.config import CustomCombiner, QuantizationConfig
from ps.errors import ConfigError
from ps.loading import build
from workers.config import JobConfig

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
