"""One shard: flushes and bounds, async mode, and bags. `test_shard.py` has the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import ProtocolError, ShardNotReadyError
from ps.messages import LATEST, Bags, Pull, Push, Rows, no_weights
from ps.optimizers import SGD, Adagrad
from ps.ragged import F32, I64
from ps.shard import MAX_STEPS_AHEAD, ShardState
from tests.support.shards import (
    P,
    S,
    contents,
    i64,
    pull_of,
    push_of,
    same_contents,
    shard_of,
    whole_table,
)

# --- flush, and when the memory of pushes is free again


def test_a_push_is_done_with_when_its_step_is_made() -> None:
    shard = shard_of()
    shard.push(push_of(0, 0))
    shard.push(push_of(0, 1))
    assert [shard.done_step(w) for w in (0, 1)] == [0, 0]
    shard.push(push_of(1, 0))
    assert [shard.done_step(w) for w in (0, 1)] == [1, 1]


def test_arrays_of_a_push_may_change_when_it_is_done_with() -> None:
    shard = shard_of(Adagrad(0.5))
    late, new_state = push_of(0, 0), np.ones(S, dtype=np.float32)
    shard.push(replace(late, state=new_state))
    shard.push(push_of(1, 0))
    after = contents(shard)
    for array in (*late.local_rows, *late.grads, late.dense_grad, new_state):
        array[...] = 77
    assert same_contents(contents(shard), after)
    shard.push(push_of(0, 1, [3]))
    shard.push(push_of(1, 1, [3]))
    assert shard.version == 2


def test_a_flush_is_answered_when_all_pushes_before_it_are_applied() -> None:
    shard, answers = shard_of(), list[tuple[str, int]]()
    shard.flush(0, lambda v: answers.append(("nothing to wait for", v)))
    shard.push(push_of(0, 0))
    shard.push(push_of(0, 1))
    shard.flush(0, lambda v: answers.append(("two steps", v)))
    shard.flush(1, lambda v: answers.append(("the other has none", v)))
    shard.push(push_of(0, 2))
    assert answers == [("nothing to wait for", 0), ("the other has none", 0)]
    shard.push(push_of(1, 0))
    assert len(answers) == 2
    shard.push(push_of(1, 1))
    assert answers[2:] == [("two steps", 2)]


def test_a_shard_without_state_refuses_a_flush() -> None:
    with pytest.raises(ShardNotReadyError, match="shard 0"):
        shard_of(ready=False).flush(0, lambda _: None)


def test_a_worker_cannot_run_away_from_the_others() -> None:
    shard = shard_of()
    for step in range(MAX_STEPS_AHEAD):
        shard.push(push_of(0, step))
    with pytest.raises(ProtocolError, match="64 or more ahead of the slowest"):
        shard.push(push_of(0, MAX_STEPS_AHEAD))
    shard.push(push_of(1, 0))
    shard.push(push_of(0, MAX_STEPS_AHEAD))
    assert shard.version == 1


def test_a_pull_of_a_version_far_ahead_is_refused_not_kept() -> None:
    shard = shard_of()
    shard.pull(pull_of(MAX_STEPS_AHEAD), lambda _: None)
    for version in (MAX_STEPS_AHEAD + 1, 2**62):  # it could wait for ever, and so many could
        with pytest.raises(ProtocolError, match="more than 64 ahead"):
            shard.pull(pull_of(version), lambda _: None)


def test_answers_that_nobody_waits_for_are_forgotten() -> None:
    shard, answers = shard_of(), list[object]()
    gone: list[Callable[..., None]] = [lambda rows: answers.append("gone") for _ in range(2)]
    shard.push(push_of(0, 0))
    shard.pull(pull_of(1), gone[0])
    shard.pull(pull_of(1), answers.append)
    shard.flush(0, gone[1])
    shard.flush(0, answers.append)
    shard.forget(gone)
    shard.push(push_of(1, 0))
    assert "gone" not in answers
    assert len(answers) == 2


# --- async mode


def async_shard(num_workers: int = 3, max_staleness: int = 2, **options: Any) -> ShardState:
    spec = replace(
        shard_of(num_workers=num_workers, ready=False, **options).spec,
        mode="async",
        max_staleness=max_staleness,
    )
    shard = ShardState(spec)
    shard.set_dense(np.arange(P, dtype=np.float32), np.zeros(S, dtype=np.float32))
    return shard


def latest(worker: int, step: int) -> Pull:
    return Pull(worker, step, LATEST, (i64(0),))


def test_an_async_push_is_applied_when_it_arrives() -> None:
    shard = async_shard()
    start = contents(shard)[0][0]
    for count, (worker, step) in enumerate([(1, 0), (1, 1), (0, 0), (2, 0)], start=1):
        shard.push(push_of(worker, step))
        np.testing.assert_array_equal(contents(shard)[0][0], start - count)
        assert shard.done_step(worker) == step + 1
    assert shard.version == 1, "that of the slowest"
    shard.push(push_of(0, 0, value=9.0))
    np.testing.assert_array_equal(contents(shard)[0][0], start - 4)
    assert shard.stats().duplicates_dropped == 1
    with pytest.raises(ProtocolError, match="step 1 is next"):
        shard.push(push_of(0, 2))


@settings(max_examples=60)
@given(
    workers=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    turns=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60),
)
def test_no_worker_sees_rows_while_the_slowest_is_too_far_behind(
    workers: int, max_staleness: int, turns: list[tuple[int, bool]]
) -> None:
    """Against the definition: step t's pull is answered while min(steps done) ≥ t − bound."""
    shard = async_shard(workers, max_staleness)
    start = contents(shard)[0][0]
    done, pulled, seen = [0] * workers, [0] * workers, [0] * workers
    waiting: set[int] = set()
    applied, ages = 0, list[int]()

    def pull(worker: int) -> None:
        step = done[worker]

        def reply(rows: Rows) -> None:
            assert min(done) >= step - max_staleness
            assert rows.version == min(done)
            np.testing.assert_array_equal(rows.rows[0][0], start - np.float32(applied))
            waiting.discard(worker)
            pulled[worker], seen[worker] = step + 1, applied

        waiting.add(worker)
        shard.pull(latest(worker, step), reply)
        assert (worker in waiting) == (min(done) < step - max_staleness)

    for turn, push_first in turns:
        worker = turn % workers
        if worker in waiting:
            continue
        if pulled[worker] == done[worker] and not push_first:
            pull(worker)
        elif pulled[worker] > done[worker]:
            ages.append(applied - seen[worker])
            done[worker] += 1
            applied += 1
            shard.push(push_of(worker, done[worker] - 1))
            assert all(min(done) < done[w] - max_staleness for w in waiting), "none waits too long"
    np.testing.assert_array_equal(contents(shard)[0][0], start - np.float32(applied))
    histogram = [ages.count(age) for age in range(max(ages, default=-1) + 1)]
    assert shard.stats().staleness == tuple(histogram)


