"""Pulls and pushes as frames: a shard gets what was sent, or an error that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import DataError, MantaError, ProtocolError
from ps.messages import Rows
from ps.optimizers import SGD
from ps.partition import DistinctRows
from ps.step_message import FIELDS, NO_PLACE, TAIL, StepMessage
from ps.wire.arena import Arena, PrivateMemory, Segment, place
from ps.wire.frames import Frame, FrameReader, Header, Kind, encode
from ps.wire.messages import (
    Incoming,
    WireDtype,
    WireFormat,
    pull_payload,
    push_payload,
    rows_payload,
    rows_places,
    write_rows,
)
from tests.support.wire import Job, any_bits, floats
from tests.support.wire_peers import bits_of, capturing_client, random_gradients

few = settings(max_examples=25)


def job_of(num_shards: int = 2, num_tables: int = 3, dtype: WireDtype = "float32") -> Job:
    return Job(
        optimizers=(SGD(0.1),) * num_tables,
        dims=tuple((4, 1, 9, 16)[:num_tables]),
        num_shards=num_shards,
        dtype=dtype,
    )


class Line:
    """A worker's messages, and what a shard makes of them: over an arena or over TCP."""

    def __init__(self, job: Job, arena: Arena | None) -> None:
        self.job = job
        self.shared = arena is not None
        self.client, self.captured = capturing_client(job, arena or PrivateMemory())
        self.incoming = Incoming(job.format, self.shared)

    def attach(self, number: int, fd: int, size: int) -> None:
        assert number == len(self.incoming.segments)
        self.incoming.segments.append(Segment.attached(fd, size))

    def frame(self, kind: Kind, message: StepMessage, shard: int, meta: bytes = b"") -> Frame:
        """The frame that the shard gets."""
        header = Header(kind, worker=message.worker, step=message.step, version=message.version)
        payloads = {Kind.PULL: pull_payload, Kind.PUSH: push_payload}
        payload = [] if self.shared else payloads[kind](message, shard)
        return self.sent(header, meta or message.descriptions()[shard].tobytes(), payload)

    def sent(self, header: Header, meta: bytes, payload: Sequence[memoryview] = ()) -> Frame:
        reader = FrameReader(self.incoming.place, self.job.format.max_payload_bytes)
        data = memoryview(bytes(encode(header, meta, payload)) + b"".join(payload))
        while True:
            count = len(reader.wanted)
            reader.wanted[:] = data[:count]
            data = data[count:]
            if (frame := reader.received(count)) is not None:
                assert len(data) == 0
                return frame


@contextmanager
def line_of(job: Job, kind: str) -> Iterator[Line]:
    if kind == "tcp":
        yield Line(job, None)
        return
    lines: list[Line] = []

    def attach(number: int, fd: int, size: int) -> None:
        lines[0].attach(number, fd, size)

    with closing(Arena(1 << 26, attach)) as arena:
        lines.append(Line(job, arena))
        yield lines[0]


KINDS = st.sampled_from(["arena", "tcp"])
BAGS = st.one_of(st.none(), st.integers(0, 6))


@few
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6), BAGS, KINDS, st.booleans())
def test_a_push_arrives_as_it_was_sent(
    num_shards: int, num_tables: int, seed: int, bags: int | None, kind: str, with_state: bool
) -> None:
    job, rng = job_of(num_shards, num_tables), np.random.default_rng(seed)
    with line_of(job, kind) as line:
        names = job.names(seed, bags=bags)
        grads = random_gradients(job, names, seed)
        state = any_bits(rng, job.state_size) if with_state else None
        line.client.push(seed, names, grads, any_bits(rng, job.dense_size), state)
        (message,) = line.captured.pushes
        for k in range(num_shards):
            got = line.incoming.push(line.frame(Kind.PUSH, message, k))
            assert (got.worker, got.step) == (0, seed)
            assert bits_of(got) == bits_of(message.push(k))
            assert (got.state is None) == (state is None)


