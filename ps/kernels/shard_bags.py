"""Bags that the shards combine: cut by shard, summed there, and what divides the sums.

A bag's entries keep their order on every shard, so each part of a sum is always taken in the same
order. A divisor needs all weights of its bag: whoever puts the parts together divides.
"""

from __future__ import annotations

import numpy as np

from ps.kernels.combine import COMBINER_CODES, _combine_for, _kernels
from ps.kernels.compiled import kernel
from ps.kernels.dedup import _count_by_shard
from ps.kernels.gradients import _divisor, _quotient
from ps.ragged import F32, I64

_SUM = COMBINER_CODES["sum"]
_ONE = np.uint64(1)

# Places are unsigned in all loops, or numba would look for those that count from the end.


def sum_bags(records_VR: F32, index_N: I64, splits_B1: I64, weights_N: F32, out_BD: F32) -> None:
    """out[b] = Σ_{i in bag b} w_i · records[index_i], of longer records their first D columns.

    Sums run in float32, entry by entry; an empty bag is 0. `weights_N` of size 0 means all ones.
    The bits are those of `combine_rows` with the combiner sum. `splits_B1` may start anywhere, so
    that threads can take spans of bags.
    """
    num_columns, width = out_BD.shape[1], records_VR.shape[1]
    assert num_columns <= width
    # Never past the caches: sums are few beside the rows, and are sent next.
    for first, combine in _kernels(_combine_for, "float32", num_columns, num_columns == width):
        combine(records_VR, first, index_N, splits_B1, weights_N, _SUM, False, out_BD)


def bags_by_shard(
    ids_N: I64, splits_B1: I64, weights_N: F32, slab_rows: int, num_shards: int, offset: int
) -> tuple[I64, I64, F32, I64]:
    """Order the entries of bags by shard, in their own order within each, and find their rows.

    Slabs are those of `distinct_by_shard`; ids may repeat, and none is negative. `weights_N` of
    size 0 stays so.

    Returns:
        local_rows int64 [N], row_splits int64 [num_shards, B + 1], weights float32 [N] and
        shard_splits int64 [num_shards + 1]: shard k owns entries
        `shard_splits[k]:shard_splits[k + 1]`, of which bag b has `row_splits[k, b:b + 2]`. With
        one shard they are the arrays that were given.
    """
    if num_shards == 1:
        return ids_N, splits_B1[None], weights_N, splits_B1[[0, -1]]
    return _by_shard(ids_N, splits_B1, weights_N, slab_rows, num_shards, offset)


@kernel()
def _by_shard(
    ids_N: I64, splits_B1: I64, weights_N: F32, slab_rows: int, num_shards: int, offset: int
) -> tuple[I64, I64, F32, I64]:
    splits = np.zeros(num_shards + 2, dtype=np.int64)
    place, shard = _count_by_shard(ids_N, slab_rows, num_shards, offset, splits)
    starts = splits.copy()
    local, weights = np.empty_like(place), np.empty(weights_N.size, dtype=np.float32)
    row_splits = np.zeros((num_shards, splits_B1.size), dtype=np.int64)
    weighted = weights_N.size > 0
    for b in range(splits_B1.size - 1):
        for i in range(np.uint64(splits_B1[b]), np.uint64(splits_B1[b + 1])):
            cursor = np.uint64(shard[i]) + _ONE
            p = np.uint64(splits[cursor])
            splits[cursor] += 1
            local[p] = place[i]
            if weighted:
                weights[p] = weights_N[i]
        for k in range(num_shards):
            row_splits[k, b + 1] = splits[k + 1] - starts[k + 1]
    return local, row_splits, weights, splits[: num_shards + 1]


@kernel(writes=("out_B",))
def bag_divisors(splits_B1: I64, weights_N: F32, combiner: int, out_B: F32) -> None:
    """out[b] = 1 (sum), Σw (mean) or √Σw² (sqrtn) of bag b, in float32, in entry order.

    The divisors of `combine_rows`: 0 for an empty bag, but for sum. `weights_N` of size 0 means all
    ones.
    """
    weighted = weights_N.size > 0
    for b in range(np.uint64(out_B.size)):
        start, stop = np.uint64(splits_B1[b]), np.uint64(splits_B1[b + _ONE])
        out_B[b] = _divisor(weights_N.ctypes.data, weighted, start, stop, combiner)


@kernel(writes=("out_N",))
def divide_weights(splits_B1: I64, weights_N: F32, divisors_B: F32, out_N: F32) -> None:
    """out[i] = w_i / divisor_b for every entry i of bag b; 0 where that is 0."""
    for b in range(np.uint64(divisors_B.size)):
        for i in range(np.uint64(splits_B1[b]), np.uint64(splits_B1[b + _ONE])):
            out_N[i] = _quotient(weights_N[i], divisors_B[b])
