"""`Outbox`: what one shard has been sent and is not done with, to be sent again if need be.

Pulls and flushes stay until they are answered, and pushes until the shard says that it is done
with their step (`done_step` of its answers): applied, and durable where the job wants that.
Everything is kept in the order in which it was sent, so that what is repeated meets the same state
as before: the pull for step t + lookahead comes before the push of step t.

It knows no sockets, and outlives the connections that it is sent over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ps.errors import ReplayGapError
from ps.step_message import StepMessage
from ps.wire.frames import Header, Kind


@dataclass(slots=True, eq=False)
class Sent:
    """A request under way; with `header`, it has been answered."""

    kind: Kind
    request: int
    message: StepMessage | None
    """Of a pull or push: it stays in memory for as long as it may be sent again."""
    places: Sequence[memoryview] = ()
    """Where the answer's payload goes, over TCP."""
    header: Header | None = None
    """Of the answer."""


class Outbox:
    """One shard's part of what a worker has sent."""

    def __init__(self, shard: int, worker: int) -> None:
        self.shard = shard
        self.worker = worker
        self.done_step = 0
        """The shard is done with this worker's pushes for steps below."""
        self.fence = 0
        """Step of the push that the shard expected next when it was connected to last."""
        self.next_push = 0
        """Step of the next push that this worker makes, as far as anybody can know."""
        self._requests = 0
        self._handled = 0
        """Every request below this one has been handled: a later one has been answered."""
        self._sent: dict[int, Sent] = {}
        """By number of the request: in order."""
        self._pushes: deque[Sent] = deque()

    @property
    def num_pushes(self) -> int:
        """Pushes that are kept."""
        return len(self._pushes)

    def add(self, kind: Kind, message: StepMessage | None) -> Sent:
        """Note what is about to be sent, and number it."""
        self._requests = request = self._requests + 1
        sent = self._sent[request] = Sent(kind, request, message)
        if kind == Kind.PUSH:
            assert message is not None, "a push has gradients"
            self._pushes.append(sent)
            self.next_push = message.step + 1
        return sent

    def under_way(self, request: int) -> Sent | None:
        """A pull or flush that waits for its answer."""
        return self._sent.get(request)

    def answered(self, header: Header) -> Sent | None:
        """Take an answer's header; None if nobody asked for it."""
        self.note_done(header)
        sent = self._sent.get(header.request)
        wanted = _ANSWERS.get(header.kind)
        if sent is None or sent.kind != wanted:
            return None
        del self._sent[header.request]
        if header.request > self._handled:
            self._handled = header.request
        sent.header = header
        return sent

    def note_done(self, header: Header) -> None:
        """Take what any frame of the shard says of this worker's pushes."""
        if header.step > self.done_step:
            self.done_step = header.step

    def forget_done(self) -> None:
        """Let go of pushes that the shard is done with.

        It may be done with the step of a push that is still on its way: one that it has had from an
        earlier connection, or an earlier worker of the same rank. It reads that one all the same.
        """
        pushes, done, handled = self._pushes, self.done_step, self._handled
        while pushes and _step(pushes[0]) < done and pushes[0].request < handled:
            del self._sent[pushes.popleft().request]

    def welcomed(self, done_step: int, fence: int) -> None:
        """Take what a shard says at the start of a connection: it may know less than before.

        Nothing is on its way then: what came over the former connection is not read any more.
        """
        self.done_step, self.fence = done_step, fence
        self._handled = self._requests + 1
        self.forget_done()
        self._handled = 0

    def to_replay(self) -> list[Sent]:
        """What is to be sent over a new connection, in order.

        Pushes below the fence are not: the shard has them. They are kept all the same until it is
        done with them, for it may come back without them.

        Raises:
            ReplayGapError: the shard wants a push that is not there any more.
        """
        oldest = _step(self._pushes[0]) if self._pushes else self.next_push
        if self.fence < oldest:
            raise ReplayGapError(
                f"shard {self.shard} came back without the pushes of worker {self.worker} from "
                f"step {self.fence} on, and the worker has kept only those from step {oldest} on"
            )
        return [s for s in self._sent.values() if s.kind != Kind.PUSH or _step(s) >= self.fence]

    def clear(self) -> None:
        """Let go of everything."""
        self._sent.clear()
        self._pushes.clear()


_ANSWERS = {Kind.ROWS: Kind.PULL, Kind.FLUSHED: Kind.FLUSH}


def _step(push: Sent) -> int:
    assert push.message is not None, "a push has gradients"
    return push.message.step
