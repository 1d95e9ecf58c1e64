"""Our optimizer classes take, refuse, keep and compare what TensorFlow's do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import ps.config as ours
from ps.errors import ConfigError
from ps.initializers import Constant
from ps.optimizers import OPTIMIZERS, Optimizer
from ps.rowstore import RowStore
from ps.spec import TableSpec, resolve
from tests.support.goldens import custom_adagrad
from tests.support.parity_size import examples

pytestmark = pytest.mark.parity

stock = tf.tpu.experimental.embedding


def rate() -> float:
    return 0.1


class Incomparable:
    """Has neither order nor arithmetic."""


NUMBERS: list[Any] = [0, 0.0, -0.1, 0.1, 0.5, 1, 1.0, 2, float("nan"), float("inf"), True,
                      np.float32(0.5), np.int64(2), None, "0.1", [0.1], Incomparable()]  # fmt: skip
FLAGS: list[Any] = [True, False, True, False, None, 0, 1, "no"]
CLIPVALUES: list[Any] = [None, None, 0.5, 2, -1.0, True, np.float32(0.5), np.int64(1), (-1.0, 2.0),
                         (None, 1.0), (-0.5, None), (None, None), (2, -2), (1.0,), (1, 2, 3), (),
                         [1.0, 2.0], [1.0], "1", ("a", "b"), {}, Incomparable()]  # fmt: skip
COMMON = {
    "use_gradient_accumulation": FLAGS,
    "clip_weight_min": NUMBERS,
    "clip_weight_max": NUMBERS,
    "weight_decay_factor": NUMBERS,
    "multiply_weight_decay_factor_by_learning_rate": FLAGS,
    "clipvalue": CLIPVALUES,
    "low_dimensional_packing_status": FLAGS,
}
SLOT_FN = {"slot_variable_creation_fn": [None, None, rate, 1, "f", Incomparable()]}
SPECIAL: dict[str, dict[str, list[Any]]] = {
    "SGD": {},
    "Adagrad": SLOT_FN | {"initial_accumulator_value": NUMBERS},
    "AdagradMomentum": SLOT_FN
    | dict.fromkeys(("momentum", "exponent", "beta2", "epsilon"), NUMBERS)
    | {"use_nesterov": FLAGS},
    "Adam": SLOT_FN
    | dict.fromkeys(("beta_1", "beta_2", "epsilon"), NUMBERS)
    | {"lazy_adam": FLAGS, "sum_inside_sqrt": FLAGS},
    "FTRL": SLOT_FN
    | {"learning_rate_power": NUMBERS, "beta": NUMBERS, "initial_accumulator_value": NUMBERS}
    | {f"l{i}_regularization_strength": NUMBERS for i in (1, 2)}
    | {"multiply_linear_by_learning_rate": FLAGS, "allow_zero_accumulator": FLAGS},
    "CustomOptimizer": {
        "slot_names": [None, [], ["a"], ("a",), ["a", "b"], ["a", "a"], "ab", 3],
        "slot_initializers": [None, [], [0.1], (0.1,), [0.1, 0], "ab", 3],
        "hyperparameters": [None, [], [0.5], (0.5,), [0.5, rate], 3],
        "slot_dims": [None, [], [2], (1,), [2, 1], [2, 2], [3], [0], [True], ["2"], 3],
    },
}


def arguments(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """A few arguments of a class, good and bad."""
    values = SPECIAL[name] | {"learning_rate": [*NUMBERS, rate, lambda: 0.1]}
    if name == "CustomOptimizer":
        values |= {"custom_computation": [rate, None, "f"]}
        required = ["custom_computation"]
    else:
        values, required = values | COMMON, []
    chosen = st.sets(st.sampled_from(sorted(values)), max_size=5)
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries(
            {n: st.sampled_from(values[n]) for n in sorted({*names, *required})}
        )
    )


def outcome(cls: Any, given_arguments: dict[str, Any]) -> Any:
    """The object, or the family of the exception."""
    try:
        return cls(**given_arguments)
    except (ValueError, TypeError) as e:
        return ValueError if isinstance(e, ValueError) else TypeError


def both(name: str, given_arguments: dict[str, Any]) -> tuple[Any, Any]:
    return (
        outcome(getattr(stock, name), given_arguments),
        outcome(getattr(ours, name), given_arguments),
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b) or (a != a and b != b)


def check_slots(theirs: Any, own: Optimizer) -> None:
    assert tuple(theirs._slot_names()) == own.slot_names
    for initializer, value in zip(
        theirs._slot_initializers(), own.slot_initial_values, strict=True
    ):
        want = np.full((2, 3), value, dtype=np.float32)
        np.testing.assert_array_equal(initializer([2, 3], tf.float32).numpy(), want)


@pytest.mark.parametrize("name", list(SPECIAL))
@settings(max_examples=examples(150))
@given(data=st.data())
def test_the_same_arguments_are_taken_and_refused(name: str, data: Any) -> None:
    given_arguments = data.draw(arguments(name))
    theirs, own = both(name, given_arguments)
    if isinstance(theirs, type):
        assert own is theirs
        return
    assert isinstance(own, Optimizer)
    for attribute, value in vars(theirs).items():
        if not attribute.startswith("_"):
            assert same(getattr(own, attribute), value), attribute
    if name != "CustomOptimizer" and "initial_accumulator_value" not in given_arguments:
        check_slots(theirs, own)
    if name == "CustomOptimizer":
        for attribute in ("custom_computation", "hyperparameters", "slot_dims"):
            assert same(getattr(own, attribute), getattr(theirs, attribute))
        assert own.slot_names == tuple(theirs._slot_names())
        assert same(own.slot_initializers, tuple(theirs._slot_initializers()))


@pytest.mark.parametrize("name", list(SPECIAL))
@settings(max_examples=examples(100))
@given(data=st.data())
def test_the_same_optimizers_are_equal(name: str, data: Any) -> None:
    first = data.draw(arguments(name))
    second = {**first, **data.draw(st.one_of(st.just({}), arguments(name)))}
    pairs = [both(name, first), both(name, second)]
    if any(isinstance(theirs, type) for theirs, _ in pairs):
        return
    (a, own_a), (b, own_b) = pairs
    assert (own_a == own_b) == (a == b)
    hashes = []
    for pair in ((a, b), (own_a, own_b)):
        try:
            hashes.append([hash(optimizer) for optimizer in pair])
        except TypeError:
            hashes.append([])
    assert len(hashes[0]) == len(hashes[1]), "what cannot be hashed there cannot be hashed here"
    if own_a == own_b and hashes[1]:
        assert hashes[1][0] == hashes[1][1]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Adagrad", {"initial_accumulator_value": 0.3}),
        ("FTRL", {"initial_accumulator_value": 7}),
        *((name, {}) for name in OPTIMIZERS),
    ],
)
def test_slots_start_with_tensorflows_values(name: str, changes: dict[str, Any]) -> None:
    theirs, own = both(name, changes)
    check_slots(theirs, own)


ORDER = {
    "SGD": "learning_rate use_gradient_accumulation clip_weight_min clip_weight_max "
    "weight_decay_factor multiply_weight_decay_factor_by_learning_rate clipvalue "
    "low_dimensional_packing_status",
    "CustomOptimizer": "custom_computation learning_rate slot_names slot_initializers "
    "hyperparameters slot_dims",
}


@pytest.mark.parametrize("name", list(ORDER))
def test_arguments_may_be_given_by_position(name: str) -> None:
    values = {
        "SGD": (0.5, True, -1.0, 1.0, 0.1, True, (-2.0, 3.0), True),
        "CustomOptimizer": (rate, 0.5, ["a"], [0.1], [0.2], [2]),
    }[name]
    named = dict(zip(ORDER[name].split(), values, strict=True))
    for module in (stock, ours):
        cls = getattr(module, name)
        assert cls(*values) == cls(**named)


# --- custom optimizers


def table_of(module: Any, optimizer: Any) -> TableSpec:
    table = module.TableConfig(5, 2, name="t", optimizer=optimizer)
    return resolve({"f": module.FeatureConfig(table)}).tables[0]


@pytest.mark.parametrize(
    "initializer",
    [
        tf.constant_initializer(0.25),
        tf.keras.initializers.Constant(0.25),
        tf.compat.v1.constant_initializer(0.25),
        Constant(0.25),
    ],
    ids=lambda i: f"{type(i).__module__}",
)
def test_a_stock_custom_optimizer_becomes_ours(initializer: Any) -> None:
    def optimizer(module: Any, start: Any) -> Any:
        return module.CustomOptimizer(custom_adagrad, rate, ["a"], [start], [0.5, rate], [2])

    want = table_of(ours, optimizer(ours, 0.25))
    assert want.optimizer.slot_initial_values == (0.25,)
    assert table_of(stock, optimizer(stock, initializer)) == want
    assert table_of(ours, optimizer(stock, initializer)) == want
    assert table_of(ours, optimizer(ours, initializer)) == want


def test_zeros_and_ones_are_constants_too() -> None:
    starts = [tf.zeros_initializer(), tf.keras.initializers.Ones()]
    own = table_of(ours, stock.CustomOptimizer(rate, 0.1, ["a", "b"], starts)).optimizer
    assert own.slot_initial_values == (0.0, 1.0)


def test_a_tensorflow_function_is_refused() -> None:
    function = tf.function(lambda gradient, table, slots, rate, hyper: table - rate * gradient)
    vector = tf.TensorSpec([2])
    concrete = function.get_concrete_function(vector, vector, [], tf.TensorSpec([]), [])
    for computation in (function, concrete):
        for module in (stock, ours):
            with pytest.raises(ConfigError, match=r"table 't': .*a function of NumPy arrays"):
                table_of(module, module.CustomOptimizer(computation))


def test_a_function_that_returns_tensors_is_refused() -> None:
    optimizer = ours.CustomOptimizer(lambda g, table, s, r, h: tf.subtract(table, g))
    store = RowStore(np.zeros((1, 2), dtype=np.float32), optimizer)
    with pytest.raises(ConfigError, match="wanted a NumPy float32"):
        store.apply(np.zeros(1, dtype=np.int64), np.ones((1, 2), dtype=np.float32), 0.1)


def test_the_documented_adagrad_gives_tensorflows_numbers() -> None:
    """The documentation's example, run by TensorFlow row by row, and its NumPy twin on a shard."""

    @tf.function
    def documented(gradient, embedding_table, slot_variables, learning_rate, hyperparameters):
        new_accumulator = slot_variables[0] + gradient * gradient
        step = learning_rate * gradient / tf.math.sqrt(new_accumulator)
        return embedding_table - step, new_accumulator

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 4)).astype(np.float32)
    index = rng.integers(0, 6, 40)
    grads = rng.normal(size=(40, 4)).astype(np.float32)
    optimizer = ours.CustomOptimizer(custom_adagrad, 0.1, ["accumulators"], [0.1])
    store = RowStore(rows.copy(), optimizer)
    store.apply(index, grads, 0.1)

    slot = np.full_like(rows, 0.1)
    for row, grad in zip(index, grads, strict=True):
        tensors = documented(grad, rows[row], [slot[row]], tf.constant(0.1), [])
        rows[row], slot[row] = (t.numpy() for t in tensors)
    np.testing.assert_allclose(store.rows, rows, rtol=1e-6)
    np.testing.assert_allclose(store.slots["accumulators"], slot, rtol=1e-6)
