"""What a log gets of a shard's versions, what it may be told, and the shard that is made of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import ProtocolError, ShardNotReadyError
from ps.messages import LogEntry, Rows
from ps.optimizers import SGD, Adagrad
from ps.ragged import F32
from ps.shard import ShardState
from ps.shard_files import load_rows
from tests.support.shards import (
    P,
    S,
    contents,
    frozen,
    i64,
    make_step,
    mixed_shard,
    mixed_spec,
    pull_of,
    push_of,
    random_pull,
    random_push,
    same_contents,
    same_state,
    shard_of,
    started,
)


def logged(shard: ShardState) -> list[LogEntry]:
    entries: list[LogEntry] = []
    shard.on_version = entries.append
    return entries


def copied(entry: LogEntry) -> LogEntry:
    """As it comes back from a file: read-only arrays."""

    def fixed(array: Any) -> Any:
        array = array.copy()
        array.flags.writeable = False
        return array

    tables = tuple((fixed(rows), fixed(records)) for rows, records in entry.tables)
    return replace(entry, tables=tables, dense=fixed(entry.dense), state=fixed(entry.state))


# --- entries


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    steps=st.integers(1, 6),
    start=st.integers(0, 6),
    history=st.integers(0, 3),
    mode=st.sampled_from(["sync", "async"]),
)
def test_entries_make_the_shard_that_applied_the_pushes(
    seed: int, steps: int, start: int, history: int, mode: str
) -> None:
    shard = mixed_shard(history=history, mode=mode)
    entries = logged(shard)
    fences, rng = [0, 0], np.random.default_rng(seed)
    states = [frozen(shard)]
    kept: list[LogEntry] = []
    while min(fences) < steps:
        worker = int(rng.integers(2))
        if fences[worker] > min(fences) + 2:
            continue
        push = random_push(shard.spec, worker, fences[worker], seed)
        shard.push(push)
        fences[worker] += 1
        if len(entries) == len(states):
            kept.append(copied(entries[-1]))
            states.append(frozen(shard))
        if mode == "async":  # of a waiting one the arrays are still needed
            for array in (*push.local_rows, *push.grads, push.dense_grad):
                array[...] = 0
    assert [e.version for e in entries] == list(range(1, len(states)))
    assert [e.fences for e in entries] == [state[1] for state in states[1:]]
    other = mixed_shard(history=history, mode=mode)
    for version, (entry, state) in enumerate(zip(kept, states[1:], strict=True), start=1):
        other.apply_entry(entry)
        assert same_state(frozen(other), state)
        assert [other.done_step(worker) for worker in (0, 1)] == list(entry.fences)
        assert same_contents([*entry.dense, entry.state], contents(other)[-1 - len(entry.dense) :])
        if version == start:
            logged(other)  # may be there: what is replayed is not logged again
    for entry, first in zip(entries, kept, strict=True):
        for (rows, records), (rows_then, records_then) in zip(
            entry.tables, first.tables, strict=True
        ):
            assert np.unique(rows).size == rows.size
            np.testing.assert_array_equal(rows, rows_then)
            assert same_contents([records], [records_then])
    if mode == "sync":
        for version in range(max(0, shard.version - history), shard.version + 1):
            answers: list[Rows] = []
            for one in (shard, other):
                one.pull(random_pull(shard.spec, version, seed), answers.append)
            a, b = answers
            assert same_contents([*a.rows, a.dense, a.state], [*b.rows, b.dense, b.state])
    for worker in range(2):  # those that came early are resent
        for step in range(other.fences()[worker], max(fences) + 1):
            for one in (shard, other):
                one.push(random_push(shard.spec, worker, step, seed))
    assert same_state(frozen(other), frozen(shard))


def test_an_entry_takes_the_place_of_pushes_that_wait() -> None:
    source, shard = shard_of(), shard_of()
    entries = logged(source)
    early = push_of(0, 0, value=9.0)
    ref = weakref.ref(early.dense_grad)
    shard.push(early)
    del early
    for step in range(2):
        for worker in (0, 1):
            source.push(push_of(worker, step))
    shard.apply_entry(entries[0])
    assert ref() is None
    for worker in (1, 0):
        shard.push(push_of(worker, 1))
    assert same_state(frozen(shard), frozen(source))


def test_a_replayed_entry_is_not_logged_again() -> None:
    source, shard = shard_of(num_workers=1), shard_of(num_workers=1)
    entries, again = logged(source), logged(shard)
    source.push(push_of(0, 0))
    shard.apply_entry(entries[0])
    assert again == []
    assert shard.done_step(0) == 1


def wrong_entries() -> dict[str, Callable[[LogEntry], LogEntry]]:
    def table(rows: Any, records: Any) -> Callable[[LogEntry], LogEntry]:
        return lambda e: replace(e, tables=((rows, records),))

    def f32(*shape: int) -> F32:
        return np.zeros(shape, np.float32)

    return {
        "the same again": lambda e: replace(e, version=1, fences=(1, 1)),
        "one left out": lambda e: replace(e, version=3, fences=(3, 3)),
        "fences of fewer workers": lambda e: replace(e, fences=(2,)),
        "fences of another version": lambda e: replace(e, fences=(2, 3)),
        "no tables": lambda e: replace(e, tables=()),
        "two tables": lambda e: replace(e, tables=e.tables * 2),
        "row past the end": table(i64(200), f32(1, 4)),
        "row below zero": table(i64(-1), f32(1, 4)),
        "records without slots": table(i64(0), f32(1, 2)),
        "records too few": table(i64(0, 1), f32(1, 4)),
        "records of another dtype": table(i64(0), np.zeros((1, 4))),
        "rows of another dtype": table(np.zeros(1, np.int32), f32(1, 4)),
        "dense values too long": lambda e: replace(e, dense=f32(1, P + 1)),
        "dense values with slots": lambda e: replace(e, dense=f32(2, P)),
        "state too short": lambda e: replace(e, state=f32(S - 1)),
    }


@pytest.mark.parametrize("wrong", wrong_entries().values(), ids=wrong_entries())
def test_an_entry_of_something_else_changes_nothing(wrong: Callable[..., LogEntry]) -> None:
    source, shard = shard_of(Adagrad(0.5)), shard_of(Adagrad(0.5))
    entries = logged(source)
    for step in range(2):
        for worker in (0, 1):
            source.push(push_of(worker, step))
    shard.apply_entry(entries[0])
    before = frozen(shard)
    with pytest.raises(ProtocolError, match="shard 0"):
        shard.apply_entry(wrong(entries[1]))
    assert same_state(frozen(shard), before)
    shard.apply_entry(entries[1])
    assert same_state(frozen(shard), frozen(source))


def test_a_shard_without_state_replays_nothing() -> None:
    source = shard_of(num_workers=1)
    entries = logged(source)
    source.push(push_of(0, 0))
    with pytest.raises(ShardNotReadyError, match="shard 0"):
        shard_of(num_workers=1, ready=False).apply_entry(entries[0])


# --- durable, done with


def test_with_a_log_a_push_is_done_with_when_it_is_applied_and_durable() -> None:
    shard = shard_of()
    shard.push(push_of(0, 0))
    shard.push(push_of(1, 0))
    logged(shard)
    assert [shard.done_step(w) for w in (0, 1)] == [1, 1], "the log starts from here"
    shard.push(push_of(0, 1))
    shard.mark_durable((9, 9))
    assert [shard.done_step(w) for w in (0, 1)] == [1, 1], "the push is not even applied"
    shard.push(push_of(1, 1))
    assert shard.version == 2
    assert [shard.done_step(w) for w in (0, 1)] == [1, 1], "nor durable"
    shard.mark_durable((2, 2))
    assert [shard.done_step(w) for w in (0, 1)] == [2, 2]
    shard.mark_durable((1, 1))
    assert [shard.done_step(w) for w in (0, 1)] == [2, 2], "late news"
    shard.on_version = None
    for worker in (0, 1):
        shard.push(push_of(worker, 2))
    assert shard.done_step(0) == 3
    assert shard.done_step(7) == shard.done_step(-1) == 0


def test_in_async_mode_each_worker_has_its_own_done_step() -> None:
    shard = mixed_shard(mode="async")
    logged(shard)
    for step in range(2):
        shard.push(random_push(shard.spec, 1, step))
    shard.push(random_push(shard.spec, 0, 0))
    assert (shard.version, shard.fences(), shard.entries_applied) == (1, (1, 2), 3)
    shard.mark_durable((0, 2))
    assert [shard.done_step(w) for w in (0, 1)] == [0, 2]


def test_with_a_log_a_flush_waits_until_all_is_durable() -> None:
    shard, answers = shard_of(num_workers=1), list[tuple[str, int]]()
    logged(shard)
    shard.flush(0, lambda v: answers.append(("nothing to wait for", v)))
    shard.push(push_of(0, 0))
    shard.push(push_of(0, 1))
    shard.flush(0, lambda v: answers.append(("both", v)))
    shard.mark_durable((1,))
    assert answers == [("nothing to wait for", 0)]
    shard.mark_durable((2,))
    assert answers[1:] == [("both", 2)]
    shard.push(push_of(0, 2))
    shard.flush(0, lambda v: answers.append(("no log any more", v)))
    shard.on_version = None
    assert answers[2:] == [("no log any more", 3)]


# --- a state that was kept


def test_a_state_starts_at_its_fences() -> None:
    shard = ShardState(mixed_spec(mode="async"))
    dense, state = np.zeros(P, np.float32), np.zeros(S, np.float32)
    shard.set_dense(dense, state, version=77, fences=(4, 6), entries_applied=10)
    assert (shard.version, shard.fences(), shard.entries_applied) == (4, (4, 6), 10)
    assert shard.stats().fences == (4, 6)
    shard.push(random_push(shard.spec, 1, 5))
    assert shard.stats().duplicates_dropped == 1
    with pytest.raises(ProtocolError, match="step 4 is next"):
        shard.push(random_push(shard.spec, 0, 5))
    shard.push(random_push(shard.spec, 1, 6))
    assert (shard.fences(), shard.entries_applied) == ((4, 7), 11)


@pytest.mark.parametrize("fences", [(3,), (3, 3, 3), (3, 4), (2, 2)])
def test_fences_of_another_state_are_refused(fences: tuple[int, ...]) -> None:
    shard = shard_of()
    before = frozen(shard)
    with pytest.raises(ProtocolError, match="shard 0: fences"):
        shard.set_dense(np.zeros(P, np.float32), np.zeros(S, np.float32), None, 3, fences)
    assert same_state(frozen(shard), before)


def test_pushes_that_came_early_are_not_part_of_the_state() -> None:
    shard = shard_of()
    shard.push(push_of(0, 0))
    shard.push(push_of(0, 1))
    assert shard.fences() == shard.stats().fences == (0, 0)
    shard.push(push_of(1, 0))
    assert shard.fences() == (1, 1)


def test_a_state_that_is_taken_back_forgets_what_came_after() -> None:
    shard = shard_of()
    entries = logged(shard)
    make = [push_of(worker, step) for step in range(3) for worker in (0, 1)]
    for push in make:
        shard.push(push)
    shard.push(push_of(0, 3, value=9.0))  # waits, and is of a past that will not have been
    rows = [rows.copy() for _, rows, _ in shard.slabs("table_0")]
    answers, done = list[int](), list[int]()
    shard.pull(pull_of(5), lambda r: answers.append(r.version))
    shard.flush(0, done.append)
    for first, part in zip(shard.slabs("table_0"), rows, strict=True):
        shard.write_rows("table_0", first[0].first_local_row, part, {})
    with pytest.raises(ShardNotReadyError):
        shard.push(push_of(1, 3))
    shard.set_dense(np.arange(P, dtype=np.float32), np.zeros(S, np.float32), version=2)
    shard.mark_durable((4, 4))  # of the log of that past
    assert (shard.version, shard.done_step(0)) == (2, 2)
    start = contents(shard)[0][0].copy()
    for step in (2, 3, 4):
        for worker in (1, 0):
            shard.push(push_of(worker, step))
    np.testing.assert_array_equal(contents(shard)[0][0], start - 6)
    assert shard.done_step(0) == 2, "nothing of this is durable yet"
    assert (answers, done) == ([5], [])
    shard.mark_durable((4, 4))
    assert done == [5]
    assert [e.version for e in entries] == [1, 2, 3, 3, 4, 5]


def test_pieces_of_a_snapshot_become_the_table() -> None:
    source, shard = mixed_shard(), ShardState(mixed_spec())
    for step in range(3):
        make_step(source, step)
    for table in source.spec.embedding.tables:
        pieces = [
            (slab.first_local_row, rows.copy(), {n: s.copy() for n, s in slots.items()})
            for slab, rows, slots in source.slabs(table.name)
        ]
        assert len(list(load_rows(shard, table.name, reversed(pieces)))) == len(pieces)
        assert not shard.stats().ready
    dense, slots, state = source.dense()
    shard.set_dense(dense, state, slots, version=3)
    assert shard.stats().ready
    assert same_state(frozen(shard), frozen(source))
    make_step(source, 3)
    make_step(shard, 3)
    assert same_state(frozen(shard), frozen(source))


WRONG_SPANS: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "before the first": (-1, (2, 2), {}),
    "past the last": (199, (2, 2), {}),
    "far away": (2**40, (1, 2), {}),
    "too wide": (0, (2, 3), {}),
    "flat": (0, (2,), {}),
    "float64": (0, np.zeros((2, 2)), {}),
    "no slots": (0, (2, 2), {"accumulators": None}),
    "other slots": (0, (2, 2), {"momenta": (2, 2)}),
    "slots too short": (0, (2, 2), {"accumulators": (1, 2)}),
    "slots of float64": (0, (2, 2), {"accumulators": np.zeros((2, 2))}),
}


@pytest.mark.parametrize(("first", "rows", "slots"), WRONG_SPANS.values(), ids=WRONG_SPANS)
def test_rows_that_do_not_fit_are_refused(first: int, rows: Any, slots: dict[str, Any]) -> None:
    def array(shape: Any) -> Any:
        return np.zeros(shape, np.float32) if isinstance(shape, tuple) else shape

    shard = shard_of(Adagrad(0.5))
    (name,) = Adagrad(0.5).slot_names
    before, given = frozen(shard), {name: array((2, 2))} | {n: array(s) for n, s in slots.items()}
    given = {n: s for n, s in given.items() if s is not None and not (slots and n not in slots)}
    with pytest.raises(ProtocolError, match="shard 0: table 'table_0'"):
        shard.write_rows("table_0", first, array(rows), given)
    assert same_state(frozen(shard), before)
    assert shard.stats().ready


def test_rows_of_no_table_are_refused() -> None:
    with pytest.raises(ProtocolError, match="no table 'other' among"):
        shard_of().write_rows("other", 0, np.zeros((1, 2), np.float32), {})


def test_stats_of_a_shard_without_state() -> None:
    stats = shard_of(ready=False).stats()
    assert (stats.version, stats.fences, stats.ready) == (0, (0, 0), False)
    assert (stats.cut_version, stats.saved_bytes) == (None, 0)
    assert shard_of().stats().ready


def test_an_async_push_that_fails_is_not_counted_as_done() -> None:
    def broken(step: int) -> float:
        if not fixed:
            raise ZeroDivisionError
        return 1.0

    fixed: list[bool] = []
    shard = started(replace(shard_of(SGD(broken), ready=False).spec, mode="async"))
    before = frozen(shard)
    with pytest.raises(ZeroDivisionError):
        shard.push(push_of(1, 0))
    assert same_state(frozen(shard), before)
    fixed.append(True)
    shard.push(push_of(1, 0))
    assert shard.fences() == (0, 1)
