"""A worker's side when shards die, are late or refuse; and what is left when processes are gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ps.errors import JobError, MantaError, ProtocolError, ShardLostError, ShardNotReadyError
from ps.optimizers import SGD
from ps.shard import ShardState
from ps.wire.server import Endpoint, ShardLoop
from tests.support.wire import (
    TIMEOUT_S,
    Job,
    Training,
    connected,
    contents_of,
    endpoints_of,
    server_options,
    shards_in_threads,
    train_locally,
    wait_until,
)
from tests.support.wire_processes import arena_mappings, in_process, open_files, shards_in_processes

KINDS = pytest.mark.parametrize("kind", ["arena", "tcp", "background"])
JOB = Job(dims=(4,), num_shards=2, num_workers=2)
MAX_PUSHES_IN_FLIGHT = 4
DENSE = np.zeros(JOB.dense_size, np.float32)


def options(kind: str) -> dict[str, Any]:
    return {"name": "arena" if kind == "arena" else "tcp", "background": kind == "background"}


def push_of(client: Any, job: Job, step: int) -> None:
    names = job.names([step])
    grads = {n: np.ones((d.local_rows.size, 4), np.float32) for n, d in names.items()}
    client.push(step, names, grads, DENSE, None)


# --- a shard that is gone


@KINDS
def test_a_killed_shard_is_noticed_at_once(kind: str) -> None:
    with (
        shards_in_processes(JOB) as shards,
        connected(JOB, [s.endpoint for s in shards], **options(kind)) as (client, _),
    ):
        client.pull(0, 0, JOB.names(0)).result(TIMEOUT_S)
        push_of(client, JOB, 0)
        pending = client.pull(1, 1, JOB.names(1))  # waits for the other worker
        killer = threading.Timer(0.2, shards[1].kill)
        killer.start()
        started = time.monotonic()
        with pytest.raises(ShardLostError, match=r"shard 1: .*connection"):
            pending.result(TIMEOUT_S)
        assert time.monotonic() - started < 15
        killer.join()
        wait_for: dict[str, Callable[[], object]] = {
            "flush": lambda: client.flush(TIMEOUT_S),
            "push": lambda: [push_of(client, JOB, step) for step in range(1, 8)],
            "pull": lambda: client.pull(2, 2, JOB.names(2)).result(TIMEOUT_S),
        }
        for call in wait_for.values():
            started = time.monotonic()
            with pytest.raises(ShardLostError, match="shard 1"):
                call()
            assert time.monotonic() - started < 15


@KINDS
def test_a_shard_that_nobody_reaches_is_lost(kind: str) -> None:
    with shards_in_threads(JOB) as loops:
        endpoints = endpoints_of(loops)
    error = JobError if kind == "arena" else ShardLostError  # it may be on another host
    with pytest.raises(error, match="shard 0"):
        connected(JOB, endpoints, **options(kind)).__enter__()
    nobody = Endpoint(3, "127.0.0.1", endpoints[0].port, "")
    with pytest.raises(ShardLostError, match=r"shard 3: no connection to 127.0.0.1:\d+"):
        connected(JOB, [nobody], name="tcp").__enter__()


# --- a shard that is late


@KINDS
def test_what_does_not_come_in_time_is_an_error_that_says_what_and_why(kind: str) -> None:
    with (
        shards_in_threads(JOB) as loops,
        connected(JOB, endpoints_of(loops), **options(kind)) as (client, _),
    ):
        pending = client.pull(1, 1, JOB.names(1))
        late = r"shard 0 has not answered the pull of version 1 within 0.1 s: another worker"
        with pytest.raises(JobError, match=late):
            pending.result(0.1)
        push_of(client, JOB, 0)
        with pytest.raises(JobError, match=r"shard 0 has not applied the gradients .* 0.1 s"):
            client.flush(0.1)
        with connected(JOB, endpoints_of(loops), worker=1) as (other, _):
            push_of(other, JOB, 0)
            assert pending.result(TIMEOUT_S).version == 1, "late is not lost"
            client.flush(TIMEOUT_S)


@KINDS
def test_a_full_window_of_pushes_waits_for_the_others(kind: str) -> None:
    with (
        shards_in_threads(JOB) as loops,
        connected(JOB, endpoints_of(loops), timeout_s=0.2, **options(kind)) as (client, _),
        connected(JOB, endpoints_of(loops), worker=1) as (other, _),
    ):
        for step in range(MAX_PUSHES_IN_FLIGHT):
            push_of(client, JOB, step)
        with pytest.raises(JobError, match="another worker is slow or stuck"):
            push_of(client, JOB, MAX_PUSHES_IN_FLIGHT)
        for step in range(MAX_PUSHES_IN_FLIGHT):
            push_of(other, JOB, step)
        push_of(client, JOB, MAX_PUSHES_IN_FLIGHT)
        push_of(other, JOB, MAX_PUSHES_IN_FLIGHT)
        client.flush(TIMEOUT_S)
        versions = [loop.call(lambda loop=loop: loop.state.version).result(5) for loop in loops]  # type: ignore[misc]
        assert versions == [MAX_PUSHES_IN_FLIGHT + 1] * 2


def test_a_push_whose_window_was_full_is_sent_to_every_shard_once() -> None:
    """It may have reached one shard before another one had no room."""
    job = replace(JOB, num_workers=1)
    with shards_in_threads(job) as loops:
        held = threading.Event()
        with connected(job, endpoints_of(loops), timeout_s=0.2) as (client, _):
            blocked = loops[1].call(lambda: held.wait(20))
            for step in range(MAX_PUSHES_IN_FLIGHT):
                push_of(client, job, step)
            with pytest.raises(JobError, match="shard 1 has not applied"):
                push_of(client, job, MAX_PUSHES_IN_FLIGHT)
            held.set()
            blocked.result(5)
            push_of(client, job, MAX_PUSHES_IN_FLIGHT)
            client.flush(TIMEOUT_S)
        for loop in loops:
            assert loop.call(lambda loop=loop: loop.state.version).result(5) == (  # type: ignore[misc]
                MAX_PUSHES_IN_FLIGHT + 1
            )


# --- a shard that refuses


@KINDS
def test_errors_of_a_shard_arrive_with_their_class_and_text(kind: str) -> None:
    job = replace(JOB, num_workers=1)
    with shards_in_threads(job) as loops:
        cases: list[tuple[Callable[[Any], object], type[MantaError], str]] = [
            (lambda c: c.pull(0, -7, job.names(0)).result(5), ProtocolError, "wants version -7"),
            (lambda c: c.pull(0, 0, _far(job)).result(5), ProtocolError, "row 99999 is not in"),
            (lambda c: (push_of(c, job, 5), c.flush(5)), ProtocolError, "but step 0 is next"),
        ]
        for call, error, text in cases:
            with (
                connected(job, endpoints_of(loops), **options(kind)) as (client, _),
                pytest.raises(error, match=f"^shard [01].*{text}"),
            ):
                call(client)


def _far(job: Job) -> Any:
    names = job.names(0)
    rows = names["t0"].local_rows.copy()
    rows[...] = 99999
    return {"t0": replace(names["t0"], local_rows=rows)}


@KINDS
def test_a_shard_without_state_says_so(kind: str) -> None:
    job = replace(JOB, num_shards=1, num_workers=1)
    loop = ShardLoop(ShardState(job.shard(0).spec), server_options(job))
    with closing(loop):
        with pytest.raises(ShardNotReadyError, match="shard 0 has no state yet"):
            connected(job, [loop.endpoint], **options(kind)).__enter__()
        ready = job.shard(0).dense()
        loop.call(lambda: loop.state.set_dense(ready[0], ready[2])).result(5)
        with connected(job, [loop.endpoint], **options(kind)) as (client, _):
            assert client.pull(0, 0, job.names(0)).result(5).version == 0


@KINDS
def test_an_error_in_an_optimizer_is_told_to_the_worker(kind: str) -> None:
    def broken(step: int) -> float:
        raise ZeroDivisionError("the rate has no value")

    def push_and_flush(client: Any) -> None:
        push_of(client, job, 0)  # a thread may hear of it at once
        client.flush(5)

    job = Job(optimizers=(SGD(broken),), dims=(4,))
    with (
        shards_in_threads(job) as loops,
        connected(job, endpoints_of(loops), **options(kind)) as (client, _),
        pytest.raises(JobError, match="ZeroDivisionError: the rate has no value"),
    ):
        push_and_flush(client)


# --- what is left


@KINDS
def test_a_closed_worker_leaves_no_thread_no_file_and_no_memory(kind: str) -> None:
    job = replace(JOB, num_workers=1)
    with shards_in_threads(job) as loops:
        Training(job, _closed(job, loops, kind), 0)
        threads, files, mapped = threading.active_count(), open_files(), arena_mappings()
        for _ in range(3):
            _closed(job, loops, kind)
        wait_until(lambda: not any(loop._peers for loop in loops), "shards see it")
        wait_until(lambda: len(open_files()) <= len(files), "no file is left over")
        assert threading.active_count() == threads
        assert arena_mappings() <= mapped


def _closed(job: Job, loops: list[ShardLoop], kind: str) -> Any:
    with connected(job, endpoints_of(loops), **options(kind)) as (client, _):
        version = loops[0].call(lambda: loops[0].state.version).result(5)
        client.pull(version, version, job.names(0)).result(TIMEOUT_S)
        push_of(client, job, version)
        client.flush(TIMEOUT_S)
    return client


def test_a_failed_connection_leaves_nothing() -> None:
    with shards_in_threads(JOB) as loops:
        endpoints = endpoints_of(loops)
        bad = [endpoints[0], replace(endpoints[1], shard=7)]
        files = len(open_files())
        for kind in ("arena", "tcp", "background"):
            with pytest.raises(ProtocolError):
                connected(JOB, bad, **options(kind)).__enter__()
        wait_until(lambda: not any(loop._peers for loop in loops), "shards see it")
        wait_until(lambda: len(open_files()) <= files, "no file is left over")


def work_and_wait(job: Job, endpoints: list[Endpoint], pipe: Any) -> None:
    """A worker that is killed: it has pushed, waits for rows, and is far from done."""
    with ExitStack() as stack:
        client, _ = stack.enter_context(connected(job, endpoints))
        big = client.gradients((1 << 20, 4))  # more than one segment
        big[...] = 1
        client.pull(0, 0, job.names(0)).result(TIMEOUT_S)
        push_of(client, job, 0)
        client.pull(1, 1, job.names(1))
        pipe.send(arena_mappings())
        time.sleep(60)


def test_a_killed_worker_leaves_no_memory_behind() -> None:
    import multiprocessing

    with shards_in_processes(JOB) as shards:
        endpoints = [s.endpoint for s in shards]
        files = [len(open_files(s.process.pid)) for s in shards]
        ours, theirs = multiprocessing.Pipe()
        with in_process(work_and_wait, JOB, endpoints, theirs) as worker:
            assert ours.poll(60)
            assert ours.recv() > 1
            for shard in shards:
                shard.stats()
                assert arena_mappings(shard.process.pid) > 1
            os.kill(worker.pid, signal.SIGKILL)
            worker.join(10)
        # A push that was taken stays until the other workers' are in, and so does its memory.
        with connected(JOB, endpoints, worker=1) as (other, _):
            push_of(other, JOB, 0)
            other.flush(TIMEOUT_S)
            assert other.pull(1, 1, JOB.names(1)).result(TIMEOUT_S).version == 1
        for shard, before in zip(shards, files, strict=True):
            shard.collect()
            wait_until(
                lambda shard=shard: not arena_mappings(shard.process.pid),  # type: ignore[misc]
                "the arena is gone",
            )
            wait_until(
                lambda shard=shard, n=before: len(open_files(shard.process.pid)) <= n,  # type: ignore[misc]
                "the sockets are closed",
            )
        # In its place comes another one, which repeats what it does not know to be done.
        with connected(JOB, endpoints) as (again, _):
            push_of(again, JOB, 0)
            push_of(again, JOB, 1)
        wait_until(
            lambda: [shard.stats().duplicates_dropped for shard in shards] == [1, 1],
            "each shard has seen the step again",
        )


def test_a_killed_shard_leaves_no_memory_in_the_worker() -> None:
    job = replace(JOB, num_workers=1)
    mapped = arena_mappings()
    with shards_in_processes(job) as shards:
        with connected(job, [s.endpoint for s in shards]) as (client, _):
            client.pull(0, 0, job.names(0)).result(TIMEOUT_S)
            shards[0].kill()
            with pytest.raises(ShardLostError):
                client.pull(0, 0, job.names(0)).result(TIMEOUT_S)
        del client
    assert arena_mappings() <= mapped


def test_a_worker_that_died_waiting_disturbs_nobody() -> None:
    job = Job(dims=(4,), num_workers=1)
    wanted, _ = train_locally(job, 6)
    with shards_in_threads(job) as (loop,):
        for kind in ("arena", "tcp"):
            with connected(job, [loop.endpoint], kind) as (gone, _):  # type: ignore[arg-type]
                gone.pull(3, 3, job.names(0))
                loop.call(lambda: None).result(5)
        with connected(job, [loop.endpoint]) as (client, _):
            Training(job, client, 0).run(6)
        assert contents_of(loop) == wanted[0]
