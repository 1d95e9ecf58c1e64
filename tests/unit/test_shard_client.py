"""`ShardClient`: what it puts together, without copies where it can, and never at their price."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from ps.client import LocalTransport, ShardClient
from ps.errors import ProtocolError
from ps.messages import LATEST
from ps.step_message import StepMessage
from ps.wire.arena import (
    Arena,
    PrivateMemory,
    Segment,
    address,
    available,
    room,
    segment_and_offset,
)
from tests.support.wire import Job, any_bits
from tests.support.wire_peers import Captured, capturing_client, random_gradients

JOB = Job(num_shards=2, dims=(6,))
DENSE = np.arange(JOB.dense_size, dtype=np.float32)


class Watched:
    """An arena, and what a shard would find at its places."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.arena = Arena(1 << 26, self._attach)

    def _attach(self, number: int, fd: int, size: int) -> None:
        self.segments.append(Segment.attached(fd, size))

    def at(self, place: int, array: Any) -> bytes:
        number, offset = segment_and_offset(place)
        return np.ndarray(array.shape, array.dtype, self.segments[number].pages, offset).tobytes()


@pytest.fixture
def watched() -> Iterator[Watched]:
    if not available():
        pytest.skip("this system has no memfd_create")
    watched = Watched()
    with closing(watched.arena):
        yield watched


def test_gradients_of_the_transports_memory_are_sent_as_they_lie(watched: Watched) -> None:
    client, captured = capturing_client(JOB, watched.arena)
    names = JOB.names(1)
    grads = client.gradients((names["t0"].local_rows.size, 6))
    grads[...] = 3
    client.push(0, names, {"t0": grads}, DENSE, None)
    (message,) = captured.pushes
    assert message.tables[0].values is grads
    assert watched.at(message.places[0].values, grads) == grads.tobytes()


@pytest.mark.parametrize("memory", ["arena", "private"])
def test_gradients_from_elsewhere_are_copied(watched: Watched, memory: str) -> None:
    client, captured = capturing_client(
        JOB, watched.arena if memory == "arena" else PrivateMemory()
    )
    names = JOB.names(1)
    grads, dense, state = random_gradients(JOB, names, 1), DENSE.copy(), np.ones(3, np.float32)
    sent = grads["t0"].tobytes(), dense.tobytes(), state.tobytes()
    client.push(0, names, grads, dense, state)
    for array in (grads["t0"], dense, state):
        array[...] = 9
    (message,) = captured.pushes
    kept = message.tables[0].values, message.dense, message.state
    assert tuple(a.tobytes() for a in kept) == sent
    if memory == "arena":
        places = message.places[0].values, message.dense_place, message.state_place
        assert tuple(map(watched.at, places, kept)) == sent


