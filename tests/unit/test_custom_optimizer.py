"""`CustomOptimizer` runs the user's function on rows, one contribution of a row after the other."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.config import CustomOptimizer, FeatureConfig, TableConfig
from ps.errors import ConfigError
from ps.initializers import Constant, TruncatedNormal
from ps.optimizers import SGD, Adagrad, LinearDecay
from ps.ragged import F32
from ps.rowstore import RowStore
from ps.shard import ShardSpec
from ps.spec import resolve
from ps.warm import warm_up
from tests.support.goldens import custom_adagrad, custom_adam, custom_sgd, times_hyperparameter
from tests.support.shards import contents, push_of, same_contents, shard_of
from tests.support.strategies import rows


def adagrad_of(**changes: Any) -> CustomOptimizer:
    return CustomOptimizer(
        **{
            "custom_computation": custom_adagrad,
            "learning_rate": 0.1,
            "slot_names": ["accumulators"],
            "slot_initializers": [0.1],
        }
        | changes
    )


# --- what it computes


@settings(max_examples=60)
@given(data=st.data())
def test_repeated_rows_are_computed_one_after_the_other(data: Any) -> None:
    """As the compiled Adagrad does, to the last bit, whatever rows a batch repeats."""
    start = data.draw(rows(5, 3))
    places = data.draw(st.lists(st.integers(0, 4), max_size=12))
    index = np.array(places, dtype=np.int64)
    grads = data.draw(rows(index.size, 3))
    custom = RowStore(start.copy(), adagrad_of())
    compiled = RowStore(start.copy(), Adagrad(use_gradient_accumulation=False))
    for _ in range(2):
        custom.apply(index, grads, 0.1)
        compiled.apply(index, grads, 0.1)
    # Not by bytes: the kernel's w - 0·w makes 0 of -0.
    np.testing.assert_array_equal(custom.rows, compiled.rows)
    np.testing.assert_array_equal(custom.slots["accumulators"], compiled.slots["accumulators"])


def test_all_rows_of_a_round_come_in_one_call() -> None:
    seen: list[list[float]] = []

    def spy(gradient: F32, table: F32, slots: Any, rate: Any, hyper: Any) -> F32:
        seen.append(gradient[:, 0].tolist())
        return table

    store = RowStore(np.zeros((9, 2), dtype=np.float32), CustomOptimizer(spy))
    grads = np.repeat(np.arange(6, dtype=np.float32)[:, None], 2, axis=1)
    store.apply(np.array([3, 7, 3, 1, 7, 3]), grads, 0.1)
    assert seen == [[0, 1, 3], [2, 4], [5]]
    seen.clear()
    store.apply(np.zeros(0, dtype=np.int64), grads[:0], 0.1)
    assert seen == []


def test_everything_it_gets_is_float32_and_a_copy() -> None:
    def check(gradient: F32, table: F32, slots: Any, rate: Any, hyper: Any) -> Any:
        arrays = (gradient, table, *slots)
        assert {a.dtype for a in (*arrays, rate, *hyper)} == {np.dtype(np.float32)}
        assert {a.shape for a in arrays} == {(2, 3)}
        assert isinstance(slots, list)
        assert isinstance(hyper, list)
        for array in arrays:
            array[:] = 7.0
        return np.ones_like(table), np.ones_like(table)

    store = RowStore(np.zeros((4, 3), dtype=np.float32), adagrad_of(custom_computation=check))
    grads = np.full((2, 3), 5.0, dtype=np.float32)
    store.apply(np.array([1, 3]), grads, 0.1, (0.5, 2))
    assert (grads == 5).all()
    np.testing.assert_array_equal(store.rows[:, 0], [0, 1, 0, 1])
    np.testing.assert_array_equal(store.slots["accumulators"][:, 0], np.float32([0.1, 1, 0.1, 1]))


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: (t,), lambda t: [t]], ids=["a", "t", "l"])
def test_without_slots_rows_may_come_alone_or_in_a_tuple(wrap: Callable[[F32], Any]) -> None:
    optimizer = CustomOptimizer(lambda g, t, s, rate, h: wrap(t - rate * g))
    store = RowStore(np.ones((2, 2), dtype=np.float32), optimizer)
    store.apply(np.array([1]), np.ones((1, 2), dtype=np.float32), 0.5)
    np.testing.assert_array_equal(store.rows, [[1, 1], [0.5, 0.5]])


def test_hyperparameters_are_evaluated_each_step_and_once_for_all_tables() -> None:
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return float(step + 1)

    by_hyper = CustomOptimizer(times_hyperparameter, hyperparameters=[rate, 0.5])
    shard = shard_of(by_hyper, num_workers=1, dense_optimizer=SGD(rate))
    start = contents(shard)[0][0]
    for step in range(3):
        shard.push(push_of(0, step))
    assert asked == [0, 1, 2]
    np.testing.assert_allclose(contents(shard)[0][0], start - 6.0, rtol=1e-6)


# --- what goes wrong


def wrong_results() -> dict[str, tuple[Callable[[F32], Any], str]]:
    return {
        "no slot": (lambda t: t, "returned 1 arrays, wanted embedding_table, accumulators"),
        "too many": (lambda t: (t, t, t), "returned 3 arrays"),
        "nothing": (lambda t: None, "returned 1 arrays"),
        "shape": (lambda t: (t[:, :1], t), r"embedding_table as float32 \(1, 1\), wanted"),
        "slot shape": (lambda t: (t, t[0]), r"accumulators as float32 \(2,\), wanted"),
        "float64": (lambda t: (t * np.float64(2), t), r"embedding_table as float64 \(1, 2\)"),
        "number": (lambda t: (t, 1.0), r"accumulators as 1\.0, wanted a NumPy float32 \(1, 2\)"),
        "list": (lambda t: (t, t.tolist()), r"accumulators as \[\["),
        "raises": (lambda t: 1 / 0, "raised ZeroDivisionError: division by zero"),
    }


@pytest.mark.parametrize(("result", "message"), wrong_results().values(), ids=wrong_results())
def test_a_wrong_result_stops_the_step_before_anything_changes(
    result: Callable[[F32], Any], message: str
) -> None:
    def good_then_wrong(gradient: F32, table: F32, slots: Any, rate: Any, hyper: Any) -> Any:
        if gradient[0, 0] == 1:
            return table - gradient, slots[0]
        return result(table)

    wrong = adagrad_of(custom_computation=good_then_wrong)
    shard = shard_of(SGD(1.0), wrong, adagrad_of(), num_workers=1)
    before = contents(shard)
    two = np.array([[1, 1], [2, 2]], dtype=np.float32)
    index = np.zeros(2, dtype=np.int64)
    push = replace(push_of(0, 0), local_rows=(index,) * 3, grads=(two,) * 3)
    with pytest.raises(ConfigError, match=rf"shard 0: table 'table_1', step 0: .*{message}"):
        shard.push(push)
    assert shard.version == 0
    assert same_contents(contents(shard), before)


def unusable() -> dict[str, tuple[CustomOptimizer, str]]:
    class Function:
        def __call__(self, *args: Any) -> Any: ...

    Function.__module__ = "tensorflow.python.eager.polymorphic_function"
    text: Any = "fast"
    return {
        "tf.function": (CustomOptimizer(Function()), "a function of NumPy arrays"),
        "no function": (CustomOptimizer(None), "`custom_computation` must be callable"),  # type: ignore[arg-type]
        "1-d slot": (adagrad_of(slot_dims=[1]), "`slot_dims` of slot 'accumulators' is 1"),
        "random slot": (
            adagrad_of(slot_initializers=[TruncatedNormal()]),
            "`slot_initializers` of slot 'accumulators' must be a number or a constant",
        ),
        "two of a name": (
            CustomOptimizer(custom_adam, 0.1, ["m", "m"], [0, 0]),
            "`slot_names` must be unique names",
        ),
        "no name": (adagrad_of(slot_names=[""]), "`slot_names` must be unique names"),
        "rate": (CustomOptimizer(custom_sgd, text), "must be numbers or callables, got 'fast'"),
        "hyperparameter": (
            CustomOptimizer(custom_sgd, hyperparameters=[text]),
            "must be numbers or callables, got 'fast'",
        ),
    }


@pytest.mark.parametrize(("optimizer", "message"), unusable().values(), ids=unusable())
def test_what_shards_cannot_run_is_refused_before_they_start(
    optimizer: CustomOptimizer, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"table 'ads': CustomOptimizer: .*{message}"):
        resolve(FeatureConfig(TableConfig(5, 2, name="ads", optimizer=optimizer)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot_initializers": []}, r"`slot_names` \(1\) must match .* `slot_initializers` \(0\)"),
        ({"slot_names": None}, r"`slot_names` \(0\) must match .* `slot_initializers` \(1\)"),
        ({"slot_dims": [2, 2]}, r"`slot_dims` \(2\) must match .* `slot_names` \(1\)"),
        ({"slot_dims": [3]}, "`slot_dims` of slot 'accumulators' must be 1 or 2, got 3"),
        ({"slot_dims": [None]}, "must be 1 or 2, got None"),
    ],
)
def test_slots_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adagrad_of(**changes)


def test_dense_values_are_no_rows_of_a_table() -> None:
    with pytest.raises(ConfigError, match="dense_optimizer: a CustomOptimizer updates rows"):
        shard_of(dense_optimizer=CustomOptimizer(custom_sgd))


# --- what it is


def test_slots_start_at_numbers_or_constants() -> None:
    optimizer = CustomOptimizer(custom_adam, 0.1, ("m", "v"), (Constant(0.5), 2))
    assert optimizer.slot_initial_values == (0.5, 2.0)
    spec = resolve(FeatureConfig(TableConfig(5, 2, optimizer=optimizer)))
    assert spec.tables[0].optimizer == replace(optimizer, slot_initializers=(0.5, 2.0))
    store = RowStore(np.zeros((1, 2), dtype=np.float32), optimizer)
    assert {name: slot.tolist() for name, slot in store.slots.items()} == {
        "m": [[0.5, 0.5]],
        "v": [[2.0, 2.0]],
    }


def test_it_is_equal_by_its_arguments_and_travels() -> None:
    assert adagrad_of() == adagrad_of(slot_names=("accumulators",))
    assert hash(adagrad_of()) == hash(adagrad_of())
    assert adagrad_of() != adagrad_of(learning_rate=0.2)
    assert adagrad_of() != adagrad_of(custom_computation=custom_sgd)
    assert adagrad_of() != Adagrad(0.1)
    for twin in (pickle.loads(pickle.dumps(adagrad_of())), copy.deepcopy(adagrad_of())):
        assert twin == adagrad_of()


def test_a_manifest_can_name_it() -> None:
    schedule = LinearDecay(0.5, 0.1, 4)
    optimizer = adagrad_of(learning_rate=schedule, hyperparameters=[np.float32(0.5), custom_sgd])
    described = optimizer.describe()
    assert json.loads(json.dumps(described)) == described
    assert described == {
        "name": "CustomOptimizer",
        "custom_computation": "tests.support.goldens.custom_adagrad",
        "learning_rate": {"name": "LinearDecay", "initial": 0.5, "final": 0.1, "steps": 4},
        "slot_names": ["accumulators"],
        "slot_initializers": [0.1],
        "hyperparameters": [0.5, "tests.support.goldens.custom_sgd"],
        "slot_dims": [],
    }


def test_warming_up_does_not_call_it() -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("called")

    spec = resolve([FeatureConfig(TableConfig(5, 2, optimizer=CustomOptimizer(never)))])
    warm_up(
        ShardSpec(shard_id=0, num_shards=1, num_workers=1, embedding=spec, dense_optimizer=SGD())
    )
