"""One shard: exact versions, no half-applied step, and a result that depends on the data alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.client import LocalTransport, ShardClient
from ps.errors import ProtocolError, ShardNotReadyError
from ps.initializers import RandomUniform, table_key
from ps.messages import Pull, Push, Rows
from ps.optimizers import FTRL, SGD, Adagrad, Adam, LinearDecay
from ps.partition import Layout, distinct_rows
from ps.ragged import F32
from ps.reduction import Reduction
from ps.shard import ShardSpec, ShardState
from tests.support.reference import same_bits
from tests.support.shards import (
    P,
    S,
    contents,
    i64,
    pull_of,
    push_of,
    same_contents,
    shard_of,
    spec_of,
    whole_table,
)

# --- readiness and versions


def test_a_shard_without_state_refuses_everything() -> None:
    shard = shard_of(ready=False)
    for call in (
        lambda: shard.pull(pull_of(0), lambda _: None),
        lambda: shard.push(push_of(0, 0)),
        shard.dense,
    ):
        with pytest.raises(ShardNotReadyError, match="shard 0"):
            call()
    assert shard.stats().version == 0


def test_rows_start_at_their_initial_values() -> None:
    shard = shard_of(SGD(), Adagrad(initial_accumulator_value=0.3))
    for name in ("table_0", "table_1"):
        rows = RandomUniform(-1.0, 1.0).rows(table_key(0, name), np.arange(200), 2)
        assert same_bits(whole_table([shard], name)[0], rows)
    assert (whole_table([shard], "table_1")[1] == np.float32(0.3)).all()


def test_a_step_is_made_when_the_last_worker_has_pushed() -> None:
    shard = shard_of(num_workers=3)
    start = contents(shard)
    for worker in (2, 0):
        shard.push(push_of(worker, 0))
        assert shard.version == 0
        assert same_contents(contents(shard), start)
    shard.push(push_of(1, 0))
    assert shard.version == 1
    np.testing.assert_array_equal(contents(shard)[0][0], start[0][0] - 3)


def test_a_pull_is_answered_at_exactly_its_version() -> None:
    shard, answers = shard_of(num_workers=1), dict[int, Rows]()
    start = contents(shard)[0][0]
    for version in (2, 0, 1, 3):
        shard.pull(pull_of(version), lambda rows, v=version: answers.update({v: rows}))  # type: ignore[misc]
    assert list(answers) == [0]
    for step in range(3):
        shard.push(push_of(0, step))
        assert list(answers) == list(range(step + 2))
    for version, rows in answers.items():
        assert rows.version == version
        np.testing.assert_array_equal(rows.rows[0], [start - np.float32(version)])
        np.testing.assert_array_equal(rows.dense, np.arange(P) - version)


def test_a_waiting_pull_sees_its_version_though_a_worker_is_far_ahead() -> None:
    shard, answers = shard_of(), list[Rows]()
    start = contents(shard)[0][0]
    for step in range(3):
        shard.push(push_of(0, step))
    shard.push(push_of(1, 0))
    shard.pull(pull_of(2), answers.append)
    shard.pull(pull_of(3), answers.append)
    assert answers == []
    shard.push(push_of(1, 1))
    (rows,) = answers
    assert (rows.version, shard.version) == (2, 2)
    np.testing.assert_array_equal(rows.rows[0][0], start - 4)


def test_an_answer_is_a_copy() -> None:
    shard, answers = shard_of(num_workers=1), list[Rows]()
    shard.pull(pull_of(0, [3, 3, 1]), answers.append)
    before = contents(shard)
    for array in (answers[0].rows[0], answers[0].dense, answers[0].state):
        array[:] = 7
    assert same_contents(contents(shard), before)


# --- what a shard refuses


def wrong_pushes() -> dict[str, Callable[[Push], Push]]:
    f32 = np.float32
    return {
        "gap in steps": lambda p: replace(p, step=p.step + 1),
        "row past the end": lambda p: replace(p, local_rows=(i64(200),)),
        "row below zero": lambda p: replace(p, local_rows=(i64(-1),)),
        "row far away": lambda p: replace(p, local_rows=(i64(2**40),)),
        "gradients too narrow": lambda p: replace(p, grads=(np.zeros((1, 1), dtype=f32),)),
        "gradients too many": lambda p: replace(p, grads=(np.zeros((2, 2), dtype=f32),)),
        "gradients flat": lambda p: replace(p, grads=(np.zeros(2, dtype=f32),)),
        "tables too few": lambda p: replace(p, local_rows=(), grads=()),
        "tables too many": lambda p: replace(p, local_rows=p.local_rows * 2, grads=p.grads * 2),
        "gradients of no table": lambda p: replace(p, grads=()),
        "dense gradient too long": lambda p: replace(p, dense_grad=np.zeros(P + 1, dtype=f32)),
        "dense gradient of two dims": lambda p: replace(p, dense_grad=np.zeros((1, P), dtype=f32)),
        "state too short": lambda p: replace(p, state=np.zeros(S - 1, dtype=f32)),
        "no such worker": lambda p: replace(p, worker=2),
        "worker below zero": lambda p: replace(p, worker=-1),
    }


@pytest.mark.parametrize("wrong", wrong_pushes().values(), ids=wrong_pushes())
def test_a_wrong_push_changes_nothing(wrong: Callable[[Push], Push]) -> None:
    shard = shard_of(Adagrad(0.5))
    for worker in (0, 1):
        shard.push(push_of(worker, 0))
    shard.push(push_of(1, 1))
    before, stats = contents(shard), shard.stats()
    with pytest.raises(ProtocolError, match="shard 0"):
        shard.push(wrong(push_of(0, 1, value=2.0)))
    assert same_contents(contents(shard), before)
    assert shard.stats() == stats
    shard.push(push_of(0, 1))
    assert shard.version == 2, "the right push is still welcome"


@pytest.mark.parametrize(
    "pull",
    [
        pull_of(0),
        pull_of(1, [200]),
        pull_of(1, [-1]),
        pull_of(2, [2**40]),
        Pull(0, 1, 1, ()),
        Pull(0, 1, 1, (i64(0), i64(0))),
    ],
    ids=["version gone by", "past the end", "below zero", "later", "no table", "two tables"],
)
def test_a_wrong_pull_changes_nothing_and_is_never_answered(pull: Pull) -> None:
    shard, answers = shard_of(num_workers=1), list[Rows]()
    shard.push(push_of(0, 0))
    before, stats = contents(shard), shard.stats()
    with pytest.raises(ProtocolError, match="shard 0"):
        shard.pull(pull, answers.append)
    assert same_contents(contents(shard), before)
    assert shard.stats() == stats
    for step in (1, 2):
        shard.push(push_of(0, step))
    assert answers == []


def test_a_rate_that_fails_changes_nothing() -> None:
    def broken(step: int) -> float:
        raise ZeroDivisionError

    shard = shard_of(SGD(1.0), SGD(broken), num_workers=1)
    before = contents(shard)
    grads = np.ones((1, 2), dtype=np.float32)
    push = Push(0, 0, (i64(0), i64(0)), (grads, grads), np.ones(P, dtype=np.float32), None)
    with pytest.raises(ZeroDivisionError):
        shard.push(push)
    assert same_contents(contents(shard), before)


def test_repeated_pushes_are_dropped() -> None:
    shard = shard_of()
    shard.push(push_of(0, 0))
    shard.push(push_of(0, 0, value=9.0))
    shard.push(push_of(1, 0))
    before = contents(shard)
    shard.push(push_of(0, 0))
    shard.push(push_of(1, 0, value=9.0))
    assert same_contents(contents(shard), before)
    assert (shard.version, shard.stats().duplicates_dropped) == (1, 3)


# --- what a step does


def awkward_push(worker: int, step: int, seed: int = 0) -> Push:
    """Values whose float32 sum depends on the order."""
    rng = np.random.default_rng([seed, worker, step])
    rows = rng.choice(20, size=rng.integers(0, 12), replace=False)
    scale = np.float32(10.0) ** rng.integers(-4, 5)
    grads = (scale * rng.normal(size=(rows.size, 2))).astype(np.float32)
    dense = (scale * rng.normal(size=P)).astype(np.float32)
    return Push(worker, step, (rows,), (grads,), dense, None)


@settings(max_examples=40)
@given(data=st.data(), reduction=st.sampled_from(["mean", "sum"]))
def test_the_order_of_arrival_does_not_matter(data: Any, reduction: Reduction) -> None:
    pushes = [awkward_push(worker, step) for step in range(3) for worker in range(3)]
    shards = []
    for order in (range(9), data.draw(st.permutations(range(9)))):
        shard = shard_of(Adagrad(0.5), num_workers=3, reduction=reduction)
        late: dict[int, list[Push]] = {w: [p for p in pushes if p.worker == w] for w in range(3)}
        for i in order:  # any interleaving that keeps each worker's own order
            shard.push(late[pushes[i].worker].pop(0))
        assert shard.version == 3
        shards.append(contents(shard))
    assert same_contents(*shards)


@pytest.mark.parametrize(("reduction", "moved"), [("sum", 6.0), ("mean", 3.0)])
def test_workers_are_summed_or_averaged(reduction: Reduction, moved: float) -> None:
    shard = shard_of(reduction=reduction)
    start = contents(shard)
    shard.push(push_of(1, 0, [7, 8], value=4.0))
    shard.push(push_of(0, 0, [8, 9], value=2.0))
    after = contents(shard)
    share = {"sum": 1.0, "mean": 0.5}[reduction]
    for row, grad in [(7, 4.0 * share), (8, moved), (9, 2.0 * share), (10, 0.0)]:
        np.testing.assert_array_equal(
            np.concatenate(after[:-2])[row], np.concatenate(start[:-2])[row] - np.float32(grad)
        )
    np.testing.assert_array_equal(shard.dense()[0], np.arange(P) - moved)


def test_gradients_are_clipped_after_they_are_summed() -> None:
    shard = shard_of(SGD(1.0, clipvalue=0.25))
    start = np.concatenate(contents(shard)[:-2])[0]
    shard.push(push_of(0, 0, value=0.3))
    shard.push(push_of(1, 0, value=-0.2))
    moved = start - np.concatenate(contents(shard)[:-2])[0]
    np.testing.assert_allclose(moved, [0.1, 0.1], rtol=1e-5)


@pytest.mark.parametrize(("accumulate", "accumulator"), [(True, 4.1), (False, 2.1)])
def test_without_accumulation_every_contribution_is_a_step(
    accumulate: bool, accumulator: float
) -> None:
    shard = shard_of(Adagrad(0.1, use_gradient_accumulation=accumulate))
    for worker in (0, 1):
        shard.push(push_of(worker, 0))
    _, slots = whole_table([shard], "table_0")
    np.testing.assert_allclose(slots[0], accumulator, rtol=1e-6)


def test_state_comes_from_worker_0_alone() -> None:
    shard, new = shard_of(), np.arange(S, dtype=np.float32)
    shard.push(replace(push_of(1, 0), state=new + 100))
    shard.push(replace(push_of(0, 0), state=new))
    np.testing.assert_array_equal(shard.dense()[2], new)
    shard.push(replace(push_of(1, 1), state=new + 100))
    shard.push(push_of(0, 1))
    np.testing.assert_array_equal(shard.dense()[2], new)


def test_a_shared_rate_is_asked_once_a_step_with_the_step() -> None:
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return max(0.5, 1 - 0.05 * step)

    calls: list[None] = []

    def tick() -> float:
        calls.append(None)
        return 0.25 * len(calls)

    shard = shard_of(SGD(rate), Adagrad(rate), SGD(tick), num_workers=1, dense_optimizer=SGD(rate))
    start = whole_table([shard], "table_0")[0][0]
    for step in range(5):
        grads = np.ones((1, 2), dtype=np.float32)
        dense = np.ones(P, dtype=np.float32)
        shard.push(Push(0, step, (i64(0),) * 3, (grads,) * 3, dense, None))
    assert asked == list(range(5))
    assert len(calls) == 5
    np.testing.assert_allclose(whole_table([shard], "table_0")[0][0], start - 4.5, rtol=1e-6)
    np.testing.assert_allclose(shard.dense()[0], np.arange(P) - 4.5, rtol=1e-6)


def test_stats_count_what_went_in_and_out() -> None:
    shard = shard_of(Adagrad())
    shard.pull(pull_of(0, [1, 2, 3]), lambda _: None)
    shard.pull(pull_of(1, [4]), lambda _: None)
    shard.push(push_of(0, 0, [1, 2]))
    shard.push(push_of(1, 0, [2, 3]))
    shard.push(push_of(1, 0, [2, 3]))
    stats = shard.stats()
    assert (stats.shard_id, stats.version, stats.num_rows) == (0, 1, 200)
    assert (stats.rows_pulled, stats.rows_pushed, stats.duplicates_dropped) == (4, 3, 1)
    assert stats.size_bytes == 200 * 2 * 4 * 2


# --- many shards


def train(
    num_shards: int, num_workers: int, seed: int, threads: int = 1
) -> tuple[list[F32], list[F32]]:
    """Random batches through clients; every table with its slots, and every pulled array."""
    spec = spec_of(
        Adagrad(LinearDecay(0.5, 0.1, 4)),
        SGD(0.1, use_gradient_accumulation=False),
        Adam(0.1, lazy_adam=False),
        FTRL(0.1),
    )
    layout = Layout.of(spec, num_shards, P, S)
    shards = [
        ShardState(
            ShardSpec(
                shard_id=k,
                num_shards=num_shards,
                num_workers=num_workers,
                embedding=spec,
                dense_optimizer=Adam(0.1),
                seed=3,
                threads=threads,
            )
        )
        for k in range(num_shards)
    ]
    rng = np.random.default_rng(seed)
    dense, state = rng.normal(size=P).astype(np.float32), np.zeros(S, dtype=np.float32)
    for k, shard in enumerate(shards):
        d, s = layout.dense_splits, layout.state_splits
        shard.set_dense(dense[d[k] : d[k + 1]], state[s[k] : s[k + 1]])
    clients = [ShardClient(spec, layout, LocalTransport(shards), w) for w in range(num_workers)]
    seen: list[F32] = []
    for step in range(4):
        for client in clients:
            ids = {t.name: rng.integers(0, 200, size=rng.integers(0, 30)) for t in spec.tables}
            plan = {n: distinct_rows(i, layout.placements[n]) for n, i in ids.items()}
            distinct = {n: d for n, (d, _) in plan.items()}
            pulled = client.pull(step, step, distinct).result()
            seen += [pulled.rows[n][index] for n, (_, index) in plan.items()]
            seen += [pulled.dense, pulled.state]
            # One gradient per id, whatever place the id has among the distinct ones.
            noise = {n: rng.normal(size=(200, 2)).astype(np.float32) for n in ids}
            grads = {n: noise[n][d.ids] for n, d in distinct.items()}
            new_state = np.full(S, step, dtype=np.float32) if client is clients[0] else None
            client.push(step, distinct, grads, rng.normal(size=P).astype(np.float32), new_state)
        assert {shard.version for shard in shards} == {step + 1}
    tables = [a for t in spec.tables for a in whole_table(shards, t.name)]
    flat = [np.concatenate([shard.dense()[i] for shard in shards]) for i in (0, 2)]
    slots = [np.concatenate([s.dense()[1][n] for s in shards]) for n in ("momenta", "velocities")]
    return [*tables, *flat, *slots], seen


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_shards_trains_the_same_tables(num_workers: int) -> None:
    want, want_seen = train(1, num_workers, seed=num_workers)
    assert not any(np.isnan(a).any() for a in want)
    for num_shards in (2, 3, 7):
        got, seen = train(num_shards, num_workers, seed=num_workers)
        assert same_contents(got, want)
        assert same_contents(seen, want_seen)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_threads_of_a_shard_change_no_bit(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, want_seen = train(2, num_workers, seed=num_workers)
    for module in ("threads", "rowstore"):
        monkeypatch.setattr(f"ps.{module}.MIN_PART_BYTES", 1)  # else so little is not cut
    got, seen = train(2, num_workers, seed=num_workers, threads=3)
    assert same_contents(got, want)
    assert same_contents(seen, want_seen)


def test_without_accumulation_every_worker_updates_the_dense_values_on_its_own() -> None:
    shard = shard_of(dense_optimizer=Adagrad(1.0, use_gradient_accumulation=False))
    for worker in range(2):
        shard.push(push_of(worker, 0))
    assert np.allclose(shard.dense()[1]["accumulators"], 0.1 + 1.0 + 1.0)


def test_the_whole_state_is_read_at_the_wanted_version_only() -> None:
    shard = shard_of()
    shard.check_version(0)
    with pytest.raises(ProtocolError, match="is at version 0, not 1"):
        shard.check_version(1)