@few
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6), BAGS, KINDS)
def test_a_pull_arrives_as_it_was_sent_and_its_answer_goes_where_it_should(
    num_shards: int, num_tables: int, seed: int, bags: int | None, kind: str
) -> None:
    job, rng = job_of(num_shards, num_tables), np.random.default_rng(seed)
    with line_of(job, kind) as line:
        names = job.names(seed, bags=bags)
        pending = line.client.pull(seed, 3, names)
        (message,) = line.captured.pulls
        answers = []
        for k in range(num_shards):
            got, into = line.incoming.pull(line.frame(Kind.PULL, message, k))
            assert (got.worker, got.step, got.version) == (0, seed, 3)
            wanted = message.pull(k)
            assert bits_of(got) == bits_of(wanted)
            assert wanted.into is not None
            rows = Rows(3, *(any_bits_like(rng, a) for a in arrays_of(wanted.into)))
            answers.append(rows)
            if kind == "arena":
                assert into is not None
                write_rows(job.format, rows, into)
            else:
                assert into is None
                receive(rows_payload(job.format, rows), rows_places(message, k))
        pulled = pending.result()
        assert_pulled(pulled, names, answers, job)


def arrays_of(rows: Rows) -> tuple[Any, Any, Any]:
    return rows.rows, rows.dense, rows.state


def any_bits_like(rng: np.random.Generator, arrays: Any) -> Any:
    if isinstance(arrays, tuple):
        return tuple(any_bits(rng, *a.shape) for a in arrays)
    return any_bits(rng, *arrays.shape)


def receive(payload: Sequence[memoryview], places: Sequence[memoryview]) -> None:
    """Put a payload into its places, wherever one ends and the next begins."""
    data = b"".join(payload)
    assert len(data) == sum(map(len, places))
    for view in places:
        view[:] = data[: len(view)]
        data = data[len(view) :]


def assert_pulled(pulled: Any, names: Any, answers: Sequence[Rows], job: Job) -> None:
    for i, name in enumerate(names):
        parts = [rows.rows[i] for rows in answers]
        whole = np.stack(parts) if pulled.rows[name].ndim == 3 else np.concatenate(parts)
        assert pulled.rows[name].tobytes() == whole.tobytes()
    assert pulled.dense.tobytes() == np.concatenate([r.dense for r in answers]).tobytes()
    assert pulled.state.tobytes() == np.concatenate([r.state for r in answers]).tobytes()


def test_what_will_be_checked_cannot_change_after_the_check() -> None:
    """A worker may write to the arena at any time; rows and splits decide where a kernel reads."""
    job = job_of(1)
    with line_of(job, "arena") as line:
        names = job.names(4, bags=3)
        line.client.pull(0, 0, names)
        (message,) = line.captured.pulls
        got, _ = line.incoming.pull(line.frame(Kind.PULL, message, 0))
        before = bits_of(got)
        for table in message.tables:
            table.local_rows[...] = 1 << 40
            if table.bags is not None:
                table.bags.row_splits[...] = 1 << 40
        assert bits_of(got) == before


# --- 16 bits


@few
@given(st.sampled_from(["bfloat16", "float16"]), st.integers(0, 10**6), BAGS, KINDS)
def test_16_bits_are_off_by_no_more_than_they_say(
    dtype: WireDtype, seed: int, bags: int | None, kind: str
) -> None:
    job, rng = job_of(2, 4, dtype), np.random.default_rng(seed)
    with line_of(job, kind) as line:
        names = job.names(seed, bags=bags)
        grads = random_gradients(job, names, seed, values=spread)
        dense, state = any_bits(rng, job.dense_size), any_bits(rng, job.state_size)
        line.client.push(0, names, grads, dense, state)
        line.client.pull(1, 1, names)
        pushes = [line.frame(Kind.PUSH, line.captured.pushes[0], k) for k in range(2)]
        got = [line.incoming.push(frame) for frame in pushes]
        assert np.concatenate([g.dense_grad for g in got]).tobytes() == dense.tobytes()
        assert np.concatenate([g.state for g in got if g.state is not None]).tobytes() == (
            state.tobytes()
        )
        for i, (name, d) in enumerate(names.items()):
            for k, push in enumerate(got):
                sent = grads[name]
                if isinstance(d, DistinctRows):
                    sent = sent[d.shard_splits[k] : d.shard_splits[k + 1]]
                assert_near(push.grads[i], sent, dtype)


