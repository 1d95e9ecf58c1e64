"""`ShardWatch`: notices the end of a shard's process within milliseconds.

An observer's connection to a shard carries nothing after its handshake, and the system closes it
when the process ends, whatever it died of. Asking Ray takes seconds.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Iterable

from ps.errors import JobError
from ps.wire.frames import OBSERVER
from ps.wire.greeting import Credentials, shake_hands
from ps.wire.server import Endpoint
from ps.wire.sockets import tcp_socket, unix_socket

_log = logging.getLogger(__name__)


class ShardWatch:
    """One connection per shard, and a thread that waits for their ends."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        token: bytes,
        fingerprint: int,
        on_lost: Callable[[int], None],
    ) -> None:
        """Connect to all shards; they need no state yet.

        Args:
            endpoints: of the shards.
            token: of the job.
            fingerprint: of the job's tables.
            on_lost: called in the thread with a shard's number when its connection ends; once per
                connection, and not for one that `add` has replaced.

        Raises:
            ShardLostError: a shard is not there.
            ProtocolError: it is not of this job.
        """
        self._credentials = Credentials(token, OBSERVER, fingerprint)
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._sockets: dict[int, socket.socket] = {}
        self._poll = select.epoll()
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="shard-watch", daemon=True)
        self._thread.start()
        try:
            for endpoint in endpoints:
                self.add(endpoint)
        except BaseException:
            self.close()
            raise

    def add(self, endpoint: Endpoint) -> None:
        """Watch a shard there from now on, and nowhere else.

        Raises:
            ShardLostError: it is not there.
            ProtocolError: it is not of this job.
        """
        sock = self._connected(endpoint)
        with self._lock:
            if self._closed:
                sock.close()
                raise JobError("the watch is closed")
            self._forget(endpoint.shard)
            self._sockets[endpoint.shard] = sock
            self._poll.register(sock.fileno(), select.EPOLLIN)

    def close(self) -> None:
        """Watch nothing any more; must not be called from `on_lost`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for shard in list(self._sockets):
                self._forget(shard)
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._poll.close()
        os.close(self._wake)

    def _connected(self, endpoint: Endpoint) -> socket.socket:
        found = unix_socket(endpoint.unix_name, self._check)
        sock = found if isinstance(found, socket.socket) else tcp_socket(endpoint, self._check)
        try:
            shake_hands(sock, self._credentials, endpoint.shard, self._check)
        except BaseException:
            sock.close()
            raise
        sock.setblocking(False)
        return sock

    def _check(self) -> None:
        if self._closed:
            raise JobError("the watch is closed")

    def _forget(self, shard: int) -> None:
        sock = self._sockets.pop(shard, None)
        if sock is not None:
            self._poll.unregister(sock.fileno())
            sock.close()

    def _run(self) -> None:
        while not self._closed:
            self._poll.poll()
            for shard in self._ended():
                try:
                    self._on_lost(shard)
                except Exception:
                    _log.exception("after the end of shard %d", shard)

    def _ended(self) -> list[int]:
        with self._lock:
            ended = [shard for shard, sock in self._sockets.items() if _has_ended(sock)]
            for shard in ended:
                self._forget(shard)
        return ended


def _has_ended(sock: socket.socket) -> bool:
    """A shard sends nothing to an observer, so whatever it is, it is the end."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
