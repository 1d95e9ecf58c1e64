"""`ShardLoop`: the thread that owns a shard's state and speaks to its workers.

Everything that reads or changes the state runs in this one thread, so nothing is locked. In each
round every connection that has something gets one frame done, and then one piece of control work
(a snapshot's slab, say): neither workers nor control calls wait for more than a turn of the others.
Sockets never block it. A peer that sends what is not the protocol is cut off, and so is one that
does not read its answers, or does not finish a frame, within the deadline.

A worker has one connection: its newest. An observer has one to notice at once when the shard's
process ends, and the shard notices when nobody watches it any more.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from ps.shard import ShardState
from ps.wire.cpu import claim_cpu
from ps.wire.frames import OBSERVER
from ps.wire.messages import WireFormat
from ps.wire.peer import Peer

T = TypeVar("T")

_log = logging.getLogger(__name__)
_MAX_PEERS = 4096
_BACKLOG = 128
_CHECK_DEADLINES_S = 0.25
_TURN_S = 0.002


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a shard is reached."""

    shard: int
    host: str
    port: int
    unix_name: str
    """Of an abstract Unix socket, which exists on the shard's host only; "" for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a shard listens."""

    token: bytes = field(repr=False)
    fingerprint: int
    """Of what both sides must have in common: tables, shards, wire format."""
    format: WireFormat
    host: str = "127.0.0.1"
    """Address to listen on for TCP."""
    deadline_s: float = 30.0
    """For a peer to say who it is, to finish a frame, and to read its answers."""
    pin: bool = False
    """Whether the shard's thread keeps to one CPU, of which no other shard is."""


