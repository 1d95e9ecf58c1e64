"""Pulls and pushes over real sockets: byte for byte what was sent, and the bits of one process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import JobError
from ps.optimizers import SGD
from ps.partition import distinct_rows
from ps.shard import ShardState
from ps.step_message import FIELDS, TAIL
from ps.wire.frames import HEADER_BYTES
from ps.wire.messages import WireDtype
from ps.wire.server import Endpoint, ShardLoop
from ps.wire.transport import WireTransport
from tests.support.shards import contents
from tests.support.wire import (
    EVERY_OPTIMIZER,
    Job,
    Training,
    any_bits,
    connected,
    contents_of,
    endpoints_of,
    floats,
    server_options,
    shards_in_threads,
    train_in_threads,
    train_locally,
    wait_until,
)
from tests.support.wire_peers import Recorder, bits_of, random_gradients
from tests.support.wire_processes import shards_in_processes

KINDS = ["arena", "tcp", "mixed"]


def endpoints_for(kind: str, endpoints: list[Endpoint]) -> list[Endpoint]:
    """Mixed: the first shard seems to be on another host."""
    if kind != "mixed":
        return endpoints
    return [replace(endpoints[0], unix_name=""), *endpoints[1:]]


def transport_name(kind: str) -> Any:
    return "auto" if kind == "mixed" else kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_push_arrives_though_its_worker_goes_to_sleep(kind: str) -> None:
    """Else a shard would wait for the rest of a big frame, and cut the worker off."""
    job = Job(num_rows=60_000, num_shards=2, dims=(64,))
    names = {"t0": distinct_rows(np.arange(job.num_rows), job.layout.placements["t0"])[0]}
    grads = random_gradients(job, names, 0, floats)
    dense, state = np.zeros(job.dense_size, np.float32), np.zeros(job.state_size, np.float32)
    with shards_in_threads(job, deadline_s=0.5) as loops:
        endpoints = endpoints_for(kind, endpoints_of(loops))
        with connected(job, endpoints, transport_name(kind)) as (client, _):
            client.push(0, names, grads, dense, state)
            wait_until(
                lambda: {loop.call(loop.state.stats).result(5).version for loop in loops} == {1},
                "the step is applied",
            )
            time.sleep(0.8)  # beyond the deadline
            assert client.pull(1, 1, names).result(10).version == 1


# --- byte for byte


@contextmanager
def recorded(job: Job, kind: str, **options: Any) -> Iterator[tuple[Any, list[Recorder]]]:
    """A client of shards that keep what they get."""
    with ExitStack() as stack:
        recorders = [Recorder(job, k) for k in range(job.num_shards)]
        loops = [ShardLoop(cast("ShardState", r), server_options(job)) for r in recorders]
        for loop in loops:
            stack.callback(loop.close)
        endpoints = endpoints_for(kind, endpoints_of(loops))
        client, transport = stack.enter_context(
            connected(job, endpoints, transport_name(kind), **options)
        )
        assert transport.kinds == [
            "tcp" if kind == "tcp" or (kind == "mixed" and k == 0) else "arena"
            for k in range(job.num_shards)
        ]
        yield client, recorders


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_get_what_was_sent_and_the_worker_what_they_answer(
    kind: str, background: bool
) -> None:
    if kind == "arena" and background:
        return
    job = Job(optimizers=(SGD(0.1),) * 4, dims=(4, 1, 9, 16), num_shards=2)
    steps = iter(range(10_000))
    with recorded(job, kind, background=background) as (client, recorders):

        @settings(max_examples=15)
        @given(
            seed=st.integers(0, 10**6),
            size=st.sampled_from([0, 1, 40, 3000]),
            bags=st.one_of(st.none(), st.integers(0, 6)),
            with_state=st.booleans(),
        )
        def check(seed: int, size: int, bags: int | None, with_state: bool) -> None:
            step, rng = next(steps), np.random.default_rng(seed)
            names = job.names(seed, size, bags)
            for recorder in recorders:
                recorder.pulls.clear()
                recorder.answers.clear()
            pulled = client.pull(step, 3, names).result(10)
            assert pulled.version == 3
            for i, name in enumerate(names):
                parts = [r.answers[0].rows[i] for r in recorders]
                rows = pulled.rows[name]
                whole = np.stack(parts) if rows.ndim == 3 else np.concatenate(parts)
                assert rows.tobytes() == whole.tobytes()
            for ours, theirs in [("dense", "dense"), ("state", "state")]:
                parts = [getattr(r.answers[0], theirs) for r in recorders]
                assert getattr(pulled, ours).tobytes() == np.concatenate(parts).tobytes()
            grads = random_gradients(job, names, seed)
            state = any_bits(rng, job.state_size) if with_state else None
            message = client.push(step, names, grads, any_bits(rng, job.dense_size), state)
            client.flush(10)
            for k, recorder in enumerate(recorders):
                assert bits_of(recorder.pulls[0]) == bits_of(pulled.message.pull(k))
                got = recorder.pushes.pop()
                assert (got.worker, got.step) == (0, step)
                assert bits_of(got) == bits_of(message.push(k))
                recorder.pushes.append(got)

        check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_end_with_the_same_bits_over_every_transport(dtype: WireDtype) -> None:
    job = Job(optimizers=(SGD(0.1),) * 2, dims=(4, 9), num_shards=2, dtype=dtype)
    ends = []
    for kind in KINDS:
        with shards_in_threads(job) as loops:
            endpoints = endpoints_for(kind, endpoints_of(loops))
            with connected(job, endpoints, transport_name(kind)) as (client, _):
                training = Training(job, client, 0, bags=3)
                training.run(4)
            ends.append(([contents_of(loop) for loop in loops], training.seen))
    assert ends[0] == ends[1] == ends[2]
    exact, _ = train_locally(replace(job, dtype="float32"), 4, bags=3)
    assert ends[0][0] != exact, "narrow numbers are really used"
    for a, b in zip(ends[0][0], exact, strict=True):
        for got, wanted in zip(a, b, strict=True):
            near = np.frombuffer(got, np.float32), np.frombuffer(wanted, np.float32)
            np.testing.assert_allclose(*near, rtol=0.05, atol=0.05)


# --- the bits of one process

TRAININGS = [
    ("arena", 1, 1, 0, None),
    ("arena", 2, 2, 1, None),
    ("arena", 3, 1, 2, 3),
    ("tcp", 2, 2, 0, 3),
    ("tcp", 3, 2, 2, None),
    ("tcp", 1, 1, 1, 3),
    ("mixed", 2, 1, 0, None),
    ("mixed", 3, 2, 1, None),
]


@pytest.mark.parametrize(
    ("kind", "num_shards", "num_workers", "lookahead", "bags"),
    TRAININGS,
    ids=[f"{k}-{s}shards-{w}workers-ahead{a}-bags{b or 0}" for k, s, w, a, b in TRAININGS],
)
def test_training_ends_with_the_bits_of_one_process(
    kind: str, num_shards: int, num_workers: int, lookahead: int, bags: int | None
) -> None:
    job = Job(
        optimizers=EVERY_OPTIMIZER if bags is None else (SGD(0.1),) * 4,
        dims=(4, 3, 8, 1),
        num_shards=num_shards,
        num_workers=num_workers,
        state_size=3,
    )
    wanted, wanted_seen = train_locally(job, 8, lookahead, bags)
    with shards_in_threads(job) as loops, ExitStack() as stack:
        endpoints = endpoints_for(kind, endpoints_of(loops))
        trainings = []
        for w in range(num_workers):
            client, _ = stack.enter_context(
                connected(job, endpoints, transport_name(kind), worker=w, background=lookahead > 0)
            )
            trainings.append(Training(job, client, w, lookahead, bags))
        train_in_threads(trainings, 8)
        assert [contents_of(loop) for loop in loops] == wanted
        assert [t.seen for t in trainings] == wanted_seen


def test_shards_in_processes_of_their_own_end_with_the_same_bits() -> None:
    job = Job(optimizers=EVERY_OPTIMIZER, dims=(4, 3, 8, 1), num_shards=2, num_workers=2)
    wanted, _ = train_locally(job, 6, 1)
    for kind in ("arena", "tcp"):
        with shards_in_processes(job) as shards, ExitStack() as stack:
            trainings = []
            for w in range(2):
                endpoints = [s.endpoint for s in shards]
                client, _ = stack.enter_context(connected(job, endpoints, kind, worker=w))  # type: ignore[arg-type]
                trainings.append(Training(job, client, w, 1))
            train_in_threads(trainings, 6)
            assert [shard.contents() for shard in shards] == wanted


# --- async mode


@pytest.mark.parametrize("kind", ["arena", "tcp"])
def test_async_pushes_are_applied_exactly_once_and_staleness_stays_in_bounds(kind: str) -> None:
    steps, workers, bound = 30, 3, 2
    job = Job(
        optimizers=(SGD(1.0),), dims=(2,), num_rows=50, num_shards=2, num_workers=workers,
        mode="async", max_staleness=bound, dense_size=4, state_size=0,
    )  # fmt: skip
    names = job.names(1, size=30)
    with shards_in_threads(job) as loops, ExitStack() as stack:
        start = [contents_of(loop) for loop in loops]
        transports = [
            stack.enter_context(connected(job, endpoints_of(loops), kind, worker=w))[0]  # type: ignore[arg-type]
            for w in range(workers)
        ]

        class OfOnes(Training):
            def names(self, step: int) -> Any:
                return names

            def _push(self, step: int, named: Any, pulled: Any) -> None:
                # What has been applied at least, at most: SSP of the slowest worker.
                assert pulled.version >= step - bound
                ones = np.ones_like(pulled.rows["t0"])
                self.client.push(step, named, {"t0": ones}, np.zeros(4, np.float32), None)

        train_in_threads([OfOnes(job, t, w) for w, t in enumerate(transports)], steps)
        for k, loop in enumerate(loops):
            stats = loop.call(loop.state.stats).result(10)
            assert stats.version == steps
            assert sum(stats.staleness) == workers * steps
            # Each of the others is at most `bound` + 1 steps ahead or behind within one's pull.
            assert len(stats.staleness) - 1 <= (workers - 1) * 2 * (bound + 1)
            moved = _moved(start[k], contents(loop.state))
            local = names["t0"].of_shard(k)
            np.testing.assert_allclose(moved[local], -workers * steps, rtol=1e-4)
            assert (np.delete(moved, local, axis=0) == 0).all()


def _moved(before: list[bytes], after: list[Any]) -> Any:
    rows = [
        np.frombuffer(b, np.float32).reshape(a.shape) for b, a in zip(before, after, strict=True)
    ]
    pairs = [(a, b) for a, b in zip(after, rows, strict=True) if a.ndim == 2]
    return np.concatenate([a for a, _ in pairs]) - np.concatenate([b for _, b in pairs])


# --- which transport


def test_auto_takes_shared_memory_where_it_can() -> None:
    job = Job(num_shards=2)
    with shards_in_threads(job) as loops:
        elsewhere = replace(loops[1].endpoint, unix_name="manta-of-another-host")
        endpoints = [loops[0].endpoint, elsewhere]
        with connected(job, endpoints, "auto") as (_, transport):
            assert transport.kinds == ["arena", "tcp"]
            assert isinstance(transport, WireTransport)
        with pytest.raises(JobError, match=r"transport arena: shard 1 at 127.0.0.1"):
            connected(job, endpoints, "arena").__enter__()


def test_endpoints_of_two_jobs_have_different_names() -> None:
    with shards_in_threads(Job(num_shards=2)) as one, shards_in_threads(Job()) as two:
        endpoints = endpoints_of([*one, *two])
        assert len({e.unix_name for e in endpoints}) == 3
        assert len({e.port for e in endpoints}) == 3
        assert {e.host for e in endpoints} == {"127.0.0.1"}


@pytest.mark.parametrize("kind", ["arena", "tcp"])
def test_what_a_worker_sends_is_counted(kind: Any) -> None:
    job = Job(num_shards=2)
    with (
        shards_in_threads(job) as loops,
        connected(job, endpoints_of(loops), kind) as (client, transport),
    ):
        names = job.names(1)
        client.pull(0, 0, names).result(10)
        before = np.array(transport.sent_bytes)
        grads = random_gradients(job, names, 1)
        message = client.push(0, names, grads, np.zeros(7, np.float32), None)
        sent = np.array(transport.sent_bytes) - before
        if kind == "tcp":
            sizes = message.names_bytes() + message.values_bytes() + HEADER_BYTES
            assert sent.tolist() == sizes.tolist()
        else:  # the arrays lie in shared memory
            assert sent.tolist() == [HEADER_BYTES + 8 * (FIELDS + TAIL)] * 2
