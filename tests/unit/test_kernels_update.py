"""Optimizer updates give, bit for bit, what their twin in `tests.support.reference` gives.

`test_optimizer_goldens` has the published numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ps import rowstore
from ps.kernels.update import flat_updater, updater
from ps.optimizers import FTRL, OPTIMIZERS, SGD, Adagrad, AdagradMomentum, Adam, Optimizer
from ps.ragged import F32, I64
from ps.rowstore import FlatStore, Formula, RowStore
from ps.threads import ONE_THREAD, Threads
from tests.support import reference as twin
from tests.support.goldens import GOLDENS
from tests.support.guarded import Canaries, guarded
from tests.support.reference import same_bits
from tests.support.strategies import NUMBERS, frozen, unaligned

DIMS = (1, 3, 8, 15, 16, 33, 64, 128)
DIM = 17
"""A whole vector and a rest."""
NUM_ROWS = 4
HARD = NUMBERS | st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-45, 3e38, -1e20])


_BY_RULE: dict[Any, Optimizer] = {
    Formula(optimizer).rule: optimizer
    for optimizer in (
        # Non-lazy Adam moves rows that the twin leaves alone; it has a test of its own.
        *(
            g.optimizer
            for g in GOLDENS
            if g.optimizer is not None
            and type(g.optimizer) in OPTIMIZERS.values()
            and not g.optimizer.updates_untouched_rows
        ),
        SGD(weight_decay_factor=0.01, clipvalue=(-1, 2), clip_weight_min=-3, clip_weight_max=2),
        Adagrad(initial_accumulator_value=1e-6, clipvalue=0.5, weight_decay_factor=0.1),
        AdagradMomentum(beta2=0.999, weight_decay_factor=0.1, clip_weight_max=0.5, clipvalue=3),
        AdagradMomentum(exponent=1, use_nesterov=True, momentum=0.5),
        Adam(weight_decay_factor=0.1, multiply_weight_decay_factor_by_learning_rate=True),
        Adam(clipvalue=(None, 1), clip_weight_min=-1, sum_inside_sqrt=False),
        FTRL(learning_rate_power=-0.7, weight_decay_factor=0.1, clip_weight_min=-1),
        *(FTRL(learning_rate_power=p, beta=0.1) for p in (0.0, -1.0, 0.5, 1.0)),
    )
}
"""One optimizer for every kernel that there may be, or nearly."""


@numba.njit
def _compiled_power(x: np.float32, p: np.float32) -> np.float32:
    return x**p


def same_power(x: F32, p: np.float32) -> F32:
    """The kernels' own `powf`, so that everything around it can be compared bit for bit."""
    return np.array([_compiled_power(v, p) for v in x.ravel()], dtype=np.float32).reshape(x.shape)


def numbers(*shape: int) -> st.SearchStrategy[F32]:
    return arrays(np.float32, shape, elements=HARD, fill=st.just(1.5))


def places(distinct: bool = False) -> st.SearchStrategy[I64]:
    lists = st.lists(st.integers(0, NUM_ROWS - 1), max_size=6, unique=distinct)
    return lists.map(lambda p: np.array(p, dtype=np.int64))


def check(store: RowStore, data: Any, dim: int, *, distinct: bool = False) -> None:
    """Two steps on hard numbers, with arrays as they may arrive."""
    store.rows[:] = data.draw(numbers(NUM_ROWS, dim))
    for slot in store.slots.values():
        slot[:] = data.draw(numbers(NUM_ROWS, dim) | st.just(np.float32(0.1)))
    want, slots = store.rows.copy(), {name: slot.copy() for name, slot in store.slots.items()}
    for rate in (0.1, 0.003):
        index = data.draw(places(distinct))
        grads = data.draw(numbers(index.size, dim))
        before = grads.copy()
        as_they_come = data.draw(st.sampled_from([lambda a: a, frozen, unaligned]))
        store.apply(as_they_come(index), as_they_come(grads), rate, distinct=distinct)
        want, slots = twin.optimize(
            store.optimizer, want, slots, index, grads, rate, power=same_power
        )
        assert same_bits(grads, before)
        assert same_bits(store.rows, want)
        for name, slot in slots.items():
            assert same_bits(store.slots[name], slot)


@pytest.mark.parametrize(
    "optimizer",
    _BY_RULE.values(),
    ids=[f"{type(o).__name__} {rule.name}" for rule, o in _BY_RULE.items()],
)
@settings(max_examples=10)
@given(data=st.data())
def test_updates_equal_their_twin_bit_for_bit(optimizer: Optimizer, data: Any) -> None:
    check(RowStore(np.zeros((NUM_ROWS, DIM), np.float32), optimizer), data, DIM)


