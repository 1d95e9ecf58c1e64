"""Connections that break and shards that die: the training ends with the same bits."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ps.errors import JobError, ProtocolError, ReplayGapError, ShardLostError
from ps.optimizers import SGD, Adagrad, Adam
from ps.shard import ShardState
from ps.wire.peer import Peer
from ps.wire.server import ShardLoop
from ps.wire.transport import WireTransport
from tests.support.wire import (
    TIMEOUT_S,
    Job,
    Training,
    connected,
    contents_of,
    endpoints_of,
    local_client,
    server_options,
    shards_in_threads,
    train_locally,
    wait_until,
)
from tests.support.wire_recovery import (
    Workers,
    in_thread,
    logged_processes,
    logged_shards,
    transport_options,
)

KINDS = pytest.mark.parametrize("kind", ["arena", "tcp", "background"])
JOB = Job(
    optimizers=(Adagrad(0.1), Adam(0.01, lazy_adam=False), SGD(0.1)), dims=(4, 3, 8),
    num_shards=2, num_workers=2, history=6,
)  # fmt: skip
ALONE = Job(dims=(4,), history=6)
LONG_S = 60.0


# --- the same bits


@pytest.mark.parametrize(
    ("kind", "lookahead"), [("arena", 0), ("arena", 2), ("tcp", 1), ("background", 2), ("auto", 1)]
)
def test_cuts_at_any_moment_change_no_bit(kind: str, lookahead: int) -> None:
    """Auto: one shard by shared memory, the other by TCP."""
    steps, rng = 100, np.random.default_rng([lookahead, len(kind)])
    wanted, wanted_seen = train_locally(JOB, steps, lookahead)
    with shards_in_threads(JOB) as loops, ExitStack() as stack:
        endpoints = endpoints_of(loops)
        options: dict[str, Any] = {"reconnect_s": LONG_S}
        if kind == "auto":
            endpoints[0] = replace(endpoints[0], unix_name="")
            options["name"] = "auto"
        workers = Workers(stack, JOB, endpoints, kind, lookahead, **options)
        cuts = 0
        with workers.training(steps) as done:
            while not done.wait(rng.uniform(0, 0.004)):
                cuts += loops[rng.integers(0, 2)].cut_connections().result(TIMEOUT_S)
        assert [contents_of(loop) for loop in loops] == wanted
        assert [t.seen for t in workers.trainings] == wanted_seen
        assert cuts >= 40
        duplicates = [loop.call(loop.state.stats).result(5).duplicates_dropped for loop in loops]
        assert sum(duplicates) < cuts * 4, "what a shard has is not sent again and again"
        kinds = {"auto": ["tcp", "arena"], "arena": ["arena"] * 2}
        assert workers.transports[0].kinds == kinds.get(kind, ["tcp"] * 2)


@pytest.mark.parametrize(("kind", "lookahead"), [("arena", 1), ("tcp", 0), ("background", 2)])
def test_shards_that_come_back_from_an_earlier_state_get_the_rest_again(
    kind: str, lookahead: int
) -> None:
    steps, rng = 60, np.random.default_rng([7, lookahead])
    wanted, wanted_seen = train_locally(JOB, steps, lookahead)
    with logged_shards(JOB) as shards, ExitStack() as stack:
        options = {"reconnect_s": LONG_S, "max_pushes": 6}
        workers = Workers(stack, JOB, endpoints_of(shards), kind, lookahead, **options)  # type: ignore[arg-type]
        crashes = 0
        with workers.training(steps) as done:
            while not done.wait(rng.uniform(0, 0.02)):
                for shard in shards:
                    if rng.random() < 0.5:
                        shard.sync()
                if crashes < 12 and rng.random() < 0.3:
                    down = [s for s in shards if rng.random() < 0.7]
                    for shard in down:
                        shard.crash()
                    for shard in down:
                        shard.restart()
                    workers.move(endpoints_of(shards))  # type: ignore[arg-type]
                    crashes += len(down)
        assert [contents_of(shard.loop) for shard in shards] == wanted
        assert [t.seen for t in workers.trainings] == wanted_seen
        assert crashes >= 4


@pytest.mark.parametrize(("kind", "lookahead"), [("arena", 2), ("tcp", 0)])
def test_a_shard_killed_in_the_middle_comes_back_to_the_same_bits(
    kind: str, lookahead: int
) -> None:
    steps = 60
    wanted, wanted_seen = train_locally(JOB, steps, lookahead)
    with logged_processes(JOB) as shards, ExitStack() as stack:
        options = {"reconnect_s": LONG_S, "max_pushes": 6}
        workers = Workers(stack, JOB, endpoints_of(shards), kind, lookahead, **options)  # type: ignore[arg-type]
        behind: list[int] = []
        with workers.training(steps) as done:
            for shard in shards:
                goal = min(workers.steps) + 10
                while min(workers.steps) < goal:
                    for other in shards:
                        other.sync()
                    assert not done.wait(0.001)
                shard.kill()
                behind.append(max(workers.steps) - shard.log_length)
                shard.restart()
                workers.move(endpoints_of(shards))  # type: ignore[arg-type]
            while not done.wait(0.005):
                for shard in shards:
                    shard.sync()
        assert max(behind) > 0, "something was not durable yet"
        assert [shard.contents() for shard in shards] == wanted
        assert [t.seen for t in workers.trainings] == wanted_seen


@pytest.mark.parametrize(("kind", "lookahead"), [("arena", 0), ("arena", 2), ("background", 1)])
def test_a_worker_in_another_ones_place_repeats_what_not_every_shard_has(
    kind: str, lookahead: int
) -> None:
    steps, rng = 60, np.random.default_rng([9, lookahead])
    wanted, wanted_seen = train_locally(JOB, steps, lookahead)
    with shards_in_threads(JOB) as loops, ExitStack() as stack:
        endpoints = endpoints_of(loops)
        other = Workers(stack, JOB, endpoints, kind, lookahead, worker=1)
        current: list[WireTransport] = []
        errors: set[str] = set()
        per_step = len(wanted_seen[0]) // steps

        def first() -> None:
            finished = False
            while not finished:
                with connected(JOB, endpoints, **transport_options(kind)) as (client, transport):
                    step = min(transport.next_steps)
                    training = Training(JOB, client, 0, lookahead, step=step)
                    current[:] = [transport]
                    try:
                        training.run(steps - step)
                        finished = True
                    except JobError as e:
                        errors.add(str(e))
                    begin = step * per_step
                    assert training.seen == wanted_seen[0][begin : begin + len(training.seen)]

        restarts = 0
        with other.training(steps), in_thread(first) as done:
            while not done.wait(rng.uniform(0, 0.03)):
                if current:
                    current.pop().close()
                    restarts += 1
        assert [contents_of(loop) for loop in loops] == wanted
        assert other.trainings[0].seen == wanted_seen[1]
        assert all("closed" in error for error in errors)
        assert restarts >= 5


def test_a_shard_may_come_back_on_another_host() -> None:
    """It seems so: its name for shared memory is not there."""
    wanted, _ = train_locally(ALONE, 30)
    with logged_shards(ALONE) as (shard,), ExitStack() as stack:
        workers = Workers(stack, ALONE, [shard.endpoint], "auto", name="auto", reconnect_s=LONG_S)
        (training,), (transport,) = workers.trainings, workers.transports
        for k, kinds in enumerate([["arena"], ["tcp"], ["arena"]]):
            for _ in range(10):
                training.take_step()
                shard.sync()
            assert transport.kinds == kinds
            shard.crash()
            shard.restart()
            unix_name = "" if k == 0 else shard.endpoint.unix_name
            transport.move([replace(shard.endpoint, unix_name=unix_name)])
        training.client.flush(TIMEOUT_S)
        assert contents_of(shard.loop) == wanted[0]


# --- what a new connection means


@KINDS
def test_what_a_shard_expects_is_known_at_the_start(kind: str) -> None:
    job = replace(JOB, num_workers=1)
    with shards_in_threads(job) as loops:
        endpoints = endpoints_of(loops)
        with ExitStack() as stack:
            workers = Workers(stack, job, endpoints, kind)
            assert workers.transports[0].next_steps == (0, 0)
            workers.trainings[0].run(5)
        with connected(job, endpoints[:1], **transport_options(kind)) as (_, transport):
            assert transport.next_steps == (5,)
        with connected(job, endpoints, **transport_options(kind)) as (_, transport):
            assert transport.next_steps == (5, 5)


@KINDS
def test_a_second_connection_of_a_worker_takes_the_first_ones_place(kind: str) -> None:
    job = replace(ALONE, num_workers=2)
    with (
        shards_in_threads(job) as (loop,),
        connected(job, [loop.endpoint], reconnect_s=LONG_S, **transport_options(kind)) as (old, _),
    ):
        pending = old.pull(1, 1, job.names(1))
        wait_until(lambda: len(loop.state._waiting) == 1, "it waits")
        with connected(job, [loop.endpoint], **transport_options(kind)) as (new, _):
            assert loop.call(lambda: len(loop.state._waiting)).result(5) == 0, "it is forgotten"
            with pytest.raises(ProtocolError, match="another connection of worker 0 took"):
                pending.result(TIMEOUT_S)  # and does not come back: two would take turns for ever
            assert new.pull(0, 0, job.names(0)).result(TIMEOUT_S).version == 0


# --- when it is not to be


@KINDS
def test_a_shard_too_far_behind_is_an_error_that_says_what_is_missing(kind: str) -> None:
    with logged_shards(ALONE) as (shard,), ExitStack() as stack:
        workers = Workers(stack, ALONE, [shard.endpoint], kind, reconnect_s=LONG_S)
        (training,) = workers.trainings
        for _ in range(3):
            training.take_step()
        training.client.pull(3, 3, ALONE.names(0)).result(TIMEOUT_S)
        shard.sync()
        training.take_step()  # hears that 3 steps are done with
        shard._log = shard._log[:1]  # a disk that lied
        shard.crash()
        shard.restart()
        workers.move([shard.endpoint])
        text = "shard 0 came back without the pushes of worker 0 from step 1 on, .* step 3 on"
        for _ in range(2):
            with pytest.raises(ReplayGapError, match=text):
                training.take_step()


@KINDS
def test_nobody_waits_for_a_shard_that_went_back_before_the_first_push(kind: str) -> None:
    with logged_shards(ALONE) as (shard,), ExitStack() as stack:
        first = Workers(stack, ALONE, [shard.endpoint], kind).trainings[0]
        for _ in range(3):
            first.take_step()
        first.client.pull(3, 3, ALONE.names(0)).result(TIMEOUT_S)
        client, transport = stack.enter_context(
            connected(ALONE, [shard.endpoint], reconnect_s=LONG_S, **transport_options(kind))
        )
        assert transport.next_steps == (3,)
        shard.crash()
        shard.restart()
        transport.move([shard.endpoint])
        with pytest.raises(ReplayGapError, match=r"from step 0 on, .* only those from step 3 on"):
            client.pull(3, 3, ALONE.names(0)).result(TIMEOUT_S)


@KINDS
def test_a_shard_that_does_not_come_back_is_lost(kind: str) -> None:
    with logged_shards(ALONE) as (shard,), ExitStack() as stack:
        workers = Workers(stack, ALONE, [shard.endpoint], kind, reconnect_s=0.3)
        (training,) = workers.trainings
        training.take_step()
        shard.crash()
        started = time.monotonic()
        with pytest.raises(ShardLostError, match=r"shard 0: no new connection within 0.3 s"):
            training.run(9)
        assert 0.2 < time.monotonic() - started < 15
        started = time.monotonic()
        with pytest.raises(ShardLostError):
            training.client.flush(TIMEOUT_S)
        assert time.monotonic() - started < 0.2, "it is not tried again"


@KINDS
def test_a_shard_that_ends_every_connection_at_once_is_lost(kind: str) -> None:
    """Each attempt succeeds, and nothing comes of it."""
    with shards_in_threads(ALONE) as (loop,), ExitStack() as stack:
        workers = Workers(stack, ALONE, [loop.endpoint], kind, reconnect_s=0.5)
        welcomed = 0
        admit = loop._admit

        def let_in_and_drop(peer: Peer) -> None:
            nonlocal welcomed
            welcomed += 1
            admit(peer)
            loop.call(lambda: loop._drop(peer))

        loop._admit = let_in_and_drop  # type: ignore[method-assign]
        loop.cut_connections().result(5)
        started = time.monotonic()
        with pytest.raises(ShardLostError, match=r"within 0\.5 s"):
            workers.trainings[0].run(1)
        assert time.monotonic() - started < 15
        assert 2 <= welcomed < 40, "with pauses"


@KINDS
def test_an_error_of_the_shard_is_not_repaired(kind: str) -> None:
    """Without a history, it cannot answer for a version that has gone by."""
    job = replace(ALONE, history=0)
    with shards_in_threads(job) as (loop,), ExitStack() as stack:
        workers = Workers(stack, job, [loop.endpoint], kind, reconnect_s=LONG_S)
        pending = workers.trainings[0].client.pull(2, 2, job.names(0))
        loop.cut_connections().result(5)
        other = Training(job, local_client(job, [loop.state], 0), 0)
        loop.call(lambda: [other.take_step() for _ in range(3)]).result(5)
        with pytest.raises(ProtocolError, match=r"wants version 2 .* at version 3"):
            pending.result(TIMEOUT_S)


@KINDS
def test_a_shard_without_state_is_waited_for(kind: str) -> None:
    wanted, _ = train_locally(ALONE, 4)
    with logged_shards(ALONE) as (shard,), ExitStack() as stack:
        workers = Workers(stack, ALONE, [shard.endpoint], kind, reconnect_s=LONG_S)
        shard.crash()
        state = ShardState(ALONE.shard(0).spec)
        shard.loop = ShardLoop(state, server_options(ALONE))
        workers.move([shard.endpoint])
        dense, _, values = ALONE.shard(0).dense()
        with workers.training(4) as done:
            assert not done.wait(0.2)
            shard.loop.call(lambda: state.set_dense(dense, values)).result(5)
        assert contents_of(shard.loop) == wanted[0]
