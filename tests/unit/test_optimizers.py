"""Update rules row by row against their twins; `test_optimizer_goldens` has the numbers."""

from __future__ import annotations

import json
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import ConfigError
from ps.optimizers import (
    FTRL,
    OPTIMIZERS,
    SGD,
    Adagrad,
    AdagradMomentum,
    Adam,
    ExponentialDecay,
    Optimizer,
)
from ps.ragged import F32
from ps.rowstore import RowStore
from tests.support import reference as twin
from tests.support.goldens import GOLDENS
from tests.support.reference import same_bits
from tests.support.strategies import DIMS, NUMBERS, frozen, rows


@numba.njit
def _compiled_power(x: np.float32, p: np.float32) -> np.float32:
    return x**p


def same_power(x: F32, p: np.float32) -> F32:
    """The kernels' own `powf`, so that everything around it can be compared bit for bit."""
    return np.array([_compiled_power(v, p) for v in x.ravel()], dtype=np.float32).reshape(x.shape)


def f32(*values: Any) -> F32:
    return np.array(values, dtype=np.float32)


def store_of(optimizer: Optimizer, *row: float) -> RowStore:
    return RowStore(f32(row), optimizer)


def step(store: RowStore, *grad: float, rate: float = 0.1) -> None:
    store.apply(np.zeros(1, dtype=np.int64), f32(grad), rate)


def close(array: F32, want: list[float] | float) -> None:
    np.testing.assert_allclose(np.atleast_1d(array.squeeze()), want, rtol=2e-6)


def test_decay_comes_before_the_step_of_ftrl() -> None:
    plain, decayed = store_of(FTRL(), 0.9), store_of(FTRL(weight_decay_factor=0.1), 1.0)
    step(plain, 0.5)
    step(decayed, 0.5)
    close(decayed.rows, float(plain.rows[0, 0]))
    close(decayed.slots["linears"], float(plain.slots["linears"][0, 0]))


def test_slots_are_neither_decayed_nor_clipped() -> None:
    store = store_of(Adagrad(weight_decay_factor=0.5, clip_weight_min=-0.1, clip_weight_max=0.1), 1)
    step(store, 2.0)
    close(store.rows, 0.1)
    close(store.slots["accumulators"], 4.1)


def test_non_lazy_adam_moves_untouched_rows() -> None:
    store = RowStore(f32([1], [1]), Adam(lazy_adam=False))
    store.slots["momenta"][:], store.slots["velocities"][:] = 0.02, 0.0003
    for _ in range(2):
        store.apply(np.zeros(0, dtype=np.int64), np.zeros((0, 1), dtype=np.float32), 0.1)
    close(store.rows, [0.8024006] * 2)
    close(store.slots["momenta"], [0.0162] * 2)
    close(store.slots["velocities"], [0.00029940] * 2)


def test_non_lazy_adam_updates_every_row_exactly_once() -> None:
    """More untouched rows than are done at a time."""
    size, touched = 10_001, np.array([4095, 0, 4096, 10_000])
    grads = np.arange(1, 5, dtype=np.float32)[:, None]
    store = RowStore(np.ones((size, 1), dtype=np.float32), Adam(lazy_adam=False))
    store.slots["momenta"][:], store.slots["velocities"][:] = 0.02, 0.0003
    all_grads = np.zeros((size, 1), dtype=np.float32)
    all_grads[touched] = grads
    lazy = RowStore(store.rows.copy(), Adam())
    lazy.slots = {name: slot.copy() for name, slot in store.slots.items()}
    store.apply(touched, grads, 0.1)
    lazy.apply(np.arange(size), all_grads, 0.1)
    assert same_bits(store.rows, lazy.rows)
    for name, slot in lazy.slots.items():
        assert same_bits(store.slots[name], slot)


def test_lazy_optimizers_leave_untouched_rows_alone() -> None:
    for optimizer in (SGD(), Adagrad(), AdagradMomentum(), Adam(weight_decay_factor=0.1), FTRL()):
        store = RowStore(f32([1, 2], [3, 4], [5, 6]), optimizer)
        before = {name: slot.copy() for name, slot in store.slots.items()}
        store.apply(np.array([1]), f32([0.5, 0.5]), 0.1)
        np.testing.assert_array_equal(store.rows[[0, 2]], [[1, 2], [5, 6]])
        assert store.rows[1, 0] != 3
        for name, slot in store.slots.items():
            np.testing.assert_array_equal(slot[[0, 2]], before[name][[0, 2]])


def _has_twin(optimizer: Optimizer) -> bool:
    return type(optimizer) in OPTIMIZERS.values() and not optimizer.updates_untouched_rows


DRAWN = st.sampled_from(
    [
        # Non-lazy Adam moves rows that the twin leaves alone; it has a test of its own.
        *(g.optimizer for g in GOLDENS if _has_twin(g.optimizer)),
        SGD(weight_decay_factor=0.01, clipvalue=(-1, 2), clip_weight_min=-3, clip_weight_max=2),
        Adagrad(initial_accumulator_value=1e-6, clipvalue=0.5, weight_decay_factor=0.1),
        AdagradMomentum(beta2=0.999, weight_decay_factor=0.1, clip_weight_max=0.5),
        Adam(weight_decay_factor=0.1, multiply_weight_decay_factor_by_learning_rate=True),
        FTRL(learning_rate_power=-0.7, weight_decay_factor=0.1, clip_weight_min=-1),
        FTRL(learning_rate_power=0.0),
    ]
)


