"""Counter-based random rows: SplitMix64 bits, uniform and normal numbers from them.

Element (id, column) is a function of (key, id, column) alone; see `ps.initializers`.
"""

from __future__ import annotations

import numpy as np

from ps.kernels import inline, kernel
from ps.ragged import F32, I64

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_LOWER_TAIL = 0.022750131948179195  # Phi(-2)

# Coefficients of AS 241, highest power first: |p - 0.5| <= 0.425, the tails, the far tails.
_CENTRE_NUM = (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853,
               45921.953931549871457, 13731.693765509461125, 1971.5909503065514427,
               133.14166789178437745, 3.387132872796366608)  # fmt: skip
_CENTRE_DEN = (5226.495278852545925, 28729.085735721942674, 39307.89580009271061,
               21213.794301586595867, 5394.1960214247511077, 687.1870074920579083,
               42.313330701600911252, 1.0)  # fmt: skip
_TAIL_NUM = (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177,
             1.27045825245236838258, 3.64784832476320460504, 5.7694972214606914055,
             4.6303378461565452959, 1.42343711074968357734)  # fmt: skip
_TAIL_DEN = (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966,
             0.14810397642748007459, 0.68976733498510000455, 1.6763848301838038494,
             2.05319162663775882187, 1.0)  # fmt: skip
_FAR_NUM = (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386,
            0.026532189526576123093, 0.29656057182850489123, 1.7848265399172913358,
            5.4637849111641143699, 6.6579046435011037772)  # fmt: skip
_FAR_DEN = (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5,
            7.868691311456132591e-4, 0.0148753612908506148525, 0.13692988092273580531,
            0.59983220655588793769, 1.0)  # fmt: skip


@inline
def mix64(z: np.uint64) -> np.uint64:
    """SplitMix64's finaliser: a bijection of 64 bits in which every bit affects every other."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


@inline
def _unit(key: np.uint64, counter: int) -> float:
    """The counter-th number of the sequence, float64, uniform in the open interval (0, 1)."""
    bits = mix64(key + _GAMMA * (np.uint64(counter) + np.uint64(1)))
    # 52 bits: with 53, adding a half would round the largest one up to u = 1.
    u: float = (np.float64(bits >> np.uint64(12)) + 0.5) * (1.0 / 4503599627370496.0)
    return u


@inline
def _horner(coefficients: tuple[float, ...], x: float) -> float:
    """The polynomial with these coefficients, highest power first."""
    total = 0.0
    for c in coefficients:
        total = total * x + c
    return total


@inline
def _normal_quantile(p: float) -> float:
    """Inverse of the normal distribution function, relative error about 1e-16.

    Algorithm AS 241, PPND16 (Wichura, Applied Statistics 37, 1988).
    """
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        value: float = q * _horner(_CENTRE_NUM, r) / _horner(_CENTRE_DEN, r)
        return value
    r = np.sqrt(-np.log(p if q < 0.0 else 1.0 - p))
    if r <= 5.0:
        tail = _horner(_TAIL_NUM, r - 1.6) / _horner(_TAIL_DEN, r - 1.6)
    else:
        tail = _horner(_FAR_NUM, r - 5.0) / _horner(_FAR_DEN, r - 5.0)
    return -tail if q < 0.0 else tail


@kernel()
def uniform_rows(key: np.uint64, ids_N: I64, dim: int, low: float, high: float) -> F32:
    """float32 [N, D]: low + u·(high - low)."""
    out = np.empty((ids_N.size, dim), dtype=np.float32)
    for i in range(ids_N.size):
        for d in range(dim):
            out[i, d] = low + _unit(key, ids_N[i] * dim + d) * (high - low)
    return out


@kernel()
def normal_rows(key: np.uint64, ids_N: I64, dim: int, mean: float, stddev: float) -> F32:
    """float32 [N, D]: mean + stddev·Φ⁻¹(u)."""
    out = np.empty((ids_N.size, dim), dtype=np.float32)
    for i in range(ids_N.size):
        for d in range(dim):
            out[i, d] = mean + stddev * _normal_quantile(_unit(key, ids_N[i] * dim + d))
    return out


@kernel()
def truncated_normal_rows(key: np.uint64, ids_N: I64, dim: int, mean: float, stddev: float) -> F32:
    """float32 [N, D]: as `normal_rows`, with u drawn between Φ(-2) and Φ(2)."""
    out = np.empty((ids_N.size, dim), dtype=np.float32)
    span = 1.0 - 2.0 * _LOWER_TAIL
    for i in range(ids_N.size):
        for d in range(dim):
            u = _LOWER_TAIL + span * _unit(key, ids_N[i] * dim + d)
            out[i, d] = mean + stddev * _normal_quantile(u)
    return out
