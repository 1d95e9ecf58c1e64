"""The five optimizers: one pass over a row, its slots and its gradient.

A row and its slots lie side by side in one record, float32 [(1 + S)·D]: the row, then its slots in
the order of the optimizer's `slot_names`. So a random row costs one place in memory, not one per
array.

Per row: clip g → decay w → optimizer step → clip w. Formulas: the optimizer classes in
`ps.optimizers`. All arithmetic is float32, never reordered or contracted. Kernels are compiled for
what an optimizer uses (`Rule`): what is switched off costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
from numba import types
from numba.core.typing.templates import signature

from ps.kernels.compiled import Kernel, inline, kernel
from ps.kernels.vector import (
    CACHE_LINE,
    Vector,
    _intrinsic,
    clip,
    load,
    power,
    prefetch_to_write,
    splat,
    sqrt,
    store,
)
from ps.ragged import F32, I64

Numbers = tuple[np.float32, ...]
Step = Callable[[Vector, Vector, Vector, Vector, np.float32, Numbers], tuple[Vector, ...]]

SGD, ADAGRAD, ADAGRAD_MOMENTUM, ADAM, FTRL = range(5)
NUM_SLOTS = (0, 1, 2, 2, 2)
CLIPS_GRADIENT, DECAYS, CLIPS_ROW = 1, 2, 4
"""Flags of `Rule.extras`."""
ANY_POWER = 3

_LANES = 16
_LINES_AHEAD = 128
_ONE, _TWO = np.float32(1.0), np.float32(2.0)


class Rule(NamedTuple):
    """What an update is compiled for. Hashable constants, so that its machine code can be kept."""

    optimizer: int
    """`SGD`, `ADAGRAD`, ..."""
    extras: int
    """The sum of those of `CLIPS_GRADIENT`, `DECAYS` and `CLIPS_ROW` that are in use."""
    option: int = 0
    """1 for the optimizer's own: decaying accumulators + 2 · Nesterov (AdagradMomentum), the sum
    inside the root (Adam), linears times the rate (FTRL)."""
    power: int = 0
    """Twice the exponent if it is one of -1, -½, 0, ½, 1; else `ANY_POWER`."""

    @property
    def name(self) -> str:
        """What kernels know it by: numba takes text as a constant where it takes no tuple."""
        return " ".join(map(str, self))

    @classmethod
    def of(cls, name: str) -> Rule:
        """The rule of that name."""
        return cls(*map(int, name.split()))

    def without(self, extra: int) -> Rule:
        """This rule with one of the extras switched off."""
        return self._replace(extras=self.extras & ~extra)


@functools.cache
def updater(rule: Rule, dim: int) -> Kernel[..., None]:
    """The kernel `update` for rows of D = dim numbers.

    Row `index_N[i]` gets gradient i. A row that appears twice is updated twice, in order. If there
    is one gradient but not one index, all rows get it.

    Args of the kernel:
        records_VW: float32 [V, (1 + S)·D], changed.
        index_N: int64 [N], in [0, V).
        grads_ND: float32 [N, D] or [1, D].
        numbers: λ; f of w - f·w; bounds of the gradient and of the row (min, max, min, max); then
            the optimizer's own, see its step.
    """
    name, row_bytes, tail = rule.name, 4 * dim, dim % _LANES
    size = row_bytes * (1 + NUM_SLOTS[rule.optimizer])
    ahead = np.uint64(max(1, _LINES_AHEAD * CACHE_LINE // size))

    @kernel(writes=("records_VW",))
    def update(records_VW: F32, index_N: I64, grads_ND: F32, numbers: Numbers) -> None:
        records, grads = records_VW.ctypes.data, grads_ND.ctypes.data
        grad_step = row_bytes if grads_ND.shape[0] == index_N.size else 0
        # Places are unsigned, or numba would look for those that count from the end.
        last = np.uint64(index_N.size - 1)
        for i in range(np.uint64(index_N.size)):
            _prefetch_record(records + index_N[min(i + ahead, last)] * size, size)
            row, grad = records + index_N[i] * size, grads + i * grad_step
            for at in range(0, row_bytes - 4 * tail, 4 * _LANES):
                _advance(name, _LANES, row + at, row_bytes, grad + at, numbers)
            if tail:
                at = row_bytes - 4 * tail
                _advance(name, tail, row + at, row_bytes, grad + at, numbers)

    return update


@functools.cache
def flat_updater(rule: Rule) -> Kernel[..., None]:
    """The kernel `update` for one vector of P numbers, such as a dense model's.

    Args of the kernel:
        values_SP: float32 [1 + S, P or more], changed: the vector, then its slots.
        grads_NP: float32 [N, P], applied one after the other.
        first, last: columns first … last - 1 are done.
        numbers: as for `updater`.
    """
    name = rule.name

    @kernel(writes=("values_SP",))
    def update(values_SP: F32, grads_NP: F32, first: int, last: int, numbers: Numbers) -> None:
        values, slot_step = values_SP.ctypes.data, 4 * values_SP.shape[1]
        whole = 4 * (first + (last - first) // _LANES * _LANES)
        for n in range(grads_NP.shape[0]):
            grad = grads_NP[n].ctypes.data
            for at in range(4 * first, whole, 4 * _LANES):
                _advance(name, _LANES, values + at, slot_step, grad + at, numbers)
            for at in range(whole, 4 * last, 4):
                _advance(name, 1, values + at, slot_step, grad + at, numbers)

    return update


@inline
def _prefetch_record(record: int, size: int) -> None:
    for start in range(0, size, CACHE_LINE):
        prefetch_to_write(record + start)
    if (size - 1) % CACHE_LINE >= size & -size:  # some records reach into one line more
        prefetch_to_write(record + size - 1)


@_intrinsic
def _advance(
    context: Any, rule: str, lanes: int, row: int, slot_step: int, grad: int, numbers: Numbers
) -> Any:
    """Update so many numbers of a row and of its slots, which are `slot_step` bytes apart.

    The rule's name and the number of lanes are constants where the kernel is compiled.
    """
    literals: Any = (rule, lanes)
    name, n = (literal.literal_value for literal in literals)
    function = _advance_function(Rule.of(name), n)
    return _compiled(function, types.void, literals, (row, slot_step, grad, numbers))


def _advance_function(rule: Rule, lanes: int) -> Callable[[int, int, int, Numbers], None]:
    name, num_slots = rule.name, NUM_SLOTS[rule.optimizer]
    clips_gradient, decays, clips_row = (
        bool(rule.extras & extra) for extra in (CLIPS_GRADIENT, DECAYS, CLIPS_ROW)
    )

    def advance(row: int, slot_step: int, grad: int, numbers: Numbers) -> None:
        rate, decay, min_grad, max_grad, min_row, max_row = numbers[:6]
        first, second = row + slot_step, row + 2 * slot_step
        w, g = load(row, lanes), load(grad, lanes)
        a = load(first, lanes) if num_slots > 0 else g
        b = load(second, lanes) if num_slots > 1 else g
        if clips_gradient:
            g = clip(g, min_grad, max_grad)
        if decays:
            w = w - decay * w
        w, a, b = _step(name, w, a, b, g, rate, numbers[6:])
        if clips_row:
            w = clip(w, min_row, max_row)
        store(row, w)
        if num_slots > 0:
            store(first, a)
        if num_slots > 1:
            store(second, b)

    return advance


@_intrinsic
def _step(
    context: Any,
    rule: str,
    w: Vector,
    a: Vector,
    b: Vector,
    g: Vector,
    rate: np.float32,
    numbers: Numbers,
) -> Any:
    """(row, slots) after the optimizer's own formula; slots that it does not have are anything."""
    literal: Any = rule
    optimizer, _, option, power = Rule.of(literal.literal_value)
    function = _STEPS[optimizer](option, power)
    return _compiled(function, types.UniTuple(w, 3), (rule,), (w, a, b, g, rate, numbers))


