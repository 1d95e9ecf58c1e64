"""`WireTransport`: a worker's messages to shards over sockets and shared memory."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ps.errors import JobError, ShardLostError
from ps.step_message import StepMessage
from ps.wire.arena import Arena, Memory, PrivateMemory, available
from ps.wire.connection import (
    Answer,
    ArenaConnection,
    TcpConnection,
    TcpLoop,
)
from ps.wire.frames import HEADER_BYTES, Buffer, Header, Kind, encode
from ps.wire.greeting import Credentials, set_timeouts, shake_hands
from ps.wire.messages import WireFormat, pull_payload, push_payload, rows_places
from ps.wire.server import Endpoint

TransportName = Literal["auto", "arena", "tcp"]
MAX_PUSHES_IN_FLIGHT = 4
"""Steps whose pushes a shard is not done with; a worker waits before it sends more."""
MAX_PACKET_BYTES = 1 << 17
"""What Linux takes as one packet of a Unix socket, with some to spare: 2,700 tables."""
_CONNECT_TIMEOUT_S = 10.0
_CHECK_OTHERS_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportOptions:
    """How a worker reaches shards."""

    name: TransportName = "auto"
    """`auto`: shared memory to shards on this host, TCP to others; or one of them for all."""
    format: WireFormat
    background: bool = False
    """Whether a thread moves TCP's bytes while the worker computes."""
    timeout_s: float = 120.0
    """For a push to be done with."""
    max_arena_bytes: int = 1 << 33


