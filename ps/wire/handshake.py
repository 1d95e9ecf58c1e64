"""Who may speak to a shard: both sides prove that they know the job's token, without sending it.

    shard  → CHALLENGE  nonce (32 random bytes)
    worker → HELLO      own nonce, HMAC-SHA256(token, "worker" · shard's nonce · own nonce · header)
    shard  → WELCOME    HMAC-SHA256(token, "shard" · worker's nonce · shard's nonce · header)

`header` stands for the HELLO's worker, shard and fingerprint, and for the WELCOME's done step and
fence (the step it expects next), 8 bytes each: a worker sends again what the fence says, so nobody
else may say it. Comparisons take the same time wherever they differ.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from ps.errors import ProtocolError
from ps.wire.frames import Frame, Header, Kind, encode

NONCE_BYTES = 32
TOKEN_BYTES = 32
MAC_BYTES = 32
HELLO_META_BYTES = NONCE_BYTES + MAC_BYTES


def new_token() -> bytes:
    """A job's secret."""
    return secrets.token_bytes(TOKEN_BYTES)


def new_nonce() -> bytes:
    """Random bytes that no connection has seen before."""
    return secrets.token_bytes(NONCE_BYTES)


def challenge(nonce: bytes) -> bytearray:
    """The shard's first frame."""
    return encode(Header(Kind.CHALLENGE), nonce)


def hello(
    token: bytes, challenged: Frame, nonce: bytes, worker: int, shard: int, fingerprint: int
) -> bytearray:
    """The worker's answer to a challenge.

    Raises:
        ProtocolError: the frame is no challenge.
    """
    if challenged.header.kind != Kind.CHALLENGE or len(challenged.meta) != NONCE_BYTES:
        raise ProtocolError(f"the shard started with {challenged.header.kind.name}, not CHALLENGE")
    header = Header(Kind.HELLO, worker=worker, version=shard, aux=fingerprint)
    return encode(header, nonce + _worker_mac(token, challenged.meta, nonce, header))


def check_hello(token: bytes, nonce: bytes, frame: Frame) -> None:
    """See that a worker knows the token.

    Raises:
        ProtocolError: it does not, or the frame is something else.
    """
    meta = frame.meta
    if frame.header.kind != Kind.HELLO or len(meta) != HELLO_META_BYTES:
        raise ProtocolError("a connection starts with HELLO")
    theirs, mac = meta[:NONCE_BYTES], meta[NONCE_BYTES:]
    if not hmac.compare_digest(mac, _worker_mac(token, nonce, theirs, frame.header)):
        raise ProtocolError("wrong token")


def welcome(token: bytes, nonce: bytes, greeting: Frame, done_step: int, fence: int) -> bytearray:
    """The shard's answer to a HELLO that `check_hello` has taken."""
    header = Header(Kind.WELCOME, step=done_step, version=fence)
    return encode(header, _shard_mac(token, greeting.meta[:NONCE_BYTES], nonce, header))


def check_welcome(token: bytes, challenged: Frame, nonce: bytes, frame: Frame) -> None:
    """See that the shard knows the token too.

    Raises:
        ProtocolError: it does not.
    """
    expected = _shard_mac(token, nonce, challenged.meta, frame.header)
    if frame.header.kind != Kind.WELCOME or not hmac.compare_digest(frame.meta, expected):
        raise ProtocolError("what answered is no shard of this job")


def _worker_mac(token: bytes, shard_nonce: bytes, worker_nonce: bytes, header: Header) -> bytes:
    said = _fields(header.worker, header.version, header.aux)
    return hmac.digest(token, b"worker" + shard_nonce + worker_nonce + said, hashlib.sha256)


def _shard_mac(token: bytes, worker_nonce: bytes, shard_nonce: bytes, header: Header) -> bytes:
    said = _fields(header.step, header.version)
    return hmac.digest(token, b"shard" + worker_nonce + shard_nonce + said, hashlib.sha256)


def _fields(*values: int) -> bytes:
    return b"".join((value % 2**64).to_bytes(8, "little") for value in values)
