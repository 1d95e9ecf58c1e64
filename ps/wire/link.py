"""`Link`: a worker's way to one shard, over as many connections as it takes.

When a connection breaks, and the worker is to go on (`reconnect_s`), the link makes a new one to
where the shard lives by now, compares what the shard has with what was sent, and sends the rest
again (`ps.wire.outbox`). The worker notices nothing but the time. A shard's own errors are not
repaired, nor are frames that make no sense.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy

from ps.errors import MantaError, ShardLostError, ShardNotReadyError
from ps.step_message import StepMessage
from ps.wire.connection import ArenaConnection
from ps.wire.control import Control
from ps.wire.dialing import Dialer
from ps.wire.frames import Buffer, Header, Kind, encode
from ps.wire.messages import pull_payload, push_payload, rows_places
from ps.wire.outbox import Outbox, Sent
from ps.wire.server import Endpoint
from ps.wire.sockets import Check, still_listens
from ps.wire.tcp import TcpConnection

_FIRST_PAUSE_S = 0.02
_MAX_PAUSE_S = 0.5
_STABLE_S = 1.0
"""A connection that held for so long, or over which something came, was a good one."""
_BAD_AT_ONCE = 8
"""Bad connections, one after the other, before the next one is made with a pause."""


class Link:
    """Sends requests to a shard and waits for their answers."""

    def __init__(
        self, endpoint: Endpoint, dialer: Dialer, control: Control, reconnect_s: float
    ) -> None:
        """Connect for the first time; this is not tried again.

        Raises:
            ShardLostError: the shard is not there.
            ShardNotReadyError: it has no state yet.
            ProtocolError: it refuses this worker, or is not of this job.
        """
        self.shard = endpoint.shard
        self.outbox = Outbox(self.shard, dialer.credentials.worker)
        self.sent_bytes = 0
        """Of frames; what lies in shared memory is not counted."""
        self._dialer = dialer
        self._control = control
        self._reconnect_s = reconnect_s
        self._endpoint = endpoint
        self._failure: MantaError | None = None
        self._broken_since: float | None = None
        self._bad = 0
        """Connections since then that broke before anything came over them."""
        self._connected_at = 0.0
        self.connection = self._dialed(endpoint)

    @property
    def by_tcp(self) -> bool:
        """Whether arrays travel, rather than lie in shared memory."""
        return isinstance(self.connection, TcpConnection)

    def send(self, kind: Kind, message: StepMessage | None, meta: Buffer = b"") -> Sent:
        """Send a request, whose description is `meta`; returns where its answer will be."""
        sent = self.outbox.add(kind, message)
        try:
            self._write(sent, meta)
        except ShardLostError as e:
            self._repair(e)  # which sends it
        return sent

    def wait(self, sent: Sent, timeout_s: float) -> bool:
        """Wait for an answer; False if it is not there within the time, or in need of more.

        Raises:
            MantaError: what the shard says instead, or `ShardLostError`.
        """
        try:
            return self.connection.wait(sent, timeout_s)
        except ShardLostError as e:
            self._repair(e)
            return False

    def check(self) -> None:
        """Raise, or repair, what is known to have gone wrong."""
        try:
            self.connection.check()
        except ShardLostError as e:
            self._repair(e)

    def check_alive(self) -> None:
        """The same after a look at the connection."""
        self.check_place()
        try:
            self.connection.check_alive()
        except ShardLostError as e:
            self._repair(e)

    def check_place(self) -> None:
        """Give a TCP connection up if its shard lives elsewhere: a dead host does not say so.

        One over shared memory ends with the process. As long as that lives it may write into our
        memory, so nothing may be sent elsewhere.
        """
        connection, endpoint = self.connection, self._control.endpoint(self.shard)
        if endpoint != self._endpoint and isinstance(connection, TcpConnection):
            assert self._dialer.loop is not None, "TCP has its loop"
            lost = connection.lost(f"the shard lives at {endpoint.host}:{endpoint.port} now")
            self._dialer.loop.give_up(connection, lost)

    def announce(self, number: int, fd: int, size: int) -> None:
        """Tell the shard of a new segment of the arena; if that fails, the next call repairs it."""
        connection = self.connection
        if isinstance(connection, ArenaConnection):
            try:
                connection.send_segment(number, fd, size)
            except ShardLostError as e:
                connection.fail(e)

    def close(self) -> None:
        """Close the connection and let go of all messages."""
        self._failure = self._failure or self.connection.lost("closed here")
        self.connection.close()
        self.outbox.clear()

    def _write(self, sent: Sent, meta: Buffer) -> None:
        connection, message, kind = self.connection, sent.message, sent.kind
        payload: Sequence[Buffer] = ()
        step = version = 0
        if message is not None:
            step = message.step
            if kind == Kind.PULL:
                version = message.version
            if isinstance(connection, TcpConnection):
                payload = self._payload(sent, message)
        header = Header(kind, worker=self.outbox.worker, request=sent.request, step=step,
                        version=version)  # fmt: skip
        frame = encode(header, meta, payload)
        self.sent_bytes += len(frame) + sum(map(len, payload))
        connection.send([frame, *payload])

    def _payload(self, sent: Sent, message: StepMessage) -> Sequence[Buffer]:
        if sent.kind == Kind.PUSH:
            return push_payload(message, self.shard)
        sent.places = rows_places(message, self.shard)
        return pull_payload(message, self.shard)

    def _repair(self, error: ShardLostError) -> None:
        """Connect again and send again, however often it takes.

        Raises:
            ReplayGapError: the shard lacks what is not there any more.
            ShardLostError: `error` if nothing is to be repaired, else that it took too long.
            MantaError: the shard refuses this worker, or what `abort` was told.
        """
        if self._reconnect_s <= 0:
            raise copy(error) from None  # what is kept would keep its traceback, and messages
        if self._failure is not None:
            raise copy(self._failure)
        self.connection.fail(error)
        self.connection.close()
        started = time.monotonic()
        held_s = started - self._connected_at
        if self._broken_since is None or self.connection.has_answered or held_s > _STABLE_S:
            self._broken_since, self._bad = started, 0
        self._bad += 1
        pause_s = _FIRST_PAUSE_S if self._bad > _BAD_AT_ONCE else 0.0
        try:
            self._keep_trying(self._broken_since + self._reconnect_s, pause_s)
        except MantaError as e:
            self._failure = copy(e)
            raise
        finally:
            self._control.repair_s += time.monotonic() - started

    def _keep_trying(self, deadline: float, pause_s: float) -> None:
        control, changes = self._control, self._control.changes
        reason = "each new connection ends at once"
        while True:
            if pause_s > 0:
                if time.monotonic() >= deadline:
                    raise ShardLostError(
                        f"shard {self.shard}: no new connection within {self._reconnect_s:g} s: "
                        f"{reason}"
                    )
                if control.wait(pause_s, changes):
                    pause_s = 0.0
            control.check()
            changes = control.changes
            pause_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _MAX_PAUSE_S)
            try:
                self._connect_again(control.endpoint(self.shard))
                return
            except (ShardLostError, ShardNotReadyError) as e:
                control.check()
                reason = str(e)

    def _connect_again(self, endpoint: Endpoint) -> None:
        former = self.connection
        if (
            isinstance(former, ArenaConnection)
            and former.unix_name != endpoint.unix_name
            and still_listens(former.unix_name)
        ):
            raise ShardLostError("its former process still lives, and shares our memory")
        try:
            self.connection = self._dialed(endpoint)
        except (ShardLostError, ShardNotReadyError):
            raise
        except MantaError as e:
            self._control.check()
            if endpoint != self._endpoint:
                raise
            # Who has the port of a dead shard by now may say anything.
            raise ShardLostError(f"not this shard any more: {e}") from None
        self._endpoint = endpoint
        try:
            for sent in self.outbox.to_replay():
                message = sent.message
                meta = b"" if message is None else message.descriptions()[self.shard].tobytes()
                self._write(sent, meta)
            if isinstance(self.connection, TcpConnection) and self._dialer.loop is not None:
                self._dialer.loop.drain(self._reconnect_s, self._checks(endpoint))
            self.connection.check()
        except BaseException:
            self.connection.close()
            raise

    def _dialed(self, endpoint: Endpoint) -> ArenaConnection | TcpConnection:
        connection = self._dialer.dial(endpoint, self.outbox, self._checks(endpoint))
        self._connected_at = time.monotonic()
        return connection

    def _checks(self, endpoint: Endpoint) -> Check:
        """What is to end a wait for the shard at this endpoint."""

        def check() -> None:
            self._control.check()
            if self._control.endpoint(self.shard) != endpoint:
                raise ShardLostError(f"shard {self.shard}: it lives elsewhere now")

        return check
