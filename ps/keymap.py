"""`KeyMap`: which row of an array each int64 key has, for tables whose keys come and go.

It owns the memory of the hash map in `ps.kernels.hashmap`, when it grows, and which rows are free.
It knows nothing of the rows' values.
"""

from __future__ import annotations

import numpy as np

from ps import memory
from ps.errors import InputError
from ps.kernels import hashmap
from ps.kernels.hashmap import CURSOR, NUM_KEYS, NUM_MOVED, NUM_ROWS, SLOTS
from ps.kernels.vector import CACHE_LINE
from ps.ragged import I64

_MIN_LINES = 2
_MOVED_PER_KEY = 4
"""Old lines moved per key of a batch: an arena is empty after a tenth of the inserts it takes to
fill the next one."""


class KeyMap:
    """A map of int64 keys to rows 0, 1, 2, ...: a new key gets the lowest row that is free.

    The rows that a sequence of calls gives do not depend on the machine, nor on the capacity.
    Growing does not stop the world: every `insert` and `erase` moves a few slots per key of its
    batch, as long as there are slots to move.

    One thread may change the map while no other uses it; any number may `find` at the same time.
    """

    def __init__(self, capacity: int = 0) -> None:
        """A map with room for `capacity` keys before it grows."""
        num_lines = _MIN_LINES
        while _limit(num_lines) < capacity:
            num_lines *= 2
        self._lines = self._old_lines = _new_lines(num_lines)
        self._free = _new_free(num_lines)
        self._state = np.zeros(4, dtype=np.int64)

    def __len__(self) -> int:
        """How many keys it holds."""
        return int(self._state[NUM_KEYS])

    @property
    def num_rows(self) -> int:
        """One more than the highest row ever given: what arrays of rows must have."""
        return int(self._state[NUM_ROWS])

    @property
    def moved_slots(self) -> int:
        """Slots moved to larger arenas so far, empty ones too: what growing has cost."""
        return int(self._state[NUM_MOVED]) * SLOTS

    def find(self, keys_N: I64) -> I64:
        """int64 [N]: the keys' rows, -1 where absent.

        Raises:
            InputError: `keys_N` is no int64 array of rank 1.
        """
        keys_N = _checked("keys", keys_N)
        rows_N = np.empty(keys_N.size, dtype=np.int64)
        hashmap.find(self._lines, self._old_lines, self._state, keys_N, rows_N)
        return rows_N

    def insert(self, keys_N: I64) -> tuple[I64, I64]:
        """(rows_N, new_M): the keys' rows, and the positions in `keys_N` of keys that were absent.

        A new key that is repeated gets one row, and its first position is in new_M, which is in
        ascending order. Row by row, what `keys_N[new_M]` got is `rows_N[new_M]`.

        Raises:
            InputError: `keys_N` is no int64 array of rank 1.
            MemoryError: no memory to grow; the map is as it was.
        """
        keys_N = _checked("keys", keys_N)
        rows_N, new_N = np.empty(keys_N.size, dtype=np.int64), np.empty(keys_N.size, dtype=np.int64)
        rows_before = self.num_rows
        done = num_new = 0
        while True:
            self._move(keys_N.size - done)
            before = len(self)
            came_to = hashmap.insert(
                self._lines, self._old_lines, self._free, self._state, _limit(len(self._lines)),
                keys_N[done:], rows_N[done:], new_N[num_new:],
            )  # fmt: skip
            new_N[num_new : num_new + len(self) - before] += done
            num_new += len(self) - before
            done += came_to
            if done == keys_N.size:
                return rows_N, new_N[:num_new]
            try:
                self._grow()
            except MemoryError:
                self._undo(keys_N, new_N[:num_new], rows_N[:num_new], rows_before)
                raise

    def erase(self, keys_N: I64) -> I64:
        """int64 [N]: the rows that the keys had, which are free now; -1 where absent.

        Raises:
            InputError: `keys_N` is no int64 array of rank 1.
        """
        keys_N = _checked("keys", keys_N)
        rows_N = np.empty(keys_N.size, dtype=np.int64)
        self._move(keys_N.size)
        hashmap.erase(self._lines, self._old_lines, self._free, self._state, keys_N, rows_N)
        return rows_N

    def keys(self) -> I64:
        """int64 [K]: the keys in ascending order of their rows."""
        return self.items()[0]

    def items(self) -> tuple[I64, I64]:
        """(keys_K, rows_K): keys and their rows, in ascending order of the rows."""
        keys_R = np.empty(self.num_rows, dtype=np.int64)
        taken_R = np.zeros(self.num_rows, dtype=np.bool_)
        hashmap.keys_by_row(self._lines, keys_R, taken_R)
        if self._moving:
            hashmap.keys_by_row(self._old_lines, keys_R, taken_R)
        return keys_R[taken_R], np.flatnonzero(taken_R)

    def to_arrays(self) -> tuple[I64, I64, int]:
        """(keys_K, rows_K, num_rows): all that `from_arrays` needs to go on in the same way."""
        return *self.items(), self.num_rows

    @classmethod
    def from_arrays(cls, keys_K: I64, rows_K: I64, num_rows: int) -> KeyMap:
        """A map of these keys and rows; the other rows below `num_rows` are free.

        Raises:
            InputError: the arrays are not both int64 [K], a key or a row is there twice, a row is
                outside [0, num_rows), or that is less than 0.
        """
        keys_K, rows_K = _checked("keys", keys_K), _checked("rows", rows_K)
        if keys_K.size != rows_K.size:
            raise InputError(f"{keys_K.size} keys cannot have {rows_K.size} rows")
        if num_rows < 0:
            raise InputError(f"num_rows is {num_rows}, which is less than 0")
        outside = np.flatnonzero((rows_K < 0) | (rows_K >= num_rows))
        if outside.size:
            raise InputError(f"row {rows_K[outside[0]]} is outside [0, {num_rows})")
        taken_R = np.zeros(num_rows, dtype=np.bool_)
        taken_R[rows_K] = True
        if np.count_nonzero(taken_R) != rows_K.size:
            raise InputError("two keys have the same row")
        keys_R = np.empty(num_rows, dtype=np.int64)
        keys_R[rows_K] = keys_K
        made = cls(num_rows)
        made._state[NUM_ROWS] = num_rows
        # With just these rows free, keys in the order of their rows get their own.
        hashmap.free_rows(made._free, rows_K)
        _, new_K = made.insert(keys_R[taken_R])
        if new_K.size != keys_K.size:
            raise InputError("two rows have the same key")
        hashmap.free_rows(made._free, np.flatnonzero(~taken_R))
        return made

    @property
    def _moving(self) -> bool:
        return self._old_lines is not self._lines

    def _grow(self) -> None:
        """Start to move to an arena of twice the size."""
        assert not self._moving, "moving is faster than filling"
        num_lines = 2 * len(self._lines)
        # A full map has no free rows below its limit: nothing to carry over.
        self._lines, self._free = _new_lines(num_lines), _new_free(num_lines)

    def _move(self, num_keys: int) -> None:
        """Move what a batch has to move."""
        if self._moving:
            hashmap.move(self._lines, self._old_lines, self._state, _MOVED_PER_KEY * num_keys)
            if self._state[CURSOR] >= len(self._old_lines):
                self._old_lines = self._lines
                self._state[CURSOR] = 0

    def _undo(self, keys_N: I64, new_M: I64, scratch_M: I64, num_rows: int) -> None:
        """Take back an insert, without asking for memory."""
        np.take(keys_N, new_M, out=scratch_M, mode="clip")
        self._state[NUM_ROWS] = num_rows
        hashmap.erase(self._lines, self._old_lines, self._free, self._state, scratch_M, new_M)


def _limit(num_lines: int) -> int:
    """The number of keys at which an arena is full: five eighths of its slots."""
    return num_lines * SLOTS * 5 // 8


def _new_lines(num_lines: int) -> I64:
    lines: I64 = memory.zeros((num_lines, CACHE_LINE // 8), np.int64)
    return lines


def _new_free(num_lines: int) -> I64:
    """No free row, in a tree that can mark `_limit(num_lines)` of them."""
    leaves, above = -(-_limit(num_lines) // 64), 0
    while 63 * above + 1 < leaves:
        above = 64 * above + 1
    free: I64 = memory.zeros((above + leaves,), np.int64)
    return free


def _checked(name: str, values: I64) -> I64:
    if isinstance(values, np.ndarray) and values.dtype == np.int64 and values.ndim == 1:
        return np.ascontiguousarray(values)
    got = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else repr(type(values))
    raise InputError(f"{name} must be an int64 array of rank 1, not {got}")
