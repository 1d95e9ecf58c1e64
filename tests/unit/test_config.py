"""Tables, features and optimizers check what they are given; `resolve` names and completes them."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest

from ps.config import CustomCombiner, FeatureConfig, QuantizationConfig, TableConfig
from ps.errors import ConfigError
from ps.initializers import Constant, TruncatedNormal
from ps.optimizers import (
    FTRL,
    OPTIMIZERS,
    SGD,
    Adagrad,
    AdagradMomentum,
    Adam,
    ExponentialDecay,
    LinearDecay,
    Optimizer,
    evaluate_rate,
)
from ps.spec import resolve

ALL_OPTIMIZERS = list(OPTIMIZERS.values())
WITH_SLOTS = [Adagrad, AdagradMomentum, Adam, FTRL]


def table(**changes: Any) -> TableConfig:
    return TableConfig(**({"vocabulary_size": 5, "dim": 2} | changes))


def feature(**changes: Any) -> FeatureConfig:
    return FeatureConfig(**({"table": table()} | changes))


# --- tables and features


@pytest.mark.parametrize("argument", ["vocabulary_size", "dim"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "5", None, np.int64(5), False])
def test_sizes_must_be_python_ints_from_one(argument: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{argument}`"):
        table(**{argument: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("initializer", 1.0),
        ("initializer", "zeros"),
        ("combiner", "SUM"),
        ("combiner", "max"),
        ("combiner", None),
        ("combiner", object()),
        ("dtype", "float64"),
        ("dtype", np.float16),
        ("dtype", None),
        ("dtype", "f4"),
        ("dtype", int),
        ("layout", object()),
    ],
)
def test_a_wrong_table_argument_is_named(argument: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{argument}`"):
        table(**{argument: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"vocabulary_size": True, "dim": True},
        {"initializer": np.zeros},
        {"dtype": np.float32},
        {"dtype": np.dtype("float32")},
        {"dtype": "float32"},
        {"dtype": float},
        {"dtype": "int32"},
        {"dtype": np.int32},
        {"quantization_config": QuantizationConfig(2, -1.0, 1.0)},
        {"quantization_config": "checked by resolve"},
        {"combiner": CustomCombiner(lambda valency, vectors: vectors[0], 4)},
        *({"combiner": c} for c in ("mean", "sum", "sqrtn")),
    ],
)
def test_what_tensorflow_accepts_for_a_table_is_accepted(changes: dict[str, Any]) -> None:
    config = table(**changes)
    assert all(getattr(config, name) is value for name, value in changes.items())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("table", None),
        ("table", "ads"),
        ("max_sequence_length", -1),
        ("max_sequence_length", 2.0),
        ("max_sequence_length", None),
        ("validate_weights_and_indices", 1),
        ("validate_weights_and_indices", None),
        ("output_shape", [-1]),
        ("output_shape", -1),
        ("tensor_core_shape", []),
        ("tensor_core_shape", [4, 2, 1]),
        ("tensor_core_shape[1]", [4, 0]),
        ("tensor_core_shape[1]", [4, None]),
        ("tensor_core_shape[1]", [4, 2.0]),
    ],
)
def test_a_wrong_feature_argument_is_named(argument: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{re.escape(argument)}`"):
        feature(**{argument.removesuffix("[1]"): value})


def test_a_sequence_cannot_go_to_the_tensor_core() -> None:
    with pytest.raises(ConfigError, match="`tensor_core_shape` does not support sequences"):
        feature(tensor_core_shape=[None, 4], max_sequence_length=3)


def test_only_the_width_of_a_tensor_core_shape_counts() -> None:
    for batch in (None, -1, 7):
        spec = resolve(feature(tensor_core_shape=[batch, 4]))
        assert spec.features[0].tensor_core_width == 4
    assert resolve(feature()).features[0].tensor_core_width is None


@pytest.mark.parametrize("shape", [[2.5], ["a"], [None, 1.0], 2.5, "a", [[2]], {"a": 1}, object()])
def test_an_output_shape_of_no_integers_is_a_type_error(shape: Any) -> None:
    with pytest.raises(TypeError, match="`output_shape`"):
        feature(output_shape=shape)


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        (None, None),
        (3, (3,)),
        ([4, 2], (4, 2)),
        ((None, 2), (None, 2)),
        ([], ()),
        ([0], (0,)),
        (np.int64(3), (3,)),
        (np.array([4, 2]), (4, 2)),
    ],
)
def test_output_shapes_are_stored_as_tuples(shape: Any, stored: Any) -> None:
    assert feature(output_shape=shape).output_shape == stored


def test_equal_looking_tables_are_two_tables() -> None:
    a, b = table(), table()
    assert a != b
    assert len({a, b, a}) == 2
    assert len(resolve([FeatureConfig(a), FeatureConfig(b)]).tables) == 2


def test_repr_lists_what_tensorflow_lists_and_hides_the_default_initializer() -> None:
    text = "TableConfig(vocabulary_size=5, dim=4, initializer={}, optimizer=None, "
    text += "combiner='mean', name='t', quantization_config=None)"
    assert repr(table(dim=4, name="t")) == text.format(None)
    assert repr(table(dim=4, name="t", initializer=TruncatedNormal(0.0, 0.5))) == text.format(None)
    other = TruncatedNormal(0.0, 0.25)
    assert repr(table(dim=4, name="t", initializer=other)) == text.format(repr(other))


def test_a_table_without_a_name_logs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        table(name="ads")
        assert not caplog.records
        table()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "without a name" in caplog.text


@pytest.mark.parametrize("num_buckets", [1, 0, -3, True])
def test_quantization_needs_two_buckets(num_buckets: int) -> None:
    with pytest.raises(ConfigError, match="`num_buckets` must be at least 2"):
        QuantizationConfig(num_buckets, -1.0, 1.0)


def test_weights_of_a_custom_combiner_need_an_initializer() -> None:
    with pytest.raises(ConfigError, match="`initializer` must be set"):
        CustomCombiner(lambda *a: a[1], 4, num_weights=2)
    assert CustomCombiner(lambda *a: a[1], 4, 2, Constant(1.0)).num_weights == 2


# --- resolve


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "int32"), ("quantization_config", "8 bits")]
)
def test_what_only_the_config_objects_accept_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"table 'ads': `{option}` must be"):
        resolve(feature(table=table(name="ads", **{option: value})))


def test_unnamed_tables_are_numbered_by_first_use_counting_all() -> None:
    tables = [table(), table(name="zz"), table()]
    spec = resolve([FeatureConfig(t) for t in (*tables, tables[0])])
    assert [t.name for t in spec.tables] == ["table_0", "zz", "table_2"]
    assert [f.table for f in spec.features] == ["table_0", "zz", "table_2", "table_0"]
    assert [f.name for f in spec.features] == ["0", "1", "2", "3"]
    assert [f.name for f in spec.features_of("table_0")] == ["0", "3"]


def test_dict_keys_are_taken_in_sorted_order() -> None:
    spec = resolve({"b": feature(), "a": feature(table=table(name="first"))})
    assert [(f.name, f.table) for f in spec.features] == [("a", "first"), ("b", "table_1")]


def test_nested_features_are_named_by_their_path() -> None:
    shared = table(name="t")
    tree = {"user": {"id": FeatureConfig(shared), "tags": [FeatureConfig(shared)] * 2}, "ad": ()}
    spec = resolve(tree)
    assert [f.name for f in spec.features] == ["user/id", "user/tags/0", "user/tags/1"]
    assert [t.name for t in spec.tables] == ["t"]


def test_a_single_feature_needs_no_structure() -> None:
    assert [f.name for f in resolve(feature(name="clicks")).features] == ["clicks"]
    assert [f.name for f in resolve(feature()).features] == ["feature_0"]


def test_no_features_is_no_tables() -> None:
    spec = resolve({})
    assert (spec.tables, spec.features) == ((), ())


@pytest.mark.parametrize("names", [["a", "a"], ["table_1", None], [None, "table_0"]])
def test_two_tables_of_one_name_are_refused(names: list[str | None]) -> None:
    with pytest.raises(ConfigError, match="Tables must have a unique name"):
        resolve([feature(table=table(name=name)) for name in names])


@pytest.mark.parametrize(
    "tree",
    [{"a": {"b": feature()}, "a/b": feature()}, {1: feature(), "1": feature()}],
    ids=["path", "number"],
)
def test_two_features_of_one_name_are_refused(tree: Any) -> None:
    """One of them would silently get the other's ids."""
    with pytest.raises(ConfigError, match=r"a/b|1"):
        resolve(tree)


