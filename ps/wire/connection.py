"""A worker's connections to shards.

`ArenaConnection` sends a few hundred bytes per message over a Unix socket, blocking: the payload is
in the arena. `TcpConnection` never blocks; a `TcpLoop` moves its bytes, either while somebody waits
for an answer or in a thread of its own.
"""

from __future__ import annotations

import array
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ps.errors import MantaError, ProtocolError, ShardLostError
from ps.wire.frames import (
    HEADER_BYTES,
    MAX_ERROR_BYTES,
    Buffer,
    Frame,
    FrameReader,
    Header,
    Kind,
    decode_packet,
    encode,
)
from ps.wire.greeting import CHECK_EVERY_S, SEND_TIMEOUT_S, error_of
from ps.wire.peer import MAX_PIECES, drop_sent


@dataclass(slots=True, eq=False)
class Answer:
    """An answer under way, and then there."""

    shard: int
    places: Sequence[memoryview]
    """Where its payload goes."""
    keep: object
    """What must stay in memory until the shard has answered."""
    header: Header | None = None


class Connection:
    """One worker's connection to one shard, after the handshake."""

    def __init__(self, sock: socket.socket, shard: int) -> None:
        self.sock = sock
        self.shard = shard
        self.done_step = 0
        """The shard is done with this worker's pushes for steps below."""
        self._answers: dict[int, Answer] = {}
        self._requests = 0
        self._error: MantaError | None = None

    def next_request(self) -> int:
        """A number for a request."""
        self._requests += 1
        return self._requests

    def expect(self, request: int, answer: Answer) -> None:
        """Say where the answer to a request goes, before the request is sent."""
        self._answers[request] = answer

    def check(self) -> None:
        """Raise what went wrong on this connection, if something did."""
        if self._error is not None:
            raise self._error

    def check_alive(self) -> None:
        """Raise if the shard is gone, as far as this side can know without waiting."""
        self.check()

    def fail(self, error: MantaError) -> None:
        """From now on everything raises this error."""
        if self._error is None:
            self._error = error

    def on_frame(self, frame: Frame) -> None:
        """Take a frame of the shard: an answer, or an error."""
        header = frame.header
        self.done_step = max(self.done_step, header.step)
        if header.kind == Kind.ERROR:
            self.fail(error_of(frame.meta))
            return
        answer = self._answers.pop(header.request, None)
        if answer is None or header.kind not in (Kind.ROWS, Kind.FLUSHED):
            raise ProtocolError(f"shard {self.shard} sent {header.kind.name}, which nobody wants")
        answer.header = header

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()
        self._answers.clear()  # with their memory

    def lost(self, reason: str | None) -> ShardLostError:
        """The error of a connection that is gone."""
        return ShardLostError(
            f"shard {self.shard}: the connection is gone ({reason}); its process may have died"
        )


class ArenaConnection(Connection):
    """Doorbells over a Unix socket."""

    def __init__(self, sock: socket.socket, shard: int) -> None:
        super().__init__(sock, shard)
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
        except BlockingIOError:
            raise self.lost(f"takes no messages for {SEND_TIMEOUT_S:g} s") from None
        except OSError as e:
            self._take_what_came()
            raise self.lost(e.strerror) from None

    def send_segment(self, number: int, fd: int, size: int) -> None:
        """Give the shard a segment of the arena."""
        frame = encode(Header(Kind.ARENA, version=number, aux=size))
        fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            self.sock.sendmsg([frame], fds)
        except OSError as e:
            raise self.lost(e.strerror) from None

    def check_alive(self) -> None:
        """See `Connection.check_alive`."""
        self.check()
        try:
            gone = not self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as e:
            raise self.lost(e.strerror) from None
        if gone:
            raise self.lost("closed by the shard")

    def wait(self, answer: Answer, timeout_s: float) -> bool:
        """Read until the answer is there; False if it is not within the time."""
        deadline = None
        while answer.header is None:
            self.check()
            try:
                self._read_frame()
            except BlockingIOError:
                now = time.monotonic()
                deadline = now + timeout_s if deadline is None else deadline
                if now >= deadline:
                    return False
        return True

    def _read_frame(self) -> None:
        """Block for one frame; `BlockingIOError` after `CHECK_EVERY_S` without any."""
        if not self._answers_come.poll(1000 * CHECK_EVERY_S):
            raise BlockingIOError
        try:
            count = self.sock.recv_into(self._packet)
        except BlockingIOError:
            raise
        except OSError as e:
            raise self.lost(e.strerror) from None
        if count == 0:
            raise self.lost("closed by the shard")
        self.on_frame(decode_packet(self._packet[:count]))

    def _take_what_came(self) -> None:
        """A shard may say why it closes the connection before it does."""
        try:
            while self._error is None:
                self._read_frame()
        except (OSError, MantaError):
            pass
        self.check()


