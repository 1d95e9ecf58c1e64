"""A worker that stalls makes nobody keep more and more."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from ps.cut import Cut
from ps.errors import ProtocolError
from ps.messages import LATEST, Push, Rows
from ps.shard import MAX_STEPS_AHEAD, ShardState
from tests.support.shards import mixed_shard, random_pull, random_push

TRIES = 500


def noted(push: Push, alive: list[weakref.ref[Any]]) -> Push:
    alive += [weakref.ref(array) for array in (*push.local_rows, *push.grads, push.dense_grad)]
    return push


def still_there(alive: list[weakref.ref[Any]]) -> int:
    return sum(ref() is not None for ref in alive)


def everything_on(mode: str) -> tuple[ShardState, list[Cut], list[int]]:
    """A shard of three workers that is logged, cut and keeps old versions."""
    shard = mixed_shard(num_workers=3, history=4, mode=mode, max_staleness=2)
    sizes, cuts = list[int](), list[Cut]()
    shard.on_version = lambda entry: sizes.append(entry.version)
    shard.arm_cut(0, cuts.append)
    return shard, cuts, sizes


def test_a_stalled_worker_holds_up_a_bounded_number_of_pushes_and_pulls() -> None:
    shard, cuts, entries = everything_on("sync")
    alive, answers, refused = list[weakref.ref[Any]](), list[Rows](), 0
    per_push = 2 * len(shard.spec.embedding.tables) + 1
    for attempt in range(TRIES):
        for worker in (0, 2):  # worker 1 stalls
            step = min(attempt, MAX_STEPS_AHEAD)
            try:
                shard.push(noted(random_push(shard.spec, worker, step), alive))
            except ProtocolError:
                refused += 1
        version = 1 + attempt
        pull = random_pull(shard.spec, version, 0)
        if version <= MAX_STEPS_AHEAD:
            shard.pull(pull, answers.append)
        else:
            with pytest.raises(ProtocolError, match="more than 64 ahead"):
                shard.pull(pull, answers.append)
    assert refused == 2 * (TRIES - MAX_STEPS_AHEAD)
    assert still_there(alive) == 2 * MAX_STEPS_AHEAD * per_push
    assert len(shard._waiting) == MAX_STEPS_AHEAD
    assert (shard.version, answers, entries, cuts[0].saved_bytes) == (0, [], [], 0)
    for step in range(MAX_STEPS_AHEAD):  # it is back
        shard.push(noted(random_push(shard.spec, 1, step), alive))
        assert cuts[0].saved_bytes <= shard.stats().size_bytes
    assert [rows.version for rows in answers] == list(range(1, MAX_STEPS_AHEAD + 1))
    assert shard._waiting == []
    assert still_there(alive) == 0, "neither history, nor cut, nor log holds arrays of pushes"
    assert shard._values.num_old_versions == 4


def test_in_async_mode_pushes_never_wait_for_a_stalled_worker() -> None:
    shard, cuts, entries = everything_on("async")
    alive, answers = list[weakref.ref[Any]](), list[Rows]()
    for step in range(TRIES // 4):
        for worker in (0, 2):
            shard.push(noted(random_push(shard.spec, worker, step), alive))
        assert still_there(alive) == 0
    assert cuts[0].saved_bytes <= shard.stats().size_bytes
    assert len(entries) == 2 * (TRIES // 4)
    waiting = 0
    for step in range(TRIES):
        pull = random_pull(shard.spec, 0, step)
        pull.step, pull.version = step, LATEST
        try:
            shard.pull(pull, answers.append)
        except ProtocolError:
            continue
        waiting += 1
    assert waiting == len(answers) + len(shard._waiting)
    assert len(answers) == 3, "those within the bound"
    assert len(shard._waiting) <= MAX_STEPS_AHEAD
    assert len(shard._counts.pulls) <= MAX_STEPS_AHEAD


def test_repeated_pulls_of_a_stalled_time_are_noted_once() -> None:
    shard, _, _ = everything_on("sync")
    for _ in range(TRIES):
        shard.pull(random_pull(shard.spec, 0, 0), lambda _: None)
    assert len(shard._counts.pulls) == 1
