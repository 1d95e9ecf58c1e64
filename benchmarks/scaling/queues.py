"""What processes queue for: cores, in turns of a millisecond, and network cards."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.scaling.model import Work

_TURN_S = 1e-3
Call = Callable[[], None]


class Clock:
    """Events in the order of their times, in a heap."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Call]] = []
        self._count = 0

    def after(self, seconds: float, call: Call) -> None:
        """Call so much later."""
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, call))

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._events:
            self.now, _, call = heapq.heappop(self._events)
            call()


@dataclass
class Cores:
    """Run processes, as many as there are cores, in turns."""

    clock: Clock
    count: float
    contention: float
    busy: int = 0
    queue: deque[Process] = field(default_factory=deque)

    def add(self, process: Process) -> None:
        """A process has work."""
        self.queue.append(process)
        self._next()

    def _next(self) -> None:
        while self.queue and self.busy < self.count:
            self._turn(self.queue.popleft())

    def _turn(self, process: Process) -> None:
        self.busy += 1
        job = process.jobs[0]
        part = min(1.0, _TURN_S / max(job.work.seconds(), 1e-12))
        part = min(part, job.left)
        slow = self.contention if self.busy > 1 else 1.0

        def over() -> None:
            self.busy -= 1
            job.left -= part
            if job.left <= 1e-9:
                process.jobs.popleft()
                job.done()
            if process.jobs:
                self.queue.append(process)
            else:
                process.runs = False
            self._next()

        self.clock.after(part * job.work.seconds(slow), over)


@dataclass
class Job:
    """Work of a process, and what follows."""

    work: Work
    done: Call
    left: float = 1.0


class Process:
    """A shard or a worker: one thread."""

    def __init__(self, cores: Cores, wake_s: float) -> None:
        self.jobs: deque[Job] = deque()
        self.runs = False
        self._cores = cores
        self._wake_s = wake_s

    def do(self, work: Work, done: Call, first: bool = False) -> None:
        """Queue work; a process that sleeps is woken."""
        (self.jobs.appendleft if first else self.jobs.append)(Job(work, done))
        if not self.runs:
            self.runs = True
            self._cores.clock.after(self._wake_s, lambda: self._cores.add(self))


class Card:
    """One direction of a host's network card."""

    def __init__(self, clock: Clock, bytes_per_s: float) -> None:
        self._clock, self._bytes_per_s = clock, bytes_per_s
        self._free = 0.0

    def carry(self, size: float, call: Call, begun_s: float = 0.0) -> None:
        """Call when so many bytes are through, after those before them.

        `begun_s` is how long ago the first of them can have come.
        """
        took = size / self._bytes_per_s
        start = max(self._clock.now - min(begun_s, took), self._free)
        self._free = start + took
        self._clock.after(self._free - self._clock.now, call)