def _compiled(
    function: Callable[..., Any], result: Any, constants: tuple[Any, ...], kinds: tuple[Any, ...]
) -> tuple[Any, Callable[..., Any]]:
    """What an intrinsic returns that is a Python function of its arguments after the constants."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        inner = signature(result, *kinds)
        return context.compile_internal(builder, function, inner, args[len(constants) :])

    return result(*constants, *kinds), emit


# --- the optimizers' own formulas -----------------------------------------------------------------


def _sgd(option: int, power: int) -> Step:
    return lambda w, a, b, g, rate, numbers: (w - rate * g, a, b)


def _adagrad(option: int, power: int) -> Step:
    def step(w, a, b, g, rate, numbers):  # type: ignore[no-untyped-def]
        a = a + g * g
        return w - rate * g / sqrt(a), a, b

    return step


def _adagrad_momentum(option: int, power: int) -> Step:
    """Numbers: momentum, -1/exponent, epsilon, beta2, 1 - beta2."""
    forgets, nesterov = option % 2 == 1, option >= 2

    def step(w, a, m, g, rate, numbers):  # type: ignore[no-untyped-def]
        momentum, exponent, epsilon, beta2, rest2 = numbers
        a = beta2 * a + rest2 * (g * g) if forgets else a + g * g
        s = g * _power(power, a + epsilon, exponent)
        m = momentum * m + s
        return w - rate * (momentum * m + s if nesterov else m), a, m

    return step


def _adam(option: int, power: int) -> Step:
    """Numbers: beta_1, 1 - beta_1, beta_2, 1 - beta_2, epsilon.

    The differences are rounded once, from float64: in float32, 1 - 0.999 is off by 2e-5.
    """
    inside = option == 1

    def step(w, m, v, g, rate, numbers):  # type: ignore[no-untyped-def]
        beta_1, rest_1, beta_2, rest_2, epsilon = numbers
        m = beta_1 * m + rest_1 * g
        v = beta_2 * v + rest_2 * (g * g)
        root = sqrt(v + epsilon * epsilon) if inside else sqrt(v) + epsilon
        return w - rate * m / root, m, v

    return step


def _ftrl(option: int, power: int) -> Step:
    """Numbers: -learning_rate_power, l1, l2, beta."""
    multiplied = option == 1

    def step(w, a, linear, g, rate, numbers):  # type: ignore[no-untyped-def]
        exponent, l1, l2, beta = numbers
        new_a = a + g * g
        root = _power(power, new_a, exponent)
        delta = root - _power(power, a, exponent)
        if multiplied:
            linear = linear + rate * g - delta * w
            bound, denominator = rate * l1, root + beta + _TWO * rate * l2
        else:
            linear = linear + g - delta * w / rate
            bound, denominator = l1, (root + beta) / rate + _TWO * l2
        return (clip(linear, -bound, bound) - linear) / denominator, new_a, linear

    return step


_STEPS: tuple[Callable[[int, int], Step], ...] = (_sgd, _adagrad, _adagrad_momentum, _adam, _ftrl)


@_intrinsic
def _power(context: Any, number: int, x: Vector, exponent: np.float32) -> Any:
    """A power: by square root and division where `Rule.power` names one, else by `powf`."""
    literal, vector = cast("Any", number), cast("Any", x)
    function = _power_function(literal.literal_value, vector.lanes)
    return _compiled(function, vector, (literal,), (vector, exponent))


def _power_function(number: int, lanes: int) -> Callable[[Vector, np.float32], Vector]:
    return {
        -2: lambda x, exponent: _ONE / x,
        -1: lambda x, exponent: _ONE / sqrt(x),
        0: lambda x, exponent: splat(_ONE, lanes),
        1: lambda x, exponent: sqrt(x),
        2: lambda x, exponent: x,
        ANY_POWER: lambda x, exponent: power(x, splat(exponent, lanes)),
    }[number]
