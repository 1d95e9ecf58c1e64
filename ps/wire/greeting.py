"""The worker's side of a handshake, and what a shard's errors become."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field

from ps import errors
from ps.errors import JobError, MantaError, ShardLostError
from ps.wire.frames import (
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    Frame,
    FrameReader,
    Header,
    Kind,
    decode_packet,
)
from ps.wire.handshake import check_welcome, hello, new_nonce
from ps.wire.sockets import Check

_HANDSHAKE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a worker shows to a shard."""

    token: bytes = field(repr=False)
    worker: int
    fingerprint: int


def shake_hands(
    sock: socket.socket,
    credentials: Credentials,
    shard: int,
    check: Check = lambda: None,
) -> Header:
    """Prove to each other that both sides belong to the job; returns the header of WELCOME.

    Args:
        sock: from `unix_socket` or `tcp_socket`.
        credentials: of the worker, or of an observer.
        shard: number of the shard that is wanted.
        check: called while the shard is busy.

    Raises:
        ProtocolError: the other side does not, or refuses this worker.
        ShardNotReadyError: the shard has no state yet.
        ShardLostError: it closed the connection.
    """
    reader = FrameReader(lambda header, meta: (), 0)
    nonce = new_nonce()
    challenged = _next_frame(sock, reader, shard, check)
    try:
        sock.sendall(hello(credentials.token, challenged, nonce, credentials.worker, shard,
                           credentials.fingerprint))  # fmt: skip
    except OSError as e:
        raise ShardLostError(f"shard {shard}: no handshake: {e.strerror or e}") from None
    answer = _next_frame(sock, reader, shard, check)
    if answer.header.kind == Kind.ERROR:
        raise error_of(answer.meta)
    check_welcome(credentials.token, challenged, nonce, answer)
    return answer.header


def _next_frame(sock: socket.socket, reader: FrameReader, shard: int, check: Check) -> Frame:
    packet = memoryview(bytearray(HEADER_BYTES + MAX_ERROR_BYTES))
    deadline = time.monotonic() + _HANDSHAKE_TIMEOUT_S
    while True:
        try:
            count = sock.recv_into(packet if sock.family == socket.AF_UNIX else reader.wanted)
        except BlockingIOError:  # the shard is busy
            check()
            if time.monotonic() < deadline:
                continue
            raise ShardLostError(
                f"shard {shard}: no handshake within {_HANDSHAKE_TIMEOUT_S:g} s"
            ) from None
        except OSError as e:
            raise ShardLostError(f"shard {shard}: no handshake: {e.strerror or e}") from None
        if count == 0:
            raise ShardLostError(f"shard {shard}: closed the connection in the handshake")
        if sock.family == socket.AF_UNIX:
            return decode_packet(packet[:count])
        frame = reader.received(count)
        if frame is not None:
            return frame


def error_of(meta: bytes) -> MantaError:
    """What an ERROR frame says, as the class that the shard raised."""
    name, _, message = meta.decode("utf-8", "replace").partition("\n")
    kind = getattr(errors, name, None)
    simple = (errors.ProtocolError, errors.ConfigError, errors.ShardNotReadyError, errors.DataError)
    return kind(message) if kind in simple else JobError(f"{name}: {message}")
