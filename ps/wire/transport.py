"""`WireTransport`: a worker's messages to shards over sockets and shared memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ps.errors import JobError, MantaError
from ps.step_message import StepMessage
from ps.wire.arena import Arena, Memory
from ps.wire.control import Control
from ps.wire.dialing import Dialer
from ps.wire.frames import Kind
from ps.wire.greeting import Credentials
from ps.wire.link import Link
from ps.wire.messages import WireFormat
from ps.wire.outbox import Sent
from ps.wire.server import Endpoint
from ps.wire.sockets import CHECK_EVERY_S

TransportName = Literal["auto", "arena", "tcp"]
_CLOSE_WAIT_S = 10.0


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
    reconnect_s: float = 0.0
    """How long a broken connection is tried again; 0: it is an error at once."""
    max_pushes: int = 4
    """Steps whose pushes a shard is not done with; a worker waits before it sends more. They stay
    in memory, to be sent again."""


class WireTransport:
    """Carries one worker's messages (see `ps.client.Transport`).

    `move`, `abort` and `close` may be called from any thread, at any time.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], credentials: Credentials, options: TransportOptions
    ) -> None:
        """Connect to every shard, once: `reconnect_s` is for connections that broke.

        Raises:
            ShardLostError: a shard is not there, or is on another host and shared memory is asked
                for.
            ShardNotReadyError: a shard has no state yet.
            ProtocolError: a shard refuses this worker, or is not of this job.
        """
        self._options = options
        self._control = Control(endpoints)
        self._dialer = Dialer(
            credentials, options.name, options.format, options.background, self._new_arena
        )
        self._links: list[Link] = []
        self._turn = threading.Lock()
        """Who has it uses the connections; `close` waits for its end."""
        try:
            for endpoint in endpoints:
                self._links.append(Link(endpoint, self._dialer, self._control, options.reconnect_s))
        except BaseException:
            self.close()
            raise
        self.memory: Memory = self._dialer.memory()
        for link in self._links:
            link.outbox.next_push = min(self.next_steps)

    @property
    def kinds(self) -> list[str]:
        """`arena` or `tcp` for every shard."""
        return ["tcp" if link.by_tcp else "arena" for link in self._links]

    @property
    def next_steps(self) -> tuple[int, ...]:
        """Per shard: the step whose push of this worker it expected when it was connected to."""
        return tuple(link.outbox.fence for link in self._links)

    @property
    def sent_bytes(self) -> list[int]:
        """Of frames, to each shard; what lies in shared memory is not counted."""
        return [link.sent_bytes for link in self._links]

    def pull(self, message: StepMessage) -> list[PendingAnswer]:
        """See `Transport.pull`."""
        metas = message.descriptions()
        with self._turn:
            self._control.check()
            return [
                PendingAnswer(self, link, link.send(Kind.PULL, message, metas[k].tobytes()))
                for k, link in enumerate(self._links)
            ]

    def push(self, message: StepMessage) -> None:
        """See `Transport.push`."""
        metas = message.descriptions()
        with self._turn:
            self._control.check()
            for k, link in enumerate(self._links):
                self._make_room(link)
                link.send(Kind.PUSH, message, metas[k].tobytes())
            if self._dialer.loop is not None:
                self._dialer.loop.drain(self._options.timeout_s, self._check_places)
                for link in self._links:
                    link.check()

    def flush(self, timeout_s: float) -> None:
        """See `Transport.flush`."""
        with self._turn:
            self._control.check()
            waiting = [(link, link.send(Kind.FLUSH, None)) for link in self._links]
            for link, sent in waiting:
                self._wait_flushed(link, sent, timeout_s)

    def move(self, endpoints: Iterable[Endpoint]) -> None:
        """Say where shards live now: connections that break from now on are made anew there.

        The former process of a shard on this host must have ended, or end: as long as it lives,
        nothing is sent to another one, because it may write into the memory that they share.
        """
        self._control.move(endpoints)

    def abort(self, error: MantaError) -> None:
        """Let whoever waits raise this error now, and every later call at once."""
        self._control.abort(error)

    def close(self) -> None:
        """Close all connections and give the arena back; who waits gets an error."""
        self._control.abort(JobError("the transport is closed"))
        mine = self._turn.acquire(timeout=_CLOSE_WAIT_S)
        for link in self._links:
            link.close()
        self._dialer.close()
        if mine:
            self._turn.release()

    def result(self, link: Link, sent: Sent, timeout_s: float) -> bool:
        """Wait for a pull's answer; False if it is not there within the time.

        Raises:
            MantaError: what went wrong on this connection, or on another one.
        """
        with self._turn:
            self._control.check()
            if not self._wait(link, sent, timeout_s):
                return False
            link.outbox.forget_done()
            return True

    def _wait(self, link: Link, sent: Sent, timeout_s: float) -> bool:
        """Wait for an answer, and see to the other connections meanwhile.

        A shard that waits for another worker may never answer if that worker's shard is gone, or if
        this worker has to repeat a push to a shard that is back.
        """
        control = self._control
        deadline, repaired_s = time.monotonic() + timeout_s, control.repair_s
        while not link.wait(sent, min(timeout_s, CHECK_EVERY_S)):
            control.check()
            for other in self._links:
                other.check_alive()
            timeout_s = deadline + (control.repair_s - repaired_s) - time.monotonic()
            if timeout_s <= 0 and sent.header is None:
                return False
        link.check()  # the error of a push may have come along with the answer
        return True

    def _make_room(self, link: Link) -> None:
        link.outbox.forget_done()
        if link.outbox.num_pushes >= self._options.max_pushes:
            self._wait_flushed(link, link.send(Kind.FLUSH, None), self._options.timeout_s)
            link.outbox.forget_done()

    def _wait_flushed(self, link: Link, sent: Sent, timeout_s: float) -> None:
        if not self._wait(link, sent, timeout_s):
            raise JobError(
                f"shard {link.shard} has not applied the gradients of this worker within "
                f"{timeout_s:g} s: another worker is slow or stuck"
            )

    def _check_places(self) -> None:
        self._control.check()
        for link in self._links:
            link.check_place()

    def _new_arena(self) -> Arena:
        return Arena(self._options.max_arena_bytes, self._on_segment)

    def _on_segment(self, number: int, fd: int, size: int) -> None:
        for link in self._links:
            link.announce(number, fd, size)


class PendingAnswer:
    """A shard's part of a pull under way (see `ps.client.PendingRows`)."""

    def __init__(self, transport: WireTransport, link: Link, sent: Sent) -> None:
        self._transport = transport
        self._link = link
        self._sent = sent

    def result(self, timeout_s: float) -> tuple[int, float]:
        """Wait; returns the version of the rows, and seconds that the shard waited for it.

        Raises:
            JobError: no answer within the time.
            MantaError: what the shard raised, or `ShardLostError`.
        """
        sent = self._sent
        if not self._transport.result(self._link, sent, timeout_s):
            assert sent.message is not None, "a pull names rows"
            raise JobError(
                f"shard {self._link.shard} has not answered the pull of version "
                f"{sent.message.version} within {timeout_s:g} s: another worker is slow or stuck"
            )
        header = sent.header
        assert header is not None, "it has come"
        return header.version, header.aux * 1e-9