def test_int_keys_are_sorted_as_numbers_as_in_tensorflow() -> None:
    spec = resolve({10: feature(), 9: feature()})
    assert [f.name for f in spec.features] == ["9", "10"]


def test_a_tables_own_optimizer_overrides_the_default() -> None:
    own, default = Adagrad(0.5), Adam()
    spec = resolve([feature(table=table(optimizer=own)), feature()], default)
    assert [t.optimizer for t in spec.tables] == [own, default]
    assert resolve(feature()).tables[0].optimizer == SGD()


def test_defaults_are_filled_in_and_nothing_else_changes() -> None:
    config = table(combiner="sqrtn", initializer=Constant(3.0), name="t")
    spec = resolve({"f": FeatureConfig(config, 4, False, [None, 4])})
    assert spec.table("t").initializer == Constant(3.0)
    assert spec.table("t").combiner == "sqrtn"
    (f,) = spec.features
    assert (f.max_sequence_length, f.validate_weights_and_indices) == (4, False)
    assert f.output_shape == (None, 4)
    assert resolve(feature()).tables[0].initializer == TruncatedNormal(0.0, 1 / math.sqrt(2))
    assert config.optimizer is None, "resolve changes no config"
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize("bad", ["adam", "", 0.1, SGD, object()])
def test_an_optimizer_of_another_kind_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="is an unsupported optimizer class"):
        resolve(feature(table=table(optimizer=bad)))


