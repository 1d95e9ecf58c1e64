"""What other threads tell a worker that waits, and what stays in memory while it does."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ps.errors import JobError, MantaError
from ps.wire.arena import Arena
from ps.wire.frames import Header, Kind
from ps.wire.transport import WireTransport
from tests.support.wire import (
    TIMEOUT_S,
    Job,
    connected,
    contents_of,
    endpoints_of,
    shards_in_threads,
    train_locally,
    wait_until,
)
from tests.support.wire_peers import META, RawPeer, authed, description, error_of, give_segment
from tests.support.wire_processes import rss_bytes
from tests.support.wire_recovery import (
    Workers,
    logged_processes,
    logged_shards,
    transport_options,
)

KINDS = pytest.mark.parametrize("kind", ["arena", "tcp", "background"])
JOB = Job(dims=(4,), num_shards=2, num_workers=2)
ALONE = Job(dims=(4,), history=6)
LONG_S = 60.0


def push_ones(client: Any, job: Job, step: int) -> None:
    names = job.names([step])
    grads = {n: np.ones((d.local_rows.size, 4), np.float32) for n, d in names.items()}
    client.push(step, names, grads, np.zeros(job.dense_size, np.float32), None)


@contextmanager
def raising(call: Callable[[], object], error: type[MantaError], text: str) -> Iterator[None]:
    """A call in a thread, which raises within a second of what happens in the `with`."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), f"it does not wait: {raised}"
    yield
    thread.join(1.0)
    assert not thread.is_alive(), "it does not notice"
    assert [type(e) for e in raised] == [error]
    assert text in str(raised[0])


def fill_window(client: Any) -> None:
    for step in range(99):
        push_ones(client, JOB, step)


WAITS: dict[str, Callable[[Any], object]] = {
    "pull": lambda client: client.pull(1, 1, JOB.names(1)).result(TIMEOUT_S),
    "flush": lambda client: (push_ones(client, JOB, 0), client.flush(TIMEOUT_S)),
    "push": fill_window,
}


@KINDS
@pytest.mark.parametrize("what", WAITS)
@pytest.mark.parametrize("how", ["abort", "close"])
def test_who_waits_stops_when_told(kind: str, what: str, how: str) -> None:
    with (
        shards_in_threads(JOB) as loops,
        connected(JOB, endpoints_of(loops), **transport_options(kind)) as (client, transport),
    ):
        error, text = (ReasonError, "why") if how == "abort" else (JobError, "transport is closed")
        with raising(lambda: WAITS[what](client), error, text):
            started = time.monotonic()
            transport.abort(ReasonError("why")) if how == "abort" else client.close()
            assert time.monotonic() - started < 1
        for call in (
            lambda: client.pull(2, 0, JOB.names(1)),
            lambda: push_ones(client, JOB, 0),
            lambda: client.flush(5),
        ):
            with pytest.raises(error, match=text):
                call()


class ReasonError(JobError):
    """Of the application."""


@KINDS
def test_who_waits_for_a_shard_to_come_back_stops_when_told(kind: str) -> None:
    with logged_shards(ALONE) as (shard,), ExitStack() as stack:
        workers = Workers(stack, ALONE, [shard.endpoint], kind, reconnect_s=LONG_S)
        shard.crash()
        with raising(lambda: workers.trainings[0].run(1), ReasonError, "why"):
            workers.transports[0].abort(ReasonError("why"))


@pytest.mark.parametrize("kind", ["arena", "tcp"])
def test_who_waits_for_a_handshake_stops_when_told(kind: str) -> None:
    with logged_shards(ALONE) as (shard,), ExitStack() as stack:
        workers = Workers(stack, ALONE, [shard.endpoint], kind, reconnect_s=LONG_S)
        shard.loop.cut_connections().result(5)
        late = shard.loop.delay(1.3)
        with raising(lambda: workers.trainings[0].run(1), ReasonError, "why"):
            workers.transports[0].abort(ReasonError("why"))
        late.result(5)


# --- where shards live


@pytest.mark.parametrize("kind", ["tcp", "background"])
def test_a_shard_on_a_dead_host_is_left_when_another_is_named(kind: str) -> None:
    """Which cannot say that it is dead: here it stands still."""
    wanted, _ = train_locally(ALONE, 3)
    hold = threading.Event()
    with logged_shards(ALONE) as (old,), logged_shards(ALONE) as (new,), ExitStack() as stack:
        workers = Workers(stack, ALONE, [old.endpoint], kind, reconnect_s=LONG_S)
        held = old.loop.call(lambda: hold.wait(30))
        with workers.training(3) as done:
            assert not done.wait(0.2)
            new.sync()
            workers.move([new.endpoint])
            wait_until(lambda: workers.steps == [3], "it trains there")
            new.sync()
        hold.set()
        held.result(5)
        assert contents_of(new.loop) == wanted[0]


def test_memory_is_shared_with_one_process_of_a_shard_only() -> None:
    """The former one may still write into it, as long as it lives."""
    wanted, _ = train_locally(ALONE, 3)
    with logged_shards(ALONE) as (old,), logged_shards(ALONE) as (new,), ExitStack() as stack:
        workers = Workers(stack, ALONE, [old.endpoint], "arena", reconnect_s=LONG_S)
        with workers.training(3) as done:
            workers.move([new.endpoint])
            old.loop.cut_connections().result(5)
            assert not done.wait(0.3)
            assert new.loop.call(lambda: new.loop.state.version).result(5) == 0
            old.crash()
            wait_until(lambda: workers.steps == [3], "it trains there")
            new.sync()
        assert contents_of(new.loop) == wanted[0]


