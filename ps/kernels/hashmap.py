"""An open-addressing hash map of int64 keys in plain arrays; `ps.keymap.KeyMap` owns the arrays.

An arena is int64 [lines, 8], its lines a power of two. A line is a cache line of four slots: four
keys, then their rows plus one, 0 for an empty slot: so any int64 can be a key, and an arena of
zeros is an empty map. The upper bits of a key's hash name its home. A key lies in the first line
from there on (the last is followed by the first) that had room: all lines between its home and
itself are full, and a line with room ends a search. Erasing keeps that so by pulling back keys that
had overflowed; tombstones would make searches longer with age.

While a map grows it has two arenas. Lines of the old one are moved in order: a key is in the new
one if its old home comes before the cursor, else in the old one. The cursor stops behind a line
that had room, so that no key's search begins before it and ends after it. Old and new homes have
the same order: moving reads and writes memory in order, and takes new pages one by one.

A batch is searched in two stages, `_AHEAD` keys apart: the first finds a key's home and lets it
wait in the output while memory fetches it and the line after it; the second compares the whole line
at once, without a branch on what it finds unless the line is full.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ps.kernels import inline, kernel
from ps.kernels.random import mix64
from ps.kernels.vector import CACHE_LINE, prefetch
from ps.ragged import I64

SLOTS = 4
NUM_KEYS, NUM_ROWS, CURSOR, NUM_MOVED = range(4)
"""What `state` holds: keys, rows ever used, the old line to move next, lines moved so far."""

_AHEAD = 64
_HALF = CACHE_LINE // 2  # where the rows of a line begin
_SALT = np.uint64(0x6A09E667F3BCC909)  # keys in the order of their `mix64` would fill line by line
_ROOM = np.int64(-(2**63))
_ROW = np.int64(2**63 - 1)
_WORD, _LANES = ir.IntType(64), ir.VectorType(ir.IntType(64), SLOTS)
_int64: Any = np.int64  # for the type checker, the ints of kernels are int


class _Arenas(NamedTuple):
    """Addresses of the arena and of the old one; while nothing moves, both are the same."""

    base: int
    end: int
    shift: np.uint64
    old_base: int
    old_end: int
    old_shift: np.uint64
    cursor: int


# --- one line ------------------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def _match(context: Any, line: int, key: int) -> Any:
    """A key's row + 1 if this line has it, else 0; with the bit `_ROOM` if the line has room."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zeros, room = (ir.Constant(_LANES, [n] * SLOTS) for n in (0, int(_ROOM)))
        keys, rows = (_lanes(builder, args[0], offset) for offset in (0, _HALF))
        same = builder.icmp_signed("==", keys, _spread(builder, args[1]))
        empty = builder.icmp_signed("==", rows, zeros)
        found = builder.or_(builder.select(same, rows, zeros), builder.select(empty, room, zeros))
        name = f"llvm.vector.reduce.or.v{SLOTS}i64"
        kind = ir.FunctionType(_WORD, [_LANES])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [found])

    return types.int64(line, key), emit


@intrinsic  # type: ignore[untyped-decorator]
def _slot_of(context: Any, line: int, place: int) -> Any:
    """The address of the first slot of a line with this row + 1 (0: that is empty); it has one."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = _lanes(builder, args[0], _HALF)
        same = builder.icmp_signed("==", rows, _spread(builder, args[1]))
        bits = builder.zext(builder.bitcast(same, ir.IntType(SLOTS)), _WORD)
        slot = builder.cttz(bits, ir.Constant(ir.IntType(1), 1))
        return builder.add(args[0], builder.shl(slot, _WORD(3)))

    return types.int64(line, types.int64), emit


def _lanes(builder: Any, line: Any, offset: int) -> Any:
    """The keys of a line, or its rows."""
    address = builder.add(line, _WORD(offset))
    return builder.load(builder.inttoptr(address, _LANES.as_pointer()), align=8)


def _spread(builder: Any, value: Any) -> Any:
    """A value in all lanes."""
    first = ir.Constant(ir.IntType(32), 0)
    lane = builder.insert_element(ir.Constant(_LANES, ir.Undefined), value, first)
    order = ir.Constant(ir.VectorType(first.type, SLOTS), [0] * SLOTS)
    return builder.shuffle_vector(lane, lane, order)


@intrinsic  # type: ignore[untyped-decorator]
def _load(context: Any, address: int) -> Any:
    """The int64 at an address."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _WORD.as_pointer()))

    return types.int64(address), emit


@intrinsic  # type: ignore[untyped-decorator]
def _store(context: Any, address: int, value: int) -> Any:
    """Write an int64 at an address."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], _WORD.as_pointer()))
        return context.get_dummy_value()

    return types.void(address, types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def _lowest_bit(context: Any, word: int) -> Any:
    """The number of the lowest bit that is set in a word; one is."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), emit


