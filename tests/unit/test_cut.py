"""A cut gives the state of one version, bit for bit, whatever is pushed while it is read."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.cut import Cut, Piece
from ps.errors import ProtocolError, ShardNotReadyError
from ps.messages import LogEntry
from ps.optimizers import SGD, Adagrad, Adam
from ps.ragged import F32
from ps.shard import ShardState
from tests.support.reference import same_bits
from tests.support.shards import (
    contents,
    frozen,
    make_step,
    mixed_shard,
    push_of,
    random_push,
    same_contents,
    same_state,
    shard_of,
)


def rest(cut: Cut, max_bytes: int = 1 << 20) -> list[Piece]:
    pieces = []
    while (piece := cut.next_piece(max_bytes)) is not None:
        pieces.append(piece)
    return pieces


def put_together(cut: Cut, pieces: list[Piece], shard: ShardState) -> list[F32]:
    """What the pieces say, in the form of `contents`."""
    assert [p.table for p in pieces] == sorted(p.table for p in pieces)
    arrays: list[F32] = []
    for number, table in enumerate(shard.spec.embedding.tables):
        mine = [p for p in pieces if p.table == number]
        for name in (None, *table.optimizer.slot_names):
            parts = [p.rows if name is None else p.slots[name] for p in mine]
            assert all(p.flags.c_contiguous and p.dtype == np.float32 for p in parts)
            arrays.append(np.concatenate([np.zeros((0, table.dim), np.float32), *parts]))
    return [*arrays, cut.dense, *cut.dense_slots.values(), cut.state]


def whole_tables(shard: ShardState) -> list[F32]:
    """`contents` with the slabs of each table put together."""
    tables = [
        np.concatenate([np.zeros((0, table.dim), np.float32), *parts])
        for table in shard.spec.embedding.tables
        for parts in zip(
            *([rows, *slots.values()] for _, rows, slots in shard.slabs(table.name)), strict=True
        )
    ]
    dense, slots, state = shard.dense()
    return [*tables, dense.copy(), *(s.copy() for s in slots.values()), state.copy()]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    at=st.integers(0, 3),
    turns=st.lists(
        st.sampled_from(["push", "push", "copy", "copy", "seal", 1, 200, 3000, 20000]), max_size=60
    ),
    history=st.sampled_from([0, 2]),
    mode=st.sampled_from(["sync", "async"]),
)
def test_pieces_are_the_state_at_the_cut_whatever_happens_meanwhile(
    seed: int, at: int, turns: list[str | int], history: int, mode: str
) -> None:
    shard = mixed_shard(history=history, mode=mode)
    undisturbed = mixed_shard(mode=mode)
    cuts, wanted, pieces = list[Cut](), list[Any](), list[Piece]()

    def begin(cut: Cut) -> None:
        cuts.append(cut)
        wanted.extend([shard.version, shard.fences(), shard.entries_applied, whole_tables(shard)])

    if mode == "sync":
        shard.arm_cut(at, begin)
    fences = [0, 0]

    def push(worker: int) -> None:
        for one in (shard, undisturbed):
            one.push(random_push(shard.spec, worker, fences[worker], seed))
        fences[worker] += 1

    rng = np.random.default_rng(seed)
    for _ in range(2 * at):
        push(int(np.argmin(fences)))
    if mode == "async":
        shard.arm_cut(99, begin)
    assert len(cuts) == 1
    copied: Piece | None = None  # pushes may come between a copy and its seal
    for turn in turns:
        if turn == "copy":
            copied = copied or cuts[0].copy_piece(500)
        elif turn != "push" and copied is not None:
            cuts[0].seal(copied)
            pieces, copied = [*pieces, copied], None
        elif turn == "seal":
            pass
        elif turn != "push":
            piece = cuts[0].next_piece(int(turn))
            pieces += [] if piece is None else [piece]
        else:
            worker = int(rng.integers(2))  # one may be some steps ahead
            push(worker if fences[worker] <= min(fences) + 3 else 1 - worker)
        assert cuts[0].saved_bytes <= shard.stats().size_bytes
    if copied is not None:
        cuts[0].seal(copied)
        pieces.append(copied)
    pieces += rest(cuts[0])
    cut = cuts[0]
    assert cut.next_piece() is None
    assert cut.version == (99 if mode == "async" else at)
    assert [cut.fences, cut.entries_applied] == wanted[1:3]
    assert same_contents(put_together(cut, pieces, shard), wanted[3])
    assert cut.saved_bytes == 0
    assert same_state(frozen(shard), frozen(undisturbed)), "the shard itself goes on as ever"


@pytest.mark.parametrize("shard_id", range(3))
def test_a_shard_of_several_is_cut_to_its_own_rows(shard_id: int) -> None:
    shard = mixed_shard(num_shards=3, shard_id=shard_id, num_workers=1)
    wanted, cuts = whole_tables(shard), list[Cut]()
    shard.arm_cut(0, cuts.append)
    pieces = [cuts[0].next_piece(500)]
    make_step(shard, 0)
    pieces += rest(cuts[0], 300)
    got = put_together(cuts[0], [p for p in pieces if p], shard)
    assert same_contents([a for a in got if a.size], [a for a in wanted if a.size])


def test_rows_are_saved_once_and_only_before_they_are_passed() -> None:
    shard, cuts = shard_of(Adagrad(0.5), num_workers=1), list[Cut]()  # records of 16 bytes
    shard.arm_cut(0, cuts.append)
    (cut,) = cuts
    first = cut.next_piece(16 * 10)
    assert first is not None
    assert len(first.rows) == 10
    saved = []
    for step, rows in enumerate([[3, 9], [9, 10], [10, 11], [11, 199]]):
        shard.push(push_of(0, step, rows))
        saved.append(cut.saved_bytes)
        assert shard.stats().saved_bytes == saved[-1]
    assert saved == [0, 16, 32, 48]
    cut.close()
    assert cut.saved_bytes == shard.stats().saved_bytes == 0


def test_a_piece_is_no_bigger_than_asked_but_at_least_a_row() -> None:
    shard, cuts = shard_of(Adagrad(0.5), num_workers=1), list[Cut]()
    shard.arm_cut(0, cuts.append)
    sizes = [len(p.rows) for p in (cuts[0].next_piece(n) for n in (1, 16, 47, 48)) if p]
    assert sizes == [1, 1, 2, 3]
    assert [len(p.rows) for p in rest(cuts[0])] == [200 - 7]


def test_a_piece_is_a_copy() -> None:
    shard, cuts = shard_of(Adagrad(0.5), num_workers=1), list[Cut]()
    before = contents(shard)
    shard.arm_cut(0, cuts.append)
    for piece in rest(cuts[0]):
        for array in (piece.rows, *piece.slots.values()):
            array[:] = 7
    for array in (cuts[0].dense, cuts[0].state):
        array[:] = 7
    assert same_contents(contents(shard), before)


def test_a_cut_begins_before_a_waiting_pull_is_answered_and_after_the_entry_of_its_version() -> (
    None
):
    shard, order = shard_of(num_workers=1), list[str]()
    shard.on_version = lambda entry: order.append(f"entry {entry.version}")
    shard.arm_cut(2, lambda cut: order.append(f"cut {cut.version}"))
    assert shard.stats().cut_version == 2
    for step in range(3):
        shard.push(push_of(0, step))
    assert order == ["entry 1", "entry 2", "cut 2", "entry 3"]


def test_there_is_one_cut_at_a_time() -> None:
    shard, cuts = shard_of(num_workers=1), list[Cut]()
    shard.arm_cut(1, cuts.append)
    with pytest.raises(ProtocolError, match="the cut of version 1 is not over"):
        shard.arm_cut(2, cuts.append)
    shard.push(push_of(0, 0))
    assert shard.stats().cut_version == 1
    with pytest.raises(ProtocolError, match="the cut of version 1 is not over"):
        shard.arm_cut(2, cuts.append)
    rest(cuts[0])
    assert shard.stats().cut_version is None
    shard.arm_cut(2, cuts.append)
    with pytest.raises(ProtocolError, match="not over"):
        shard.arm_cut(3, cuts.append)
    assert len(cuts) == 1


def test_a_version_gone_by_cannot_be_cut() -> None:
    shard = shard_of(num_workers=1)
    shard.push(push_of(0, 0))
    with pytest.raises(ProtocolError, match="shard 0 is at version 1, too late for a cut of 0"):
        shard.arm_cut(0, lambda cut: None)
    assert shard.stats().cut_version is None


def test_a_shard_without_state_cannot_be_cut() -> None:
    with pytest.raises(ShardNotReadyError, match="shard 0"):
        shard_of(ready=False).arm_cut(0, lambda cut: None)


def given_up(shard: ShardState, cut: Cut, how: str) -> None:
    if how == "close":
        cut.close()
        cut.close()
    elif how == "disarm":
        shard.disarm()
    elif how == "set_dense":
        dense, _, state = shard.dense()
        shard.set_dense(dense, state, version=shard.version)
    else:
        _, rows, slots = next(shard.slabs("table_0"))
        shard.write_rows("table_0", 0, rows.copy(), {n: s.copy() for n, s in slots.items()})


@pytest.mark.parametrize("how", ["close", "disarm", "set_dense", "write_rows"])
def test_a_cut_that_was_given_up_is_never_taken_for_a_whole_one(how: str) -> None:
    shard, cuts = shard_of(Adagrad(0.5), num_workers=1), list[Cut]()
    shard.arm_cut(0, cuts.append)
    assert cuts[0].next_piece(100) is not None
    shard.push(push_of(0, 0, [100]))
    assert cuts[0].saved_bytes > 0
    given_up(shard, cuts[0], how)
    with pytest.raises(ProtocolError, match="cut of version 0 was given up"):
        cuts[0].next_piece()
    assert cuts[0].saved_bytes == 0
    assert shard.stats().cut_version is None


def test_an_armed_cut_that_was_disarmed_never_begins() -> None:
    shard = shard_of(num_workers=1)
    shard.arm_cut(1, lambda cut: pytest.fail("it began"))
    shard.disarm()
    assert shard.stats().cut_version is None
    for step in range(2):
        shard.push(push_of(0, step))
    shard.disarm()


def test_a_cut_whose_reader_fails_at_once_saves_nothing() -> None:
    def fails(cut: Cut) -> None:
        raise OSError("no thread")

    shard = shard_of(num_workers=1)
    with pytest.raises(OSError, match="no thread"):
        shard.arm_cut(0, fails)
    assert shard.stats().cut_version is None
    shard.push(push_of(0, 0))
    assert shard.version == 1


def test_closing_a_cut_at_its_end_changes_nothing() -> None:
    shard, cuts = shard_of(num_workers=1), list[Cut]()
    shard.arm_cut(0, cuts.append)
    rest(cuts[0])
    cuts[0].close()
    assert cuts[0].next_piece() is None


def test_an_optimizer_that_changes_all_rows_saves_what_is_left_of_its_table() -> None:
    shard, cuts = shard_of(Adam(0.1, lazy_adam=False), SGD(), num_workers=1), list[Cut]()
    wanted = whole_tables(shard)
    shard.arm_cut(0, cuts.append)
    record = 4 * 2 * 3
    pieces = [cuts[0].next_piece(record * 50)]
    grads = np.ones((1, 2), np.float32)
    push = push_of(0, 0)
    for step in range(3):
        push.step, push.local_rows, push.grads = step, push.local_rows[:1] * 2, (grads, grads)
        shard.push(push)
        assert cuts[0].saved_bytes == record * 150 + 4 * 2
    pieces += rest(cuts[0])
    assert same_contents(put_together(cuts[0], [p for p in pieces if p], shard), wanted)


def test_rows_that_a_log_replays_are_saved_too() -> None:
    source, shard = mixed_shard(), mixed_shard()
    entries, cuts = list[LogEntry](), list[Cut]()
    source.on_version = entries.append
    wanted = whole_tables(shard)
    shard.arm_cut(0, cuts.append)
    for step in range(2):
        make_step(source, step)
        shard.apply_entry(entries[step])
    assert not same_bits(whole_tables(shard)[1], wanted[1])
    assert same_contents(put_together(cuts[0], rest(cuts[0]), shard), wanted)


def test_another_thread_copies_while_pushes_change_what_it_copies() -> None:
    shard = mixed_shard()
    cuts = list[Cut]()
    shard.arm_cut(0, cuts.append)
    wanted = whole_tables(shard)
    pieces, copied, sealed = list[Piece](), queue.Queue[Piece | None](), threading.Semaphore(0)

    def copy() -> None:
        while (piece := cuts[0].copy_piece(700)) is not None:
            copied.put(piece)
            sealed.acquire()
        copied.put(None)

    thread = threading.Thread(target=copy)
    thread.start()
    step, running = 0, True
    while running:
        for worker in range(2):
            shard.push(random_push(shard.spec, worker, step, step))
        step += 1
        with contextlib.suppress(queue.Empty):
            piece = copied.get_nowait()
            running = piece is not None
            if piece is not None:
                cuts[0].seal(piece)
                pieces.append(piece)
                sealed.release()
    thread.join()
    assert same_contents(put_together(cuts[0], pieces, shard), wanted)
    assert not same_contents(whole_tables(shard), wanted)
