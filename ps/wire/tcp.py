"""A worker's connections to shards on other hosts: frames with their arrays.

`TcpConnection` never blocks; a `TcpLoop` moves its bytes, either while somebody waits for an answer
or in a thread of its own.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from ps.errors import MantaError, ProtocolError, ShardLostError
from ps.wire.connection import Connection
from ps.wire.frames import Buffer, FrameReader, Header
from ps.wire.outbox import Outbox, Sent
from ps.wire.sending import SendQueue
from ps.wire.sockets import CHECK_EVERY_S


class TcpConnection(Connection):
    """One of them."""

    def __init__(self, sock: socket.socket, outbox: Outbox, loop: TcpLoop) -> None:
        super().__init__(sock, outbox)
        sock.setblocking(False)
        self.outgoing = SendQueue(sock)
        self._reader = FrameReader(self._place, 1 << 62)
        self._loop = loop
        loop.add(self)

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Queue a frame; what the socket takes at once goes out."""
        self.check()
        self._loop.send(self, pieces)

    def wait(self, sent: Sent, timeout_s: float) -> bool:
        """Wait until the answer is there; False if it is not within the time."""
        return self._loop.wait(self, sent, timeout_s)

    def check_alive(self) -> None:
        """Take what has come; raise if the shard is gone, as far as this side can know."""
        self._loop.look()
        self.check()

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
        """See `Connection.close`; nothing more is written to where answers go."""
        self._loop.remove(self)
        self.outgoing.clear()
        super().close()

    def _place(self, header: Header, meta: bytes) -> Sequence[memoryview]:
        sent = self.outbox.under_way(header.request)
        places = () if sent is None else sent.places
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
            if self._connections.get(fd) is connection:
                del self._connections[fd]
                self._poll.unregister(fd)

    def send(self, connection: TcpConnection, pieces: Sequence[Buffer]) -> None:
        """See `TcpConnection.send`."""
        with self._changed:
            idle = not connection.outgoing.pieces
            connection.outgoing.add(pieces)
            if idle:
                self._step(connection, connection.outgoing.flush)
        connection.check()

    def drain(self, timeout_s: float, check: Callable[[], None]) -> None:
        """Send what is queued, unless a thread does: nobody might wait for an answer for long.

        A connection that takes nothing within the time is given up. `check` is called at times, and
        may raise.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._background:
                waiting = [c for c in self._connections.values() if c.outgoing.pieces]
                if not waiting:
                    return
                if time.monotonic() >= deadline:
                    lost = waiting[0].lost(f"takes nothing for {timeout_s:g} s")
                    self.give_up(waiting[0], lost)
                self._move(CHECK_EVERY_S)
                check()

    def wait(self, connection: TcpConnection, sent: Sent, timeout_s: float) -> bool:
        """See `TcpConnection.wait`."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while sent.header is None:
                connection.check()
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                if self._background:
                    self._changed.wait(left)
                else:
                    self._move(min(left, CHECK_EVERY_S))
        return True

    def look(self) -> None:
        """Move what can be moved at once, unless a thread does."""
        with self._changed:
            if not self._background and not self._closed:
                self._move(0)

    def give_up(self, connection: TcpConnection, error: MantaError) -> None:
        """Use a connection no more."""
        connection.fail(error)
        self.remove(connection)

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
                self._step(connection, connection.outgoing.flush)
            if events & ~select.EPOLLOUT and self._connections.get(fd) is connection:
                self._step(connection, connection.read)

    def _step(self, connection: TcpConnection, move: Callable[[], object]) -> None:
        fd = connection.sock.fileno()
        try:
            move()
        except MantaError as e:
            self.give_up(connection, e)
        except OSError as e:
            self._take_what_came(connection)
            self.give_up(connection, connection.lost(e.strerror))
        else:
            events = select.EPOLLIN | (select.EPOLLOUT if connection.outgoing.pieces else 0)
            if events != self._events[fd]:
                self._events[fd] = events
                self._poll.modify(fd, events)

    def _take_what_came(self, connection: TcpConnection) -> None:
        """Why the shard closed the connection, if it said so, and answers."""
        try:
            connection.read()
        except (ShardLostError, OSError):
            pass
        except MantaError as e:
            connection.fail(e)
