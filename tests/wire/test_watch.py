"""Observers: a shard's end is known at once, and a shard knows when nobody watches it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from ps.errors import JobError, ProtocolError, ShardLostError
from ps.shard import ShardState
from ps.wire.frames import OBSERVER, Header, Kind
from ps.wire.server import Endpoint, ShardLoop
from ps.wire.watch import ShardWatch
from tests.support.wire import (
    FINGERPRINT,
    TIMEOUT_S,
    TOKEN,
    Job,
    Training,
    connected,
    endpoints_of,
    server_options,
    shards_in_threads,
    wait_until,
)
from tests.support.wire_peers import RawPeer, authed
from tests.support.wire_processes import open_files, shards_in_processes

JOB = Job(dims=(4,), num_shards=2)
SOCKETS = pytest.mark.parametrize("kind", ["tcp", "unix"])


@contextmanager
def watched(endpoints: list[Endpoint]) -> Iterator[tuple[ShardWatch, queue.Queue[int]]]:
    lost: queue.Queue[int] = queue.Queue()
    with closing(ShardWatch(endpoints, TOKEN, FINGERPRINT, lost.put)) as watch:
        yield watch, lost


def over(kind: str, endpoint: Endpoint) -> Endpoint:
    return replace(endpoint, unix_name="") if kind == "tcp" else endpoint


@SOCKETS
def test_a_killed_shard_is_noticed_within_half_a_second(kind: str) -> None:
    with (
        shards_in_processes(JOB) as shards,
        watched([over(kind, s.endpoint) for s in shards]) as (_, lost),
    ):
        seconds = []
        for k in (1, 0):
            assert lost.empty()
            started = time.monotonic()
            shards[k].process.kill()
            assert lost.get(timeout=TIMEOUT_S) == k
            seconds.append(time.monotonic() - started)
        assert min(seconds) < 0.5


@SOCKETS
def test_an_observer_disturbs_nobody_and_may_be_silent_for_ever(kind: str) -> None:
    job = replace(JOB, num_shards=1)
    with shards_in_threads(job, deadline_s=0.2) as (loop,):
        endpoints = [over(kind, loop.endpoint)]
        with (
            watched(endpoints) as (_, first),
            watched(endpoints) as (_, second),
            connected(job, [loop.endpoint]) as (client, _),
        ):
            started = time.monotonic()
            Training(job, client, 0).run(5)
            assert loop.cut_connections().result(5) == 1, "of workers"
            while time.monotonic() - started < 0.65:
                assert loop.delay(0.05).result(5) is None
            assert first.empty()
            assert second.empty()
            assert loop.observed


@SOCKETS
def test_an_observer_says_nothing(kind: str) -> None:
    with (
        shards_in_threads(JOB, deadline_s=600.0) as (loop, _),
        authed(loop.endpoint, kind, worker=OBSERVER) as peer,
    ):
        peer.send(Header(Kind.FLUSH, worker=OBSERVER, request=1))
        assert peer.is_cut_off()
    with shards_in_threads(JOB) as (loop, _), RawPeer(loop.endpoint, kind) as peer:
        assert peer.shake_hands(worker=OBSERVER, token=b"o" * 32) is None


def test_a_shard_without_state_can_be_watched() -> None:
    loop = ShardLoop(ShardState(JOB.shard(0).spec), server_options(JOB))
    with watched([loop.endpoint]) as (_, lost):
        with RawPeer(loop.endpoint) as peer:
            answer = peer.shake_hands(worker=0)
            assert answer is not None
            assert answer.meta.decode().startswith("ShardNotReadyError\nshard 0 has no state yet")
        assert lost.empty()
        loop.close()
        assert lost.get(timeout=TIMEOUT_S) == 0


def test_a_shard_that_is_added_again_is_watched_there_only() -> None:
    with (
        shards_in_threads(JOB) as old,
        shards_in_threads(JOB) as new,
        watched(endpoints_of(old)) as (watch, lost),
    ):
        watch.add(new[1].endpoint)
        old[1].close()
        old[0].close()
        assert lost.get(timeout=TIMEOUT_S) == 0, "not shard 1"
        watch.add(new[0].endpoint)
        new[1].close()
        assert lost.get(timeout=TIMEOUT_S) == 1
        new[0].close()
        assert lost.get(timeout=TIMEOUT_S) == 0
        assert lost.empty()


def test_who_is_told_may_fail_and_is_told_again() -> None:
    told: queue.Queue[int] = queue.Queue()

    def fail(shard: int) -> None:
        told.put(shard)
        raise ValueError("of the application")

    with (
        shards_in_threads(JOB) as loops,
        closing(ShardWatch(endpoints_of(loops), TOKEN, FINGERPRINT, fail)),
    ):
        for k in (0, 1):
            loops[k].close()
            assert told.get(timeout=TIMEOUT_S) == k


def test_a_watch_leaves_nothing() -> None:
    with shards_in_threads(JOB) as loops:
        threads, files = threading.active_count(), len(open_files())
        with watched(endpoints_of(loops)) as (watch, lost):
            pass
        watch.close()
        with pytest.raises(JobError, match="closed"):
            watch.add(loops[0].endpoint)
        elsewhere = replace(loops[1].endpoint, shard=7)
        with pytest.raises(ProtocolError, match="wants shard 7"):
            watched([loops[0].endpoint, elsewhere]).__enter__()
        wait_until(lambda: not any(loop._peers for loop in loops), "shards see it")
        assert threading.active_count() == threads
        wait_until(lambda: len(open_files()) <= files, "no file is left over")
        assert lost.empty()
        endpoint = loops[0].endpoint
    with pytest.raises(ShardLostError, match="shard 0: no connection"):
        watched([endpoint]).__enter__()


def test_a_shard_that_nobody_watches_any_more_says_so() -> None:
    orphaned: queue.Queue[float] = queue.Queue()
    loop = ShardLoop(
        JOB.shard(0), server_options(JOB),
        on_orphaned=lambda: orphaned.put(time.monotonic()), orphan_s=0.3,
    )  # fmt: skip

    def is_silent() -> None:
        with pytest.raises(queue.Empty):
            orphaned.get(timeout=0.65)

    with closing(loop):
        is_silent()  # nobody has watched yet
        with watched([loop.endpoint]):
            with watched([loop.endpoint]):
                pass
            is_silent()  # one is left
        left = time.monotonic()
        assert orphaned.get(timeout=TIMEOUT_S) - left > 0.2
        assert not loop.observed
        with watched([loop.endpoint]):
            pass
        with watched([loop.endpoint]):
            is_silent()  # another one came in time
