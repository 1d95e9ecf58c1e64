"""A worker's connection to one shard, for as long as it holds.

`ArenaConnection` sends a few hundred bytes per message over a Unix socket, blocking: the payload
is in the arena. `ps.wire.tcp` is for shards on other hosts. What is under way is in the `Outbox`,
which outlives the connection; `ps.wire.link` makes a new one when this one breaks.
"""

from __future__ import annotations

import array
import select
import socket
import time
from collections.abc import Callable, Sequence

from ps.errors import MantaError, ProtocolError, ShardLostError
from ps.wire.frames import (
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    Buffer,
    Frame,
    Header,
    Kind,
    decode_packet,
    encode,
)
from ps.wire.greeting import error_of
from ps.wire.outbox import Outbox, Sent
from ps.wire.sockets import CHECK_EVERY_S

SEND_TIMEOUT_S = 30.0


class Connection:
    """What both kinds have in common."""

    def __init__(self, sock: socket.socket, outbox: Outbox) -> None:
        self.sock = sock
        self.outbox = outbox
        self.shard = outbox.shard
        self.has_answered = False
        """Whether a frame has come since the handshake."""
        self._error: MantaError | None = None

    def check(self) -> None:
        """Raise what went wrong on this connection, if something did."""
        if self._error is not None:
            raise self._error

    def fail(self, error: MantaError) -> None:
        """From now on everything raises this error."""
        if self._error is None:
            self._error = error

    def on_frame(self, frame: Frame) -> None:
        """Take a frame of the shard: an answer, or an error."""
        header, outbox = frame.header, self.outbox
        self.has_answered = True
        if header.kind == Kind.ERROR:
            outbox.note_done(header)
            self.fail(error_of(frame.meta))
        elif outbox.answered(header) is None:
            raise ProtocolError(f"shard {self.shard} sent {header.kind.name}, which nobody wants")

    def close(self) -> None:
        """Close the socket; what uses the connection after that raises its error."""
        self.fail(self.lost("closed here"))
        self.sock.close()

    def lost(self, reason: str | None) -> ShardLostError:
        """The error of a connection that is gone."""
        return ShardLostError(
            f"shard {self.shard}: the connection is gone ({reason}); its process may have died"
        )


class ArenaConnection(Connection):
    """Doorbells over a Unix socket, which blocks for `CHECK_EVERY_S` at most."""

    def __init__(
        self, sock: socket.socket, outbox: Outbox, unix_name: str, check: Callable[[], None]
    ) -> None:
        """`check` is called while the shard does not take a message; it may raise."""
        super().__init__(sock, outbox)
        self.unix_name = unix_name
        self._check_caller = check
        self._packet = memoryview(bytearray(HEADER_BYTES + MAX_ERROR_BYTES))
        # A thread that blocks in `recv` is also woken each time the shard takes one of its
        # messages, for then there is room to send; one that polls for input is not.
        self._answers_come = select.poll()
        self._answers_come.register(sock.fileno(), select.POLLIN)

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Send a frame of one piece; it is small, and the shard always reads."""
        self.check()
        (frame,) = pieces
        try:
            self.sock.send(frame)  # a packet goes as a whole
        except OSError as e:
            self._send_again(e, lambda: self.sock.send(frame))

    def send_segment(self, number: int, fd: int, size: int) -> None:
        """Give the shard a segment of the arena."""
        self.check()
        frame = encode(Header(Kind.ARENA, version=number, aux=size))
        fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            self.sock.sendmsg([frame], fds)
        except OSError as e:
            self._send_again(e, lambda: self.sock.sendmsg([frame], fds))

    def wait(self, sent: Sent, timeout_s: float) -> bool:
        """Read until the answer is there; False if it is not within the time."""
        deadline = None
        while sent.header is None:
            self.check()
            if self._read_frame(CHECK_EVERY_S):
                continue
            now = time.monotonic()
            deadline = now + timeout_s if deadline is None else deadline
            if now >= deadline:
                return False
        return True

    def check_alive(self) -> None:
        """Take what has come; raise if the shard is gone, as far as this side can know."""
        self.check()
        while self._read_frame(0):
            self.check()

    def _send_again(self, error: OSError, send: Callable[[], object]) -> None:
        """Wait until the shard takes a message that it did not take within `CHECK_EVERY_S`."""
        deadline = time.monotonic() + SEND_TIMEOUT_S
        while isinstance(error, BlockingIOError):
            if time.monotonic() >= deadline:
                raise self.lost(f"takes no messages for {SEND_TIMEOUT_S:g} s")
            self._check_caller()
            try:
                send()
            except OSError as e:
                error = e
            else:
                return
        self._take_what_came()
        raise self.lost(error.strerror)

    def _read_frame(self, timeout_s: float) -> bool:
        """Take one frame; False if none comes within the time."""
        if not self._answers_come.poll(1000 * timeout_s):
            return False
        try:
            count = self.sock.recv_into(self._packet)
        except BlockingIOError:
            return False
        except OSError as e:  # a reset is reported ahead of what came before it
            self._take_what_came()
            raise self.lost(e.strerror) from None
        if count == 0:
            raise self.lost("closed by the shard")
        self.on_frame(decode_packet(self._packet[:count]))
        return True

    def _take_what_came(self) -> None:
        """Answers, and why a shard closes the connection: it may say so before it does."""
        try:
            while self._error is None and self._read_frame(0):
                pass
        except MantaError:
            pass
        self.check()
