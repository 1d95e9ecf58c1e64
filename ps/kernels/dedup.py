"""Distinct ids of a batch and where each entry finds its row.

One pass over an open-addressing hash table; the distinct ids keep the order of first appearance,
then a counting sort makes them shard-major.
"""

from __future__ import annotations

import numpy as np

from ps.kernels import kernel
from ps.kernels.random import mix64
from ps.ragged import I64


@kernel
def first_out_of_range(ids_N: I64, num_rows: int) -> int:
    """Position of the first id outside [0, num_rows), -1 if there is none."""
    for i in range(ids_N.size):
        if ids_N[i] < 0 or ids_N[i] >= num_rows:
            return i
    return -1


@kernel
def distinct_ids(ids_N: I64) -> tuple[I64, I64]:
    """(unique_U, inverse_N) with `unique[inverse] == ids`, unique in order of first appearance."""
    size = 16
    while size < 2 * ids_N.size:
        size *= 2
    mask = np.uint64(size - 1)
    places = np.full(size, -1, dtype=np.int64)
    unique = np.empty(ids_N.size, dtype=np.int64)
    inverse = np.empty(ids_N.size, dtype=np.int64)
    count = 0
    for i in range(ids_N.size):
        key = ids_N[i]
        h = mix64(np.uint64(key)) & mask
        while places[h] >= 0 and unique[places[h]] != key:
            h = (h + np.uint64(1)) & mask
        if places[h] < 0:
            places[h] = count
            unique[count] = key
            count += 1
        inverse[i] = places[h]
    return unique[:count].copy(), inverse


@kernel
def shard_major(
    unique_U: I64, inverse_N: I64, slab_rows: int, num_shards: int, offset: int
) -> tuple[I64, I64, I64, I64]:
    """Order distinct ids by shard and find their rows there.

    Slab s = id div slab_rows lives on shard (s + offset) mod num_shards, as its s div num_shards-th
    slab. Returns (ids_U, local_rows_U, shard_splits, inverse_N), all in the new order; shard k owns
    entries `shard_splits[k]:shard_splits[k + 1]`.
    """
    splits = np.zeros(num_shards + 1, dtype=np.int64)
    for u in range(unique_U.size):
        splits[(unique_U[u] // slab_rows + offset) % num_shards + 1] += 1
    for k in range(num_shards):
        splits[k + 1] += splits[k]
    cursor = splits.copy()
    place = np.empty(unique_U.size, dtype=np.int64)
    ids = np.empty(unique_U.size, dtype=np.int64)
    local = np.empty(unique_U.size, dtype=np.int64)
    for u in range(unique_U.size):
        slab = unique_U[u] // slab_rows
        k = (slab + offset) % num_shards
        p = cursor[k]
        cursor[k] += 1
        place[u] = p
        ids[p] = unique_U[u]
        local[p] = slab // num_shards * slab_rows + unique_U[u] % slab_rows
    inverse = np.empty(inverse_N.size, dtype=np.int64)
    for i in range(inverse_N.size):
        inverse[i] = place[inverse_N[i]]
    return ids, local, splits, inverse
