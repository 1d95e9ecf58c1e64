"""`KeyMap` gives what its dict twin gives, at every moment of growing, and never stops to grow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ps import keymap, memory
from ps.errors import InputError
from ps.kernels import hashmap
from ps.keymap import KeyMap
from ps.ragged import I64
from tests.support.guarded import guarded
from tests.support.reference import unmix64
from tests.support.reference_map import ReferenceMap
from tests.support.strategies import frozen, unaligned

INT64 = np.iinfo(np.int64)
MOVED_PER_KEY = 16
"""Slots; as many again if growth begins within a batch."""


def i64(*values: int) -> I64:
    return np.array(values, dtype=np.int64)


def key_at(hashed: int) -> int:
    """The key with this hash: it names the key's home at every size."""
    key = (unmix64(hashed) - int(hashmap._SALT)) % 2**64
    return key - 2**64 if key >= 2**63 else key


# Keys that share their home in the first, the middle or the last line of every arena, so that they
# overflow, also past the end; and keys that look special.
CROWDED = [key_at(start + n) for start in (0, 2**63, 2**64 - 12) for n in range(12)]
SPECIAL = [-1, 0, 1, int(INT64.min), int(INT64.max)]
POOL = i64(*CROWDED, *SPECIAL)
KEYS = st.lists(st.sampled_from(POOL.tolist()) | st.integers(-40, 40), max_size=12)


def batch(keys: list[int]) -> I64:
    return np.array(keys, dtype=np.int64)


def same(got: Any, want: Any) -> None:
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w, strict=True)