def spread(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers of all sizes that 16 bits have."""
    scale = np.exp2(rng.integers(-30, 15, size=shape))
    return (rng.uniform(-1, 1, size=shape) * scale).astype(np.float32)


def assert_near(got: np.ndarray, sent: np.ndarray, dtype: WireDtype) -> None:
    wide = sent.astype(np.float64)
    error = np.abs(got.astype(np.float64) - wide)
    bound = {"bfloat16": 2.0**-8 * np.abs(wide), "float16": 2.0**-11 * np.abs(wide)}[dtype]
    if dtype == "float16":
        bound = np.maximum(bound, 2.0**-25)
    assert got.dtype == np.float32
    assert (error <= bound).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_transports_carry_the_same_16_bits(dtype: WireDtype) -> None:
    job = job_of(2, 4, dtype)
    names, got = job.names(5, bags=4), []
    for kind in ("arena", "tcp"):
        with line_of(job, kind) as line:
            grads = random_gradients(job, names, 5, values=spread)
            line.client.push(0, names, grads, np.zeros(job.dense_size, np.float32), None)
            frames = [line.frame(Kind.PUSH, line.captured.pushes[0], k) for k in range(2)]
            got.append([bits_of(line.incoming.push(frame)) for frame in frames])
    assert got[0] == got[1]


@pytest.mark.parametrize(
    ("dtype", "number"),
    [("float16", 70000.0), ("float16", np.nan), ("bfloat16", np.inf), ("bfloat16", 3.4e38)],
)
def test_numbers_that_do_not_fit_are_an_error_of_the_worker(
    dtype: WireDtype, number: float
) -> None:
    job = job_of(1, 1, dtype)
    client, captured = capturing_client(job, PrivateMemory())
    names = job.names(1)
    grads = random_gradients(job, names, 1, values=floats)
    grads["t0"][3, 2] = number
    with pytest.raises(DataError, match=f"row 3 does not fit {dtype}"):
        client.push(0, names, grads, np.zeros(job.dense_size, np.float32), None)
    assert captured.pushes == [], "nothing is sent"


# --- what a shard refuses


def valid(line: Line, kind: Kind) -> tuple[StepMessage, np.ndarray]:
    """A message with bags and weights, and shard 0's description of it."""
    names = line.job.names(6, bags=3)
    line.client.pull(1, 1, names)
    grads = random_gradients(line.job, names, 6)
    state = np.ones(line.job.state_size, np.float32)
    line.client.push(1, names, grads, np.ones(line.job.dense_size, np.float32), state)
    captured = line.captured.pulls if kind == Kind.PULL else line.captured.pushes
    return captured[-1], captured[-1].descriptions()[0]


def take(line: Line, frame: Frame) -> Any:
    if frame.header.kind == Kind.PULL:
        return line.incoming.pull(frame)
    return line.incoming.push(frame)


FIELD = st.integers(0, 4 * FIELDS + TAIL - 1)
BAD = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([-2, -1, 0, 1, 2**20, 2**31, 2**40, 2**40 - 8, 2**63 - 1, -(2**63)]),
)


@settings(max_examples=150)
@given(st.sampled_from([Kind.PULL, Kind.PUSH]), KINDS, st.dictionaries(FIELD, BAD, max_size=3))
def test_any_description_is_taken_within_bounds_or_refused(
    of_kind: Kind, kind: str, wrong: dict[int, int]
) -> None:
    with line_of(job_of(2, 4), kind) as line:
        message, numbers = valid(line, of_kind)
        for index, number in wrong.items():
            numbers[index] = number
        try:
            took = take(line, line.frame(of_kind, message, 0, numbers.tobytes()))
        except ProtocolError:
            return
        if kind == "tcp":
            return
        segment = line.incoming.segments[0]
        start = np.frombuffer(segment.pages, np.uint8).__array_interface__["data"][0]
        arrays = [took[1]] if of_kind == Kind.PULL else [took]
        for array in in_arena(arrays[0]):
            where = array.__array_interface__["data"][0] - start
            assert where >= 0
            assert where + array.nbytes <= segment.size


def in_arena(message: Any) -> list[np.ndarray]:
    if isinstance(message, Rows):
        return [a for a in (*message.rows, message.dense, message.state) if a.size]
    return [a for a in (*message.grads, message.dense_grad) if a.size]


