"""From the pushes of all workers of one step to one gradient, in worker-rank order.

The order of sums is that of the ranks, whichever push came first: so the result has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ps.kernels.combine import COMBINER_CODES
from ps.kernels.dedup import distinct_ids
from ps.kernels.gradients import add_rows, combine_gradients
from ps.memory import zeros
from ps.messages import Push
from ps.ragged import F32, I64

Reduction = Literal["mean", "sum"]


def reduced_rows(
    ranked: Sequence[Push], table: int, reduction: Reduction, *, accumulate: bool
) -> tuple[I64, F32]:
    """The rows of a table that pushes name, int64 [n], and one gradient for each, float32 [n, D].

    Without `accumulate` a row appears once per contribution.
    """
    named = [_rows_and_grads(push, table) for push in ranked]
    if len(named) == 1:
        return named[0]
    index = np.concatenate([rows for rows, _ in named])
    grads = [grads for _, grads in named]
    if not accumulate:
        return index, _scaled(np.concatenate(grads), len(grads), reduction)
    index, places = distinct_ids(index)
    total: F32 = zeros((index.size, grads[0].shape[1]))
    stop = 0
    for grad in grads:
        start, stop = stop, stop + len(grad)
        add_rows(grad, places[start:stop], total)
    return index, _scaled(total, len(grads), reduction)


def reduced_dense(ranked: Sequence[Push], reduction: Reduction, *, accumulate: bool) -> F32:
    """Gradients of the dense values: float32 [1, P], or [N, P] without `accumulate`."""
    grads = [push.dense_grad for push in ranked]
    if len(grads) == 1:
        return grads[0].reshape(1, -1)
    if not accumulate:
        return _scaled(np.stack(grads), len(grads), reduction)
    total = np.zeros((1, grads[0].size), dtype=np.float32)
    for grad in grads:
        total += grad
    return _scaled(total, len(grads), reduction)


def _scaled(total: F32, num_workers: int, reduction: Reduction) -> F32:
    """The mean of so many workers if that is wanted; changes `total`."""
    if reduction == "mean":
        total *= np.float32(1.0 / num_workers)
    return total


def _rows_and_grads(push: Push, table: int) -> tuple[I64, F32]:
    """The rows of a table that one push names; those of bags with the sums of their gradients."""
    bags = push.bags[table] if push.bags else None
    index, grads = push.local_rows[table], push.grads[table]
    if bags is None:
        return index, grads
    distinct, places = distinct_ids(index)
    total: F32 = zeros((distinct.size, grads.shape[1]))
    combine_gradients(grads, places, bags.row_splits, bags.weights, COMBINER_CODES["sum"], total)
    return distinct, total