@settings(max_examples=120)
@given(optimizer=DRAWN, data=st.data(), num_rows=st.integers(1, 4), dim=DIMS)
def test_updates_equal_their_twin_bit_for_bit(
    optimizer: Optimizer, data: Any, num_rows: int, dim: int
) -> None:
    start = data.draw(rows(num_rows, dim))
    store = RowStore(start.copy(), optimizer)
    want, slots = start, {name: slot.copy() for name, slot in store.slots.items()}
    for rate in (0.1, 0.003):
        places = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=5))
        index = np.array(places, dtype=np.int64)
        grads = data.draw(rows(index.size, dim))
        if data.draw(st.booleans()):
            index, grads = frozen(index), frozen(grads)
        before = grads.copy()
        store.apply(index, grads, rate)
        want, slots = twin.optimize(optimizer, want, slots, index, grads, rate, same_power)
        assert grads.tobytes() == before.tobytes()
        assert same_bits(store.rows, want)
        for name in optimizer.slot_names:
            assert same_bits(store.slots[name], slots[name])


@pytest.mark.parametrize(
    "optimizer", [SGD(), Adagrad(), AdagradMomentum(), Adam(), FTRL()], ids=repr
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradients_that_are_no_numbers_are_not_hidden(optimizer: Optimizer, bad: float) -> None:
    store = RowStore(f32([1, 1], [2, 2]), optimizer)
    slots = {name: slot.copy() for name, slot in store.slots.items()}
    args = (np.array([0]), f32([bad, 0.5]), 0.1)
    want, _ = twin.optimize(optimizer, store.rows, slots, *args, same_power)
    store.apply(*args)
    assert same_bits(store.rows, want)
    np.testing.assert_array_equal(store.rows[1], [2, 2])


def test_nan_passes_through_clipping() -> None:
    store = store_of(SGD(clipvalue=1.0, clip_weight_min=-1, clip_weight_max=1), 0.5)
    step(store, np.nan)
    assert np.isnan(store.rows).all()


@given(x=NUMBERS.map(lambda v: abs(v) + 1e-3), p=st.sampled_from([0.5, 0.7, -0.5, -1 / 3]))
def test_compiled_powers_are_good_to_the_last_place(x: float, p: float) -> None:
    # libm's powf is within one unit in the last place of the rounded value.
    args = f32(x), np.float32(p)
    np.testing.assert_array_max_ulp(same_power(*args), twin.rounded_power(*args), maxulp=1)


def test_a_gathered_row_is_a_copy() -> None:
    store = RowStore(f32([1, 2], [3, 4]), SGD())
    got = store.gather(np.array([1, 1, 0]))
    np.testing.assert_array_equal(got, [[3, 4], [3, 4], [1, 2]])
    got[:] = 0
    np.testing.assert_array_equal(store.rows, [[1, 2], [3, 4]])
    assert store.gather(np.zeros(0, dtype=np.int64)).shape == (0, 2)


def test_size_counts_rows_and_slots() -> None:
    for optimizer, arrays in [(SGD(), 1), (Adagrad(), 2), (Adam(), 3)]:
        assert RowStore(np.zeros((10, 3), dtype=np.float32), optimizer).size_bytes == 120 * arrays


# --- before shards start


@pytest.mark.parametrize(
    ("optimizer", "argument"),
    [
        (SGD("fast"), "learning_rate"),  # type: ignore[arg-type]
        (SGD(None), "learning_rate"),  # type: ignore[arg-type]
        (SGD(clipvalue=("a", None)), "clipvalue"),  # type: ignore[arg-type]
        (SGD(clip_weight_min="a"), "clip_weight_min"),  # type: ignore[arg-type]
        (AdagradMomentum(momentum=None), "momentum"),  # type: ignore[arg-type]
        (AdagradMomentum(momentum=[0.9]), "momentum"),  # type: ignore[arg-type]
        (FTRL(beta=lambda: 0.1), "beta"),  # type: ignore[arg-type]
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_no_update_could_act_on_is_refused_by_name(
    optimizer: Optimizer, argument: str
) -> None:
    """TensorFlow's constructors, and so ours, let these pass."""
    with pytest.raises(ConfigError, match=f"`{argument}` must be a number, got"):
        optimizer.for_shards()


def test_everything_else_runs_as_it_is() -> None:
    for golden in GOLDENS:
        if type(golden.optimizer) in OPTIMIZERS.values():
            assert golden.optimizer is not None
            assert golden.optimizer.for_shards() is golden.optimizer
    odd = SGD(np.float32(0.1), True, clipvalue=(None, np.int64(2)))  # type: ignore[arg-type]
    assert odd.for_shards() is odd


def test_a_manifest_can_hold_every_optimizer() -> None:
    optimizer = Adagrad(ExponentialDecay(0.1, 0.5, 10), clipvalue=(None, 2.0))
    described = optimizer.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["name"] == "Adagrad"
    assert described["clipvalue"] == [None, 2.0]
    assert described["learning_rate"] == {
        "name": "ExponentialDecay",
        "initial": 0.1,
        "rate": 0.5,
        "steps": 10,
    }
    assert described["initial_accumulator_value"] == 0.1
    assert SGD(rows).describe()["learning_rate"] == "tests.support.strategies.rows"  # type: ignore[arg-type]