@pytest.mark.parametrize("dim", DIMS)
@settings(max_examples=10)
@given(data=st.data())
def test_every_dim_is_updated_whole(dim: int, data: Any) -> None:
    check(RowStore(np.zeros((NUM_ROWS, dim), np.float32), Adam()), data, dim)


@pytest.fixture(scope="module")
def _small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rowstore, "MIN_PART_BYTES", 1)
        patch.setattr(rowstore, "_UNTOUCHED_CHUNK", 2)
        yield


@settings(max_examples=20)
@given(data=st.data(), count=st.integers(2, 4), optimizer=st.sampled_from([Adam(), SGD()]))
@pytest.mark.usefixtures("_small_parts")
def test_threads_change_no_bit(optimizer: Optimizer, count: int, data: Any) -> None:
    store = RowStore(np.zeros((NUM_ROWS, DIM), np.float32), optimizer, Threads(count))
    check(store, data, DIM, distinct=data.draw(st.booleans()))


# --- what is read and written ---------------------------------------------------------------------


@pytest.mark.parametrize("edge", ["start", "end"])
@pytest.mark.parametrize("dim", [1, 15, DIM, 64])
def test_nothing_is_touched_outside_the_arrays(dim: int, edge: Literal["start", "end"]) -> None:
    optimizer = Adam()
    formula = Formula(optimizer)
    rng = np.random.default_rng(0)
    records = guarded(rng.random((NUM_ROWS, 3 * dim), dtype=np.float32), edge)
    before = records.copy()
    index = guarded(np.array([3, 0, 3]), edge)
    grads = guarded(rng.random((3, dim), dtype=np.float32), edge)
    updater(formula.rule, dim)(records, index, grads, formula.numbers(0.1))
    assert same_bits(records[1:3], before[1:3])
    assert (records[[0, 3]] != before[[0, 3]]).all()


@pytest.mark.parametrize("offset", [0, 4, 60])
def test_nothing_is_written_around_the_rows(offset: int) -> None:
    formula = Formula(Adagrad())
    around = Canaries((3, 2 * DIM), offset=offset)
    around.array[:] = 0.5
    grads = np.ones((2, DIM), dtype=np.float32)
    updater(formula.rule, DIM)(around.array, np.array([2, 0]), grads, formula.numbers(0.1))
    assert around.intact
    assert (around.array[1] == 0.5).all()
    empty = np.zeros(0, dtype=np.int64)
    before = around.array.copy()
    updater(formula.rule, DIM)(around.array, empty, grads[:0], formula.numbers(0.1))
    assert same_bits(around.array, before)


def test_one_gradient_can_serve_all_rows() -> None:
    formula = Formula(Adagrad())
    one, many = np.full((2, 5, 2 * DIM), 0.5, dtype=np.float32)
    index, grad = np.array([1, 4, 1]), np.arange(DIM, dtype=np.float32)[None]
    run = updater(formula.rule, DIM)
    run(one, index, grad, formula.numbers(0.1))
    run(many, index, np.repeat(grad, 3, axis=0), formula.numbers(0.1))
    assert same_bits(one, many)


# --- one long vector ------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("threads", [ONE_THREAD, Threads(3)], ids=["one", "three"])
def test_a_flat_vector_is_updated_like_one_long_row(size: int, threads: Threads) -> None:
    optimizer = Adam(clipvalue=1.0, weight_decay_factor=0.1)
    rng = np.random.default_rng(size)
    start = rng.normal(size=size).astype(np.float32)
    store = FlatStore(start, optimizer, threads)
    slots = {name: slot[None].copy() for name, slot in store.slots.items()}
    want, index = start[None], np.zeros(2, dtype=np.int64)
    for rate in (0.1, 0.2):
        grads = unaligned(frozen(rng.normal(size=(2, size)).astype(np.float32)))
        store.apply(grads, rate)
        want, slots = twin.optimize(optimizer, want, slots, index, grads, rate)
    assert same_bits(store.values, want[0])
    for name, slot in slots.items():
        assert same_bits(store.slots[name], slot[0])


@pytest.mark.parametrize("edge", ["start", "end"])
def test_a_flat_vector_ends_where_it_ends(edge: Literal["start", "end"]) -> None:
    formula = Formula(Adam(clipvalue=1.0, weight_decay_factor=0.1))
    values = guarded(np.full((3, 37), 0.5, dtype=np.float32), edge)
    grads = guarded(np.ones((1, 37), dtype=np.float32), edge)
    flat_updater(formula.rule)(values, grads, 0, 20, formula.numbers(0.1))
    assert (values[:, 20:] == 0.5).all()
    assert (values[:, :20] != 0.5).all()
    flat_updater(formula.rule)(values, grads, 20, 37, formula.numbers(0.1))
    assert (values == values[:, :1]).all()


