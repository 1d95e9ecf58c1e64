"""What a job's batch makes of `output_shape`, and what training refuses before it starts."""

from __future__ import annotations

from typing import Any

import pytest

from ps.config import CustomCombiner, FeatureConfig, QuantizationConfig, TableConfig
from ps.errors import ConfigError
from ps.optimizers import SGD
from ps.spec import EmbeddingSpec, resolve
from workers.shapes import (
    activation_shape,
    check_trainable,
    device_lookups,
    num_positions,
    uses_weights,
)

CUSTOM = CustomCombiner("package.module:function", 3)


def spec_of(table: dict[str, Any] | None = None, **feature: Any) -> EmbeddingSpec:
    """Feature 'f' of table 't'."""
    arguments = {"vocabulary_size": 5, "dim": 2, "name": "t"} | (table or {})
    return resolve({"f": FeatureConfig(TableConfig(**arguments), **feature)})


@pytest.mark.parametrize(
    ("options", "positions", "shape"),
    [
        ({}, 0, (4, 2)),
        ({"max_sequence_length": 3}, 3, (4, 3, 2)),
        ({"output_shape": 4}, 0, (4, 2)),
        ({"output_shape": [2, 2]}, 0, (2, 2, 2)),
        ({"output_shape": [2, 2], "max_sequence_length": 3}, 0, (2, 2, 2)),
        ({"output_shape": [4, 3]}, 3, (4, 3, 2)),
        ({"output_shape": [2, 4]}, 2, (2, 4, 2)),
        ({"output_shape": 12, "max_sequence_length": 9}, 3, (12, 2)),
    ],
)
def test_output_shape_wins_over_a_sequence_length(
    options: dict[str, Any], positions: int, shape: tuple[int, ...]
) -> None:
    spec = spec_of(**options)
    check_trainable(spec, 4)
    assert num_positions(spec.features[0], 4) == positions
    assert activation_shape(spec, spec.features[0], 4) == shape


def test_an_empty_output_shape_is_one_vector() -> None:
    spec = spec_of(output_shape=[])
    assert activation_shape(spec, spec.features[0], 1) == (2,)
    with pytest.raises(ConfigError, match="1 vectors, wanted a multiple of the 4 examples"):
        check_trainable(spec, 4)


@pytest.mark.parametrize(
    ("table", "feature", "fragment"),
    [
        ({}, {"output_shape": [3]}, "`output_shape` .* multiple of the 4 examples"),
        ({}, {"output_shape": [4, 0]}, "`output_shape` .* multiple of the 4 examples"),
        ({}, {"output_shape": [6]}, "`output_shape` .* multiple of the 4 examples"),
        ({}, {"output_shape": [None, 4]}, "`output_shape` .* is not fully defined"),
        ({"combiner": "sqrtn"}, {"tensor_core_shape": [None, 3]}, "sum or mean.*'sqrtn'"),
        ({"combiner": CUSTOM}, {"tensor_core_shape": [None, 3]}, "sum or mean"),
        ({}, {"tensor_core_shape": [4, 3], "output_shape": [4, 2]}, "2 vectors per example"),
        (
            {"optimizer": SGD(use_gradient_accumulation=False)},
            {"tensor_core_shape": [4, 3]},
            "needs `use_gradient_accumulation`",
        ),
        (
            {"combiner": CUSTOM, "optimizer": SGD(use_gradient_accumulation=False)},
            {},
            "needs `use_gradient_accumulation`",
        ),
        ({"quantization_config": QuantizationConfig(2, 1.0, 1.0)}, {}, "lower < upper"),
        ({"combiner": CustomCombiner("m:f", 0)}, {}, "`max_valency`"),
        ({"combiner": CustomCombiner("m:f", 2.0)}, {}, "`max_valency`"),  # type: ignore[arg-type]
        ({"combiner": CustomCombiner("m:f", 2, 1, lambda shape: None)}, {}, "`num_weights`"),
    ],
)
def test_what_a_step_cannot_do_is_refused_by_name(
    table: dict[str, Any], feature: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(ConfigError, match=fragment) as caught:
        check_trainable(spec_of(table, **feature), 4)
    assert "feature 'f'" in str(caught.value) or "table 't'" in str(caught.value)


def test_the_compiled_step_combines_what_asks_for_it() -> None:
    assert device_lookups(spec_of(), 4) == ()
    (core,) = device_lookups(spec_of(tensor_core_shape=[-1, 3]), 4)
    assert (core.feature, core.table, core.width, core.dim) == ("f", "t", 3, 2)
    assert (core.combiner, core.shape) == ("mean", (2,))
    (custom,) = device_lookups(spec_of({"combiner": CUSTOM}, output_shape=[2, 2]), 4)
    assert (custom.width, custom.combiner, custom.shape) == (3, CUSTOM, (2, 2))
    assert device_lookups(spec_of({"combiner": CUSTOM}, max_sequence_length=2), 4) == ()


def test_weights_matter_where_ids_are_combined_and_in_sequences() -> None:
    def used(table: dict[str, Any] | None = None, **feature: Any) -> bool:
        spec = spec_of(table, **feature)
        return uses_weights(spec.tables[0], spec.features[0], 4)

    assert used()
    assert used(max_sequence_length=3)
    assert used(output_shape=[2, 2])
    assert not used(output_shape=[4, 2])
    assert not used(tensor_core_shape=[None, 2])
    assert not used({"combiner": CUSTOM})
    assert not used({"combiner": CUSTOM}, max_sequence_length=2)