def test_in_sync_mode_staleness_is_the_lookahead() -> None:
    for lookahead in (0, 1, 2):
        shard = shard_of(num_workers=1)
        for step in range(lookahead):
            shard.pull(Pull(0, step, 0, (i64(0),)), lambda _: None)
        for step in range(6):
            shard.pull(Pull(0, step + lookahead, step, (i64(0),)), lambda _: None)
            shard.push(push_of(0, step))
        counts = [0] * lookahead
        for step in range(6):  # the first steps read what there is
            age = min(step, lookahead)
            counts += [0] * (age + 1 - len(counts))
            counts[age] += 1
        assert shard.stats().staleness == tuple(counts)


def test_pulls_of_any_step_leave_nothing_behind() -> None:
    shard = async_shard(num_workers=1, max_staleness=10**9)
    for step in range(5000):
        shard.pull(latest(0, 1000 + step), lambda _: None)
    assert len(shard._counts.pulls) <= MAX_STEPS_AHEAD
    for step in range(70):
        shard.pull(latest(0, step), lambda _: None)
        shard.push(push_of(0, step))
    assert len(shard._counts.pulls) <= MAX_STEPS_AHEAD
    assert sum(shard.stats().staleness) == 70


# --- bags


def bags_push(splits: I64, weights: F32, rows: I64, grads: F32, step: int = 0) -> Push:
    return Push(0, step, (rows,), (grads,), np.zeros(P, dtype=np.float32), None,
                (Bags(splits, weights),))  # fmt: skip


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), num_bags=st.integers(0, 5), weighted=st.booleans())
def test_bags_are_sums_of_rows_and_their_gradients_go_to_every_entry(
    seed: int, num_bags: int, weighted: bool
) -> None:
    shard, answers = shard_of(SGD(1.0), num_workers=1), list[Rows]()
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 200, size=rng.integers(0, 8) if num_bags else 0)
    splits = np.sort(rng.integers(0, rows.size + 1, size=num_bags + 1))
    splits[0], splits[-1] = 0, rows.size
    weights = rng.normal(size=rows.size).astype(np.float32) if weighted else no_weights()
    table = whole_table([shard], "table_0")[0]
    shard.pull(Pull(0, 0, 0, (rows,), (Bags(splits, weights),)), answers.append)
    ones = weights if weighted else np.ones(rows.size, np.float32)
    sums = np.zeros((num_bags, 2), np.float32)
    grads = rng.normal(size=(num_bags, 2)).astype(np.float32)
    total = np.zeros_like(table)
    for bag in range(num_bags):
        for i in range(splits[bag], splits[bag + 1]):
            sums[bag] += ones[i] * table[rows[i]]
            total[rows[i]] += ones[i] * grads[bag]
    np.testing.assert_allclose(answers[0].rows[0], sums, rtol=1e-5, atol=1e-5)
    shard.push(bags_push(splits, weights, rows, grads))
    after = whole_table([shard], "table_0")[0]
    np.testing.assert_allclose(after, table - total, rtol=1e-5, atol=1e-5)


