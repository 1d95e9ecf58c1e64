"""The shard's loop: segments it takes, turns of workers and control calls, and its end."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.errors import MantaError
from ps.messages import LATEST
from ps.step_message import NO_PLACE
from ps.wire.frames import Header, Kind, encode
from ps.wire.server import Endpoint, ShardLoop
from tests.support.wire import (
    FINGERPRINT,
    Job,
    Training,
    connected,
    contents_of,
    local_client,
    shards_in_threads,
    train_locally,
    wait_until,
)
from tests.support.wire_peers import META, RawPeer, authed, pull, segment, send_fds

JOB = Job(dims=(4,), num_workers=2)
ALONE = Job(dims=(4,))


@pytest.fixture(scope="module")
def patient() -> Iterator[Endpoint]:
    """Of a shard that has time: whom it cuts off, it cuts off at once."""
    with shards_in_threads(JOB, deadline_s=600.0) as (loop,):
        yield loop.endpoint


# --- segments


def test_only_one_sealed_segment_at_a_time_is_taken(patient: Endpoint) -> None:
    fd = segment()
    plain = os.memfd_create("plain")
    os.ftruncate(plain, 1 << 16)
    opened = len(os.listdir("/proc/self/fd"))
    cases: list[tuple[list[int], Header]] = [
        ([fd, fd], Header(Kind.ARENA, aux=1 << 16)),
        ([fd] * 20, Header(Kind.ARENA, aux=1 << 16)),
        ([plain], Header(Kind.ARENA, aux=1 << 16)),
        ([fd], Header(Kind.ARENA, aux=1 << 17)),
        ([fd], Header(Kind.ARENA, aux=1 << 16, version=1)),
        ([], Header(Kind.ARENA, aux=1 << 16)),
    ]
    for fds, header in cases:
        with authed(patient, "unix") as peer:
            if fds:
                send_fds(peer, fds, bytes(encode(header)))
            else:
                peer.send(header)
            assert peer.is_cut_off(), (fds, header)
    with authed(patient, "unix") as peer:
        send_fds(peer, [fd], bytes(encode(Header(Kind.ARENA, aux=1 << 16))))
        peer.send(Header(Kind.FLUSH, request=1))
        assert peer.read() is not None
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= opened, "no descriptor is left over")
    os.close(fd)
    os.close(plain)


def test_descriptors_of_strangers_are_dropped(patient: Endpoint) -> None:
    fd = segment()
    with RawPeer(patient, "unix") as peer:
        assert peer.read() is not None
        opened = len(os.listdir("/proc/self/fd"))
        send_fds(peer, [fd] * 5, b"M")
        assert peer.is_cut_off()
        assert len(os.listdir("/proc/self/fd")) <= opened
    os.close(fd)


# --- others notice nothing


@contextmanager
def in_thread(function: Any) -> Iterator[None]:
    """Call a function again and again."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.is_set():
                function()
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_answers_that_do_not_fit_16_bits_are_an_error_of_who_asked() -> None:
    """Of the worker that waits for them, not of the one whose push makes the version."""
    job = Job(dims=(4,), num_workers=2, dtype="float16")
    with shards_in_threads(job) as (loop,), closing_all() as open_all:
        names = job.names(3)
        clients = [
            open_all(connected(job, [loop.endpoint], kind, worker=w))[0]  # type: ignore[arg-type]
            for w, kind in enumerate(["tcp", "arena"])
        ]
        grads = [np.zeros((names["t0"].local_rows.size, 4), np.float32) for _ in range(2)]
        dense = np.zeros(7, np.float32)
        pending = []
        for step in range(2):
            for w, client in enumerate(clients):
                client.push(step, names, {"t0": grads[w]}, dense, None)
            clients[0].flush(10)

        def grow() -> None:
            for _, rows, _ in loop.state.slabs("t0"):
                rows[...] = 1e6

        pending += [client.pull(3, 3, names) for client in clients]
        loop.call(grow).result(5)
        for client in clients:
            client.push(2, names, {"t0": grads[0]}, dense, None)
        for w in range(2):
            with pytest.raises(MantaError, match="does not fit float16"):
                pending[w].result(10)


@contextmanager
def closing_all() -> Iterator[Any]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield stack.enter_context


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_pull_that_waits_harms_its_sender_only(dtype: Any) -> None:
    """Room for too few dense values, in shared memory, for a version that another worker makes."""
    job = Job(dims=(4,), num_workers=2, dtype=dtype)
    with (
        shards_in_threads(job) as (loop,),
        connected(job, [loop.endpoint], "arena") as (client, _),
        authed(loop.endpoint, "unix", worker=1) as peer,
    ):
        fd = segment()
        send_fds(peer, [fd], bytes(encode(Header(Kind.ARENA, aux=1 << 16))))
        os.close(fd)
        numbers = np.full(META, NO_PLACE, dtype="<i8")
        numbers[[0, 2, 5]] = 0, 0, 0
        numbers[-4:] = 0, 3, 0, 1
        peer.send(Header(Kind.PULL, worker=1, request=1, step=1, version=1), numbers.tobytes())
        peer.send(Header(Kind.FLUSH, worker=1, request=2))
        frames = [peer.read()]
        training = Training(job, client, 0)
        # The other worker's steps: its one connection is the peer's.
        other = Training(job, local_client(replace(job, dtype="float32"), [loop.state], 1), 1)
        for _ in range(3):
            loop.call(other.take_step).result(5)
            training.take_step()
            client.flush(5)
        frames.append(peer.read())
        assert all(frames)
        wrong = [f.meta.decode() for f in frames if f and f.header.kind == Kind.ERROR]
        assert len(wrong) == 1
        assert wrong[0].startswith("ProtocolError\n")
        if dtype == "float32":
            assert contents_of(loop) == train_locally(job, 3)[0][0]


