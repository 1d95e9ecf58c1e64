"""Frames: what is sent arrives whatever the pieces, and nothing else gets through."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import DataError, ProtocolError
from ps.wire.frames import (
    HEADER_BYTES,
    MAGIC,
    MAX_META_BYTES,
    PROTOCOL,
    Frame,
    FrameReader,
    Header,
    Kind,
    decode_header,
    encode,
    error_frame,
    pack,
    seal,
)

MOST = 1 << 20


def reader(parts: int = 1) -> FrameReader:
    """Takes any payload, in so many pieces of memory."""

    def place(header: Header, meta: bytes) -> Sequence[memoryview]:
        whole = memoryview(bytearray(header.payload_bytes))
        cut = -(-len(whole) // parts) or 1
        return [whole[i : i + cut] for i in range(0, len(whole), cut)] + [memoryview(b"")]

    return FrameReader(place, MOST)


def feed(reader: FrameReader, data: bytes, cuts: Sequence[int] = ()) -> Iterator[Frame]:
    """Frames of a stream that is received in these pieces."""
    for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
        piece = memoryview(data)[start:stop]
        while len(piece):
            wanted = reader.wanted
            assert len(wanted) > 0, "a reader that wants nothing would never end"
            count = min(len(wanted), len(piece))
            wanted[:count] = piece[:count]
            piece = piece[count:]
            if (frame := reader.received(count)) is not None:
                yield frame


def same(frame: Frame, header: Header, meta: bytes, payload: bytes) -> bool:
    got = (frame.header, frame.meta, b"".join(frame.payload))
    return got == (header, meta, payload)


def stream(header: Header, meta: bytes, payload: Sequence[bytes] = ()) -> bytes:
    return bytes(encode(header, meta, payload)) + b"".join(payload)


U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def frames(draw: st.DrawFn) -> tuple[Header, bytes, list[bytes]]:
    meta = draw(st.binary(max_size=40))
    payload = draw(st.lists(st.binary(max_size=30), max_size=4))
    header = Header(
        kind=draw(st.sampled_from(Kind)),
        meta_bytes=len(meta),
        worker=draw(U32),
        payload_bytes=sum(map(len, payload)),
        request=draw(U64),
        step=draw(I64),
        version=draw(I64),
        aux=draw(U64),
        flags=draw(st.integers(0, 2**16 - 1)),
    )
    return header, meta, payload


# --- what comes through


@given(data=st.data(), sent=st.lists(frames(), max_size=4), parts=st.integers(1, 5))
def test_any_pieces_of_the_stream_give_the_frames_that_were_sent(
    data: Any, sent: list[tuple[Header, bytes, list[bytes]]], parts: int
) -> None:
    whole = b"".join(stream(*frame) for frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    receiving = reader(parts)
    got = list(feed(receiving, whole, cuts))
    assert receiving.idle
    assert len(got) == len(sent)
    for frame, (header, meta, payload) in zip(got, sent, strict=True):
        assert same(frame, header, meta, b"".join(payload))


def test_a_frame_that_came_byte_by_byte_is_whole_at_its_last_byte() -> None:
    data = stream(Header(Kind.PUSH, request=3), b"meta", [b"pay", b"load"])
    receiving, came = reader(3), []
    for i in range(len(data)):
        came += list(feed(receiving, data[i : i + 1]))
        assert receiving.idle == (i == len(data) - 1)
        assert len(came) == (i == len(data) - 1)


def test_a_frame_keeps_its_arrays_when_the_next_one_comes() -> None:
    first, second = (stream(Header(Kind.PUSH), b"m%d" % i, [bytes([i]) * 9]) for i in (1, 2))
    one, two = feed(reader(), first + second)
    assert (one.meta, b"".join(one.payload)) == (b"m1", b"\1" * 9)
    assert (two.meta, b"".join(two.payload)) == (b"m2", b"\2" * 9)


def test_a_header_has_the_bytes_that_the_protocol_says() -> None:
    header = Header(Kind.PULL, worker=0x04030201, request=5, step=-2, version=-1, aux=7, flags=9)
    data = stream(header, b"abc")
    assert data[:8] == b"MNTA" + bytes([2, 5]) + b"\x09\x00"
    numbers = [3, 0x04030201, 0, 5, 2**64 - 2, 2**64 - 1, 7]
    at = 8
    for number, size in zip(numbers, [4, 4, 8, 8, 8, 8, 8], strict=True):
        assert int.from_bytes(data[at : at + size], "little") == number
        at += size
    assert (at, HEADER_BYTES, len(data)) == (56, 64, 67)


# --- what does not


@settings(max_examples=200)
@given(frame=frames(), where=st.integers(0, 2**30))
def test_a_flipped_bit_anywhere_is_found(
    frame: tuple[Header, bytes, list[bytes]], where: int
) -> None:
    data = bytearray(stream(*frame))
    where %= 8 * len(data)
    data[where // 8] ^= 1 << where % 8
    receiving = reader()
    try:
        came = list(feed(receiving, bytes(data)))
    except ProtocolError:
        return
    # Only a size that grew may leave the reader without an error yet: it waits for more.
    assert came == []
    assert not receiving.idle
    with pytest.raises(ProtocolError):
        list(feed(receiving, bytes(2 * MOST)))


@given(frame=frames(), cut=st.integers(1, 2**30))
def test_a_truncated_frame_is_no_frame(frame: tuple[Header, bytes, list[bytes]], cut: int) -> None:
    data = stream(*frame)
    receiving = reader()
    assert list(feed(receiving, data[: 1 + cut % (len(data) - 1)])) == []
    assert not receiving.idle


@settings(max_examples=200)
@given(garbage=st.binary(min_size=HEADER_BYTES, max_size=300), honest=st.booleans())
def test_garbage_is_an_error_and_never_a_frame(garbage: bytes, honest: bool) -> None:
    if honest:  # as far as magic and version go
        garbage = MAGIC + bytes([PROTOCOL]) + garbage[5:]
    receiving = reader()
    try:
        assert list(feed(receiving, garbage)) == []
    except ProtocolError:
        return
    assert not receiving.idle


def packed(**wrong: Any) -> bytes:
    fields: dict[str, int] = {
        "kind": 6, "flags": 0, "meta_bytes": 0, "worker": 0, "payload_bytes": 0, "request": 0,
        "step": 0, "version": 0, "aux": 0,
    }  # fmt: skip
    frame = bytearray(HEADER_BYTES)
    pack(frame, **(fields | {k: v for k, v in wrong.items() if k in fields}))
    frame[0:4] = wrong.get("magic", MAGIC)
    frame[4] = wrong.get("protocol", PROTOCOL)
    seal(frame)
    return bytes(frame)


WRONG = {
    "magic": ({"magic": b"HTTP"}, "starts with b'HTTP'"),
    "newer protocol": ({"protocol": PROTOCOL + 1}, "frame of protocol 3, this side speaks 2"),
    "no kind": ({"kind": 0}, "frame of kind 0"),
    "unknown kind": ({"kind": 11}, "frame of kind 11"),
    "meta": ({"meta_bytes": MAX_META_BYTES + 1}, "meta part of 1048577 bytes, at most 1048576"),
    "all the meta there is": ({"meta_bytes": 2**32 - 1}, "meta part of 4294967295 bytes"),
    "payload": ({"payload_bytes": MOST + 1}, "payload of 1048577 bytes, at most 1048576"),
    "all the payload there is": ({"payload_bytes": 2**64 - 1}, "payload of 18446744073709551615"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_header_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        list(feed(reader(), packed(**fields)))
    with pytest.raises(ProtocolError, match=message):
        decode_header(packed(**fields), MOST)


@pytest.mark.parametrize("size", [MOST + 1, 2**60, 2**64 - 1])
def test_sizes_are_checked_before_anything_is_allocated(size: int) -> None:
    asked: list[Header] = []

    def place(header: Header, meta: bytes) -> Sequence[memoryview]:
        asked.append(header)
        raise ProtocolError("no room")

    data = packed(payload_bytes=size, meta_bytes=10)
    receiving = FrameReader(place, MOST)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="payload of"):
            list(feed(receiving, data))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert asked == []


def test_memory_for_a_payload_is_asked_once_when_its_description_is_there() -> None:
    asked: list[tuple[Header, bytes]] = []

    def place(header: Header, meta: bytes) -> Sequence[memoryview]:
        asked.append((header, meta))
        return [memoryview(bytearray(header.payload_bytes))]

    receiving = FrameReader(place, MOST)
    data = stream(Header(Kind.PUSH), b"what it is", [b"payload"])
    assert list(feed(receiving, data[: HEADER_BYTES + 9])) == []
    assert asked == []
    (frame,) = feed(receiving, data[HEADER_BYTES + 9 :])
    assert [meta for _, meta in asked] == [b"what it is"]
    assert asked[0][0] == frame.header


def test_a_payload_that_has_no_place_is_an_error() -> None:
    def place(header: Header, meta: bytes) -> Sequence[memoryview]:
        raise ProtocolError("no room for it")

    with pytest.raises(ProtocolError, match="no room for it"):
        list(feed(FrameReader(place, MOST), stream(Header(Kind.HELLO), b"m", [b"payload"])))


def test_an_error_frame_names_class_and_message_and_stays_small() -> None:
    (frame,) = feed(reader(), bytes(error_frame(5, DataError("wörd " * 4000), done_step=3)))
    assert (frame.header.kind, frame.header.request, frame.header.step) == (Kind.ERROR, 5, 3)
    name, _, message = frame.meta.decode("utf-8", "replace").partition("\n")
    assert name == "DataError"
    assert message.startswith("wörd wörd")
    assert len(frame.meta) <= 4096