SEGMENT = 1 << 22
PLACES = {
    "no place": NO_PLACE,
    "before the arena": -(1 << 40),
    "no such segment": place(1, 0),
    "segment far away": place(1 << 22, 0),
    "behind its end": SEGMENT,
    "reaches beyond its end": SEGMENT - 8,
    "last byte of the numbering": (1 << 40) - 1,
}
ARRAYS = {"local rows": 2, "row splits": FIELDS + 3, "weights": 3 * FIELDS + 4, "values": 5}


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("of_kind", [Kind.PULL, Kind.PUSH], ids=["pull", "push"])
def test_a_place_outside_the_arena_is_refused(of_kind: Kind, where: str, array: str) -> None:
    with line_of(job_of(1, 4), "arena") as line:
        message, numbers = valid(line, of_kind)
        assert len(line.incoming.segments) == 1
        assert line.incoming.segments[0].size == SEGMENT
        if array == "weights" and where == "no place":
            return  # what all ones are
        assert numbers[ARRAYS[array]] >= 0
        numbers[ARRAYS[array]] = PLACES[where]
        with pytest.raises(ProtocolError, match="segment"):
            take(line, line.frame(of_kind, message, 0, numbers.tobytes()))


SIZES = {"entries": 0, "bags": FIELDS + 1, "dense": 4 * FIELDS + 1}


@pytest.mark.parametrize("kind", ["arena", "tcp"])
@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("size", [-2, 2**20, 2**26 + 1, 2**62])
def test_a_size_that_cannot_be_is_refused(kind: str, field: str, size: int) -> None:
    with line_of(job_of(1, 4), kind) as line:
        message, numbers = valid(line, Kind.PUSH)
        numbers[SIZES[field]] = size
        with pytest.raises(ProtocolError):
            take(line, line.frame(Kind.PUSH, message, 0, numbers.tobytes()))


def test_an_answer_that_would_be_too_big_is_refused() -> None:
    """A few bytes must not make a shard gather gigabytes: bags cost 8 bytes, a row of D more."""
    job = job_of(1, 2)
    small = WireFormat(job.dims, max_payload_bytes=1 << 12)
    numbers = np.full(2 * FIELDS + TAIL, NO_PLACE, dtype=np.int64)
    numbers[[0, FIELDS, -3, -1]] = 0
    numbers[1] = 300  # bags of 16 bytes
    header = Header(Kind.PULL, payload_bytes=8 * 301)
    with pytest.raises(ProtocolError, match="4800 bytes of rows, at most 4096"):
        Incoming(small, False).place(header, numbers.tobytes())


@pytest.mark.parametrize("change", [-8, 8, -1, 1, -200])
def test_a_description_of_another_length_is_refused(change: int) -> None:
    with line_of(job_of(1, 4), "tcp") as line:
        _, numbers = valid(line, Kind.PULL)
        meta = (numbers.tobytes() + bytes(8))[: numbers.nbytes + change]
        with pytest.raises(ProtocolError, match="describes its tables in"):
            line.sent(Header(Kind.PULL, payload_bytes=8), meta, [memoryview(bytes(8))])


@pytest.mark.parametrize("of_kind", [Kind.PULL, Kind.PUSH], ids=["pull", "push"])
def test_a_payload_of_another_size_is_refused_before_it_is_read(of_kind: Kind) -> None:
    with line_of(job_of(1, 4), "tcp") as line:
        message, numbers = valid(line, of_kind)
        right = sum(map(len, line.frame(of_kind, message, 0).payload))
        for size in (right - 1, right + 1, 1, 1 << 25):
            with pytest.raises(ProtocolError, match="with a payload of"):
                line.incoming.place(Header(of_kind, payload_bytes=size), numbers.tobytes())
        with pytest.raises(ProtocolError, match="without its payload"):
            take(line, line.sent(Header(of_kind), numbers.tobytes()))


def test_no_payload_goes_with_shared_memory_or_other_frames() -> None:
    for kind, of_kind in [("arena", Kind.PULL), ("arena", Kind.PUSH), ("tcp", Kind.FLUSH)]:
        with (
            line_of(job_of(1, 1), kind) as line,
            pytest.raises(ProtocolError, match="payload, which it has not"),
        ):
            line.sent(Header(of_kind), b"", [memoryview(b"12345678")])


def test_a_shard_without_segments_reads_nothing() -> None:
    with line_of(job_of(1, 4), "arena") as line:
        message, _ = valid(line, Kind.PUSH)
        line.incoming.segments.clear()
        with pytest.raises(MantaError, match="lies in segment 0 of 0"):
            take(line, line.frame(Kind.PUSH, message, 0))
