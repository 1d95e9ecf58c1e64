"""Distinct ids of a batch, where each entry finds its row, and on which shard each row lies.

A hash table numbers the ids in order of first appearance. Its loop has no branch that depends on
whether an id is new, which nobody could predict, and asks for what it will need ahead of time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ps.kernels.compiled import inline, kernel
from ps.kernels.vector import prefetch, prefetch_to_write
from ps.ragged import I64

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

_CHECKED_AT_ONCE = np.uint64(512)

_SLOTS_PER_ID = 4
"""Most slots of the hash table are empty, so that an id is nearly always found at the first."""
_SMALL_TABLE_BITS = 15
"""A table of so many bits (128 KiB) is not worth starting smaller."""
_GROWTH_BITS = 4
"""Bigger ones start 2⁴ times smaller: few distinct ids then stay in the caches."""

_AHEAD, _SOON = np.uint64(64), np.uint64(20)
"""Entries from asking for a slot of the table to using it, and for the key that it names."""

_ONE = np.uint64(1)
_MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)

# Places are unsigned in all loops, or numba would look for those that count from the end.


@kernel()
def first_out_of_range(ids_N: I64, num_rows: int) -> int:
    """Position of the first id outside [0, num_rows), -1 if there is none."""
    start, size, end = np.uint64(0), np.uint64(ids_N.size), np.uint64(num_rows)
    while start < size:
        stop = min(start + _CHECKED_AT_ONCE, size)
        num_bad = np.int64(0)
        for i in range(start, stop):  # without a way out, so that it becomes SIMD
            num_bad += np.int64(np.uint64(ids_N[i]) >= end)
        if num_bad:
            for i in range(start, stop):
                if np.uint64(ids_N[i]) >= end:
                    return int(np.int64(i))
        start = stop
    return -1


@kernel()
def distinct_ids(ids_N: I64) -> tuple[I64, I64]:
    """(unique_U, inverse_N) with `unique[inverse] == ids`, unique in order of first appearance."""
    return _number(ids_N)


@kernel()
def distinct_by_shard(
    ids_N: I64, slab_rows: int, num_shards: int, offset: int
) -> tuple[I64, I64, I64, I64]:
    """Deduplicate ids, order them by shard and find their rows there.

    Slab s = id div slab_rows lives on shard (s + offset) mod num_shards, as its s div num_shards-th
    slab; `slab_rows` is a power of two and offset < num_shards. No id is negative. Returns
    (ids_U, local_rows_U, shard_splits, inverse_N) with `ids[inverse] == ids_N`; shard k owns
    entries `shard_splits[k]:shard_splits[k + 1]`, in order of first appearance.
    """
    unique, inverse = _number(ids_N)
    splits = np.zeros(num_shards + 2, dtype=np.int64)
    if num_shards == 1:
        splits[1] = unique.size
        return unique, unique, splits[:2], inverse
    ids, local = np.empty_like(unique), np.empty_like(unique)
    # Once per distinct id, while they are in the caches: in the loop over all entries it is slower.
    place, shard = _count_by_shard(unique, slab_rows, num_shards, offset, splits)
    for u in range(np.uint64(unique.size)):
        cursor = np.uint64(shard[u]) + _ONE
        p = np.uint64(splits[cursor])
        splits[cursor] += 1
        ids[p], local[p], place[u] = unique[u], place[u], p
    for i in range(np.uint64(inverse.size)):
        inverse[i] = place[np.uint64(inverse[i])]
    return ids, local, splits[: num_shards + 1], inverse


@inline
def _count_by_shard(
    unique_U: I64, slab_rows: int, num_shards: int, offset: int, splits: I64
) -> tuple[I64, U32]:
    """(local rows, shards) of distinct ids; shard k's entries start at `splits[k + 1]` then."""
    slab_bits, in_slab = np.uint64(0), np.uint64(slab_rows - 1)
    while in_slab >> slab_bits:
        slab_bits += _ONE
    shards = np.uint64(num_shards)
    local = np.empty(unique_U.size, dtype=np.int64)
    shard = np.empty(unique_U.size, dtype=np.uint32)
    for u in range(np.uint64(unique_U.size)):
        key = np.uint64(unique_U[u])
        slab = key >> slab_bits
        turn = slab // shards
        k = slab - turn * shards + np.uint64(offset)
        k = k - shards if k >= shards else k
        local[u] = (turn << slab_bits) | (key & in_slab)
        shard[u] = k
        splits[k + np.uint64(2)] += 1
    for shard_id in range(num_shards):
        splits[shard_id + 2] += splits[shard_id + 1]
    return local, shard