def test_an_initializer_that_needs_the_whole_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"table 'ads'.*cannot be computed row by row"):
        resolve(feature(table=table(name="ads", initializer=lambda shape, dtype: None)))


def test_slot_variables_made_by_the_caller_are_refused() -> None:
    with pytest.raises(ConfigError, match="`slot_variable_creation_fn`"):
        resolve(feature(), Adagrad(slot_variable_creation_fn=lambda *a: {}))


@pytest.mark.parametrize("leaf", [None, 5, "ads", table()], ids=repr)
def test_a_leaf_that_is_no_feature_is_refused(leaf: Any) -> None:
    with pytest.raises(ConfigError, match="wanted a FeatureConfig"):
        resolve({"a": leaf})


# --- optimizers


@pytest.mark.parametrize(
    ("kind", "argument", "bad"),
    [
        (Adagrad, "initial_accumulator_value", [0, 0.0, -0.1]),
        (FTRL, "initial_accumulator_value", [0, 0.0, -0.1]),
        (AdagradMomentum, "epsilon", [0, -1e-9]),
        (AdagradMomentum, "exponent", [0, -2]),
        (Adam, "epsilon", [0, -1e-9]),
        (Adam, "beta_1", [-0.1, 1.0, 1.5]),
        (Adam, "beta_2", [-0.1, 1.0, 1.5]),
        *((kind, "slot_variable_creation_fn", [1, "f"]) for kind in WITH_SLOTS),
    ],
)
def test_a_wrong_optimizer_argument_is_named(kind: Any, argument: str, bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=f"`{argument}`"):
            kind(**{argument: value})


def test_ftrl_needs_a_positive_accumulator_even_where_zero_is_allowed() -> None:
    with pytest.raises(ConfigError, match="`initial_accumulator_value`"):
        FTRL(initial_accumulator_value=0.0, allow_zero_accumulator=True)


@pytest.mark.parametrize("kind", ALL_OPTIMIZERS)
def test_gradient_clipping_needs_accumulation(kind: type[Optimizer]) -> None:
    for clipvalue in (1.0, (None, None), (None, 1.0)):
        with pytest.raises(ConfigError, match="`use_gradient_accumulation`"):
            kind(clipvalue=clipvalue, use_gradient_accumulation=False)  # type: ignore[call-arg]


def test_non_lazy_adam_needs_accumulation() -> None:
    with pytest.raises(ConfigError, match="`use_gradient_accumulation`"):
        Adam(lazy_adam=False, use_gradient_accumulation=False)


