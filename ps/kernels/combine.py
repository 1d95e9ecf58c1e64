"""Bags of rows to vectors, and gradients of vectors back to rows.

`index_N` says which row of `rows` an entry reads: the id itself at serving, the place in the
pulled buffer in training. Sums run in float32, entry by entry in the given order.
"""

from __future__ import annotations

import numpy as np

from ps.kernels import inline, kernel
from ps.ragged import F32, I64

COMBINER_CODES = {"sum": 0, "mean": 1, "sqrtn": 2}
_MEAN = 1
_SQRTN = 2
_ZERO = np.float32(0.0)


@inline
def _divisor(weights_N: F32, start: int, stop: int, combiner: int) -> np.float32:
    """What a bag's weighted sum is divided by: 1 (sum), Σw (mean) or √Σw² (sqrtn)."""
    total = np.float32(0.0)
    if combiner == _MEAN:
        for i in range(start, stop):
            total += weights_N[i] if weights_N.size else np.float32(1.0)
    elif combiner == _SQRTN:
        for i in range(start, stop):
            total += weights_N[i] * weights_N[i] if weights_N.size else np.float32(1.0)
        total = np.sqrt(total)
    else:
        total = np.float32(1.0)
    return total


@kernel
def combine_rows(
    rows: F32, index_N: I64, splits_B1: I64, weights_N: F32, combiner: int, out_BD: F32
) -> None:
    """out[b] = (Σ_{i in bag b} w_i · rows[index_i]) / divisor_b.

    0 for an empty bag and where the divisor is 0. `weights_N` of size 0 means all ones. Equals
    `tf.nn.embedding_lookup_sparse`.
    """
    dim = rows.shape[1]
    for b in range(splits_B1.size - 1):
        start, stop = splits_B1[b], splits_B1[b + 1]
        for d in range(dim):
            out_BD[b, d] = np.float32(0.0)
        for i in range(start, stop):
            r = index_N[i]
            if weights_N.size:
                w = weights_N[i]
                for d in range(dim):
                    out_BD[b, d] += w * rows[r, d]
            else:
                for d in range(dim):
                    out_BD[b, d] += rows[r, d]
        if combiner != 0 and stop > start:
            total = _divisor(weights_N, start, stop, combiner)
            for d in range(dim):
                out_BD[b, d] = out_BD[b, d] / total if total != _ZERO else _ZERO


@kernel
def scatter_sequences(rows: F32, index_N: I64, splits_B1: I64, out_BLD: F32) -> None:
    """out[b, l] = rows of the l-th id of example b, cut or zero-padded to L positions."""
    dim = rows.shape[1]
    length = out_BLD.shape[1]
    for b in range(splits_B1.size - 1):
        start = splits_B1[b]
        count = min(splits_B1[b + 1] - start, length)
        for p in range(length):
            for d in range(dim):
                out_BLD[b, p, d] = rows[index_N[start + p], d] if p < count else np.float32(0.0)


@kernel
def combine_gradients(
    grads_BD: F32, index_N: I64, splits_B1: I64, weights_N: F32, combiner: int, out_UD: F32
) -> None:
    """Transposed combine: out[index_i] += (w_i / divisor_b) · grads[b], added in entry order.

    `out_UD` is added to, so that several features of one table sum up.
    """
    dim = grads_BD.shape[1]
    for b in range(splits_B1.size - 1):
        start, stop = splits_B1[b], splits_B1[b + 1]
        total = _divisor(weights_N, start, stop, combiner)
        for i in range(start, stop):
            w = weights_N[i] if weights_N.size else np.float32(1.0)
            c = w / total if total != _ZERO else _ZERO
            u = index_N[i]
            for d in range(dim):
                out_UD[u, d] += c * grads_BD[b, d]


@kernel
def gather_rows(rows_VD: F32, index_N: I64, out_ND: F32) -> None:
    """out[i] = rows[index_i]."""
    for i in range(index_N.size):
        for d in range(rows_VD.shape[1]):
            out_ND[i, d] = rows_VD[index_N[i], d]


@kernel
def add_rows(grads_ND: F32, index_N: I64, out_UD: F32) -> None:
    """out[index_i] += grads[i], in order."""
    for i in range(index_N.size):
        u = index_N[i]
        for d in range(grads_ND.shape[1]):
            out_UD[u, d] += grads_ND[i, d]


@kernel
def entry_gradients(
    grads_BD: F32, splits_B1: I64, weights_N: F32, combiner: int, out_ND: F32
) -> None:
    """out[i] = (w_i / divisor_b) · grads[b] for every entry i of example b, not summed by row."""
    for b in range(splits_B1.size - 1):
        start, stop = splits_B1[b], splits_B1[b + 1]
        total = _divisor(weights_N, start, stop, combiner)
        for i in range(start, stop):
            w = weights_N[i] if weights_N.size else np.float32(1.0)
            c = w / total if total != _ZERO else _ZERO
            for d in range(grads_BD.shape[1]):
                out_ND[i, d] = c * grads_BD[b, d]
