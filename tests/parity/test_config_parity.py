"""TensorFlow's own config objects mean to `resolve` what ours mean."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.python.ops import init_ops_v2

import ps.config as ours
from ps.errors import ConfigError
from ps.initializers import (
    Constant,
    Initializer,
    RandomNormal,
    RandomUniform,
    RowIdInitializer,
    TruncatedNormal,
)
from ps.optimizers import OPTIMIZERS, SGD
from ps.spec import EmbeddingSpec, resolve
from tests.support.parity_size import examples

pytestmark = pytest.mark.parity

stock = tf.tpu.experimental.embedding

COMMON: list[dict[str, Any]] = [
    {},
    {"learning_rate": 0.5},
    {"clipvalue": (-1.0, 2.0)},
    {"clipvalue": (None, 2.0)},
    {"clipvalue": 1.5},
    {"clip_weight_min": -1.0, "clip_weight_max": 0.5},
    {"weight_decay_factor": 0.1, "multiply_weight_decay_factor_by_learning_rate": True},
    {"use_gradient_accumulation": False},
    {"low_dimensional_packing_status": True},
]
SPECIAL: dict[str, dict[str, Any]] = {
    "SGD": {},
    "Adagrad": {"initial_accumulator_value": 0.3},
    "AdagradMomentum": {
        "momentum": 0.9,
        "use_nesterov": True,
        "exponent": 3,
        "beta2": 0.9,
        "epsilon": 0.1,
    },
    "Adam": {
        "beta_1": 0.8,
        "beta_2": 0.9,
        "epsilon": 0.1,
        "lazy_adam": False,
        "sum_inside_sqrt": False,
    },
    "FTRL": {
        "learning_rate_power": -0.6,
        "l1_regularization_strength": 0.1,
        "l2_regularization_strength": 0.2,
        "beta": 0.3,
        "initial_accumulator_value": 0.4,
        "multiply_linear_by_learning_rate": True,
        "allow_zero_accumulator": True,
    },
}


def spec_of(module: Any, optimizer: Any = None, **table: Any) -> EmbeddingSpec:
    arguments = {"vocabulary_size": 5, "dim": 4, "name": "t"} | table
    return resolve({"f": module.FeatureConfig(module.TableConfig(**arguments))}, optimizer)


def converted(initializer: Any) -> Initializer:
    return spec_of(stock, initializer=initializer).tables[0].initializer


@pytest.mark.parametrize(
    "name", [*OPTIMIZERS, "TableConfig", "FeatureConfig", "QuantizationConfig", "CustomCombiner"]
)
def test_arguments_have_tensorflows_names_order_and_defaults(name: str) -> None:
    def parameters(cls: Any) -> list[tuple[str, Any, Any]]:
        found = list(inspect.signature(cls.__init__).parameters.values())[1:]
        default = lambda p: "float32" if p.default == tf.float32 else p.default  # noqa: E731
        return [(p.name, p.kind, default(p)) for p in found if p.kind is not p.KEYWORD_ONLY]

    assert parameters(getattr(ours, name)) == parameters(getattr(stock, name))


def test_the_only_argument_of_our_own_is_keyword_only() -> None:
    found = inspect.signature(ours.FeatureConfig).parameters
    assert [p.name for p in found.values() if p.kind is p.KEYWORD_ONLY] == ["tensor_core_shape"]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("arguments", [*COMMON, None], ids=str)
def test_stock_optimizers_become_ours(name: str, arguments: dict[str, Any] | None) -> None:
    chosen = SPECIAL[name] if arguments is None else arguments
    theirs, own = getattr(stock, name)(**chosen), OPTIMIZERS[name](**chosen)
    assert spec_of(stock, theirs) == spec_of(ours, own)
    assert spec_of(stock, optimizer=theirs) == spec_of(ours, optimizer=own)
    assert spec_of(ours, theirs) == spec_of(ours, own)


def test_a_stock_learning_rate_callable_stays_the_same_object() -> None:
    rate = lambda: 0.1  # noqa: E731
    assert spec_of(stock, stock.Adagrad(rate)) == spec_of(ours, ours.Adagrad(rate))
    assert spec_of(stock, stock.Adagrad(rate)) != spec_of(stock, stock.Adagrad(lambda: 0.1))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_equality_is_that_of_tensorflow(name: str) -> None:
    rate = lambda: 0.1  # noqa: E731
    variants = [*COMMON, SPECIAL[name], {"learning_rate": rate}, {"learning_rate": lambda: 0.1}]
    variants += [{"clipvalue": (-1.5, 1.5)}, {"clipvalue": (None, None)}, {"learning_rate": rate}]
    theirs = [getattr(stock, name)(**v) for v in variants]
    own = [OPTIMIZERS[name](**v) for v in variants]
    for i in range(len(variants)):
        for j in range(len(variants)):
            assert (own[i] == own[j]) == (theirs[i] == theirs[j]), (variants[i], variants[j])


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, a) for name in OPTIMIZERS for a in ("learning_rate", *SPECIAL[name])],
)
@pytest.mark.parametrize("value", [0, -0.1, 1.0, 2])
def test_bad_optimizer_arguments_are_bad_in_both(name: str, argument: str, value: Any) -> None:
    raised = []
    for cls in (getattr(stock, name), OPTIMIZERS[name]):
        try:
            cls(**{argument: value})
            raised.append(None)
        except ValueError:
            raised.append(ValueError)
    assert raised[0] == raised[1]


@pytest.mark.parametrize("module", [init_ops_v2, tf.keras.initializers], ids=["tf", "keras"])
def test_stock_initializers_become_ours(module: Any) -> None:
    constant = tf.constant_initializer if module is init_ops_v2 else module.Constant
    zeros = tf.zeros_initializer if module is init_ops_v2 else module.Zeros
    ones = tf.ones_initializer if module is init_ops_v2 else module.Ones
    assert converted(module.TruncatedNormal(0.5, 0.2)) == TruncatedNormal(0.5, 0.2)
    assert converted(module.RandomNormal(0.5, 0.2)) == RandomNormal(0.5, 0.2)
    assert converted(module.RandomUniform(-0.5, 0.2)) == RandomUniform(-0.5, 0.2)
    assert converted(module.TruncatedNormal()) == TruncatedNormal(0.0, 0.05)
    assert converted(constant(3.0)) == Constant(3.0)
    assert converted(zeros()) == Constant(0.0)
    assert converted(ones()) == Constant(1.0)


def test_defaults_and_row_ids_become_ours() -> None:
    assert spec_of(stock) == spec_of(ours)
    assert spec_of(stock, dim=16).tables[0].initializer == TruncatedNormal(0.0, 0.25)
    assert converted(stock.RowIdInitializer(3)) == RowIdInitializer(3)
    assert spec_of(stock).tables[0].optimizer == SGD()


@pytest.mark.parametrize(
    "initializer", [tf.keras.initializers.HeNormal(), lambda shape, dtype: None], ids=["he", "fn"]
)
def test_an_initializer_without_a_counterpart_is_refused(initializer: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be computed row by row"):
        spec_of(stock, initializer=initializer)
    with pytest.raises(ConfigError, match="table 't'"):
        spec_of(ours, initializer=initializer)


@pytest.mark.parametrize(
    "optimizer",
    [
        "adam",
        tf.keras.optimizers.Adam(),
        tf.keras.optimizers.SGD(),
        tf.compat.v1.train.AdagradOptimizer(0.1),
    ],
    ids=lambda o: type(o).__name__,
)
@pytest.mark.parametrize("module", [stock, ours], ids=["stock", "ours"])
def test_an_optimizer_of_another_kind_is_refused(module: Any, optimizer: Any) -> None:
    with pytest.raises(ConfigError, match="is an unsupported optimizer class"):
        spec_of(module, optimizer)
    with pytest.raises(ConfigError, match="is an unsupported optimizer class"):
        spec_of(ours, optimizer=optimizer)


def test_shared_stock_tables_stay_shared() -> None:
    def tree(module: Any) -> Any:
        a, b = module.TableConfig(5, 4), module.TableConfig(5, 4, combiner="sum")
        f = module.FeatureConfig
        return {"x": f(a), "y": (f(b), f(a, max_sequence_length=3)), "z": [f(b, output_shape=[2])]}

    spec = resolve(tree(stock))
    assert spec == resolve(tree(ours))
    assert [f.table for f in spec.features] == ["table_0", "table_1", "table_0", "table_1"]


@pytest.mark.parametrize("shape", [None, 3, [4, 2], [None, 2], []], ids=str)
def test_stock_features_become_ours(shape: Any) -> None:
    def feature(module: Any) -> Any:
        return module.FeatureConfig(module.TableConfig(5, 4), 7, False, shape, "clicks")

    assert resolve(feature(stock)) == resolve(feature(ours))
    assert resolve({"f": feature(stock)}) == resolve({"f": feature(ours)})


@pytest.mark.parametrize(
    "names",
    [[None, "zz", None], ["a", None], ["table_2", None, "x"]],
    ids=str,
)
@pytest.mark.parametrize("keys", ["abc", (10, 9, 8), None], ids=["text", "int", "list"])
def test_tables_get_the_names_that_tensorflow_gives_them(
    names: list[str | None], keys: Any
) -> None:
    def tree(module: Any) -> tuple[Any, list[Any]]:
        tables = [module.TableConfig(5, 4, name=name) for name in names]
        leaves = [module.FeatureConfig(t) for t in tables]
        return (dict(zip(keys, leaves, strict=False)) if keys else leaves), tables

    theirs, tables = tree(stock)
    own = {f.name: f.table for f in resolve(tree(ours)[0]).features}
    stock.TPUEmbeddingForServing(theirs, None)  # names its tables
    paths = [str(k) for k, _ in zip(keys or range(len(names)), names, strict=False)]
    assert own == dict(zip(paths, [t.name for t in tables], strict=True))


def test_clashing_names_are_refused_as_by_tensorflow() -> None:
    def tree(module: Any) -> list[Any]:
        return [module.FeatureConfig(module.TableConfig(5, 4, name=n)) for n in ("table_1", None)]

    with pytest.raises(ValueError, match="Tables must have a unique name"):
        stock.TPUEmbeddingForServing(tree(stock), None)
    for module in (stock, ours):
        with pytest.raises(ConfigError, match="Tables must have a unique name"):
            resolve(tree(module))


def test_a_stock_table_option_without_a_counterpart_is_refused() -> None:
    for changes in ({"dtype": tf.int32}, {"layout": "any"}, {"quantization_config": "8 bits"}):
        with pytest.raises(ConfigError, match=f"`{next(iter(changes))}`"):
            spec_of(stock, **changes)


def test_stock_quantization_and_combiners_become_ours() -> None:
    def changes(module: Any) -> dict[str, Any]:
        return {
            "quantization_config": module.QuantizationConfig(5, -1.0, 1.0),
            "combiner": module.CustomCombiner(max, 7, 2, zeros, 0.5),
        }

    zeros = tf.zeros_initializer()
    assert spec_of(stock, **changes(stock)) == spec_of(ours, **changes(ours))


def test_row_ids_are_those_of_tensorflow() -> None:
    for offset in (0, -2, 7):
        want = stock.RowIdInitializer(offset)([4, 3], tf.float32).numpy()
        np.testing.assert_array_equal(RowIdInitializer(offset)((4, 3)), want)


# --- the config objects take and refuse what TensorFlow's do

SIZES = st.one_of(
    st.integers(-2, 5), st.sampled_from([True, False, None, "5", 2.0, np.int64(3), np.float32(2)])
)
TABLE_ARGUMENTS = st.fixed_dictionaries(
    {"vocabulary_size": SIZES, "dim": SIZES},
    optional={
        "initializer": st.sampled_from([None, np.zeros, 1.0, "zeros"]),
        "optimizer": st.sampled_from([None, "adam", 3]),
        "combiner": st.sampled_from(["mean", "sum", "sqrtn", "SUM", "max", "", None, 1, object()]),
        "name": st.sampled_from([None, "t", ""]),
        "dtype": st.sampled_from(
            [
                None,
                "float32",
                "int32",
                "float",
                "float64",
                "int64",
                "f4",
                "Float32",
                float,
                int,
                np.float32,
                np.int32,
                np.float16,
                np.dtype("float32"),
                tf.float32,
                tf.int32,
                tf.float64,
                tf.bool,
            ]
        ),
    },
)
SHAPES = st.one_of(
    st.none(),
    st.integers(-2, 4),
    st.lists(st.one_of(st.none(), st.integers(-1, 4)), max_size=3),
    st.sampled_from(
        [
            2.5,
            "a",
            ["a"],
            [2.5],
            [[2]],
            (3, None),
            np.int64(3),
            np.array([2, 3]),
            {"a": 1},
            object(),
            tf.TensorShape([2, None]),
            tf.TensorShape([]),
            tf.TensorShape(None),
        ]
    ),
)
FEATURE_ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "max_sequence_length": SIZES,
        "validate_weights_and_indices": st.sampled_from([True, False, 0, 1, None, "yes"]),
        "output_shape": SHAPES,
        "name": st.sampled_from([None, "f"]),
    },
)


def outcome(make: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return make(), None
    except (TypeError, ValueError) as e:
        return None, e


def assert_same_failure(ours: Exception | None, theirs: Exception | None) -> None:
    """The same kind of error, about the same argument."""
    assert (ours is None) == (theirs is None), (ours, theirs)
    if ours is None or theirs is None:
        return
    assert isinstance(ours, ValueError) == isinstance(theirs, ValueError), (ours, theirs)
    assert isinstance(ours, TypeError) == isinstance(theirs, TypeError), (ours, theirs)
    named = re.findall(r"rgument `(\w+)`", str(theirs))
    assert all(f"`{argument}`" in str(ours) for argument in named[:1]), (ours, theirs)


@settings(max_examples=examples(150), deadline=None)
@given(arguments=TABLE_ARGUMENTS)
def test_tables_take_what_tensorflow_takes(arguments: dict[str, Any]) -> None:
    own, failure = outcome(lambda: ours.TableConfig(**arguments))
    theirs, stock_failure = outcome(lambda: stock.TableConfig(**arguments))
    assert_same_failure(failure, stock_failure)
    if failure is None:
        assert repr(own) == repr(theirs)


@settings(max_examples=examples(150), deadline=None)
@given(arguments=FEATURE_ARGUMENTS)
def test_features_take_what_tensorflow_takes(arguments: dict[str, Any]) -> None:
    def made(module: Any) -> Callable[[], Any]:
        return lambda: module.FeatureConfig(module.TableConfig(5, 2, name="t"), **arguments)

    own, failure = outcome(made(ours))
    theirs, stock_failure = outcome(made(stock))
    assert_same_failure(failure, stock_failure)
    if failure is None:
        known = theirs.output_shape.rank is not None
        assert own.output_shape == (tuple(theirs.output_shape.as_list()) if known else None)
        assert own.max_sequence_length == theirs.max_sequence_length


def test_a_feature_of_no_table_is_refused_as_by_tensorflow() -> None:
    for bad in (None, "t", stock.TableConfig):
        for module in (ours, stock):
            with pytest.raises(ValueError, match="`table`"):
                module.FeatureConfig(bad)


@pytest.mark.parametrize("num_buckets", [-1, 0, 1, 2, 3, True, 2.5, "a", None], ids=str)
def test_quantization_takes_what_tensorflow_takes(num_buckets: Any) -> None:
    own, failure = outcome(lambda: ours.QuantizationConfig(num_buckets, -1.0, 1.0))
    theirs, stock_failure = outcome(lambda: stock.QuantizationConfig(num_buckets, -1.0, 1.0))
    assert_same_failure(failure, stock_failure)
    assert repr(own) == repr(theirs)


@pytest.mark.parametrize("num_weights", [-1, 0, 2])
@pytest.mark.parametrize("initializer", [None, np.zeros])
def test_custom_combiners_take_what_tensorflow_takes(num_weights: int, initializer: Any) -> None:
    arguments = {"num_weights": num_weights, "initializer": initializer}
    _, failure = outcome(lambda: ours.CustomCombiner(max, 3, **arguments))
    _, stock_failure = outcome(lambda: stock.CustomCombiner(max, 3, **arguments))
    assert_same_failure(failure, stock_failure)
    if failure is not None:
        assert "`initializer` must be set" in str(failure)
        assert "`initializer` must be set" in str(stock_failure)