@inline
def _put(line: int, key: int, place: int) -> None:
    """Put a key and its row + 1 into a line that has room."""
    slot = _slot_of(line, 0)
    _store(slot, key)
    _store(slot + _HALF, place)


# --- lines of an arena ---------------------------------------------------------------------------


@inline
def _arenas(lines: I64, old_lines: I64, state: I64) -> _Arenas:
    base, old_base = _int64(lines.ctypes.data), _int64(old_lines.ctypes.data)
    return _Arenas(
        base,
        base + lines.size * 8,
        np.uint64(64 - _lowest_bit(lines.shape[0])),
        old_base,
        old_base + old_lines.size * 8,
        np.uint64(64 - _lowest_bit(old_lines.shape[0])),
        state[CURSOR],
    )


@inline
def _hash(key: int) -> np.uint64:
    return mix64(np.uint64(key) + _SALT)


@inline
def _home(base: int, hashed: np.uint64, shift: np.uint64) -> int:
    home: int = base + _int64(hashed >> shift) * CACHE_LINE
    return home


@inline
def _ask(key: int, arenas: _Arenas) -> int:
    """The address of a key's home; it is asked for, and the line after it, which may be needed."""
    hashed = _hash(key)
    line = _home(arenas.old_base, hashed, arenas.old_shift)
    if line < arenas.old_base + arenas.cursor * CACHE_LINE:
        line = _home(arenas.base, hashed, arenas.shift)
    prefetch(line)
    prefetch(line + CACHE_LINE)
    return line


@inline
def _after(line: int, arenas: _Arenas) -> int:
    line += CACHE_LINE
    if line == arenas.end:
        return arenas.base
    return arenas.old_base if line == arenas.old_end else line


@inline
def _search(key: int, line: int, arenas: _Arenas) -> tuple[int, int]:
    """From a key's home on: (the line with the key, else the first with room; its match)."""
    match = _match(line, key)
    while match == 0:
        line = _after(line, arenas)
        match = _match(line, key)
    return line, match


@inline
def _close_gap(slot: int, line: int, arenas: _Arenas) -> None:
    """Refill a slot emptied in a full line with a key that had to pass the line, and so on."""
    in_old = arenas.old_base <= line < arenas.old_end
    base = arenas.old_base if in_old else arenas.base
    wrap = (arenas.old_end if in_old else arenas.end) - base - 1
    shift = arenas.old_shift if in_old else arenas.shift
    there, full = line, True
    while full:
        there = _after(there, arenas)
        full = _match(there, 0) >= 0
        for other in range(there, there + _HALF, 8):
            home = _home(base, _hash(_load(other)), shift)
            if _load(other + _HALF) != 0 and (there - home) & wrap >= (there - line) & wrap:
                _store(slot, _load(other))
                _store(slot + _HALF, _load(other + _HALF))
                _store(other + _HALF, 0)
                slot, line = other, there
                break


# --- rows to give away ---------------------------------------------------------------------------
#
# Which rows are free, in a tree of words: word 0 is the root, word w has children 64·w + 1 to
# 64·w + 64, a bit says that its child is not 0, and the bits of the leaves are rows. These helpers
# take addresses: arrays passed to a function that LLVM does not inline are counted, atomically.


@inline
def _first_leaf(free_W: I64) -> int:
    leaf = 0
    while 64 * leaf + 1 < free_W.size:
        leaf = 64 * leaf + 1
    return leaf


@inline
def _free(row: int, root: int, leaf: int) -> None:
    """Mark a row as free."""
    word, bit = leaf + (row >> 6), row & 63
    while True:
        before = _load(root + 8 * word)
        _store(root + 8 * word, before | (1 << bit))
        if before != 0 or word == 0:
            return
        word, bit = (word - 1) >> 6, (word - 1) & 63


@inline
def _lowest_free(root: int, leaf: int) -> int:
    """Take the lowest free row; there is one."""
    word = 0
    while word < leaf:
        word = 64 * word + 1 + _lowest_bit(_load(root + 8 * word))
    row: int = (word - leaf) * 64 + _lowest_bit(_load(root + 8 * word))
    while True:
        left = _load(root + 8 * word)
        left &= left - 1
        _store(root + 8 * word, left)
        if left != 0 or word == 0:
            return row
        word = (word - 1) >> 6


# --- kernels -------------------------------------------------------------------------------------


@kernel(writes=("rows_N",))
def find(lines: I64, old_lines: I64, state: I64, keys_N: I64, rows_N: I64) -> None:
    """rows: the keys' rows, -1 where absent."""
    arenas = _arenas(lines, old_lines, state)
    for i in range(min(_AHEAD, keys_N.size)):
        rows_N[i] = _ask(keys_N[i], arenas)
    for i in range(keys_N.size):
        if i + _AHEAD < keys_N.size:
            rows_N[i + _AHEAD] = _ask(keys_N[i + _AHEAD], arenas)
        _, match = _search(keys_N[i], rows_N[i], arenas)
        rows_N[i] = (match & _ROW) - 1