@inline
def _number(ids_N: I64) -> tuple[I64, I64]:
    """`distinct_ids`. The table starts small and grows to what the ids so far foretell."""
    most = 1
    while (1 << most) < _SLOTS_PER_ID * ids_N.size:
        most += 1
    bits = most if most <= _SMALL_TABLE_BITS else most - _GROWTH_BITS
    slots = np.empty(1 << most, dtype=np.uint32)  # 2³² ids would be 32 GiB of them
    keys = np.empty(ids_N.size + 2, dtype=np.int64)
    inverse = np.empty(ids_N.size, dtype=np.int64)
    hashes = np.zeros(_AHEAD, dtype=np.uint64)
    for i in range(min(_AHEAD, np.uint64(ids_N.size))):
        hashes[i] = _hash(ids_N[i])
    start, count = np.uint64(0), np.uint64(0)
    while start < np.uint64(ids_N.size):
        _fill(slots, bits, keys, count)
        start, count = _number_until_full(ids_N, start, slots, bits, keys, count, hashes, inverse)
        wanted = _SLOTS_PER_ID * (np.float64(count) / np.float64(start)) * ids_N.size
        while (1 << bits) < wanted:
            bits += 1
    return keys[1 : np.int64(count) + 1], inverse


@inline
def _number_until_full(
    ids_N: I64,
    start: np.uint64,
    slots: U32,
    bits: int,
    keys: I64,
    count: np.uint64,
    hashes: U64,
    inverse_N: I64,
) -> tuple[np.uint64, np.uint64]:
    """Number entries from `start`; where it stopped, and how many distinct ids there are then.

    A slot holds the number of an id, counted from 1, or 0: `keys[number]` is that id, and
    `keys[0]` the one that is looked for, so that an empty slot looks like a find. Hashes are
    computed once, `_AHEAD` entries early, and kept in a ring: entry i's at i mod `_AHEAD`.
    """
    shift, mask = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
    room = np.uint64((1 << bits) // _SLOTS_PER_ID)
    size = np.uint64(ids_N.size)
    for i in range(start, size):
        slot = hashes[i % _AHEAD] >> shift
        soon = slots[hashes[(i + _SOON) % _AHEAD] >> shift]
        prefetch(keys.ctypes.data + 8 * np.int64(soon))
        hashes[i % _AHEAD] = hash_ahead = _hash(ids_N[min(i + _AHEAD, size - _ONE)])
        prefetch_to_write(slots.ctypes.data + 4 * np.int64(hash_ahead >> shift))
        key = ids_N[i]
        keys[0] = key
        number = np.uint64(slots[slot])
        while keys[number] != key:
            slot = (slot + _ONE) & mask
            number = np.uint64(slots[slot])
        new = np.uint64(number == 0)
        number += new * (count + _ONE)
        slots[slot] = number
        keys[count + _ONE] = key
        count += new
        inverse_N[i] = number - _ONE
        if count > room:
            return i + _ONE, count
    return size, count


@inline
def _fill(slots: U32, bits: int, keys: I64, count: np.uint64) -> None:
    """Empty the first 2^bits slots and put `keys[1:count + 1]` there."""
    shift, mask = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
    slots[: 1 << bits] = 0
    for number in range(_ONE, count + _ONE):
        ahead = _hash(keys[min(number + _AHEAD, count)]) >> shift
        prefetch_to_write(slots.ctypes.data + 4 * np.int64(ahead))
        slot = _hash(keys[number]) >> shift
        while slots[slot]:
            slot = (slot + _ONE) & mask
        slots[slot] = number


@inline
def _hash(key: int) -> np.uint64:
    """64 bits of which the upper ones are good.

    After one multiplication, some arithmetic progressions of ids would lie in one heap.
    """
    h = np.uint64(key) * _MIX_1
    return (h ^ (h >> np.uint64(32))) * _MIX_2
