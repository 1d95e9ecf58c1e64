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
    return _first_out_of_range(ids_N, num_rows)


@kernel()
def first_out_of_tables(ids_N: I64, tables_T1: I64, num_rows_T: I64) -> int:
    """Position of the first id outside its table, -1 if there is none.

    Table t has ids `tables[t]:tables[t + 1]`, which must be in [0, num_rows[t]).
    """
    for t in range(num_rows_T.size):
        place = _first_out_of_range(ids_N[tables_T1[t] : tables_T1[t + 1]], num_rows_T[t])
        if place >= 0:
            return int(tables_T1[t]) + place
    return -1


@inline
def _first_out_of_range(ids_N: I64, num_rows: int) -> int:
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
    ids_N: I64, tables_T1: I64, slab_rows_T: I64, offsets_T: I64, num_shards: int
) -> tuple[I64, I64, I64, I64, I64]:
    """Deduplicate the ids of each table, order them by shard and find their rows there.

    Table t has ids `tables[t]:tables[t + 1]`, none negative. Its slab s = id div slab_rows[t], a
    power of two, lives on shard (s + offsets[t]) mod num_shards, as its s div num_shards-th slab;
    offsets < num_shards.

    Returns (ids_U, local_rows_U, distinct_T1, shard_splits_TK, inverse_N). Table t has the distinct
    ids `distinct[t]:distinct[t + 1]`, of which shard k owns entries `shard_splits[t, k]` to
    `shard_splits[t, k + 1]`, in order of first appearance. `inverse` counts from a table's first.
    """
    num_tables = tables_T1.size - 1
    ids, local = np.empty(ids_N.size, dtype=np.int64), np.empty(ids_N.size, dtype=np.int64)
    inverse = np.empty(ids_N.size, dtype=np.int64)
    distinct = np.zeros(num_tables + 1, dtype=np.int64)
    splits = np.zeros((num_tables, num_shards + 1), dtype=np.int64)
    for t in range(num_tables):
        start, stop, first = tables_T1[t], tables_T1[t + 1], distinct[t]
        unique, number = _number(ids_N[start:stop])
        last = distinct[t + 1] = first + unique.size
        if num_shards == 1:
            splits[t, 1] = unique.size
            ids[first:last], local[first:last], inverse[start:stop] = unique, unique, number
            continue
        place = _place_by_shard(
            unique, slab_rows_T[t], offsets_T[t], ids[first:last], local[first:last], splits[t]
        )
        for i in range(np.uint64(number.size)):
            inverse[np.uint64(start) + i] = place[np.uint64(number[i])]
    return ids[: distinct[num_tables]], local[: distinct[num_tables]], distinct, splits, inverse


@inline
def _place_by_shard(
    unique_U: I64, slab_rows: int, offset: int, ids_U: I64, local_U: I64, splits_K1: I64
) -> I64:
    """Write ids, local rows and splits in order of shard; where each distinct id went to."""
    num_shards = splits_K1.size - 1
    cursors = np.zeros(num_shards + 2, dtype=np.int64)
    # Once per distinct id, while they are in the caches: in the loop over all entries it is slower.
    place, shard = _count_by_shard(unique_U, slab_rows, num_shards, offset, cursors)
    for u in range(np.uint64(unique_U.size)):
        cursor = np.uint64(shard[u]) + _ONE
        p = np.uint64(cursors[cursor])
        cursors[cursor] += 1
        ids_U[p], local_U[p], place[u] = unique_U[u], place[u], p
    splits_K1[:] = cursors[: num_shards + 1]
    return place


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