WRONG_BAGS = {
    "no splits": (i64(), []),
    "starts late": (i64(1, 3), []),
    "ends early": (i64(0, 2), []),
    "ends late": (i64(0, 4), []),
    "goes back": (i64(0, 3, 1, 3), []),
    "below zero": (i64(0, -1, 3), []),
    "far away": (i64(0, 2**62, 3), []),
    "few weights": (i64(0, 3), [1.0, 2.0]),
    "many weights": (i64(0, 3), [1.0] * 4),
}


@pytest.mark.parametrize(("splits", "weights"), WRONG_BAGS.values(), ids=WRONG_BAGS)
def test_bags_that_are_none_change_nothing(splits: I64, weights: list[float]) -> None:
    shard = shard_of(num_workers=1)
    before, stats, rows = contents(shard), shard.stats(), i64(1, 2, 3)
    bags = Bags(splits, np.array(weights, dtype=np.float32))
    answers: list[Rows] = []
    with pytest.raises(ProtocolError, match="shard 0: table 'table_0'"):
        shard.pull(Pull(0, 0, 0, (rows,), (bags,)), answers.append)
    grads = np.zeros((max(0, splits.size - 1), 2), np.float32)
    with pytest.raises(ProtocolError, match="shard 0: table 'table_0'"):
        shard.push(bags_push(bags.row_splits, bags.weights, rows, grads))
    assert answers == []
    assert same_contents(contents(shard), before)
    assert shard.stats() == stats


def test_rows_of_bags_are_checked_like_all_others() -> None:
    shard = shard_of(num_workers=1)
    for bad in (-1, 200):
        with pytest.raises(ProtocolError, match=f"local row {bad} is not in"):
            shard.pull(
                Pull(0, 0, 0, (i64(0, bad),), (Bags(i64(0, 2), no_weights()),)), lambda _: None
            )


def test_bags_need_gradients_that_are_summed() -> None:
    shard = shard_of(SGD(1.0, use_gradient_accumulation=False), num_workers=1)
    push = bags_push(i64(0, 2), no_weights(), i64(0, 1), np.ones((1, 2), np.float32))
    with pytest.raises(ProtocolError, match="use_gradient_accumulation"):
        shard.push(push)
    assert shard.version == 0
