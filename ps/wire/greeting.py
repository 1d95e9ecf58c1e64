"""The worker's side of a handshake, over a socket that blocks, and what a shard's errors become."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass, field

from ps import errors
from ps.errors import JobError, MantaError, ShardLostError
from ps.wire.frames import (
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    Frame,
    FrameReader,
    Kind,
    decode_packet,
)
from ps.wire.handshake import check_welcome, hello, new_nonce

CHECK_EVERY_S = 0.5
"""Longest time that a read blocks."""
SEND_TIMEOUT_S = 30.0
_HANDSHAKE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a worker shows to a shard."""

    token: bytes = field(repr=False)
    worker: int
    fingerprint: int


def shake_hands(sock: socket.socket, credentials: Credentials, shard: int) -> None:
    """Prove to each other that both sides belong to the job; `sock` blocks.

    Raises:
        ProtocolError: the other side does not, or refuses this worker.
        ShardLostError: it closed the connection.
    """
    reader = FrameReader(lambda header, meta: (), 0)
    nonce = new_nonce()
    challenged = _next_frame(sock, reader, shard)
    sock.sendall(hello(credentials.token, challenged, nonce, credentials.worker, shard,
                       credentials.fingerprint))  # fmt: skip
    answer = _next_frame(sock, reader, shard)
    if answer.header.kind == Kind.ERROR:
        raise error_of(answer.meta)
    check_welcome(credentials.token, challenged, nonce, answer)


def _next_frame(sock: socket.socket, reader: FrameReader, shard: int) -> Frame:
    packet = memoryview(bytearray(HEADER_BYTES + MAX_ERROR_BYTES))
    deadline = time.monotonic() + _HANDSHAKE_TIMEOUT_S
    while True:
        try:
            count = sock.recv_into(packet if sock.family == socket.AF_UNIX else reader.wanted)
        except BlockingIOError:  # the shard is busy
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


def set_timeouts(sock: socket.socket) -> None:
    """Let a blocking socket give up by itself, without a system call before each read."""
    for option, seconds in (
        (socket.SO_RCVTIMEO, CHECK_EVERY_S),
        (socket.SO_SNDTIMEO, SEND_TIMEOUT_S),
    ):
        whole = int(seconds)
        value = struct.pack("@ll", whole, int((seconds - whole) * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, option, value)


def error_of(meta: bytes) -> MantaError:
    """What an ERROR frame says, as the class that the shard raised."""
    name, _, message = meta.decode("utf-8", "replace").partition("\n")
    kind = getattr(errors, name, None)
    simple = (errors.ProtocolError, errors.ConfigError, errors.ShardNotReadyError, errors.DataError)
    return kind(message) if kind in simple else JobError(f"{name}: {message}")