class TwinMachine(RuleBasedStateMachine):
    """Starts with a map that is empty, or about to grow, and moves a line per key, not four."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(keymap, "_MOVED_PER_KEY", 1)

    def teardown(self) -> None:
        self.patch.undo()

    @initialize(capacity=st.sampled_from([0, 7, 40]), held=st.sampled_from([0, 19, 40, 79]))
    def start(self, capacity: int, held: int) -> None:
        self.map, self.twin = KeyMap(capacity), ReferenceMap()
        self.insert([*CROWDED, *range(1000, 1100)][:held])

    @rule(keys=KEYS)
    def insert(self, keys: list[int]) -> None:
        same(self.map.insert(batch(keys)), self.twin.insert(batch(keys)))

    @rule(keys=KEYS)
    def erase(self, keys: list[int]) -> None:
        same([self.map.erase(batch(keys))], [self.twin.erase(batch(keys))])

    @rule(first=st.integers(0, 30), count=st.integers(0, 12))
    def insert_one_by_one(self, first: int, count: int) -> None:
        for key in POOL[first : first + count]:
            self.insert([int(key)])
            self.equals_the_twin()

    @rule(first=st.integers(0, 30), count=st.integers(0, 12))
    def erase_one_by_one(self, first: int, count: int) -> None:
        for key in POOL[first : first + count]:
            self.erase([int(key)])
            self.equals_the_twin()

    @rule()
    def restore(self) -> None:
        self.map = KeyMap.from_arrays(*self.map.to_arrays())

    @invariant()
    def equals_the_twin(self) -> None:
        asked = np.concatenate([POOL, np.arange(-40, 40)])
        same([self.map.find(asked)], [self.twin.find(asked)])
        same(self.map.items(), self.twin.items())
        assert (len(self.map), self.map.num_rows) == (len(self.twin), self.twin.num_rows)


TestTwin = TwinMachine.TestCase
TestTwin.settings = settings(max_examples=40, stateful_step_count=20)


@given(keys=st.lists(st.integers(INT64.min, INT64.max) | st.integers(-9, 9), max_size=200))
@settings(max_examples=50)
def test_any_int64_is_a_key(keys: list[int]) -> None:
    mine, twin = KeyMap(), ReferenceMap()
    half = len(keys) // 2
    same(mine.insert(batch(keys[half:])), twin.insert(batch(keys[half:])))
    same([mine.find(batch(keys))], [twin.find(batch(keys))])
    same([mine.erase(batch(keys))], [twin.erase(batch(keys))])
    same([mine.find(batch(keys))], [twin.find(batch(keys))])


def test_a_new_key_that_is_repeated_gets_one_row() -> None:
    mine = KeyMap()
    mine.insert(i64(7))
    same(mine.insert(i64(9, 7, 9, 8, 9)), (i64(1, 0, 1, 2, 1), i64(0, 3)))
    assert len(mine) == mine.num_rows == 3


def test_erased_rows_are_given_again_lowest_first(rng: np.random.Generator) -> None:
    mine = KeyMap()
    keys = rng.permutation(300_000)
    same(mine.insert(keys), (np.arange(300_000), np.arange(300_000)))
    gone = rng.choice(keys, 100_000, replace=False)
    freed = mine.erase(gone)
    rows, _ = mine.insert(np.arange(-100_050, 0))
    same([rows], [np.append(np.sort(freed), np.arange(300_000, 300_050))])
    assert mine.num_rows == 300_050


def test_rows_depend_on_neither_batches_nor_capacity(rng: np.random.Generator) -> None:
    keys = rng.integers(-20_000, 20_000, 50_000)
    whole, pieces = KeyMap(), KeyMap(100_000)
    rows, new = whole.insert(keys)
    parts = [pieces.insert(part)[0] for part in np.array_split(keys, 999)]
    same([np.concatenate(parts)], [rows])
    same(whole.items(), pieces.items())
    same([keys[new]], [whole.keys()])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(4)


# --- growth -------------------------------------------------------------------------------------


def test_no_call_moves_more_than_its_share_while_growing_to_millions() -> None:
    mine, full = KeyMap(), 5 * 2**19
    mine.insert(np.arange(full))
    start = mine.moved_slots
    assert 2**22 - 8 <= start < 2**22 + 400, "every slot of every smaller arena, once"
    inserted, worst = full, 0
    while mine.moved_slots < start + 2**22:
        size = 1 if inserted < full + 2000 else 100
        before = mine.moved_slots
        same([mine.insert(np.arange(inserted, inserted + size))[0]], [np.arange(size) + inserted])
        worst = max(worst, mine.moved_slots - before - MOVED_PER_KEY * size)
        inserted += size
        asked = np.linspace(0, inserted - 1, 50).astype(np.int64)
        same([mine.find(asked)], [asked])
    assert worst < 400, "to the end of a run of full lines"
    assert inserted < 1.11 * full, "long before the next growth at twice as many"


@given(sizes=st.lists(st.integers(0, 300), max_size=30), erases=st.booleans())
@settings(max_examples=30)
def test_growth_is_over_before_the_next_and_erasing_moves_too(
    sizes: list[int], erases: bool
) -> None:
    mine, inserted = KeyMap(), 0
    for size in sizes:
        before = mine.moved_slots
        mine.insert(np.arange(inserted, inserted + size))
        assert mine.moved_slots - before <= 2 * MOVED_PER_KEY * size + 200
        if erases:
            before = mine.moved_slots
            mine.erase(np.arange(inserted, inserted + size // 2))
            assert mine.moved_slots - before <= MOVED_PER_KEY * size + 200
        inserted += size
    assert mine.find(np.arange(-5, 0)).max() == -1


@pytest.mark.parametrize("growths", [0, 1, 3])
def test_without_memory_to_grow_a_map_is_as_it_was(
    growths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, twin = KeyMap(), ReferenceMap()
    for target in (mine, twin):
        target.insert(np.arange(40))
        target.erase(i64(3, 17, 30))
    left = [2 * growths + growths % 2]  # two arrays for every growth; or one and not the other

    def zeros(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        return real_zeros(*args)

    real_zeros = memory.zeros
    with monkeypatch.context() as patch:
        patch.setattr(memory, "zeros", zeros)
        with pytest.raises(MemoryError):
            mine.insert(np.arange(20, 2000))
    same(mine.items(), twin.items())
    same([mine.find(np.arange(2000))], [twin.find(np.arange(2000))])
    assert mine.num_rows == twin.num_rows
    same(mine.insert(np.arange(30, 500)), twin.insert(np.arange(30, 500)))


# --- keys of every kind -------------------------------------------------------------------------


STRUCTURED = {
    "consecutive": np.arange(150_000),
    "negative": -np.arange(150_000),
    "stride 2^20": np.arange(150_000) << 20,
    "stride 2^46": np.arange(150_000) << 46,
    "stride a Fibonacci number": np.arange(150_000) * 1836311903,
    "pairs": (np.arange(150_000) // 387 << 32) + np.arange(150_000) % 387,
    "bits of floats": np.arange(150_000).astype(np.float64).view(np.int64),
    "mix64 in order": unmix64(np.arange(150_000, dtype=np.uint64) << np.uint64(40)).view(np.int64),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_keys_spread_like_random_ones(name: str, rng: np.random.Generator) -> None:
    def share_of_full_lines(keys: I64) -> float:
        mine = KeyMap(keys.size)
        mine.insert(keys)
        return float(np.mean((mine._lines[:, hashmap.SLOTS :] != 0).all(axis=1)))

    chance = share_of_full_lines(rng.integers(INT64.min, INT64.max, 150_000))
    assert share_of_full_lines(STRUCTURED[name]) == pytest.approx(chance, rel=0.05)


@pytest.mark.parametrize("kind", [frozen, unaligned, lambda keys: np.repeat(keys, 2)[::2]])
def test_keys_may_be_read_only_unaligned_or_strided(kind: Any) -> None:
    plain, other, keys = KeyMap(), KeyMap(), POOL.copy()
    same(other.insert(kind(keys)), plain.insert(keys))
    same([other.find(kind(keys))], [plain.find(keys)])
    same([other.erase(kind(keys[::3]))], [plain.erase(keys[::3])])
    same(KeyMap.from_arrays(*map(kind, other.items()), other.num_rows).items(), plain.items())
    same([keys], [POOL])


BAD_KEYS = [
    np.zeros(3),
    np.zeros(3, dtype=np.int32),
    np.zeros(3, dtype=np.uint64),
    np.zeros(3, dtype=">i8"),
    np.zeros((2, 3), dtype=np.int64),
    np.int64(3),
    [1, 2],
    None,
]


@pytest.mark.parametrize("bad", BAD_KEYS, ids=repr)
def test_other_keys_are_refused_and_nothing_changes(bad: Any) -> None:
    mine = KeyMap()
    mine.insert(POOL)
    before = mine.to_arrays()
    for call in (mine.find, mine.insert, mine.erase):
        with pytest.raises(InputError, match="keys must be an int64 array of rank 1, not"):
            call(bad)
    same(mine.to_arrays(), before)


# --- persistence, threads, memory ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "rows", "num_rows", "message"),
    [
        (i64(1, 2), i64(0), 2, "2 keys cannot have 1 rows"),
        (i64(1, 2), i64(0, 2), 2, r"row 2 is outside \[0, 2\)"),
        (i64(1, 2), i64(-1, 0), 2, r"row -1 is outside \[0, 2\)"),
        (i64(1, 2), i64(1, 1), 2, "two keys have the same row"),
        (i64(5, 5), i64(0, 1), 2, "two rows have the same key"),
        (i64(1, 2), np.zeros(2), 2, "rows must be an int64 array"),
        (np.zeros(2), i64(0, 1), 2, "keys must be an int64 array"),
        (i64(), i64(), -1, "num_rows is -1"),
    ],
)
def test_arrays_that_are_no_map_are_refused(
    keys: I64, rows: I64, num_rows: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        KeyMap.from_arrays(keys, rows, num_rows)


def test_arrays_may_be_in_any_order_and_leave_rows_free() -> None:
    mine = KeyMap.from_arrays(i64(30, 10), i64(3, 1), 6)
    same(mine.items(), (i64(10, 30), i64(1, 3)))
    same(mine.insert(np.arange(5)), (i64(0, 2, 4, 5, 6), np.arange(5)))


def test_threads_may_find_at_the_same_time(rng: np.random.Generator) -> None:
    mine, keys = KeyMap(), rng.permutation(200_000)
    mine.insert(keys)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(mine.find, np.array_split(keys, 7)))
    same([np.concatenate(rows)], [np.arange(200_000)])


@pytest.mark.parametrize("edge", ["start", "end"])
def test_nothing_is_touched_outside_the_arrays(
    edge: Literal["start", "end"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An access outside ends the process."""

    def zeros(shape: Any, dtype: Any) -> Any:
        return guarded(np.zeros(shape, dtype=dtype), edge)

    monkeypatch.setattr(memory, "zeros", zeros)
    monkeypatch.setattr("ps.keymap.np", SimpleNamespace(**{**vars(np), "empty": zeros}))
    mine, twin = KeyMap(), ReferenceMap()
    for some in (POOL[:9], POOL[5:40], np.arange(400), POOL):
        keys = guarded(some, edge)
        same(mine.insert(keys), twin.insert(keys))
        same([mine.find(keys)], [twin.find(keys)])
        same([mine.erase(keys[::2])], [twin.erase(keys[::2])])
        same([mine.find(keys)], [twin.find(keys)])
    same(mine.items(), twin.items())