def test_clipvalues_become_bounds() -> None:
    for clipvalue, bounds in [
        (0.5, (-0.5, 0.5)),
        (2, (-2, 2)),
        ((-1.0, None), (-1.0, None)),
        ((None, None), (None, None)),
        (None, (None, None)),
        (-1.0, (1.0, -1.0)),  # neither signs nor order are checked
    ]:
        sgd = SGD(clipvalue=clipvalue)
        assert (sgd.clip_gradient_min, sgd.clip_gradient_max) == bounds
    with pytest.raises(TypeError, match="clipvalue"):
        SGD(clipvalue=[-1.0, 1.0])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="clipvalue"):
        SGD(clipvalue=(1.0,))  # type: ignore[arg-type]


def test_decay_is_off_without_a_factor() -> None:
    by_rate = {"multiply_weight_decay_factor_by_learning_rate": True}
    assert SGD(**by_rate).decay(0.5) == SGD(weight_decay_factor=0, **by_rate).decay(0.5) == 0
    assert SGD(weight_decay_factor=0.2).decay(0.5) == 0.2
    assert SGD(weight_decay_factor=0.2, **by_rate).decay(0.5) == 0.1


def test_slots_have_tensorflows_names_and_first_values() -> None:
    for optimizer, slots in [
        (SGD(), {}),
        (Adagrad(initial_accumulator_value=0.3), {"accumulators": 0.3}),
        (AdagradMomentum(), {"accumulators": 0.0, "momenta": 0.0}),
        (Adam(), {"momenta": 0.0, "velocities": 0.0}),
        (FTRL(initial_accumulator_value=0.2), {"accumulators": 0.2, "linears": 0.0}),
    ]:
        pairs = zip(optimizer.slot_names, optimizer.slot_initial_values, strict=True)
        assert dict(pairs) == slots


def test_optimizers_are_equal_by_class_and_attributes_callables_by_identity() -> None:
    rate = lambda: 0.1  # noqa: E731
    for kind in ALL_OPTIMIZERS:
        assert kind(0.1) == kind(0.1)  # type: ignore[call-arg]
        assert hash(kind(rate)) == hash(kind(rate))  # type: ignore[call-arg]
        assert kind(rate) == kind(rate)  # type: ignore[call-arg]
        assert kind(rate) != kind(lambda: 0.1)  # type: ignore[call-arg]
        assert kind(0.1) != kind(0.2)  # type: ignore[call-arg]
        assert copy.deepcopy(kind(0.1)) == kind(0.1)  # type: ignore[call-arg]
    assert len({kind() for kind in ALL_OPTIMIZERS}) == len(ALL_OPTIMIZERS)


def test_equal_clip_bounds_are_equal_however_they_are_written() -> None:
    """TensorFlow keeps the bounds; its `SGD(clipvalue=1.0) == SGD(clipvalue=(-1.0, 1.0))`."""
    assert SGD(clipvalue=1.0) == SGD(clipvalue=(-1.0, 1.0))
    assert SGD(clipvalue=(None, None)) == SGD()


# --- learning rates


def test_rates_are_numbers_or_callables_with_or_without_a_step() -> None:
    class Schedule:
        def __call__(self, step: int) -> float:
            return 0.5 * step

    assert evaluate_rate(0.25, 7) == 0.25
    assert evaluate_rate(1, 7) == 1.0
    assert evaluate_rate(lambda: 0.5, 7) == 0.5
    assert evaluate_rate(lambda step: step / 2, 7) == 3.5
    assert evaluate_rate(lambda step=100: step / 2, 7) == 3.5
    assert evaluate_rate(Schedule(), 7) == 3.5
    assert evaluate_rate(iter([0.125]).__next__, 7) == 0.125
    assert isinstance(evaluate_rate(lambda: np.float32(0.5), 0), float)


def test_schedules_follow_their_formulas() -> None:
    linear, exponential = LinearDecay(1.0, 0.5, 10), ExponentialDecay(0.1, 0.5, 10)
    assert [linear(t) for t in (0, 5, 10, 1000)] == [1.0, 0.75, 0.5, 0.5]
    assert [exponential(t) for t in (0, 10, 20)] == pytest.approx([0.1, 0.05, 0.025])
    assert exponential(5) == pytest.approx(0.1 * 0.5**0.5)
    assert SGD(ExponentialDecay(0.1, 0.5, 10)) == SGD(exponential)
    for kind in (LinearDecay, ExponentialDecay):
        with pytest.raises(ConfigError, match="`steps`"):
            kind(1.0, 0.5, 0)
