"""The plain twins of `ps.kernels.shard_bags`; see `tests.support.reference`."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ps.ragged import F32, I64
from tests.support import reference
from tests.support.reference import f32, quiet


def sum_bags(
    records_VR: F32, index_N: I64, splits_B1: I64, weights: F32 | None, num_columns: int
) -> F32:
    """float32 [B, D]: Σ w·row entry by entry, of the first D columns."""
    return reference.combine_rows(records_VR[:, :num_columns], index_N, splits_B1, weights, "sum")


def bags_by_shard(
    ids_N: I64,
    splits_B1: I64,
    weights: F32 | None,
    slab_rows: int,
    num_shards: int,
    offset: int,
) -> tuple[I64, I64, F32, I64]:
    """(local rows, row splits per shard, weights, shard splits), shard by shard, stable."""
    slab_N, place_N = np.divmod(ids_N, slab_rows)
    shard_N = (slab_N + offset) % num_shards
    local_N = slab_N // num_shards * slab_rows + place_N
    bag_N = np.repeat(np.arange(splits_B1.size - 1), np.diff(splits_B1))
    order = np.argsort(shard_N, kind="stable")
    row_splits = np.array(
        [
            [np.count_nonzero((shard_N == k) & (bag_N < b)) for b in range(splits_B1.size)]
            for k in range(num_shards)
        ],
        dtype=np.int64,
    )
    shard_splits = np.array([np.count_nonzero(shard_N < k) for k in range(num_shards + 1)])
    kept = np.zeros(0, dtype=f32) if weights is None else weights[order]
    return local_N[order], row_splits, kept, shard_splits


@quiet
def bag_divisors(splits_B1: I64, weights: F32 | None, combiner: str) -> F32:
    """float32 [B]: what each bag's sum is divided by."""
    w = np.ones(splits_B1[-1], dtype=f32) if weights is None else weights
    bags = [w[start:stop] for start, stop in pairwise(splits_B1)]
    return np.array([reference.divisor(bag, combiner) for bag in bags], dtype=f32)


@quiet
def divide_weights(splits_B1: I64, weights_N: F32, divisors_B: F32) -> F32:
    """float32 [N]: each entry's weight by its bag's divisor; 0 where that is 0."""
    out = np.zeros_like(weights_N)
    for total, (start, stop) in zip(divisors_B, pairwise(splits_B1), strict=True):
        if total != 0:
            out[start:stop] = weights_N[start:stop] / total
    return out
