"""`Dialer`: makes a worker's connections, over shared memory where it can."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Literal

from ps.errors import ShardLostError
from ps.wire.arena import Arena, Memory, PrivateMemory
from ps.wire.connection import ArenaConnection
from ps.wire.frames import HEADER_BYTES
from ps.wire.greeting import Credentials, shake_hands
from ps.wire.messages import WireFormat
from ps.wire.outbox import Outbox
from ps.wire.server import Endpoint
from ps.wire.sockets import Check, tcp_socket, unix_socket
from ps.wire.tcp import TcpConnection, TcpLoop

MAX_PACKET_BYTES = 1 << 17
"""What Linux takes as one packet of a Unix socket, with some to spare: 2,700 tables."""


class Dialer:
    """Knows what all connections of a worker have in common."""

    def __init__(
        self,
        credentials: Credentials,
        name: Literal["auto", "arena", "tcp"],
        format: WireFormat,
        background: bool,
        make_arena: Callable[[], Arena],
    ) -> None:
        self.credentials = credentials
        self.arena: Arena | None = None
        self.loop: TcpLoop | None = None
        self._name = name
        self._fits = HEADER_BYTES + format.meta_bytes <= MAX_PACKET_BYTES
        self._num_tables = len(format.dims)
        self._background = background
        self._make_arena = make_arena
        self._may_share = name != "tcp"

    def memory(self) -> Memory:
        """Where messages are to be from now on; what lies elsewhere cannot be shared later."""
        self._may_share = self.arena is not None
        return self.arena or PrivateMemory()

    def dial(
        self, endpoint: Endpoint, outbox: Outbox, check: Check
    ) -> ArenaConnection | TcpConnection:
        """A connection after its handshake; the outbox knows what the shard expects.

        Args:
            endpoint: of the shard.
            outbox: of the shard.
            check: called while this takes time; may raise.

        Raises:
            ShardLostError: the shard is not there.
            ShardNotReadyError: it has no state yet.
            ProtocolError: it refuses this worker, or is not of this job.
        """
        sock = self._socket(endpoint, check)
        try:
            header = shake_hands(sock, self.credentials, endpoint.shard, check)
            outbox.welcomed(header.step, header.version)
            if sock.family == socket.AF_UNIX:
                return self._sharing(sock, outbox, endpoint.unix_name, check)
            if self.loop is None:
                self.loop = TcpLoop(self._background)
            return TcpConnection(sock, outbox, self.loop)
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        """Give back what the connections shared; they are closed."""
        if self.loop is not None:
            self.loop.close()
        if self.arena is not None:
            self.arena.close()

    def _socket(self, endpoint: Endpoint, check: Check) -> socket.socket:
        reason = f"{self._num_tables} tables do not fit one packet"
        if self._may_share and self._fits:
            found = unix_socket(endpoint.unix_name, check)
            if isinstance(found, socket.socket):
                return found
            reason = found
        if self._name == "arena":
            raise ShardLostError(
                f"transport arena: shard {endpoint.shard} at {endpoint.host} shares no memory with "
                f"this host: {reason}"
            )
        return tcp_socket(endpoint, check)

    def _sharing(
        self, sock: socket.socket, outbox: Outbox, unix_name: str, check: Check
    ) -> ArenaConnection:
        connection = ArenaConnection(sock, outbox, unix_name, check)
        if self.arena is None:
            self.arena = self._make_arena()
        self.arena.announce(connection.send_segment)
        return connection
