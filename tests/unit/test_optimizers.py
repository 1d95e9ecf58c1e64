"""Update rules in small numbers, and what is refused; `test_kernels_update` has their twins."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

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
from tests.support.goldens import GOLDENS
from tests.support.strategies import rows


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


def test_lazy_optimizers_leave_untouched_rows_alone() -> None:
    for optimizer in (SGD(), Adagrad(), AdagradMomentum(), Adam(weight_decay_factor=0.1), FTRL()):
        store = RowStore(f32([1, 2], [3, 4], [5, 6]), optimizer)
        before = {name: slot.copy() for name, slot in store.slots.items()}
        store.apply(np.array([1]), f32([0.5, 0.5]), 0.1)
        np.testing.assert_array_equal(store.rows[[0, 2]], [[1, 2], [5, 6]])
        assert store.rows[1, 0] != 3
        for name, slot in store.slots.items():
            np.testing.assert_array_equal(slot[[0, 2]], before[name][[0, 2]])


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