# --- rows without a gradient ----------------------------------------------------------------------


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("threads", [ONE_THREAD, Threads(3)], ids=["one", "three"])
def test_non_lazy_adam_updates_every_row_exactly_once(threads: Threads) -> None:
    """Rows without a gradient by one of zeros, clipped as any other, and without decay."""
    changes = {"clipvalue": (0.25, 2.0), "clip_weight_max": 0.9}
    rng = np.random.default_rng(0)
    start = rng.normal(size=(11, 3)).astype(np.float32)
    touched, grads = np.array([9, 0, 4]), rng.normal(size=(3, 3)).astype(np.float32)
    rest = np.setdiff1d(np.arange(11), touched)
    store = RowStore(start, Adam(lazy_adam=False, weight_decay_factor=0.1, **changes), threads)
    store.slots["momenta"][:], store.slots["velocities"][:] = 0.02, 0.0003
    slots = {name: slot.copy() for name, slot in store.slots.items()}
    store.apply(touched, grads, 0.1)
    decayed = Adam(weight_decay_factor=0.1, **changes)
    want, slots = twin.optimize(decayed, start, slots, touched, grads, 0.1)
    zeros = np.zeros((rest.size, 3), dtype=np.float32)
    want, slots = twin.optimize(Adam(**changes), want, slots, rest, zeros, 0.1)
    assert same_bits(store.rows, want)
    for name, slot in slots.items():
        assert same_bits(store.slots[name], slot)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [cls() for cls in OPTIMIZERS.values()], ids=OPTIMIZERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradients_that_are_no_numbers_are_not_hidden(optimizer: Optimizer, bad: float) -> None:
    store = RowStore(np.array([[1, 1], [2, 2]], np.float32), optimizer)
    slots = {name: slot.copy() for name, slot in store.slots.items()}
    args = (np.array([0]), np.array([[bad, 0.5]], np.float32), 0.1)
    want, _ = twin.optimize(optimizer, store.rows, slots, *args)
    store.apply(*args)
    assert same_bits(store.rows, want)
    np.testing.assert_array_equal(store.rows[1], [2, 2])


def test_nan_passes_through_clipping() -> None:
    store = RowStore(
        np.zeros((1, 1), np.float32), SGD(clipvalue=1.0, clip_weight_min=-1, clip_weight_max=1)
    )
    store.apply(np.array([0]), np.array([[np.nan]], np.float32), 0.1)
    assert np.isnan(store.rows).all()


@given(x=NUMBERS.map(lambda v: abs(v) + 1e-3), p=st.sampled_from([0.7, -0.7, 2.0, -1 / 3]))
def test_other_powers_are_good_to_the_last_place(x: float, p: float) -> None:
    # libm's powf is within one unit in the last place of the rounded value.
    args = np.array([x], np.float32), np.float32(p)
    np.testing.assert_array_max_ulp(same_power(*args), twin.rounded_power(*args), maxulp=1)


def in_float64(optimizer: Optimizer, w: Any, slots: Sequence[Any], g: Any) -> Any:
    match optimizer:
        case SGD():
            return w - 0.1 * g
        case Adagrad():
            return w - 0.1 * g / np.sqrt(slots[0] + g * g)
        case AdagradMomentum():
            return w - 0.1 * g * (slots[0] + g * g + optimizer.epsilon) ** (-1 / optimizer.exponent)
        case Adam():
            m, v = 0.9 * slots[0] + 0.1 * g, 0.999 * slots[1] + 0.001 * g * g
            return w - 0.1 * m / np.sqrt(v + 1e-14)
    a, linear = slots
    linear = linear + g - (np.sqrt(a + g * g) - np.sqrt(a)) * w / 0.1
    return -linear / (np.sqrt(a + g * g) / 0.1)


@pytest.mark.parametrize(
    "optimizer",
    [*(cls() for cls in OPTIMIZERS.values()), AdagradMomentum(exponent=3)],
    ids=[*OPTIMIZERS, "exponent 3"],
)
def test_one_step_is_within_a_millionth_of_float64(optimizer: Optimizer) -> None:
    rng = np.random.default_rng(0)
    rows, grads = rng.normal(size=(2, 400, DIM)).astype(np.float32)
    store = RowStore(rows, optimizer)
    for slot in store.slots.values():
        slot[:] += rng.random(slot.shape, dtype=np.float32)
    before = [array.astype(np.float64) for array in (rows, *store.slots.values())]
    store.apply(np.arange(400), grads, 0.1)
    want = in_float64(optimizer, before[0], before[1:], grads.astype(np.float64))
    scale = np.abs(want) + np.abs(before[0])
    assert (np.abs(store.rows - want) <= 1e-6 * scale).all()
