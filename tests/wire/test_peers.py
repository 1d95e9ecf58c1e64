"""What a shard does with peers that break the rules: nothing that others notice."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from ps.errors import JobError, ProtocolError
from ps.wire.frames import Header, Kind, encode
from ps.wire.handshake import challenge, new_nonce
from ps.wire.server import Endpoint
from tests.support.wire import (
    TOKEN,
    Job,
    connected,
    shards_in_threads,
    wait_until,
)
from tests.support.wire_peers import META, RawPeer, authed, description, error_of, pull
from tests.support.wire_processes import rss_bytes, shards_in_processes

JOB = Job(dims=(4,), num_workers=2)
ALONE = Job(dims=(4,))
SOCKETS = pytest.mark.parametrize("kind", ["tcp", "unix"])


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    """Of a shard that cuts off who makes it wait for half a second."""
    with shards_in_threads(JOB, deadline_s=0.5) as (loop,):
        yield loop.endpoint


@pytest.fixture(scope="module")
def patient() -> Iterator[Endpoint]:
    """Of a shard that has time: whom it cuts off, it cuts off at once."""
    with shards_in_threads(JOB, deadline_s=600.0) as (loop,):
        yield loop.endpoint


# --- the handshake


@SOCKETS
@pytest.mark.parametrize("token", [b"o" * 32, b"", TOKEN[:-1], TOKEN + b"t"])
def test_a_peer_with_a_wrong_token_is_cut_off(endpoint: Endpoint, kind: str, token: bytes) -> None:
    with RawPeer(endpoint, kind) as peer:
        assert peer.shake_hands(token=token) is None


def test_a_replayed_hello_is_cut_off(patient: Endpoint) -> None:
    sent: list[bytes] = []

    class Heard(RawPeer):
        def shake_hands(self, *args: Any, **kwargs: Any) -> Any:
            real, peer = self.sock, self

            class Tapped:
                def __getattr__(self, name: str) -> Any:
                    return getattr(real, name)

                def sendall(self, data: Any) -> None:
                    sent.append(bytes(data))
                    real.sendall(data)

            peer.sock = Tapped()  # type: ignore[assignment]
            return super().shake_hands(*args, **kwargs)

    with Heard(patient) as peer:
        assert peer.shake_hands() is not None
    with RawPeer(patient) as again:
        assert again.read() is not None
        again.sock.sendall(sent[0])
        assert again.is_cut_off()


@SOCKETS
@pytest.mark.parametrize(
    "wrong", [{"worker": 2}, {"fingerprint": 1}, {"shard": 1}], ids=lambda w: next(iter(w))
)
def test_a_worker_of_another_job_is_told_why(
    endpoint: Endpoint, kind: str, wrong: dict[str, int]
) -> None:
    wrong = dict(wrong)
    shard = wrong.pop("shard", 0)
    other = Endpoint(shard, endpoint.host, endpoint.port, endpoint.unix_name)
    name: Any = "arena" if kind == "unix" else "tcp"
    with pytest.raises(ProtocolError, match="this is shard 0 of 0xf00d, with 2 workers"):
        connected(JOB, [other], name, **wrong).__enter__()  # type: ignore[arg-type]


@SOCKETS
def test_two_jobs_on_one_machine_do_not_meet(endpoint: Endpoint, kind: str) -> None:
    name: Any = "arena" if kind == "unix" else "tcp"
    with pytest.raises(JobError, match="closed the connection in the handshake"):
        connected(JOB, [endpoint], name, token=b"o" * 32).__enter__()


@SOCKETS
def test_a_worker_refuses_a_shard_that_does_not_know_the_token(kind: str) -> None:
    """It only answers: what it says proves nothing, and helps to make nobody else believe it."""
    listener = (
        socket.socket(socket.AF_INET)
        if kind == "tcp"
        else socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    )
    with closing(listener):
        listener.bind(("127.0.0.1", 0) if kind == "tcp" else "\0manta-test-impostor")
        listener.listen()

        def impostor() -> None:
            sock, _ = listener.accept()
            with closing(sock):
                sock.sendall(challenge(new_nonce()))
                sock.recv(1000)
                sock.sendall(encode(Header(Kind.WELCOME), os.urandom(32)))
                sock.recv(1)

        thread = threading.Thread(target=impostor)
        thread.start()
        port = listener.getsockname()[1] if kind == "tcp" else 1
        endpoint = Endpoint(0, "127.0.0.1", port, "" if kind == "tcp" else "manta-test-impostor")
        with pytest.raises(ProtocolError, match="no shard of this job"):
            connected(JOB, [endpoint], "tcp" if kind == "tcp" else "arena").__enter__()
        thread.join(5)
        assert not thread.is_alive()


def test_a_busy_shard_is_waited_for() -> None:
    with shards_in_threads(ALONE) as (loop,):
        for kind in ("arena", "tcp"):
            busy = loop.call(lambda: time.sleep(1.2))
            with connected(ALONE, [loop.endpoint], kind) as (client, _):  # type: ignore[arg-type]
                assert client.pull(0, 0, ALONE.names(1)).result(10).version == 0
            busy.result(5)


FIRST = {
    "a pull": (Header(Kind.PULL), description(2), [memoryview(bytes(16))]),
    "a push": (Header(Kind.PUSH), description(0), []),
    "a long hello": (Header(Kind.HELLO), bytes(1 << 17), []),
    "a big hello": (Header(Kind.HELLO), bytes(65), []),
    "a payload": (Header(Kind.HELLO), bytes(64), [memoryview(b"x")]),
    "a flush": (Header(Kind.FLUSH), b"", []),
    "a segment": (Header(Kind.ARENA, aux=4096), b"", []),
    "a welcome": (Header(Kind.WELCOME), bytes(32), []),
}


@SOCKETS
@pytest.mark.parametrize("first", FIRST)
def test_who_does_not_start_with_hello_is_cut_off(patient: Endpoint, kind: str, first: str) -> None:
    header, meta, payload = FIRST[first]
    with RawPeer(patient, kind) as peer:
        assert peer.read() is not None
        peer.try_send(bytes(encode(header, meta, payload)) + b"".join(payload))
        assert peer.is_cut_off(), "at once, not at its deadline"


@SOCKETS
@pytest.mark.parametrize("what", ["meta", "payload"])
def test_a_stranger_gets_no_memory(kind: str, what: str) -> None:
    """Only a header that promises more: nothing is kept ready for it."""
    big = 1 << 25
    if what == "meta":
        data = bytes(encode(Header(Kind.HELLO), bytes(1 << 20)))[:64]
    else:
        payload = [memoryview(bytes(big))]
        data = bytes(encode(Header(Kind.PULL), description(big // 8), payload))
    with (
        shards_in_threads(ALONE, deadline_s=600.0) as (loop,),
        RawPeer(loop.endpoint, kind) as peer,
    ):
        assert peer.read() is not None
        peer.try_send(data)
        assert peer.is_cut_off(), "at the header"


# --- deadlines


@SOCKETS
@pytest.mark.parametrize("sent", [b"", b"MNTA", bytes(encode(Header(Kind.HELLO), bytes(64)))[:-1]])
def test_who_does_not_say_who_it_is_is_cut_off(endpoint: Endpoint, kind: str, sent: bytes) -> None:
    with RawPeer(endpoint, kind) as peer:
        assert peer.read() is not None
        if sent:
            peer.sock.sendall(sent)
        started = time.monotonic()
        assert peer.is_cut_off()
        # Of a stream the rest may come; a packet is a frame or is none.
        at_once = kind == "unix" and sent
        assert at_once or time.monotonic() - started > 0.3


@SOCKETS
def test_who_says_it_in_drops_is_cut_off_too(endpoint: Endpoint, kind: str) -> None:
    data = bytes(encode(Header(Kind.HELLO), bytes(64)))
    with RawPeer(endpoint, kind) as peer:
        assert peer.read() is not None
        started = time.monotonic()
        for i in range(100):
            peer.try_send(data[i : i + 1])
            if peer.is_cut_off(0.05):
                break
        assert time.monotonic() - started < 15


@SOCKETS
@pytest.mark.parametrize("where", [1, 63, 64, 70, 64 + 8 * META])
def test_a_worker_that_stops_in_a_frame_is_cut_off(
    endpoint: Endpoint, kind: str, where: int
) -> None:
    payload = [memoryview(bytes(800))] if kind == "tcp" else []
    data = bytes(encode(Header(Kind.PULL), description(100), payload))
    with authed(endpoint, kind) as peer:
        peer.sock.sendall(data[:where] if payload else data[: min(where, len(data) - 1)])
        assert peer.is_cut_off()


@SOCKETS
def test_a_worker_that_has_nothing_to_say_is_left_alone(endpoint: Endpoint, kind: str) -> None:
    with authed(endpoint, kind) as peer:
        assert not peer.is_cut_off(1.2)
        peer.send(Header(Kind.FLUSH, request=1))
        peer.sock.settimeout(5)
        answer = peer.read()
        assert answer is not None
        assert answer.header.kind == Kind.FLUSHED


BIG = Job(num_rows=20_000, dims=(64,), num_workers=2)


def unread(peer: RawPeer) -> None:
    """Room for little in the kernel."""
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)


@pytest.mark.parametrize("drops", [False, True], ids=["silent", "sends on"])
def test_a_worker_that_stops_reading_is_cut_off(drops: bool) -> None:
    with (
        shards_in_threads(BIG, deadline_s=0.6) as (loop,),
        authed(loop.endpoint) as peer,
    ):
        unread(peer)
        for request in (1, 2):
            pull(peer, np.arange(20_000), request=request)  # 5 MB each
        next_frame = bytes(encode(Header(Kind.FLUSH, request=3), bytes(1 << 16)))
        started = time.monotonic()

        def connections() -> int:
            return loop.call(lambda: len(loop._peers)).result(5)

        sent = 0
        while connections():
            assert time.monotonic() - started < 20, "never cut off"
            if drops:
                peer.try_send(next_frame[sent : sent + 1])
                sent += 1
            time.sleep(0.05)
        assert time.monotonic() - started > 0.3


def test_a_worker_that_never_reads_cannot_fill_the_memory_of_a_shard() -> None:
    with shards_in_processes(BIG, deadline_s=20.0) as (shard,):
        with connected(BIG, [shard.endpoint], "tcp", worker=1) as (client, _):
            client.pull(0, 0, BIG.names(1)).result(20)
            before = rss_bytes(shard.process.pid)
            with authed(shard.endpoint) as peer:
                unread(peer)
                peer.sock.settimeout(0.3)
                count = 0
                try:
                    while count < 300:
                        pull(peer, np.arange(20_000), request=count + 1)  # answers of 1.5 GB
                        count += 1
                except TimeoutError:
                    pass
                client.pull(0, 0, BIG.names(1)).result(20)
                grown = rss_bytes(shard.process.pid) - before
        assert count < 60, "it is not read from either"
        assert grown < 100 << 20


# --- broken frames of somebody who knows the token


BROKEN: dict[str, bytes] = {
    "garbage": bytes(range(64)) * 2,
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: a browser, say\r\n\r\n" + bytes(64),
    "a damaged frame": bytes(encode(Header(Kind.FLUSH))[:-1]) + b"\x99",
    "a frame of a shard": bytes(encode(Header(Kind.ROWS))),
    "a second hello": bytes(encode(Header(Kind.HELLO), bytes(64))),
    "a huge payload": bytes(encode(Header(Kind.PUSH)))[:16] + b"\xff" * 8 + bytes(40),
    "no segment": bytes(encode(Header(Kind.ARENA, aux=4096))),
}


@SOCKETS
@pytest.mark.parametrize("broken", BROKEN)
def test_who_breaks_the_protocol_is_cut_off_at_once(
    patient: Endpoint, kind: str, broken: str
) -> None:
    with authed(patient, kind) as peer:
        peer.try_send(BROKEN[broken])
        assert peer.is_cut_off()


def test_a_request_that_cannot_be_is_answered_by_its_error_and_the_next_one_works(
    endpoint: Endpoint,
) -> None:
    with authed(endpoint) as peer:
        pull(peer, [300], request=1)
        assert error_of(peer) == (
            "ProtocolError\nshard 0: table 't0': local row 300 is not in [0, 300)"
        )
        pull(peer, [-1], request=2)
        assert "local row -1" in error_of(peer)
        pull(peer, [1], request=3, worker=1)
        assert "worker 0 sent as worker 1" in error_of(peer)
        pull(peer, [1], version=2**40, request=4)
        assert "more than 64 ahead" in error_of(peer)
        pull(peer, [1, 1, 2], request=5)
        frame = peer.read()
        assert frame is not None
        assert (frame.header.kind, frame.header.request) == (Kind.ROWS, 5)


def test_more_requests_than_anybody_needs_end_the_connection(patient: Endpoint) -> None:
    with authed(patient) as peer:
        for request in range(65):
            pull(peer, [1], version=5, request=request + 1)
        assert peer.is_cut_off()
    with authed(patient) as peer:
        for _ in range(2):
            pull(peer, [1], version=5, request=1)
        assert peer.is_cut_off(), "two requests of one number"


def test_what_a_broken_connection_waited_for_is_forgotten() -> None:
    with shards_in_threads(JOB) as (loop,):
        for _ in range(5):
            with authed(loop.endpoint) as peer:
                for request in range(20):
                    pull(peer, [1], version=5, request=request + 1)
                peer.send(Header(Kind.FLUSH, request=50))
                assert peer.read() is not None
        wait_until(lambda: not loop._peers, "all are gone")
        waiting = loop.call(lambda: (len(loop.state._waiting), len(loop.state._flushes)))
        assert waiting.result(5) == (0, 0)
