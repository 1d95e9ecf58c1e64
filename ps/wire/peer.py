"""`Peer`: one connection of a worker or observer, as the shard sees it; for the loop's thread."""

from __future__ import annotations

import array
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ps.errors import MantaError, ProtocolError, ShardNotReadyError
from ps.messages import Rows
from ps.shard import ShardState
from ps.wire.arena import MAX_SEGMENTS, Segment
from ps.wire.frames import (
    HEADER_BYTES,
    OBSERVER,
    Buffer,
    Frame,
    FrameReader,
    Header,
    Kind,
    decode_packet,
    encode,
    error_frame,
)
from ps.wire.handshake import HELLO_META_BYTES, challenge, check_hello, new_nonce, welcome
from ps.wire.messages import Incoming, rows_payload, write_rows
from ps.wire.sending import SendQueue
from ps.wire.sockets import keep_alive

if TYPE_CHECKING:
    from ps.wire.server import ServerOptions

MAX_UNANSWERED = 64
"""Pulls and flushes of a worker that wait at one time; it never has more than a few."""
MAX_QUEUED = 4
"""Answers that wait to be sent before no more frames are read."""
_FD_BYTES = socket.CMSG_SPACE(4)
_TRUNCATED = int(socket.MSG_CTRUNC | socket.MSG_TRUNC)  # a plain number: every frame asks for it
_NOT_YET = Frame(Header(Kind.FLUSH), b"", ())


