"""A pull of a version that has gone by gets the bits that it would have got then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.config import FeatureConfig, TableConfig
from ps.errors import ConfigError, ProtocolError
from ps.history import OldRows
from ps.messages import LATEST, Pull, Push, Rows
from ps.optimizers import SGD, Adam
from ps.ragged import F32
from ps.shard import ShardState
from ps.spec import resolve
from tests.support.reference import same_bits
from tests.support.shards import (
    P,
    S,
    contents,
    i64,
    make_step,
    mixed_shard,
    mixed_spec,
    pull_of,
    push_of,
    random_pull,
    same_contents,
    shard_of,
    started,
)


def pulled(shard: ShardState, pull: Pull) -> Rows:
    answers: list[Rows] = []
    shard.pull(pull, answers.append)
    (answer,) = answers
    return answer


def arrays(rows: Rows) -> list[F32]:
    return [*(a.copy() for a in rows.rows), rows.dense.copy(), rows.state.copy()]


def room_for(shard: ShardState, pull: Pull) -> Rows:
    """Arrays of another content, at odd addresses as in a message."""

    def odd(*shape: int) -> F32:
        room = np.full(4 * int(np.prod(shape)) + 1, 77, dtype=np.uint8)
        return np.ndarray(shape, np.float32, room, 1)

    rows = tuple(
        odd(index.size if bag is None else bag.count, table.dim)
        for index, bag, table in zip(
            pull.local_rows, pull.bags, shard.spec.embedding.tables, strict=True
        )
    )
    return Rows(0, rows, odd(P), odd(S))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), history=st.integers(1, 5), steps=st.integers(0, 8))
def test_an_old_version_is_answered_as_it_would_have_been(
    seed: int, history: int, steps: int
) -> None:
    shard = mixed_shard(history=history)
    pulls: list[Pull] = []
    seen: list[Any] = []
    for step in range(steps + 1):
        pulls.append(random_pull(shard.spec, step, seed))
        seen.append(arrays(pulled(shard, pulls[-1])))
        if step < steps:
            make_step(shard, step, seed)
    after = contents(shard)
    for version in range(max(0, steps - history), steps + 1):
        for pull in (pulls[version], replace(pulls[version])):
            pull.into = None if pull is pulls[version] else room_for(shard, pull)
            again = pulled(shard, pull)
            assert again.version == version
            assert same_contents(arrays(again), seen[version])
            if pull.into is not None:
                assert again.dense is pull.into.dense, "written where it was asked for"
    for version in range(steps - history):
        with pytest.raises(ProtocolError, match=f"wants version {version} .* none before"):
            shard.pull(pulls[version], lambda _: None)
    assert same_contents(contents(shard), after), "reading changes nothing"


def test_without_history_a_version_gone_by_is_refused() -> None:
    shard = mixed_shard()
    make_step(shard, 0)
    with pytest.raises(ProtocolError, match=r"the shard is at version 1$"):
        shard.pull(random_pull(shard.spec, 0, 0), lambda _: None)


def test_an_old_answer_is_a_copy() -> None:
    shard = mixed_shard(history=2)
    make_step(shard, 0)
    pull = random_pull(shard.spec, 0, 1)
    first = pulled(shard, pull)
    wanted = arrays(first)
    for array in (*first.rows, first.dense, first.state):
        array[...] = 7
    assert same_contents(arrays(pulled(shard, pull)), wanted)


def test_old_rows_do_not_need_the_arrays_of_the_push() -> None:
    """They are a worker's shared memory, and free once the push is done with."""
    shard = ShardState(replace(shard_of(num_workers=1, ready=False).spec, history=2))
    shard.set_dense(np.arange(P, dtype=np.float32), np.zeros(S, dtype=np.float32))
    start = arrays(pulled(shard, pull_of(0, [3, 4, 5])))
    push = push_of(0, 0, [3, 5])
    shard.push(push)
    assert shard.done_step(0) == 1
    for array in (*push.local_rows, *push.grads, push.dense_grad):
        array[...] = 0
    assert same_contents(arrays(pulled(shard, pull_of(0, [3, 4, 5]))), start)


def test_a_new_state_has_no_old_versions() -> None:
    shard = mixed_shard(history=3)
    for step in range(3):
        make_step(shard, step)
    pulled(shard, random_pull(shard.spec, 1, 0))
    dense, _, state = shard.dense()
    shard.set_dense(dense.copy(), state, version=3)
    for version in range(3):
        with pytest.raises(ProtocolError, match=r"the shard is at version 3$"):
            shard.pull(random_pull(shard.spec, version, 0), lambda _: None)
    make_step(shard, 3)
    pulled(shard, random_pull(shard.spec, 3, 0))


def test_no_more_versions_are_kept_than_asked_for() -> None:
    shard = mixed_shard(history=3)
    kept = []
    for step in range(6):
        make_step(shard, step)
        kept.append(shard._values.num_old_versions)
    assert kept == [1, 2, 3, 3, 3, 3]


def test_async_mode_keeps_no_history() -> None:
    shard = started(mixed_spec(history=3, mode="async"))
    make_step(shard, 0)
    assert shard._values.num_old_versions == 0
    assert pulled(shard, replace(random_pull(shard.spec, 0, 0), version=LATEST)).version == 1


def test_history_cannot_be_negative() -> None:
    with pytest.raises(ConfigError, match="history must be at least 0 versions, got -1"):
        mixed_spec(history=-1)


def test_staleness_counts_from_the_version_that_was_read() -> None:
    shard = ShardState(replace(shard_of(num_workers=1, ready=False).spec, history=4))
    shard.set_dense(np.arange(P, dtype=np.float32), np.zeros(S, dtype=np.float32))
    for step in range(3):
        shard.push(push_of(0, step))
    shard.pull(Pull(0, 3, 1, (i64(0),)), lambda _: None)
    shard.push(push_of(0, 3))
    assert shard.stats().staleness == (0, 0, 1)


@given(st.data())
def test_rows_are_put_where_they_are_named(data: Any) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, 9), unique=True)), dtype=np.int64)
    rows = np.arange(index.size * 2, dtype=np.float32).reshape(-1, 2)
    wanted = np.array(data.draw(st.lists(st.integers(0, 9))), dtype=np.int64)
    out = np.full((wanted.size, 2), -1, dtype=np.float32)
    OldRows(index, rows).put(wanted, out)
    by_row = dict(zip(index.tolist(), rows, strict=True))
    for row, got in zip(wanted.tolist(), out, strict=True):
        assert same_bits(got, by_row.get(row, np.full(2, -1, dtype=np.float32)))


def test_a_table_all_of_whose_rows_change_is_kept_whole() -> None:
    tables = resolve([
        FeatureConfig(TableConfig(40, 2, optimizer=optimizer, name=name))
        for name, optimizer in (("all", Adam(0.5, lazy_adam=False)), ("named", SGD()))
    ])  # fmt: skip
    shard = started(mixed_spec(embedding=tables, history=2, num_workers=1))
    pull = Pull(0, 0, 0, (i64(*range(40)), i64(*range(40))))
    seen: list[list[F32]] = []
    for step in range(4):
        pull.version = step
        seen.append(arrays(pulled(shard, pull)))
        grads = np.full((1, 2), 1 + step, np.float32)
        dense = np.zeros(P, np.float32)
        shard.push(Push(0, step, (i64(step), i64(step)), (grads, grads), dense, None))
    for version in (2, 3):
        pull.version = version
        assert same_contents(arrays(pulled(shard, pull)), seen[version])
    assert not same_contents(seen[2], seen[3])