class WireTransport:
    """Carries one worker's messages (see `ps.client.Transport`)."""

    def __init__(
        self, endpoints: Sequence[Endpoint], credentials: Credentials, options: TransportOptions
    ) -> None:
        """Connect to every shard.

        Raises:
            ShardLostError: a shard is not there.
            ProtocolError: it refuses this worker, or is not of this job.
            JobError: shared memory is asked for, and a shard is on another host.
        """
        self._options = options
        self._credentials = credentials
        self._loop: TcpLoop | None = None
        self._arena: Arena | None = None
        self._connections: list[ArenaConnection | TcpConnection] = []
        self._pushes: list[deque[tuple[int, StepMessage]]] = [deque() for _ in endpoints]
        self.sent_bytes = [0] * len(endpoints)
        """Of frames, to each shard; what lies in shared memory is not counted."""
        try:
            for endpoint in endpoints:
                self._connections.append(self._connected(endpoint))
        except BaseException:
            self.close()
            raise
        self.memory: Memory = self._arena or PrivateMemory()

    @property
    def kinds(self) -> list[str]:
        """`arena` or `tcp` for every shard."""
        return ["arena" if isinstance(c, ArenaConnection) else "tcp" for c in self._connections]

    def pull(self, message: StepMessage) -> list[PendingAnswer]:
        """See `Transport.pull`."""
        metas = message.descriptions()
        pending = []
        for shard, connection in enumerate(self._connections):
            by_tcp = isinstance(connection, TcpConnection)
            payload = pull_payload(message, shard) if by_tcp else []
            places = rows_places(message, shard) if by_tcp else []
            answer = Answer(shard, places, message)
            request = connection.next_request()
            connection.expect(request, answer)
            header = Header(Kind.PULL, worker=message.worker, request=request, step=message.step,
                            version=message.version)  # fmt: skip
            self._send(connection, header, metas[shard].tobytes(), payload)
            pending.append(PendingAnswer(self, connection, answer, message.version))
        return pending

    def push(self, message: StepMessage) -> None:
        """See `Transport.push`."""
        metas = message.descriptions()
        for shard, connection in enumerate(self._connections):
            self._make_room(shard, connection)
            payload = push_payload(message, shard) if isinstance(connection, TcpConnection) else []
            header = Header(Kind.PUSH, worker=message.worker, request=connection.next_request(),
                            step=message.step)  # fmt: skip
            self._send(connection, header, metas[shard].tobytes(), payload)
            self._pushes[shard].append((message.step, message))
        if self._loop is not None:
            self._loop.drain(self._options.timeout_s)

    def flush(self, timeout_s: float) -> None:
        """See `Transport.flush`."""
        waiting = [(self._ask_flush(k), c) for k, c in enumerate(self._connections)]
        for answer, connection in waiting:
            self._wait_flushed(connection, answer, timeout_s)

    def close(self) -> None:
        """Close all connections and give the arena back."""
        for connection, pushes in zip(self._connections, self._pushes, strict=False):
            connection.close()
            pushes.clear()  # with their memory
        if self._loop is not None:
            self._loop.close()
        if self._arena is not None:
            self._arena.close()

    def wait(
        self, connection: ArenaConnection | TcpConnection, answer: Answer, timeout_s: float
    ) -> bool:
        """Wait for an answer; False if it is not there within the time.

        Raises:
            MantaError: what went wrong on this connection, or on another one: a shard that waits
                for another worker may never answer if that worker's shard is gone.
        """
        deadline = time.monotonic() + timeout_s
        while not connection.wait(answer, min(timeout_s, _CHECK_OTHERS_S)):
            for other in self._connections:
                other.check_alive()
            timeout_s = deadline - time.monotonic()
            if timeout_s <= 0:
                return False
        connection.check()  # the error of a push may have come along with the answer
        return True

    def forget_done(self, shard: int) -> None:
        """Let go of the pushes that a shard is done with."""
        pushes, done = self._pushes[shard], self._connections[shard].done_step
        while pushes and pushes[0][0] < done:
            pushes.popleft()

    def _make_room(self, shard: int, connection: ArenaConnection | TcpConnection) -> None:
        self.forget_done(shard)
        if len(self._pushes[shard]) >= MAX_PUSHES_IN_FLIGHT:
            self._wait_flushed(connection, self._ask_flush(shard), self._options.timeout_s)
            self.forget_done(shard)

    def _ask_flush(self, shard: int) -> Answer:
        connection = self._connections[shard]
        request = connection.next_request()
        answer = Answer(shard, (), None)
        connection.expect(request, answer)
        worker = self._credentials.worker
        self._send(connection, Header(Kind.FLUSH, worker=worker, request=request), b"", [])
        return answer

    def _wait_flushed(
        self, connection: ArenaConnection | TcpConnection, answer: Answer, timeout_s: float
    ) -> None:
        if not self.wait(connection, answer, timeout_s):
            raise JobError(
                f"shard {answer.shard} has not applied the gradients of this worker within "
                f"{timeout_s:g} s: another worker is slow or stuck"
            )

    def _send(
        self,
        connection: ArenaConnection | TcpConnection,
        header: Header,
        meta: bytes,
        payload: Sequence[Buffer],
    ) -> None:
        frame = encode(header, meta, payload)
        self.sent_bytes[connection.shard] += len(frame) + sum(map(len, payload))
        connection.send([frame, *payload])

    def _connected(self, endpoint: Endpoint) -> ArenaConnection | TcpConnection:
        name, reason = self._options.name, "this system, or the shard's, has no memfd"
        if HEADER_BYTES + self._options.format.meta_bytes > MAX_PACKET_BYTES:
            reason = f"{len(self._options.format.dims)} tables do not fit one packet"
            endpoint = replace(endpoint, unix_name="")
        if name != "tcp" and available() and endpoint.unix_name:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                sock.connect(f"\0{endpoint.unix_name}")
            except OSError as e:  # such a name exists on the shard's own host only
                sock.close()
                reason = str(e.strerror)
            else:
                return self._sharing(sock, endpoint.shard)
        if name == "arena":
            raise JobError(
                f"transport arena: shard {endpoint.shard} at {endpoint.host} shares no memory with "
                f"this host: {reason}"
            )
        return self._over_tcp(endpoint)

    def _sharing(self, sock: socket.socket, shard: int) -> ArenaConnection:
        set_timeouts(sock)
        shake_hands(sock, self._credentials, shard)
        connection = ArenaConnection(sock, shard)
        if self._arena is None:
            self._arena = Arena(self._options.max_arena_bytes, self._on_segment)
        self._arena.announce(connection.send_segment)
        return connection

    def _over_tcp(self, endpoint: Endpoint) -> TcpConnection:
        address = (endpoint.host, endpoint.port)
        try:
            sock = socket.create_connection(address, timeout=_CONNECT_TIMEOUT_S)
        except OSError as e:
            raise ShardLostError(
                f"shard {endpoint.shard}: no connection to {endpoint.host}:{endpoint.port}: "
                f"{e.strerror or e}"
            ) from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        shake_hands(sock, self._credentials, endpoint.shard)
        if self._loop is None:
            self._loop = TcpLoop(self._options.background)
        return TcpConnection(sock, endpoint.shard, self._loop)

    def _on_segment(self, number: int, fd: int, size: int) -> None:
        for connection in self._connections:
            if isinstance(connection, ArenaConnection):
                connection.send_segment(number, fd, size)


class PendingAnswer:
    """A shard's part of a pull under way (see `ps.client.PendingRows`)."""

    def __init__(
        self,
        transport: WireTransport,
        connection: ArenaConnection | TcpConnection,
        answer: Answer,
        version: int,
    ) -> None:
        self._transport = transport
        self._connection = connection
        self._answer = answer
        self._version = version

    def result(self, timeout_s: float) -> tuple[int, float]:
        """Wait; returns the version of the rows, and seconds that the shard waited for it.

        Raises:
            JobError: no answer within the time.
            MantaError: what the shard raised, or `ShardLostError`.
        """
        shard = self._answer.shard
        if not self._transport.wait(self._connection, self._answer, timeout_s):
            raise JobError(
                f"shard {shard} has not answered the pull of version {self._version} within "
                f"{timeout_s:g} s: another worker is slow or stuck"
            )
        self._transport.forget_done(shard)
        header = self._answer.header
        assert header is not None, "it has come"
        return header.version, header.aux * 1e-9