def test_a_stranger_on_a_dead_shards_port_ends_nothing() -> None:
    wanted, _ = train_locally(ALONE, 3)
    with logged_shards(ALONE) as (shard,), ExitStack() as stack:
        workers = Workers(stack, ALONE, [shard.endpoint], "tcp", reconnect_s=LONG_S)
        port = shard.endpoint.port
        shard.crash()
        stranger = stack.enter_context(closing(socket.create_server(("127.0.0.1", port))))
        came: list[int] = []

        def answer() -> None:
            while len(came) < 3:
                sock, _ = stranger.accept()
                with sock:
                    sock.sendall(b"220 mail.example.com ESMTP" + bytes(64))
                came.append(1)

        thread = threading.Thread(target=answer)
        thread.start()
        with workers.training(3):
            thread.join(TIMEOUT_S)
            shard.restart()
            workers.move([shard.endpoint])
            wait_until(lambda: workers.steps == [3], "it trains")
            shard.sync()
        assert len(came) == 3
        assert contents_of(shard.loop) == wanted[0]


# --- old frames


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_frames_of_a_replaced_connection_have_no_effect(kind: str) -> None:
    job, hold = Job(dims=(4,), dense_size=0, state_size=0), threading.Event()
    with (
        shards_in_threads(job) as (loop,),
        authed(loop.endpoint, kind) as old,
        RawPeer(loop.endpoint, kind) as new,
    ):
        numbers = description() if kind == "tcp" else EMPTY
        if kind == "unix":
            give_segment(old)
        held = loop.call(lambda: hold.wait(30))
        for step in range(20):
            old.send(Header(Kind.PUSH, request=step + 1, step=step), numbers)
        releaser = threading.Timer(0.1, hold.set)  # when HELLO and the old frames lie side by side
        releaser.start()
        welcome = new.shake_hands()
        held.result(5)
        assert welcome is not None
        assert welcome.header.kind == Kind.WELCOME
        fence = welcome.header.version
        assert fence < 20, "a frame per turn"
        assert error_of(old).startswith("ProtocolError\nshard 0: another connection of worker 0")
        assert old.is_cut_off()
        new.send(Header(Kind.FLUSH, request=1))
        assert new.read() is not None
        assert loop.call(loop.state.fences).result(5) == (fence,), "exactly what WELCOME said"
        if kind == "unix":
            give_segment(new)
        new.send(Header(Kind.PUSH, request=2, step=fence), numbers)
        new.send(Header(Kind.FLUSH, request=3))
        answer = new.read()
        assert answer is not None
        assert answer.header.step == fence + 1


EMPTY = np.zeros(META, dtype="<i8")
EMPTY[[1, 3, 4, -2, -1]] = -1
EMPTY = EMPTY.tobytes()


# --- memory

STALL_S = float(os.environ.get("MANTA_STALL_S", "1"))
"""How long a shard stands still; docs/testing.md says what longer ones showed."""


def arena_bytes(transport: WireTransport) -> int:
    assert isinstance(transport.memory, Arena)
    return transport.memory.size_bytes


@KINDS
def test_a_shard_that_is_never_done_stops_its_worker_soon(kind: str) -> None:
    with logged_shards(ALONE) as (shard,), ExitStack() as stack:
        client, transport = stack.enter_context(
            connected(ALONE, [shard.endpoint], timeout_s=0.1, max_pushes=3, reconnect_s=LONG_S,
                      **transport_options(kind))
        )  # fmt: skip
        for step in range(3):
            push_ones(client, ALONE, step)
        sizes = []
        for _ in range(4):
            with pytest.raises(JobError, match="shard 0 has not applied"):
                push_ones(client, ALONE, 3)
            sizes.append(arena_bytes(transport) if kind == "arena" else 0)
        assert sizes[0] == sizes[-1]
        shard.sync()
        push_ones(client, ALONE, 3)
        shard.sync()


def test_what_is_kept_for_later_takes_the_memory_of_a_few_steps() -> None:
    job = replace(ALONE, num_rows=60_000)
    with logged_shards(job) as (shard,), ExitStack() as stack:
        workers = Workers(stack, job, [shard.endpoint], "arena", max_pushes=8, reconnect_s=LONG_S)
        (training,), sizes = workers.trainings, []
        big = job.names(0, size=40_000)
        training.names = lambda step: big  # type: ignore[method-assign]
        for step in range(60):
            training.take_step()
            if step % 4 == 3:
                shard.loop.call(lambda: None).result(5)
                shard.sync()
            sizes.append(arena_bytes(workers.transports[0]))
        assert sizes[15] == sizes[-1]


@pytest.mark.parametrize("kind", ["arena", "tcp"])
def test_a_shard_that_stands_still_takes_no_memory(kind: str) -> None:
    job = Job(dims=(64,), num_rows=20_000, num_shards=2, num_workers=2, history=4)
    wanted, _ = train_locally(job, 12)
    with logged_processes(job) as shards, ExitStack() as stack:
        endpoints = endpoints_of(shards)  # type: ignore[arg-type]
        workers = Workers(stack, job, endpoints, kind, reconnect_s=LONG_S, max_pushes=20)
        with workers.training(12) as done:
            wait_until(lambda: min(workers.steps) >= 3, "all is warm")
            shards[1].stop()
            while not done.wait(0.1):  # until nobody gets on
                before = workers.steps
                if not done.wait(0.3) and workers.steps == before:
                    break
            stood, memory = workers.steps, rss_bytes()
            assert not done.wait(STALL_S)
            grown = rss_bytes() - memory
            assert workers.steps == stood
            shards[1].go_on()
            while not done.wait(0.01):
                for shard in shards:
                    shard.sync()
        assert max(stood) - min(stood) <= 1
        assert grown < 4 << 20, f"{grown} bytes more"
        assert [shard.contents() for shard in shards] == wanted
