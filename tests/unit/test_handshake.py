"""The handshake: only those who know the token get through, and nothing said before helps."""

from __future__ import annotations

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.errors import ProtocolError
from ps.wire import handshake
from ps.wire.frames import Buffer, Frame, FrameReader, Header, Kind, encode
from ps.wire.handshake import (
    NONCE_BYTES,
    challenge,
    check_hello,
    check_welcome,
    hello,
    new_nonce,
    new_token,
    welcome,
)

TOKEN, OTHER = b"t" * 32, b"o" * 32
SHARDS, WORKERS = b"s" * NONCE_BYTES, b"w" * NONCE_BYTES


def frame_of(data: Buffer) -> Frame:
    """What the other side gets."""
    reader = FrameReader(lambda header, meta: (), 0)
    view = memoryview(data)
    while True:
        count = len(reader.wanted)
        reader.wanted[:] = view[:count]
        view = view[count:]
        if (frame := reader.received(count)) is not None:
            assert len(view) == 0
            return frame


def said(token: bytes = TOKEN, worker: int = 1, shard: int = 2, fingerprint: int = 3) -> Frame:
    challenged = frame_of(challenge(SHARDS))
    return frame_of(hello(token, challenged, WORKERS, worker, shard, fingerprint))


def welcomed(token: bytes, nonce: bytes, greeting: Frame, done: int = 5, fence: int = 7) -> Frame:
    check_hello(token, nonce, greeting)
    return frame_of(welcome(token, nonce, greeting, done, fence))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31), st.integers(0, 2**64 - 1))
def test_both_sides_believe_who_knows_the_token(worker: int, shard: int, fingerprint: int) -> None:
    token, nonces = new_token(), (new_nonce(), new_nonce())
    challenged = frame_of(challenge(nonces[0]))
    greeting = frame_of(hello(token, challenged, nonces[1], worker, shard, fingerprint))
    seen = (greeting.header.worker, greeting.header.version, greeting.header.aux)
    assert seen == (worker, shard, fingerprint)
    answer = welcomed(token, nonces[0], greeting)
    check_welcome(token, challenged, nonces[1], answer)
    assert (answer.header.step, answer.header.version) == (5, 7)


def test_no_frame_holds_the_token() -> None:
    for data in (challenge(SHARDS), said().meta, welcome(TOKEN, SHARDS, said(), 5, 7)):
        assert TOKEN not in bytes(data)


def test_a_wrong_token_is_refused() -> None:
    with pytest.raises(ProtocolError, match="wrong token"):
        check_hello(TOKEN, SHARDS, said(OTHER))


def test_a_replayed_hello_is_refused() -> None:
    check_hello(TOKEN, SHARDS, said())
    with pytest.raises(ProtocolError, match="wrong token"):
        check_hello(TOKEN, new_nonce(), said())


@pytest.mark.parametrize("field", ["worker", "version", "aux"])
def test_who_a_worker_is_cannot_be_changed_on_the_way(field: str) -> None:
    greeting = said()
    header = greeting.header._replace(**{field: 9})
    with pytest.raises(ProtocolError, match="wrong token"):
        check_hello(TOKEN, SHARDS, Frame(header, greeting.meta, ()))


@given(st.integers(0, 8 * (NONCE_BYTES + 32) - 1))
def test_any_other_signature_is_refused(bit: int) -> None:
    greeting = said()
    meta = bytearray(greeting.meta)
    meta[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError, match="wrong token"):
        check_hello(TOKEN, SHARDS, Frame(greeting.header, bytes(meta), ()))


@pytest.mark.parametrize("kind", [k for k in Kind if k != Kind.HELLO])
def test_a_connection_starts_with_hello(kind: Kind) -> None:
    frame = Frame(said().header._replace(kind=kind), said().meta, ())
    with pytest.raises(ProtocolError, match="starts with HELLO"):
        check_hello(TOKEN, SHARDS, frame)


@pytest.mark.parametrize("size", [0, 31, 63, 65, 4096])
def test_a_hello_has_one_size(size: int) -> None:
    with pytest.raises(ProtocolError, match="starts with HELLO"):
        check_hello(TOKEN, SHARDS, Frame(said().header, bytes(size), ()))


def test_a_worker_refuses_a_shard_that_does_not_know_the_token() -> None:
    challenged = frame_of(challenge(SHARDS))
    greeting = frame_of(hello(OTHER, challenged, WORKERS, 1, 2, 3))
    forged = welcomed(OTHER, SHARDS, greeting)
    with pytest.raises(ProtocolError, match="no shard of this job"):
        check_welcome(TOKEN, challenged, WORKERS, forged)


def test_a_worker_refuses_a_welcome_to_somebody_else() -> None:
    challenged = frame_of(challenge(SHARDS))
    answer = welcomed(TOKEN, SHARDS, said())
    check_welcome(TOKEN, challenged, WORKERS, answer)
    with pytest.raises(ProtocolError, match="no shard of this job"):
        check_welcome(TOKEN, challenged, new_nonce(), answer)
    with pytest.raises(ProtocolError, match="no shard of this job"):
        check_welcome(TOKEN, frame_of(challenge(new_nonce())), WORKERS, answer)


@pytest.mark.parametrize("field", ["step", "version"])
def test_what_a_shard_expects_cannot_be_changed_on_the_way(field: str) -> None:
    answer = welcomed(TOKEN, SHARDS, said())
    changed = Frame(answer.header._replace(**{field: 6}), answer.meta, ())
    with pytest.raises(ProtocolError, match="no shard of this job"):
        check_welcome(TOKEN, frame_of(challenge(SHARDS)), WORKERS, changed)


def test_a_signature_of_one_side_is_none_of_the_other() -> None:
    """A shard that echoes what a worker signed proves nothing."""
    challenged = frame_of(challenge(SHARDS))
    echoed = Frame(Header(Kind.WELCOME), said().meta[NONCE_BYTES:], ())
    with pytest.raises(ProtocolError, match="no shard of this job"):
        check_welcome(TOKEN, challenged, WORKERS, echoed)


@pytest.mark.parametrize(
    "frame",
    [frame_of(encode(Header(Kind.WELCOME), SHARDS)), frame_of(encode(Header(Kind.CHALLENGE), b""))],
    ids=["welcome", "no nonce"],
)
def test_a_worker_answers_nothing_but_a_challenge(frame: Frame) -> None:
    with pytest.raises(ProtocolError, match="not CHALLENGE"):
        hello(TOKEN, frame, WORKERS, 0, 0, 0)


def test_signatures_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(len(a))
        return hmac.compare_digest(a, b)

    class Watched:
        compare_digest = staticmethod(compare)
        digest = staticmethod(hmac.digest)

    monkeypatch.setattr(handshake, "hmac", Watched)
    check_welcome(TOKEN, frame_of(challenge(SHARDS)), WORKERS, welcomed(TOKEN, SHARDS, said()))
    assert compared == [32, 32]


def test_nonces_and_tokens_are_new_every_time() -> None:
    assert len({new_nonce() for _ in range(100)}) == 100
    assert len({new_token() for _ in range(100)}) == 100
    assert {len(new_token()), len(new_nonce())} == {32}