class TcpConnection(Connection):
    """Frames with their arrays, moved by a `TcpLoop`."""

    def __init__(self, sock: socket.socket, shard: int, loop: TcpLoop) -> None:
        super().__init__(sock, shard)
        sock.setblocking(False)
        self._reader = FrameReader(self._place, 1 << 62)
        self._loop = loop
        self.outgoing: deque[memoryview] = deque()
        loop.add(self)

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Queue a frame; what the socket takes at once goes out."""
        self.check()
        self._loop.send(self, pieces)

    def wait(self, answer: Answer, timeout_s: float) -> bool:
        """Wait until the answer is there; False if it is not within the time."""
        return self._loop.wait(self, answer, timeout_s)

    def flush(self) -> None:
        """Send what the socket takes."""
        while self.outgoing:
            pieces = [self.outgoing[i] for i in range(min(len(self.outgoing), MAX_PIECES))]
            try:
                sent = self.sock.sendmsg(pieces)
            except BlockingIOError:
                return
            drop_sent(self.outgoing, sent)

    def read(self) -> None:
        """Take what the socket has."""
        while True:
            try:
                count = self.sock.recv_into(self._reader.wanted)
            except BlockingIOError:
                return
            if count == 0:
                raise self.lost("closed by the shard")
            frame = self._reader.received(count)
            if frame is not None:
                self.on_frame(frame)

    def close(self) -> None:
        """Close the socket."""
        self._loop.remove(self)
        super().close()

    def _place(self, header: Header, meta: bytes) -> Sequence[memoryview]:
        answer = self._answers.get(header.request)
        places = () if answer is None else answer.places
        size = sum(map(len, places))
        if size != header.payload_bytes:
            raise ProtocolError(
                f"shard {self.shard} answered with {header.payload_bytes} bytes, wanted {size}"
            )
        return places


class TcpLoop:
    """Moves the bytes of all TCP connections of a worker.

    In a thread of its own when `background`, so that answers come in while the worker computes;
    otherwise in whoever waits, which saves two changes of threads per answer.
    """

    def __init__(self, background: bool) -> None:
        self._poll = select.epoll()
        self._connections: dict[int, TcpConnection] = {}
        self._events: dict[int, int] = {}
        self._changed = threading.Condition()
        self._background = background
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="tcp", daemon=True)
        if background:
            self._thread.start()

    def add(self, connection: TcpConnection) -> None:
        """Take a connection."""
        with self._changed:
            fd = connection.sock.fileno()
            self._connections[fd] = connection
            self._events[fd] = select.EPOLLIN
            self._poll.register(fd, select.EPOLLIN)

    def remove(self, connection: TcpConnection) -> None:
        """Forget a connection."""
        with self._changed:
            fd = connection.sock.fileno()
            if self._connections.pop(fd, None) is not None:
                self._poll.unregister(fd)

    def send(self, connection: TcpConnection, pieces: Sequence[Buffer]) -> None:
        """See `TcpConnection.send`."""
        with self._changed:
            idle = not connection.outgoing
            connection.outgoing.extend(map(memoryview, pieces))
            if idle:
                self._step(connection, connection.flush)
        connection.check()

    def drain(self, timeout_s: float) -> None:
        """Send what is queued, unless a thread does: nobody might wait for an answer for long.

        Raises:
            ShardLostError: a shard does not take it within the time.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._background:
                waiting = [c for c in self._connections.values() if c.outgoing]
                if not waiting:
                    return
                if time.monotonic() >= deadline:
                    raise waiting[0].lost(f"takes nothing for {timeout_s:g} s")
                self._move(CHECK_EVERY_S)

    def wait(self, connection: TcpConnection, answer: Answer, timeout_s: float) -> bool:
        """See `TcpConnection.wait`."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while answer.header is None:
                connection.check()
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                if self._background:
                    self._changed.wait(left)
                else:
                    self._move(min(left, CHECK_EVERY_S))
        return True

    def close(self) -> None:
        """Stop the thread."""
        if self._closed:
            return
        self._closed = True
        if self._background:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        self._poll.close()
        os.close(self._wake)

    def _run(self) -> None:
        while not self._closed:
            ready = self._poll.poll()
            with self._changed:
                self._on_events(ready)
                self._changed.notify_all()

    def _move(self, timeout_s: float) -> None:
        self._on_events(self._poll.poll(timeout_s))

    def _on_events(self, ready: Sequence[tuple[int, int]]) -> None:
        for fd, events in ready:
            if fd == self._wake:
                os.eventfd_read(fd)
                continue
            connection = self._connections.get(fd)
            if connection is None:
                continue
            if events & select.EPOLLOUT:
                self._step(connection, connection.flush)
            if events & ~select.EPOLLOUT:
                self._step(connection, connection.read)

    def _step(self, connection: TcpConnection, move: Callable[[], None]) -> None:
        fd = connection.sock.fileno()
        try:
            move()
        except MantaError as e:
            self._give_up(connection, e)
        except OSError as e:
            self._give_up(connection, connection.lost(e.strerror))
        else:
            events = select.EPOLLIN | (select.EPOLLOUT if connection.outgoing else 0)
            if events != self._events[fd]:
                self._events[fd] = events
                self._poll.modify(fd, events)

    def _give_up(self, connection: TcpConnection, error: MantaError) -> None:
        connection.fail(error)
        fd = connection.sock.fileno()
        if self._connections.pop(fd, None) is not None:
            self._poll.unregister(fd)
