"""The five optimizers, one row at a time: clip g → decay w → optimizer step → clip w.

Formulas: the optimizer classes in `ps.optimizers`. All arithmetic is float32. `index_N` names the
rows; a row that appears twice is updated twice, in order. `bounds` is
(gradient min, gradient max, weight min, weight max), infinite where there is no clipping.
"""

from __future__ import annotations

import numpy as np

from ps.kernels import inline, kernel
from ps.ragged import F32, I64

_ONE = np.float32(1.0)


@inline
def _clip(x: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """Cut x to [low, high]; NaN stays NaN."""
    if x < low:
        return low
    if x > high:
        return high
    return x


@kernel
def sgd(rows: F32, index_N: I64, grads_ND: F32, rate: np.float32, decay: np.float32,
        bounds: F32) -> None:  # fmt: skip
    """See `ps.optimizers.SGD`."""
    for i in range(index_N.size):
        r = index_N[i]
        for d in range(rows.shape[1]):
            g = _clip(grads_ND[i, d], bounds[0], bounds[1])
            w = rows[r, d] - decay * rows[r, d]
            rows[r, d] = _clip(w - rate * g, bounds[2], bounds[3])


@kernel
def adagrad(rows: F32, accumulators: F32, index_N: I64, grads_ND: F32, rate: np.float32,
            decay: np.float32, bounds: F32) -> None:  # fmt: skip
    """See `ps.optimizers.Adagrad`."""
    for i in range(index_N.size):
        r = index_N[i]
        for d in range(rows.shape[1]):
            g = _clip(grads_ND[i, d], bounds[0], bounds[1])
            w = rows[r, d] - decay * rows[r, d]
            a = accumulators[r, d] + g * g
            accumulators[r, d] = a
            rows[r, d] = _clip(w - rate * g / np.sqrt(a), bounds[2], bounds[3])


@kernel
def adagrad_momentum(rows: F32, accumulators: F32, momenta: F32, index_N: I64, grads_ND: F32,
                     rate: np.float32, decay: np.float32, bounds: F32, momentum: np.float32,
                     nesterov: bool, power: np.float32, beta2: np.float32, rest2: np.float32,
                     epsilon: np.float32) -> None:  # fmt: skip
    """See `ps.optimizers.AdagradMomentum`; `power` is -1/exponent, `rest2` 1 - beta2."""
    for i in range(index_N.size):
        r = index_N[i]
        for d in range(rows.shape[1]):
            g = _clip(grads_ND[i, d], bounds[0], bounds[1])
            w = rows[r, d] - decay * rows[r, d]
            if beta2 == _ONE:
                a = accumulators[r, d] + g * g
            else:
                a = beta2 * accumulators[r, d] + rest2 * (g * g)
            accumulators[r, d] = a
            s = g * (a + epsilon) ** power
            m = momentum * momenta[r, d] + s
            momenta[r, d] = m
            step = momentum * m + s if nesterov else m
            rows[r, d] = _clip(w - rate * step, bounds[2], bounds[3])


@kernel
def adam(rows: F32, momenta: F32, velocities: F32, index_N: I64, grads_ND: F32, rate: np.float32,
         decay: np.float32, bounds: F32, beta_1: np.float32, rest_1: np.float32,
         beta_2: np.float32, rest_2: np.float32, epsilon: np.float32,
         inside: bool) -> None:  # fmt: skip
    """See `ps.optimizers.Adam`; `rest_1` is 1 - beta_1, `rest_2` 1 - beta_2.

    Both are rounded once, from float64: in float32, 1 - 0.999 is off by 2e-5.
    """
    for i in range(index_N.size):
        r = index_N[i]
        for d in range(rows.shape[1]):
            g = _clip(grads_ND[i, d], bounds[0], bounds[1])
            w = rows[r, d] - decay * rows[r, d]
            m = beta_1 * momenta[r, d] + rest_1 * g
            v = beta_2 * velocities[r, d] + rest_2 * (g * g)
            momenta[r, d] = m
            velocities[r, d] = v
            root = np.sqrt(v + epsilon * epsilon) if inside else np.sqrt(v) + epsilon
            rows[r, d] = _clip(w - rate * m / root, bounds[2], bounds[3])


@kernel
def ftrl(rows: F32, accumulators: F32, linears: F32, index_N: I64, grads_ND: F32,
         rate: np.float32, decay: np.float32, bounds: F32, power: np.float32, l1: np.float32,
         l2: np.float32, beta: np.float32, multiply_linear: bool) -> None:  # fmt: skip
    """See `ps.optimizers.FTRL`; `power` is -learning_rate_power."""
    two = np.float32(2.0)
    for i in range(index_N.size):
        r = index_N[i]
        for d in range(rows.shape[1]):
            g = _clip(grads_ND[i, d], bounds[0], bounds[1])
            w = rows[r, d] - decay * rows[r, d]
            a = accumulators[r, d]
            new_a = a + g * g
            new_root = new_a**power
            delta = new_root - a**power
            if multiply_linear:
                linear = linears[r, d] + rate * g - delta * w
                w = (_clip(linear, -rate * l1, rate * l1) - linear) / (
                    new_root + beta + two * rate * l2
                )
            else:
                linear = linears[r, d] + g - delta * w / rate
                w = (_clip(linear, -l1, l1) - linear) / ((new_root + beta) / rate + two * l2)
            accumulators[r, d] = new_a
            linears[r, d] = linear
            rows[r, d] = _clip(w, bounds[2], bounds[3])