@kernel(writes=("lines", "old_lines", "free_W", "state", "rows_N", "new_N"))
def insert(
    lines: I64, old_lines: I64, free_W: I64, state: I64, limit: int,
    keys_N: I64, rows_N: I64, new_N: I64,
) -> int:  # fmt: skip
    """rows: the keys' rows; absent keys get the lowest free row, and their positions go into new.

    Returns how many keys it came to: less than N if the map would then hold more than `limit`.
    """
    arenas = _arenas(lines, old_lines, state)
    root, leaf = _int64(free_W.ctypes.data), _first_leaf(free_W)
    before = state[NUM_KEYS]
    for i in range(min(_AHEAD, keys_N.size)):
        rows_N[i] = _ask(keys_N[i], arenas)
    for i in range(keys_N.size):
        if i + _AHEAD < keys_N.size:
            rows_N[i + _AHEAD] = _ask(keys_N[i + _AHEAD], arenas)
        line, match = _search(keys_N[i], rows_N[i], arenas)
        if match == _ROOM:
            if state[NUM_KEYS] == limit:
                return i
            new_N[state[NUM_KEYS] - before] = i
            state[NUM_KEYS] += 1
            if _load(root) != 0:
                match = _lowest_free(root, leaf) + 1
            else:
                state[NUM_ROWS] += 1
                match = _int64(state[NUM_ROWS])
            _put(line, keys_N[i], match)
        rows_N[i] = (match & _ROW) - 1
    return keys_N.size


@kernel(writes=("lines", "old_lines", "free_W", "state", "rows_N"))
def erase(lines: I64, old_lines: I64, free_W: I64, state: I64, keys_N: I64, rows_N: I64) -> None:
    """rows: the rows that the keys had, which are free now; -1 where absent."""
    arenas = _arenas(lines, old_lines, state)
    root, leaf = _int64(free_W.ctypes.data), _first_leaf(free_W)
    for i in range(min(_AHEAD, keys_N.size)):
        rows_N[i] = _ask(keys_N[i], arenas)
    for i in range(keys_N.size):
        if i + _AHEAD < keys_N.size:
            rows_N[i + _AHEAD] = _ask(keys_N[i + _AHEAD], arenas)
        line, match = _search(keys_N[i], rows_N[i], arenas)
        place = _int64(match & _ROW)
        rows_N[i] = place - 1
        if place == 0:
            continue
        slot = _slot_of(line, place)
        _store(slot + _HALF, 0)
        if match >= 0:
            _close_gap(slot, line, arenas)
        state[NUM_KEYS] -= 1
        if place <= state[NUM_ROWS]:  # not so for an insert that is taken back
            _free(place - 1, root, leaf)


@kernel(writes=("lines", "old_lines", "state"))
def move(lines: I64, old_lines: I64, state: I64, num_lines: int) -> None:
    """Move the next lines of the old arena to the new one, and on to the first that had room."""
    arenas = _arenas(lines, old_lines, state)
    line, full = arenas.cursor, False
    stop = min(line + num_lines, old_lines.shape[0])
    while line < stop or full:
        address = arenas.old_base + (line & (old_lines.shape[0] - 1)) * CACHE_LINE
        full = _match(address, 0) >= 0
        for slot in range(address, address + _HALF, 8):
            place = _load(slot + _HALF)
            if place != 0:
                _store(slot + _HALF, 0)
                _move_one(_load(slot), place, line, arenas)
        line += 1
    state[NUM_MOVED] += line - arenas.cursor
    state[CURSOR] = line


@inline
def _move_one(key: int, place: int, line: int, arenas: _Arenas) -> None:
    """Put a key of an old line where it belongs: nearly always into the new arena."""
    hashed = _hash(key)
    to = _home(arenas.old_base, hashed, arenas.old_shift)
    # A later home: it overflowed past the end of the arena, from lines whose turn is to come.
    if to <= arenas.old_base + line * CACHE_LINE:
        to = _home(arenas.base, hashed, arenas.shift)
    while _match(to, 0) >= 0:
        to = _after(to, arenas)
    _put(to, key, place)


@kernel(writes=("free_W",))
def free_rows(free_W: I64, rows_N: I64) -> None:
    """Mark rows as free."""
    root, leaf = _int64(free_W.ctypes.data), _first_leaf(free_W)
    for i in range(rows_N.size):
        _free(rows_N[i], root, leaf)


@kernel(writes=("keys_R", "taken_R"))
def keys_by_row(lines: I64, keys_R: I64, taken_R: npt.NDArray[np.bool_]) -> None:
    """Write an arena's keys to the places of their rows, and mark these as taken."""
    for line in range(lines.shape[0]):
        for slot in range(SLOTS):
            row = lines[line, SLOTS + slot] - 1
            if row >= 0:
                keys_R[row] = lines[line, slot]
                taken_R[row] = True
