"""The plain NumPy twin of every kernel: written to be read, it defines the result.

Everything is float32 and in a fixed order, one operation at a time, so that kernel and twin can be
compared bit for bit. Twins return new arrays and never write to an argument. `weights` is None for
all ones. Letters as in `ps.kernels`: V rows, D columns, N ids, U distinct ids, B examples,
L positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from ps.kernels.rows import QuantizedRows
from ps.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam, Optimizer
from ps.ragged import F32, I64

f32 = np.float32
quiet = np.errstate(all="ignore")
"""Infinities and NaN are results like any other here."""


def same_bits(a: F32, b: F32) -> bool:
    """Equal shapes, types and bits (so 0.0 is not -0.0); any NaN equals any NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    nan = np.isnan(a)
    return bool(np.array_equal(nan, np.isnan(b)) and a[~nan].tobytes() == b[~nan].tobytes())


# --- bags of rows -------------------------------------------------------------------------------


@quiet
def divisor(weights_n: F32, combiner: str) -> np.float32:
    """What one bag's weighted sum is divided by: 1 (sum), Σw (mean) or √Σw² (sqrtn)."""
    total = f32(0)
    for w in weights_n:
        total += w if combiner == "mean" else w * w
    if combiner == "sum":
        return f32(1)
    return total if combiner == "mean" else np.sqrt(total)


@quiet
def coefficients(splits_B1: I64, weights: F32 | None, combiner: str) -> F32:
    """float32 [N]: what an entry's row is multiplied by in a combined gradient; 0 for n/0."""
    out = np.zeros(splits_B1[-1], dtype=f32)
    w = np.ones_like(out) if weights is None else weights
    for start, stop in pairwise(splits_B1):
        total = divisor(w[start:stop], combiner)
        if total != 0:
            out[start:stop] = w[start:stop] / total
    return out


@quiet
def float32_rows(q: QuantizedRows) -> F32:
    """float32 [V, D]: what every record stands for; int8: (q·scale) + offset, rounded twice."""
    match q.format:
        case "float16":
            return q.records.view(np.float16).astype(f32)
        case "bfloat16":
            return (q.records.view(np.uint16).astype(np.uint32) << 16).view(f32)
        case "int8":
            scale_offset_V2 = np.ascontiguousarray(q.records[:, :8]).view(f32)
            return q.records[:, 8:].astype(f32) * scale_offset_V2[:, :1] + scale_offset_V2[:, 1:]


@quiet
def combine_rows(
    rows_VD: F32, index_N: I64, splits_B1: I64, weights: F32 | None, combiner: str
) -> F32:
    """float32 [B, D]: Σ w·row entry by entry, divided once; 0 for an empty bag and for n/0."""
    w = np.ones(index_N.size, dtype=f32) if weights is None else weights
    out = np.zeros((splits_B1.size - 1, rows_VD.shape[1]), dtype=f32)
    for b, (start, stop) in enumerate(pairwise(splits_B1)):
        for i in range(start, stop):
            out[b] += w[i] * rows_VD[index_N[i]]
        if combiner != "sum":
            total = divisor(w[start:stop], combiner)
            out[b] = out[b] / total if total != 0 else 0
    return out


def scatter_sequences(rows_VD: F32, index_N: I64, splits_B1: I64, length: int) -> F32:
    """float32 [B, L, D]: the first L rows of each bag, then zeros."""
    out = np.zeros((splits_B1.size - 1, length, rows_VD.shape[1]), dtype=f32)
    for b, (start, stop) in enumerate(pairwise(splits_B1)):
        kept = index_N[start:stop][:length]
        out[b, : kept.size] = rows_VD[kept]
    return out


def gather_rows(rows_VD: F32, index_N: I64) -> F32:
    """float32 [N, D]."""
    return rows_VD[index_N]


@quiet
def add_rows(grads_ND: F32, index_N: I64, start_UD: F32) -> F32:
    """float32 [U, D]: start, plus every gradient at its row, in order."""
    out = start_UD.copy()
    for u, grad in zip(index_N, grads_ND, strict=True):
        out[u] += grad
    return out


@quiet
def entry_gradients(grads_BD: F32, splits_B1: I64, weights: F32 | None, combiner: str) -> F32:
    """float32 [N, D]: coefficient × gradient of the example, for every entry."""
    example_N = np.repeat(np.arange(splits_B1.size - 1), np.diff(splits_B1))
    return coefficients(splits_B1, weights, combiner)[:, None] * grads_BD[example_N]


def combine_gradients(
    grads_BD: F32,
    index_N: I64,
    splits_B1: I64,
    weights: F32 | None,
    combiner: str,
    start_UD: F32,
) -> F32:
    """float32 [U, D]: start plus the entries' gradients, in entry order."""
    entries = entry_gradients(grads_BD, splits_B1, weights, combiner)
    return add_rows(entries, index_N, start_UD)