class ShardLoop:
    """Listens, and runs the state's thread until `close`."""

    def __init__(
        self,
        state: ShardState,
        options: ServerOptions,
        *,
        on_orphaned: Callable[[], None] | None = None,
        orphan_s: float = 0.0,
    ) -> None:
        """Listen, and start the thread.

        Args:
            state: of the shard; the thread alone uses it from now on.
            options: how to listen.
            on_orphaned: called in the thread when there has been an observer, and then none for
                `orphan_s` seconds; not again before there was another one.
            orphan_s: 0 for no such call.
        """
        self.state = state
        self.options = options
        self._on_orphaned = on_orphaned if orphan_s > 0 else None
        self._orphan_s = orphan_s
        self._num_observers = 0
        self._orphaned_since: float | None = None
        self._poll = select.epoll()
        self._peers: dict[int, Peer] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._streams: deque[Callable[[], bool]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.EPOLLIN)
        self._listeners: dict[int, socket.socket] = {}
        self.endpoint = self._listen()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="shard", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a short function in the loop's thread, between messages."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as e:
                future.set_exception(e)

        self._calls.append(run)
        self._notify()
        return future

    def stream(self, pieces: Iterator[object]) -> Future[None]:
        """Run long work piece by piece, messages in between; a piece should take milliseconds.

        Small pieces run together, for about `_TURN_S`. Several streams take turns.
        """
        future: Future[None] = Future()

        def start() -> None:
            if future.set_running_or_notify_cancel():
                self._streams.append(piece)

        def piece() -> bool:
            end = time.monotonic() + _TURN_S
            try:
                next(pieces)
                while time.monotonic() < end:
                    next(pieces)
            except StopIteration:
                future.set_result(None)
                return False
            except BaseException as e:
                future.set_exception(e)
                return False
            return True

        self._calls.append(start)
        self._notify()
        return future

    @property
    def observed(self) -> bool:
        """Whether an observer is connected."""
        return self._num_observers > 0

    def cut_connections(self) -> Future[int]:
        """Close the connections of all workers, without a word: a fault for tests and chaos.

        Returns:
            How many there were.
        """
        return self.call(self._drop_workers)

    def delay(self, seconds: float) -> Future[None]:
        """Stand still for so long, as a slow machine would: a fault for tests and chaos."""
        return self.call(lambda: time.sleep(seconds))

    def close(self) -> None:
        """Stop the thread and close all connections."""
        if self._wake < 0:
            return
        self.call(self._stop)
        self._thread.join(timeout=10.0)
        if not self._thread.is_alive():
            os.close(self._wake)
            self._wake = -1

    # All below runs in the loop's thread.

    def _listen(self) -> Endpoint:
        tcp = socket.create_server((self.options.host, 0), backlog=_BACKLOG)
        listeners, name = [tcp], ""
        if hasattr(os, "memfd_create"):
            name = f"manta-{secrets.token_hex(16)}"
            unix = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            unix.bind(f"\0{name}")
            unix.listen(_BACKLOG)
            listeners.append(unix)
        for listener in listeners:
            listener.setblocking(False)
            self._listeners[listener.fileno()] = listener
            self._poll.register(listener.fileno(), select.EPOLLIN)
        host, port = tcp.getsockname()[:2]
        return Endpoint(self.state.spec.shard_id, host, port, name)

    def _run(self) -> None:
        cpu = claim_cpu() if self.options.pin else None
        try:
            self._serve()
        except BaseException:
            _log.exception("shard %d stops", self.state.spec.shard_id)
        finally:
            self._close_all()  # workers notice at once
            if cpu is not None:
                cpu.release()

    def _serve(self) -> None:
        next_check = time.monotonic() + _CHECK_DEADLINES_S
        while not self._stopped:
            busy = bool(self._streams or self._calls)
            for fd, events in self._poll.poll(0 if busy else _CHECK_DEADLINES_S):
                self._on_event(fd, events)
            if self._calls:
                self._calls.popleft()()
            if self._streams and (piece := self._streams.popleft())():
                self._streams.append(piece)
            now = time.monotonic()
            if now >= next_check:
                next_check = now + _CHECK_DEADLINES_S
                self._cut_off(now)
                self._note_orphaned(now)

    def _on_event(self, fd: int, events: int) -> None:
        if fd == self._wake:
            os.eventfd_read(fd)
        elif fd in self._listeners:
            self._accept(self._listeners[fd])
        elif (peer := self._peers.get(fd)) is not None:
            try:
                alive = peer.on_event(events)
            except Exception as e:
                _log.warning("shard %d: %s: %s", self.state.spec.shard_id, peer.name, e)
                alive = False
            if not alive:
                self._drop(peer)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, address = listener.accept()
        except OSError:  # gone again, or no descriptors left
            return
        if len(self._peers) >= _MAX_PEERS:
            sock.close()
            return
        peer = Peer(sock, address, self.state, self.options, self._watch, self._admit)
        self._peers[sock.fileno()] = peer
        self._poll.register(sock.fileno(), select.EPOLLIN)
        try:
            peer.start()
        except OSError:
            self._drop(peer)

    def _watch(self, peer: Peer, events: int) -> None:
        self._poll.modify(peer.fileno(), events)

    def _admit(self, peer: Peer) -> None:
        """Let in who has just said who it is."""
        if peer.worker == OBSERVER:
            self._num_observers += 1
            self._orphaned_since = None
            return
        for other in list(self._peers.values()):
            if other is not peer and other.worker == peer.worker:
                other.dismiss()
                self._drop(other)

    def _drop(self, peer: Peer) -> None:
        fd = peer.fileno()
        self._poll.unregister(fd)
        del self._peers[fd]
        peer.close()
        if peer.worker == OBSERVER:
            self._num_observers -= 1
            self._orphaned_since = None if self._num_observers else time.monotonic()

    def _drop_workers(self) -> int:
        workers = [peer for peer in self._peers.values() if peer.worker != OBSERVER]
        for peer in workers:
            self._drop(peer)
        return len(workers)

    def _note_orphaned(self, now: float) -> None:
        since = self._orphaned_since
        if self._on_orphaned is not None and since is not None and now - since >= self._orphan_s:
            self._orphaned_since = None
            self._on_orphaned()

    def _cut_off(self, now: float) -> None:
        for peer in list(self._peers.values()):
            if (reason := peer.overdue(now)) is not None:
                _log.warning("shard %d: %s: %s", self.state.spec.shard_id, peer.name, reason)
                self._drop(peer)

    def _stop(self) -> None:
        self._stopped = True

    def _close_all(self) -> None:
        for peer in list(self._peers.values()):
            self._drop(peer)
        for listener in self._listeners.values():
            listener.close()
        self._poll.close()

    def _notify(self) -> None:
        os.eventfd_write(self._wake, 1)
