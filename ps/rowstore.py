"""Rows and vectors with their optimizer slots, read and updated by kernels.

`RowStore` keeps the row of a table and its slots side by side, in one record, because they are
updated together: a random row then costs one place in memory rather than one per array. What reads
rows or slots alone sees them as views with a stride. `FlatStore` is for one long vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import numpy as np

from ps.custom_optimizer import CustomOptimizer, updated_rows
from ps.kernels import update
from ps.kernels.records import gather_records, scatter_records
from ps.kernels.shard_bags import sum_bags
from ps.kernels.update import Numbers, Rule
from ps.memory import CACHE_LINE, empty, zeros
from ps.messages import Bags
from ps.optimizers import (
    FTRL,
    SGD,
    Adagrad,
    AdagradMomentum,
    Adam,
    Optimizer,
    Rate,
    evaluate_rate,
)
from ps.ragged import F32, I64
from ps.threads import MIN_PART_BYTES, ONE_THREAD, Threads, gather_rows

_UNTOUCHED_CHUNK = 1 << 16
_LINE = CACHE_LINE // 4
_POWERS = (-1.0, -0.5, 0.0, 0.5, 1.0)


Update = tuple[I64 | None, Callable[[], None]]
"""A step of one table that cannot fail any more: the rows that it will change, int64 [n], where a
row may repeat (None: all of the table), and how to make it."""


class RowStore:
    """float32 rows [n, D] with one array of the same shape per slot."""

    def __init__(self, rows: F32, optimizer: Optimizer, threads: Threads = ONE_THREAD) -> None:
        """Start with a copy of `rows` and fresh slots."""
        self._start(rows.shape, optimizer, threads)
        self.rows[:] = rows

    @classmethod
    def zeros(
        cls, shape: tuple[int, int], optimizer: Optimizer, threads: Threads = ONE_THREAD
    ) -> Self:
        """Rows of zeros [n, D], to be filled in; they take no memory before."""
        store = cls.__new__(cls)
        store._start(shape, optimizer, threads)
        return store

    def _start(self, shape: tuple[int, ...], optimizer: Optimizer, threads: Threads) -> None:
        num_rows, dim = shape
        starts = optimizer.slot_initial_values
        self.records: F32 = zeros((num_rows, (1 + len(starts)) * dim))
        """float32 [n, (1 + S)·D]: rows, each followed by its slots."""
        self._threads = threads
        self._formula = None if isinstance(optimizer, CustomOptimizer) else Formula(optimizer)
        self.optimizer = optimizer
        self._updates_all = optimizer.updates_untouched_rows
        self.rows, *slots = (
            self.records[:, k * dim : (k + 1) * dim] for k in range(1 + len(starts))
        )
        self.slots: dict[str, F32] = dict(zip(optimizer.slot_names, slots, strict=True))
        _fill(slots, starts)

    @property
    def size_bytes(self) -> int:
        """Bytes of rows and slots."""
        return self.records.nbytes

    def old_rows(self, local_rows: I64 | None) -> F32:
        """float32 [n, D]: copies of the given rows, int64 [n], of all for None."""
        return self.rows.copy() if local_rows is None else self.gather(local_rows)

    def gather_records(self, local_rows: I64) -> F32:
        """float32 [n, (1 + S)·D]: copies of the records of the given rows, int64 [n]."""
        out: F32 = empty((local_rows.size, self.records.shape[1]))
        parts = self._threads.parts(len(out), MIN_PART_BYTES // (4 * out.shape[1]) + 1)
        self._threads.run(
            [partial(gather_records, self.records, local_rows[p], out[p]) for p in parts]
        )
        return out

    def put_records(self, local_rows: I64, records: F32) -> None:
        """Replace the records of the given rows, int64 [n], by float32 [n, (1 + S)·D]."""
        scatter_records(records, local_rows, self.records)

    def gather(self, local_rows: I64, out: F32 | None = None) -> F32:
        """float32 [n, D]: a copy of the given rows, int64 [n]; written to `out` if it is given."""
        if out is None:
            out = empty((local_rows.size, self.rows.shape[1]))
        gather_rows(self._threads, self.records, local_rows, out)
        return out

    def sums(self, local_rows: I64, bags: Bags, out: F32 | None = None) -> F32:
        """float32 [bags, D]: the weighted sum of each bag's rows, in the order of its entries."""
        if out is None:
            out = empty((bags.count, self.rows.shape[1]))
        return sum_rows(self._threads, self.records, local_rows, bags, out)

    def apply(
        self,
        local_rows: I64,
        grads: F32,
        rate: float,
        hyperparameters: Sequence[float] = (),
        *,
        distinct: bool = False,
    ) -> None:
        """Update rows int64 [n] with gradients float32 [n, D], in order; `rate` is λ.

        A row that appears several times is updated several times; `distinct` says that none does,
        so that several threads may be used, for the same bits. Rows not named stay as they are,
        unless the optimizer is non-lazy Adam.

        Raises:
            ConfigError: a custom computation failed; nothing has changed then.
        """
        self.prepare(local_rows, grads, rate, hyperparameters, distinct=distinct)[1]()

    def prepare(
        self,
        local_rows: I64,
        grads: F32,
        rate: float,
        hyperparameters: Sequence[float] = (),
        *,
        distinct: bool = False,
    ) -> Update:
        """`apply` up to where it changes something."""
        if self._formula is not None:
            run = partial(self._apply_kernel, self._formula, local_rows, grads, rate, distinct)
            return None if self._updates_all else local_rows, run
        assert isinstance(self.optimizer, CustomOptimizer)
        arrays = (self.rows, *self.slots.values())
        rows, values = updated_rows(
            self.optimizer, arrays, local_rows, grads, rate, hyperparameters
        )
        return rows, partial(self._write, rows, values)

    def _write(self, local_rows: I64, values: Sequence[F32]) -> None:
        for array, new in zip((self.rows, *self.slots.values()), values, strict=True):
            array[local_rows] = new

    def _apply_kernel(
        self, formula: Formula, index: I64, grads: F32, rate: float, distinct: bool
    ) -> None:
        kernel = update.updater(formula.rule, self.rows.shape[1])
        numbers = formula.numbers(rate)
        threads = self._threads if distinct else ONE_THREAD
        parts = threads.parts(index.size, MIN_PART_BYTES // (4 * self.records.shape[1]) + 1)
        threads.run([partial(kernel, self.records, index[p], grads[p], numbers) for p in parts])
        if self._updates_all:
            self._apply_zeros(formula, index, rate)

    def _apply_zeros(self, formula: Formula, touched: I64, rate: float) -> None:
        """A step with gradient 0 and without decay for the rows that are not named."""
        kernel = update.updater(formula.rule.without(update.DECAYS), self.rows.shape[1])
        numbers = formula.numbers(rate)
        zero: F32 = zeros((1, self.rows.shape[1]))
        untouched = np.ones(len(self.rows), dtype=bool)
        untouched[touched] = False

        def run(part: slice) -> None:
            for start in range(part.start, part.stop, _UNTOUCHED_CHUNK):
                chunk = untouched[start : min(start + _UNTOUCHED_CHUNK, part.stop)]
                kernel(self.records, np.flatnonzero(chunk) + start, zero, numbers)

        parts = self._threads.parts(len(self.rows), _UNTOUCHED_CHUNK)
        self._threads.run([partial(run, part) for part in parts])


def sum_rows(threads: Threads, records_VW: F32, index_N: I64, bags: Bags, out_BD: F32) -> F32:
    """out[b] = the weighted sum of bag b's rows, the first D columns of records; returns `out`."""
    parts = threads.parts(bags.count, MIN_PART_BYTES // (4 * out_BD.shape[1]) + 1)
    splits = bags.row_splits
    threads.run(
        [partial(sum_bags, records_VW, index_N, splits[p.start : p.stop + 1], bags.weights,
                 out_BD[p])
         for p in parts]
    )  # fmt: skip
    return out_BD


class FlatStore:
    """A float32 vector [P] with one of the same size per slot: the values of a dense model."""

    def __init__(self, values: F32, optimizer: Optimizer, threads: Threads = ONE_THREAD) -> None:
        """Start with a copy of `values` and fresh slots."""
        assert not isinstance(optimizer, CustomOptimizer), "its computation takes rows of a table"
        size = -(-values.size // _LINE) * _LINE
        self.arrays: F32 = zeros((1 + len(optimizer.slot_names), size))
        """float32 [1 + S, P or more]: the values, then the slots."""
        self._threads = threads
        self._formula = Formula(optimizer)
        self.optimizer = optimizer
        self.values, *slots = self.arrays[:, : values.size]
        self.slots: dict[str, F32] = dict(zip(optimizer.slot_names, slots, strict=True))
        _fill(slots, optimizer.slot_initial_values)
        self.values[:] = values

    def apply(self, grads: F32, rate: float) -> None:
        """Update with gradients float32 [N, P], one after the other; `rate` is λ."""
        kernel, numbers = update.flat_updater(self._formula.rule), self._formula.numbers(rate)
        num_arrays, size = self.arrays.shape
        # Cut at cache lines, so that no two threads write to the same one.
        lines = self._threads.parts(size // _LINE, MIN_PART_BYTES // (4 * _LINE * num_arrays))
        ends = [(_LINE * part.start, min(_LINE * part.stop, self.values.size)) for part in lines]
        self._threads.run([partial(kernel, self.arrays, grads, *part, numbers) for part in ends])


def _fill(slots: Sequence[F32], starts: Sequence[float]) -> None:
    for slot, value in zip(slots, starts, strict=True):
        if value:
            slot.fill(value)


class StepRates:
    """The rates of several stores in each step."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._fixed: list[list[float]] | None = None
        """Once they are known not to change."""

    def at(self, step: int) -> list[list[float]]:
        """The rates of each; a callable is called once a step, however many share it."""
        if self._fixed is not None:
            return self._fixed
        known: list[tuple[Rate, float]] = []

        def value_of(rate: Rate) -> float:
            for seen, value in known:
                if seen == rate:
                    return value
            known.append((rate, evaluate_rate(rate, step)))
            return known[-1][1]

        rates = [[value_of(rate) for rate in optimizer.rates] for optimizer in self._optimizers]
        if not any(callable(rate) for rate, _ in known):
            self._fixed = rates
        return rates


class Formula:
    """Which kernel an optimizer has, and the float32 numbers that it takes."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        (number, option, power), own = _kernel_of(optimizer)
        gradient = optimizer.clip_gradient_min, optimizer.clip_gradient_max
        row = optimizer.clip_weight_min, optimizer.clip_weight_max
        extras = (
            update.CLIPS_GRADIENT * (gradient != (None, None))
            + update.DECAYS * bool(optimizer.weight_decay_factor)
            + update.CLIPS_ROW * (row != (None, None))
        )
        self.rule = Rule(number, extras, option, power)
        no_bounds = (-np.inf, np.inf) * 2
        bounds = (n if b is None else b for b, n in zip(gradient + row, no_bounds, strict=True))
        self._numbers = tuple(np.float32(value) for value in (*bounds, *own))
        self._last: tuple[float, Numbers] = (np.nan, ())

    def numbers(self, rate: float) -> Numbers:
        """The last argument of a kernel."""
        if rate != self._last[0]:
            decay = np.float32(self._optimizer.decay(rate))
            self._last = rate, (np.float32(rate), decay, *self._numbers)
        return self._last[1]


def _kernel_of(optimizer: Optimizer) -> tuple[tuple[int, int, int], tuple[float, ...]]:
    """(`Rule.optimizer`, its `option` and `power`), and the numbers of its step."""
    match optimizer:
        case SGD():
            return (update.SGD, 0, 0), ()
        case Adagrad():
            return (update.ADAGRAD, 0, 0), ()
        case AdagradMomentum(momentum=m, use_nesterov=n, exponent=e, beta2=b, epsilon=eps):
            option = int(np.float32(b) != 1) + 2 * bool(n)
            return (update.ADAGRAD_MOMENTUM, option, _power(-1 / e)), (m, -1 / e, eps, b, 1 - b)
        case Adam(beta_1=b1, beta_2=b2, epsilon=eps, sum_inside_sqrt=inside):
            return (update.ADAM, int(bool(inside)), 0), (b1, 1 - b1, b2, 1 - b2, eps)
        case FTRL(learning_rate_power=p, l1_regularization_strength=l1,
                  l2_regularization_strength=l2, beta=b,
                  multiply_linear_by_learning_rate=multiply):  # fmt: skip
            return (update.FTRL, int(bool(multiply)), _power(-p)), (-p, l1, l2, b)
    raise TypeError(f"no kernel for {type(optimizer).__name__}")


def _power(exponent: float) -> int:
    p = float(np.float32(exponent))
    return int(2 * p) if p in _POWERS else update.ANY_POWER