def sequence_entries(grads_BLD: F32, splits_B1: I64) -> tuple[F32, I64]:
    """(float32 [K, D], int64 [K]): gradients of the K entries within L, and their places in N."""
    length = grads_BLD.shape[1]
    places = [
        (b, p, start + p)
        for b, (start, stop) in enumerate(pairwise(splits_B1))
        for p in range(min(stop - start, length))
    ]
    b, p, n = np.array(places, dtype=np.int64).reshape(-1, 3).T
    return grads_BLD[b, p], n


def sequence_gradients(grads_BLD: F32, index_N: I64, splits_B1: I64, start_UD: F32) -> F32:
    """float32 [U, D]: start plus the positions' gradients, in entry order."""
    entries, places = sequence_entries(grads_BLD, splits_B1)
    return add_rows(entries, index_N[places], start_UD)


# --- ids ----------------------------------------------------------------------------------------


def first_out_of_range(ids_N: I64, num_rows: int) -> int:
    """Position of the first id outside [0, num_rows), -1 if there is none."""
    return next((i for i, x in enumerate(ids_N.tolist()) if not 0 <= x < num_rows), -1)


def distinct_ids(ids_N: I64) -> tuple[I64, I64]:
    """(distinct ids in order of first appearance, place of every given id among them)."""
    places: dict[int, int] = {}
    inverse = [places.setdefault(x, len(places)) for x in ids_N.tolist()]
    return np.array(list(places), dtype=np.int64), np.array(inverse, dtype=np.int64)


def distinct_by_shard(
    ids_N: I64, slab_rows: int, offset: int, num_shards: int
) -> tuple[I64, I64, I64, I64]:
    """(ids, local rows, shard splits, inverse): the distinct ids, ordered by shard, stable."""
    unique_U, inverse_N = distinct_ids(ids_N)
    slab_U, place_U = np.divmod(unique_U, slab_rows)
    shard_U = (slab_U + offset) % num_shards
    local_U = slab_U // num_shards * slab_rows + place_U
    order = np.argsort(shard_U, kind="stable")
    splits = np.searchsorted(shard_U[order], np.arange(num_shards + 1))
    return unique_U[order], local_U[order], splits, np.argsort(order)[inverse_N]


def take_bags(ids_N: I64, splits_B1: I64, weights_N: F32, order_M: I64) -> tuple[I64, F32]:
    """(ids, weights) of bag order[0], bag order[1], …, one after the other."""
    bags = [slice(splits_B1[b], splits_B1[b + 1]) for b in order_M]
    ids = np.concatenate([ids_N[:0], *(ids_N[bag] for bag in bags)])
    return ids, np.concatenate([weights_N[:0], *(weights_N[bag] for bag in bags)])


# --- random rows --------------------------------------------------------------------------------

_M64 = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_UNIT_BITS = 52


def mix64(z: int) -> int:
    """SplitMix64's finaliser."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _M64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _M64
    return z ^ (z >> 31)


def unmix64(z: int) -> int:
    """The inverse of `mix64`."""
    z = _unshift(z, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & _M64
    z = _unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & _M64
    return _unshift(z, 30)


def _unshift(z: int, bits: int) -> int:
    """Solve x ^ (x >> bits) = z."""
    x = z
    for _ in range(64 // bits):
        x = z ^ (x >> bits)
    return x


def key_that_draws(bits: int, counter: int = 0) -> np.uint64:
    """The key whose sequence has these 64 bits at this place: any u can be brought about."""
    return np.uint64((unmix64(bits) - _GAMMA * (counter + 1)) & _M64)


def unit(key: int, counter: int) -> float:
    """The counter-th number of a sequence, float64, uniform in (0, 1)."""
    bits = mix64((key + _GAMMA * (counter + 1)) & _M64)
    return (float(bits >> (64 - _UNIT_BITS)) + 0.5) * 2.0**-_UNIT_BITS


def units(key: int, ids_N: I64, dim: int) -> list[list[float]]:
    """[N][D] numbers in (0, 1): element (id, d) has number id·D + d."""
    return [[unit(int(key), i * dim + d) for d in range(dim)] for i in ids_N.tolist()]


def uniform_rows(key: int, ids_N: I64, dim: int, low: float, high: float) -> F32:
    """float32 [N, D]: low + u·(high - low) in float64, rounded once."""
    values = [[low + u * (high - low) for u in row] for row in units(key, ids_N, dim)]
    return np.array(values, dtype=f32).reshape(-1, dim)


def normal_rows(key: int, ids_N: I64, dim: int, mean: float, stddev: float) -> F32:
    """float32 [N, D]: mean + stddev·Φ⁻¹(u) in float64, rounded once."""
    quantile = NormalDist().inv_cdf
    values = [[mean + stddev * quantile(u) for u in row] for row in units(key, ids_N, dim)]
    return np.array(values, dtype=f32).reshape(-1, dim)


def truncated_normal_rows(key: int, ids_N: I64, dim: int, mean: float, stddev: float) -> F32:
    """float32 [N, D]: as `normal_rows`, with u moved into (Φ(-2), Φ(2))."""
    low, quantile = NormalDist().cdf(-2.0), NormalDist().inv_cdf
    values = [
        [mean + stddev * quantile(low + (1.0 - 2.0 * low) * u) for u in row]
        for row in units(key, ids_N, dim)
    ]
    return np.array(values, dtype=f32).reshape(-1, dim)


# --- optimizers ---------------------------------------------------------------------------------

Power = Callable[[F32, np.float32], F32]
Slots = Mapping[str, F32]


def rounded_power(x: F32, p: np.float32) -> F32:
    """x**p rounded from float64. libm's `powf` may differ in the last place."""
    return (x.astype(np.float64) ** float(p)).astype(f32)