class Peer:
    """Reads frames, hands them to the state, and sends the answers as the peer takes them."""

    def __init__(
        self,
        sock: socket.socket,
        address: Any,
        state: ShardState,
        options: ServerOptions,
        watch: Callable[[Peer, int], None],
        admit: Callable[[Peer], None],
    ) -> None:
        """Take a connection.

        Args:
            sock: of the connection.
            address: where it comes from, for messages.
            state: of the shard.
            options: of the shard's loop.
            watch: called with the events to wait for when they change.
            admit: called when the peer has said who it is, before it is welcomed.
        """
        sock.setblocking(False)
        self._sock = sock
        self._shared = sock.family == socket.AF_UNIX
        if not self._shared:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(sock)
        self._state = state
        self._options = options
        self._watch = watch
        self._admit = admit
        self._incoming = Incoming(options.format, self._shared)
        self._reader = FrameReader(self._incoming.place, 0, HELLO_META_BYTES)
        room = HEADER_BYTES + max(HELLO_META_BYTES, options.format.meta_bytes)
        self._packet = memoryview(bytearray(room if self._shared else 0))
        self._outgoing = SendQueue(sock)
        self._fds: list[int] = []
        self._nonce = new_nonce()
        self.worker: int | None = None
        """Rank of the worker, or `OBSERVER`; None before the peer has proven it."""
        self._unanswered: dict[int, Callable[..., None]] = {}
        """What the state calls with the answers that it owes, by number of the request."""
        self._queued = 0
        self._events = select.EPOLLIN
        self._closed = False
        self._waiting_since: float | None = time.monotonic()
        """Since when the peer owes us something; None while it does not."""
        self.name = f"{'unix' if self._shared else 'tcp'} peer {address or ''}".strip()

    def fileno(self) -> int:
        """Of its socket."""
        return self._sock.fileno()

    def start(self) -> None:
        """Send the challenge."""
        self._send([challenge(self._nonce)])

    def close(self) -> None:
        """Close the socket; a worker's pushes that were taken stay, its pulls are forgotten."""
        self._closed = True
        if self._unanswered:
            self._state.forget(set(self._unanswered.values()))
            self._unanswered.clear()
        self._outgoing.clear()
        for fd in self._fds:
            os.close(fd)
        self._sock.close()

    def dismiss(self) -> None:
        """Say that another connection is in this one's place, if the peer still listens."""
        error = ProtocolError(
            f"shard {self._state.spec.shard_id}: another connection of worker {self.worker} took "
            f"the place of this one"
        )
        self._send([error_frame(0, error)])

    def overdue(self, now: float) -> str | None:
        """Why the peer is to be cut off, None if it is not."""
        if self._waiting_since is None or now - self._waiting_since < self._options.deadline_s:
            return None
        owed = "its answers are not read" if self._outgoing.pieces else "no whole frame came"
        if self.worker is None:
            owed = "it has not said who it is"
        return f"{owed} within {self._options.deadline_s:g} s"

    def on_event(self, events: int) -> bool:
        """Send and read what the socket takes and has; at most one frame. False: it is gone.

        Raises:
            ProtocolError: what came is not the protocol.
        """
        if events & select.EPOLLOUT:
            self._flush()
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            return self._read()
        return True

    def _read(self) -> bool:
        try:
            frame = self._read_packet() if self._shared else self._read_stream()
        except OSError:
            return False
        if frame is None:
            return False
        if frame is not _NOT_YET:
            self._on_frame(frame)
        self._note_debt()
        return True

    def _read_stream(self) -> Frame | None:
        """A frame if it is whole by now; None at the end of the stream."""
        while True:
            try:
                count = self._sock.recv_into(self._reader.wanted)
            except BlockingIOError:
                return _NOT_YET
            if count == 0:
                return None
            if self.worker is not None and not self._outgoing.pieces:
                self._waiting_since = None  # it goes on
            frame = self._reader.received(count)
            if frame is not None:
                return frame

    def _read_packet(self) -> Frame | None:
        """A frame that is one packet, with the descriptors that came along."""
        try:
            count, control, flags, _ = self._sock.recvmsg_into([self._packet], _FD_BYTES)
        except BlockingIOError:
            return _NOT_YET
        for level, kind, data in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)
        if flags & _TRUNCATED or len(self._fds) > (self.worker is not None):
            raise ProtocolError("a packet that is too long, or with descriptors it should not have")
        return decode_packet(self._packet[:count]) if count else None

    def _on_frame(self, frame: Frame) -> None:
        kind = frame.header.kind
        if self.worker is None:
            self._on_hello(frame)
        elif self.worker == OBSERVER:
            raise ProtocolError(f"an observer says nothing, but sent {kind.name}")
        elif kind == Kind.PULL:
            self._answered_late(frame.header, lambda: self._pull(frame))
        elif kind == Kind.PUSH:
            self._guarded(frame.header, lambda: self._push(frame))
        elif kind == Kind.FLUSH:
            self._answered_late(frame.header, lambda: self._flush_pushes(frame.header))
        elif kind == Kind.ARENA:
            self._on_segment(frame.header)
        else:
            raise ProtocolError(f"a worker does not send {kind.name}")

    def _on_hello(self, frame: Frame) -> None:
        check_hello(self._options.token, self._nonce, frame)
        refused = self._refused(frame.header)
        if refused is not None:
            self._send([error_frame(0, refused)])
            return
        self.worker = worker = frame.header.worker
        self._reader = FrameReader(self._incoming.place, self._options.format.max_payload_bytes)
        who = "observer" if worker == OBSERVER else f"worker {worker}"
        self.name = f"{who} ({self.name})"
        self._admit(self)  # from now on nothing of an older connection changes the state
        done = fence = 0
        if worker != OBSERVER:
            done, fence = self._state.done_step(worker), self._state.fences()[worker]
        self._send([welcome(self._options.token, self._nonce, frame, done, fence)])

    def _refused(self, header: Header) -> Exception | None:
        """Why a peer of this job is not let in."""
        spec, seen = self._state.spec, (header.version, header.aux)
        wanted = (spec.shard_id, self._options.fingerprint)
        if seen != wanted or spec.num_workers <= header.worker != OBSERVER:
            return ProtocolError(
                f"worker {header.worker} wants shard {seen[0]} of the job {seen[1]:#x}; this is "
                f"shard {wanted[0]} of {wanted[1]:#x}, with {spec.num_workers} workers"
            )
        if header.worker != OBSERVER:
            try:
                self._state.dense()
            except ShardNotReadyError as e:
                return e
        return None

    def _on_segment(self, header: Header) -> None:
        segments = self._incoming.segments
        if not self._shared or not self._fds or len(segments) >= MAX_SEGMENTS:
            raise ProtocolError("an ARENA frame without its file descriptor, or too many of them")
        if header.version != len(segments):
            raise ProtocolError(f"segment {header.version} came, {len(segments)} is next")
        fd = self._fds.pop()
        try:
            segments.append(Segment.attached(fd, header.aux))
        finally:
            os.close(fd)

    def _answered_late(self, header: Header, call: Callable[[], None]) -> None:
        if len(self._unanswered) >= MAX_UNANSWERED:
            raise ProtocolError(f"more than {MAX_UNANSWERED} requests wait for their answers")
        if header.request in self._unanswered:
            raise ProtocolError(f"request {header.request} came while it waits for its answer")
        self._guarded(header, call)

    def _guarded(self, header: Header, call: Callable[[], None]) -> None:
        """Tell the worker what went wrong with a request; other connections are not touched."""
        try:
            if header.worker != self.worker:
                raise ProtocolError(f"worker {self.worker} sent as worker {header.worker}")
            call()
        except Exception as e:  # a custom optimizer may raise anything
            self._unanswered.pop(header.request, None)
            self._send([error_frame(header.request, e)])

    def _pull(self, frame: Frame) -> None:
        pull, into = self._incoming.pull(frame)
        came = time.monotonic_ns()

        def reply(rows: Rows) -> None:
            self._unanswered.pop(frame.header.request, None)
            payload: Sequence[Buffer] = ()
            try:
                if into is None:
                    payload = rows_payload(self._options.format, rows)
                elif pull.into is None:
                    write_rows(self._options.format, rows, into)
            except MantaError as e:  # this worker's affair, not that of whose push made the version
                self._send([error_frame(frame.header.request, e)])
                return
            waited = time.monotonic_ns() - came
            self._answer(Kind.ROWS, frame.header, rows.version, waited, payload)

        self._unanswered[frame.header.request] = reply
        self._state.pull(pull, reply)

    def _push(self, frame: Frame) -> None:
        self._state.push(self._incoming.push(frame))

    def _flush_pushes(self, header: Header) -> None:
        """Answered when the state is done with all pushes so far."""

        def reply(version: int) -> None:
            self._unanswered.pop(header.request, None)
            self._answer(Kind.FLUSHED, header, version, 0, ())

        self._unanswered[header.request] = reply
        self._state.flush(header.worker, reply)

    def _answer(
        self, kind: Kind, request: Header, version: int, aux: int, payload: Sequence[Buffer]
    ) -> None:
        done = self._state.done_step(request.worker)
        header = Header(kind, request=request.request, step=done, version=version, aux=aux)
        self._send([encode(header, b"", payload), *payload])

    def _send(self, pieces: Sequence[Buffer]) -> None:
        if self._closed or (self._shared and self._sent_at_once(pieces)):
            return
        idle = not self._outgoing.pieces
        self._queued += 1
        self._outgoing.add(pieces)
        if idle:
            self._flush()
        self._watch_what_matters()

    def _sent_at_once(self, pieces: Sequence[Buffer]) -> bool:
        """Send a packet that nothing waits before; nearly all go this way."""
        if self._outgoing.pieces:
            return False
        try:
            self._sock.send(pieces[0])
        except BlockingIOError:
            return False
        except OSError:  # gone: reading will say so
            pass
        return True

    def _flush(self) -> None:
        """Send what the socket takes."""
        try:
            if self._outgoing.flush():
                self._waiting_since = time.monotonic()
        except OSError:  # gone: reading will say so
            self._outgoing.clear()
        if not self._outgoing.pieces:
            self._queued = 0
        self._watch_what_matters()
        self._note_debt()

    def _watch_what_matters(self) -> None:
        """A peer that leaves several answers unread is not read from either."""
        events = select.EPOLLIN if self._queued < MAX_QUEUED else 0
        events |= select.EPOLLOUT if self._outgoing.pieces else 0
        if events != self._events and not self._closed:
            self._events = events
            self._watch(self, events)

    def _note_debt(self) -> None:
        """A peer owes us its HELLO, the rest of a frame, or to take what is sent to it."""
        owes = self.worker is None or bool(self._outgoing.pieces) or not self._reader.idle
        if not owes:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = time.monotonic()
