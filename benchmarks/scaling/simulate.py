"""The same costs as `benchmarks.scaling.model`, played through: what the formula leaves out.

Processes queue for cores, messages queue for network cards, in pieces, and pulls wait at shards for
their version. Pure, and the same every time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.scaling.model import Case, Costs, Machine, Parts, Work
from benchmarks.scaling.queues import Call, Card, Clock, Cores, Process

_PIECE_BYTES, _MAX_PIECES = 1 << 16, 8


@dataclass(frozen=True)
class Load:
    """A message: CPU of both sides per message, and its bytes."""

    size: float
    send: Work
    receive: Work
    finish: Work


class Run:
    """One simulated job."""

    def __init__(self, case: Case, costs: Costs, machine: Machine, steps: int) -> None:
        self.case, self.machine, self.steps = case, machine, steps
        self.parts = Parts.of(case, costs, machine)
        self.clock = clock = Clock()
        shared = Cores(clock, machine.cores, costs.contention)

        def process() -> Process:
            own = Cores(clock, 1, 1.0) if machine.cores == math.inf else shared
            return Process(own, costs.wake)

        def cards(count: int, per_host: int) -> list[tuple[Card, Card]]:
            hosts = [(Card(clock, machine.bytes_per_s), Card(clock, machine.bytes_per_s))
                     for _ in range(-(-count // per_host))]  # fmt: skip
            return [hosts[i // per_host] for i in range(count)]

        k, p, tcp = case.shards, self.parts, case.transport == "tcp"
        worker_cards = cards(case.workers, machine.workers_per_host)
        shard_cards = cards(case.shards, machine.shards_per_host)
        self.shards = [Shard(self, process(), shard_cards[i]) for i in range(k)]
        self.workers = [Worker(self, process(), worker_cards[i]) for i in range(case.workers)]
        self.push = Load(
            case.push_bytes * tcp, p.send_push * (1 / k), p.receive_push, p.accept_push
        )
        self.ask = Load(case.ask_bytes * tcp, p.send_ask * (1 / k), p.receive_ask, p.accept_pull)
        self.rows = Load(case.answer_bytes * tcp, p.send_rows, p.receive_rows * (1 / k),
                         p.take * (1 / k))  # fmt: skip

    def send(self, load: Load, source: End, target: End, done: Call) -> None:
        """Move a message; `done` when the target has it whole."""
        pieces = int(min(_MAX_PIECES, max(1, load.size // _PIECE_BYTES)))
        latency, part = self.machine.round_trip_s / 2, 1 / pieces
        size = load.size * part

        def arrived(last: bool) -> None:
            target.receive(load.receive * part + (load.finish if last else Work(0.0)),
                           done if last else _nothing)  # fmt: skip

        def through(last: bool) -> None:
            target.cards[1].carry(size, lambda: arrived(last), begun_s=math.inf)

        for i in range(pieces):

            def sent(last: bool = i == pieces - 1) -> None:
                source.cards[0].carry(
                    size, lambda: self.clock.after(latency, lambda: through(last))
                )

            source.process.do(load.send * part, sent)

    def step_s(self) -> float:
        """Seconds of a step, once the first are over."""
        for worker in self.workers:
            worker.ask(0)
        self.clock.run()
        ends = self.workers[0].ends[:-1]  # the last step asks for no more
        first = len(ends) // 3
        return (ends[-1] - ends[first]) / (len(ends) - 1 - first)


class End:
    """A process with its network cards."""

    def __init__(self, run: Run, process: Process, cards: tuple[Card, Card]) -> None:
        self.run, self.process, self.cards = run, process, cards

    def receive(self, work: Work, done: Call) -> None:
        """Bytes have come."""
        self.process.do(work, done)


class Worker(End):
    """Asks, waits for all shards, makes gradients, pushes."""

    def __init__(self, run: Run, process: Process, cards: tuple[Card, Card]) -> None:
        super().__init__(run, process, cards)
        self.step, self.ends = 0, list[float]()
        self._waits, self._answers = True, 0
        self._inbox: deque[tuple[Work, Call]] = deque()

    def receive(self, work: Work, done: Call) -> None:
        """What comes while it computes stays in the socket."""
        if self._waits:
            self.process.do(work, done)
        else:
            self._inbox.append((work, done))

    def ask(self, step: int) -> None:
        """Pull the rows of a step from every shard."""
        version = max(0, step - self.run.case.lookahead)
        self._to_all(self.run.parts.ask, self.run.ask,
                     lambda shard: shard.on_pull(self, version))  # fmt: skip

    def _to_all(self, build: Work, load: Load, call: Callable[[Shard], None]) -> None:
        shards = self.run.shards
        for shard in shards:
            self.process.do(build * (1 / len(shards)), _nothing)
            self.run.send(load, self, shard, lambda shard=shard: call(shard))  # type: ignore[misc]

    def on_rows(self) -> None:
        """One shard's rows are here."""
        self._answers += 1
        if self._answers < len(self.run.shards):
            return
        self._answers, self._waits = 0, False
        ahead, step = self.run.case.lookahead, self.step
        if ahead:
            self._ask_next()
        self.process.do(self.run.parts.compute, _nothing)
        self._to_all(self.run.parts.push, self.run.push, lambda shard: shard.on_push(step))
        if not ahead:
            self._ask_next()
        self.process.do(Work(0.0), self._pushed)

    def _ask_next(self) -> None:
        if self.step + 1 < self.run.steps:
            self.ask(self.step + 1)

    def _pushed(self) -> None:
        self.step += 1
        self.ends.append(self.run.clock.now)
        self._waits = True
        while self._inbox:
            self.process.do(*self._inbox.popleft())


class Shard(End):
    """Collects a step's pushes, applies them, answers the pulls of the new version."""

    def __init__(self, run: Run, process: Process, cards: tuple[Card, Card]) -> None:
        super().__init__(run, process, cards)
        self._version, self._pushes = 0, dict[int, int]()
        self._waiting: list[tuple[int, Worker]] = []

    def on_pull(self, worker: Worker, version: int) -> None:
        """Answer, or wait for the version."""
        if version == self._version:
            self._answer(worker)
        else:
            self._waiting.append((version, worker))

    def on_push(self, step: int) -> None:
        """Make a version when everyone's push is in."""
        self._pushes[step] = self._pushes.get(step, 0) + 1
        if self._pushes[step] == self.run.case.workers:
            self.process.do(self.run.parts.apply, self._applied, first=True)

    def _applied(self) -> None:
        self._version += 1
        due = [worker for version, worker in self._waiting if version == self._version]
        self._waiting = [w for w in self._waiting if w[0] != self._version]
        for worker in due:
            self._answer(worker)

    def _answer(self, worker: Worker) -> None:
        self.process.do(self.run.parts.answer, _nothing)
        self.run.send(self.run.rows, self, worker, worker.on_rows)


def _nothing() -> None:
    pass


def simulated_step(case: Case, costs: Costs, machine: Machine, steps: int = 14) -> float:
    """Seconds of a step, played through."""
    return Run(case, costs, machine, steps).step_s()