def power_of(x: F32, p: np.float32, general: Power) -> F32:
    """x**p, where p is -1, -½, 0, ½ or 1 by square root and division, else as `general` has it."""
    if p == 0:
        return np.ones_like(x)
    if abs(p) not in (0.5, 1):
        return general(x, p)
    root = np.sqrt(x) if abs(p) == f32(0.5) else x
    return root if p > 0 else f32(1) / root


@quiet
def optimize(
    optimizer: Optimizer,
    rows: F32,
    slots: Slots,
    index_N: I64,
    grads_ND: F32,
    rate: float,
    power: Power = rounded_power,
) -> tuple[F32, dict[str, F32]]:
    """(rows, slots) after applying gradients to rows in order; others stay (lazy optimizers).

    Per entry: clip the gradient, decay the row, the optimizer's step, clip the row; each only if
    the optimizer asks for it.
    """
    rows, new = rows.copy(), {name: slot.copy() for name, slot in slots.items()}
    decay = f32(optimizer.decay(rate))
    for r, grad in zip(index_N, grads_ND, strict=True):
        g = clip(grad, optimizer.clip_gradient_min, optimizer.clip_gradient_max)
        w = rows[r] - decay * rows[r] if optimizer.weight_decay_factor else rows[r]
        before = tuple(new[name][r] for name in optimizer.slot_names)
        w, *after = _STEPS[type(optimizer)](optimizer, w, g, f32(rate), power, *before)
        rows[r] = clip(w, optimizer.clip_weight_min, optimizer.clip_weight_max)
        for name, value in zip(optimizer.slot_names, after, strict=True):
            new[name][r] = value
    return rows, new


def clip(x: F32, low: float | None, high: float | None) -> F32:
    """x cut to [low, high]; NaN stays NaN."""
    if low is not None:
        x = np.where(x < f32(low), f32(low), x)
    if high is not None:
        x = np.where(x > f32(high), f32(high), x)
    return x


def _sgd(_: SGD, w: F32, g: F32, rate: np.float32, power: Power) -> tuple[F32, ...]:
    return (w - rate * g,)


def _adagrad(_: Adagrad, w: F32, g: F32, rate: np.float32, power: Power, a: F32) -> tuple[F32, ...]:
    a = a + g * g
    return w - rate * g / np.sqrt(a), a


def _adagrad_momentum(
    o: AdagradMomentum, w: F32, g: F32, rate: np.float32, power: Power, a: F32, m: F32
) -> tuple[F32, ...]:
    beta2, momentum = f32(o.beta2), f32(o.momentum)
    a = a + g * g if beta2 == 1 else beta2 * a + f32(1 - o.beta2) * (g * g)
    s = g * power_of(a + f32(o.epsilon), f32(-1 / o.exponent), power)
    m = momentum * m + s
    return w - rate * (momentum * m + s if o.use_nesterov else m), a, m


def _adam(
    o: Adam, w: F32, g: F32, rate: np.float32, power: Power, m: F32, v: F32
) -> tuple[F32, ...]:
    b1, b2, epsilon = f32(o.beta_1), f32(o.beta_2), f32(o.epsilon)
    m = b1 * m + f32(1 - o.beta_1) * g
    v = b2 * v + f32(1 - o.beta_2) * (g * g)
    root = np.sqrt(v + epsilon * epsilon) if o.sum_inside_sqrt else np.sqrt(v) + epsilon
    return w - rate * m / root, m, v


def _ftrl(
    o: FTRL, w: F32, g: F32, rate: np.float32, power: Power, a: F32, linear: F32
) -> tuple[F32, ...]:
    p, beta = f32(-o.learning_rate_power), f32(o.beta)
    l1, l2 = f32(o.l1_regularization_strength), f32(o.l2_regularization_strength)
    new_a = a + g * g
    root = power_of(new_a, p, power)
    delta = root - power_of(a, p, power)
    if o.multiply_linear_by_learning_rate:
        linear = linear + rate * g - delta * w
        bound, denominator = rate * l1, root + beta + f32(2) * rate * l2
    else:
        linear = linear + g - delta * w / rate
        bound, denominator = l1, (root + beta) / rate + f32(2) * l2
    return (clip(linear, -bound, bound) - linear) / denominator, new_a, linear


_STEPS: dict[type[Optimizer], Callable[..., tuple[F32, ...]]] = {
    SGD: _sgd,
    Adagrad: _adagrad,
    AdagradMomentum: _adagrad_momentum,
    Adam: _adam,
    FTRL: _ftrl,
}