def test_a_worker_that_floods_does_not_starve_another() -> None:
    """It waits for a turn of the other's 50 pulls, not for all of them."""
    job = Job(num_rows=20_000, dims=(16,), num_workers=2, mode="async", max_staleness=10**6)
    with (
        shards_in_threads(job) as (loop,),
        connected(job, [loop.endpoint], "arena", worker=0) as (busy, _),
        connected(job, [loop.endpoint], "arena", worker=1) as (calm, _),
    ):
        many, few = job.names(0, size=15_000), job.names(1, size=100)
        floods_s: list[float] = []
        pulls_s: list[float] = []

        def flood() -> None:
            started = time.perf_counter()
            pending = [busy.pull(0, LATEST, many) for _ in range(50)]
            for one in pending:
                one.result(60)
            floods_s.append(time.perf_counter() - started)

        flood()
        with in_thread(flood):
            while len(pulls_s) < 40 or len(floods_s) < 4:
                started = time.perf_counter()
                calm.pull(0, LATEST, few).result(60)
                pulls_s.append(time.perf_counter() - started)
    assert np.median(pulls_s) < 0.3 * np.median(floods_s)


def test_control_calls_and_training_both_advance() -> None:
    job = ALONE
    wanted, _ = train_locally(job, 60)
    done: list[int] = []

    def pieces() -> Iterator[None]:
        for i in range(3000):
            done.append(i)
            yield

    with shards_in_threads(job) as (loop,), connected(job, [loop.endpoint]) as (client, _):
        training = Training(job, client, 0)
        training.begin()
        streams = [loop.stream(pieces()) for _ in range(2)]
        calls = [loop.call(lambda i=i: i) for i in range(500)]  # type: ignore[misc]
        for _ in range(60):
            training.take_step()
        client.flush(10)
        for future in streams:
            future.result(20)
        assert [call.result(5) for call in calls] == list(range(500))
        assert len(done) == 6000
        assert contents_of(loop) == wanted[0]

    def forever() -> Iterator[None]:
        while not stop.is_set():
            yield

    stop = threading.Event()
    with shards_in_threads(job) as (loop,), connected(job, [loop.endpoint]) as (client, _):
        stream = loop.stream(forever())
        training = Training(job, client, 0)
        training.run(20)
        assert loop.call(lambda: 5).result(5) == 5
        stop.set()
        stream.result(5)


def test_a_stream_that_nobody_waits_for_any_more_harms_nothing() -> None:
    def pieces() -> Iterator[None]:
        for _ in range(50):
            time.sleep(0.001)
            yield

    def broken() -> Iterator[None]:
        yield
        raise ValueError("broken")

    with shards_in_threads(ALONE) as (loop,):
        for wait_s in (0.0, 0.01):
            future = loop.stream(pieces())
            time.sleep(wait_s)
            future.cancel()
        failing = loop.stream(broken())
        with pytest.raises(ValueError, match="broken"):
            failing.result(5)
        time.sleep(0.1)
        assert loop.call(lambda: 3).result(5) == 3


def test_a_closed_shard_leaves_no_thread_and_no_file() -> None:
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with shards_in_threads(ALONE) as (loop,):
        with authed(loop.endpoint) as peer:
            pull(peer, [1])
            assert peer.read() is not None
        Training(ALONE, connected_client(loop), 0)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files
    assert loop.endpoint.unix_name not in Path("/proc/net/unix").read_text()


def connected_client(loop: ShardLoop) -> Any:
    with connected(ALONE, [loop.endpoint]) as (client, _):
        client.pull(0, 0, ALONE.names(1)).result(10)
        return client


def test_a_connection_reset_at_any_moment_harms_nobody(patient: Endpoint) -> None:
    linger = struct.pack("ii", 1, 0)  # closing sends a reset
    for i in range(60):
        peer = RawPeer(patient)
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if i % 3 == 1:
            peer.shake_hands(worker=0)
        if i % 3 == 2:
            peer.shake_hands(worker=0)
            pull(peer, np.arange(300))
        peer.sock.close()
    with authed(patient) as peer:
        pull(peer, [1])
        assert peer.read() is not None
    assert FINGERPRINT == 0xF00D