VIEWS = {
    "whole": lambda n: ((n, 6), lambda a: a),
    "reshaped": lambda n: ((6 * n,), lambda a: a.reshape(n, 6)),
    "first rows": lambda n: ((n + 5, 6), lambda a: a[:n]),
    "later rows": lambda n: ((n + 5, 6), lambda a: a[5:]),
    "first columns": lambda n: ((n, 9), lambda a: a[:, :6]),
    "every second row": lambda n: ((2 * n, 6), lambda a: a[::2]),
    "transposed": lambda n: ((6, n), lambda a: a.T),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("memory", ["arena", "private"])
def test_any_view_of_such_memory_is_sent_as_it_looks(
    watched: Watched, memory: str, view: str
) -> None:
    client, captured = capturing_client(
        JOB, watched.arena if memory == "arena" else PrivateMemory()
    )
    names = JOB.names(1)
    shape, of = VIEWS[view](names["t0"].local_rows.size)  # type: ignore[no-untyped-call]
    lent = client.gradients(shape)
    lent[...] = any_bits(np.random.default_rng(0), *shape)
    grads = of(lent)
    wanted = grads.tobytes()
    client.push(0, names, {"t0": grads}, DENSE, None)
    (message,) = captured.pushes
    assert message.tables[0].values.tobytes() == wanted
    if memory == "arena":
        assert watched.at(message.places[0].values, grads) == wanted


def test_an_array_is_not_taken_for_one_that_is_gone() -> None:
    """Memory of an array that nobody pushed may become the caller's own array."""
    client, captured = capturing_client(JOB, PrivateMemory())
    names = JOB.names(1)
    shape = names["t0"].local_rows.size, 6
    lent = client.gradients(shape)
    where, lent_bytes = address(lent), lent.nbytes
    del lent
    kept = []
    for _ in range(20):
        kept.append(PrivateMemory().block(room(lent_bytes)).take(shape, np.float32)[0])
        if address(kept[-1]) == where:
            break
    own = kept[-1]
    own[...] = 1
    client.push(0, names, {"t0": own}, DENSE, None)
    own[...] = 2
    assert (captured.pushes[0].tables[0].values == 1).all()


def test_a_push_names_its_rows_once_with_the_pull(watched: Watched) -> None:
    client, captured = capturing_client(JOB, watched.arena)
    names, others = JOB.names(1), JOB.names(1)
    client.pull(0, 0, names)
    client.pull(1, 0, names)
    for step, pushed in [(0, names), (1, others)]:
        client.push(step, pushed, random_gradients(JOB, pushed, step), DENSE, None)
    (pull, _), (same, other) = captured.pulls, captured.pushes
    assert np.shares_memory(pull.tables[0].local_rows, same.tables[0].local_rows)
    assert pull.places[0].local_rows == same.places[0].local_rows
    assert not np.shares_memory(captured.pulls[1].tables[0].local_rows, other.tables[0].local_rows)
    for message in (same, other):
        rows = message.tables[0].local_rows
        assert watched.at(message.places[0].local_rows, rows) == names["t0"].local_rows.tobytes()


def test_pulled_rows_stay_while_somebody_looks_at_them(watched: Watched) -> None:
    client, captured = capturing_client(JOB, watched.arena)
    pulled = client.pull(0, 0, JOB.names(1)).result()
    rows = pulled.rows["t0"]
    rows[...] = 5
    captured.pulls.clear()
    del pulled
    for step in range(1, 8):
        later = client.pull(step, step, JOB.names(1)).result()
        later.rows["t0"][...] = 6
    assert (rows == 5).all()


def test_many_steps_take_the_memory_of_a_few(watched: Watched) -> None:
    client, captured = capturing_client(JOB, watched.arena)

    def step(t: int) -> None:
        names = JOB.names([t], size=2000)
        pulled = client.pull(t, t, names).result()
        client.push(t, names, {"t0": pulled.rows["t0"]}, pulled.dense, pulled.state)
        captured.pulls.clear()
        captured.pushes.clear()

    for t in range(10):
        step(t)
    size = watched.arena.size_bytes
    for t in range(10, 100):
        step(t)
    assert watched.arena.size_bytes == size


def test_pulled_rows_can_be_pushed_back(watched: Watched) -> None:
    """They lie in shared memory too, but not where `gradients` knows them: they are copied."""
    client, captured = capturing_client(JOB, watched.arena)
    names = JOB.names(1)
    rows = client.pull(0, 0, names).result().rows["t0"]
    rows[...] = 5
    client.push(0, names, {"t0": rows}, DENSE, None)
    rows[...] = 6
    assert (captured.pushes[0].tables[0].values == 5).all()


class Versions:
    """Shards that answer at these versions."""

    def __init__(self, *versions: int) -> None:
        self.memory: Any = PrivateMemory()
        self._versions = versions

    def pull(self, message: StepMessage) -> list[Any]:
        return [_At(version, 0.5 * i) for i, version in enumerate(self._versions)]


class _At:
    def __init__(self, version: int, waited_s: float) -> None:
        self._answer = version, waited_s

    def result(self, timeout_s: float) -> tuple[int, float]:
        return self._answer


def versions_client(*versions: int) -> ShardClient:
    transport: Any = Versions(*versions)
    return ShardClient(JOB.embedding, JOB.layout, transport, 0)


def test_shards_that_answer_at_several_versions_are_an_error() -> None:
    pending = versions_client(4, 5).pull(4, 4, JOB.names(0))
    with pytest.raises(ProtocolError, match=r"several versions: \[4, 5\]"):
        pending.result()


def test_the_latest_rows_are_as_old_as_the_oldest() -> None:
    pulled = versions_client(7, 5).pull(4, LATEST, JOB.names(0)).result()
    assert pulled.version == 5
    assert pulled.barrier_s == (0.0, 0.5)
    assert len(pulled.wait_s) == 2


def test_a_pull_that_nobody_will_answer_is_an_error_at_once() -> None:
    shards = [JOB.shard(k) for k in range(2)]
    client = ShardClient(JOB.embedding, JOB.layout, LocalTransport(shards), 0)
    with pytest.raises(ProtocolError, match="nobody else will make it"):
        client.pull(1, 1, JOB.names(0)).result()


def test_a_dense_gradient_of_another_size_is_our_own_bug() -> None:
    client, captured = capturing_client(JOB, PrivateMemory())
    names = JOB.names(1)
    with pytest.raises(AssertionError, match="one gradient per dense value"):
        client.push(0, names, random_gradients(JOB, names, 1), DENSE[1:], None)
    assert isinstance(captured, Captured)
    assert captured.pushes == []
