"""The cost model: seconds of CPU per message, row and byte, and how they add up to a step.

Pure: no clock, no process, no I/O. A step of sync training is pull, gradients, push. W workers and
K shards, each one thread, share `cores` cores, or have one each; hosts share their network card.

`step` adds costs up in the phases of a step: within a phase everything that may run at the same
time does, as far as there are cores. `benchmarks.scaling.simulate` has the same costs with queues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

Transport = Literal["arena", "tcp"]
ID_BYTES = 8
_TABLE_FIELDS, _TAIL_FIELDS, _HEADER = 6, 4, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is run."""

    shards: int
    workers: int
    rows: int
    """Distinct rows of one worker's step, over all tables."""
    dim: int
    tables: int = 1
    transport: Transport = "arena"
    lookahead: int = 0
    number_bytes: int = 4
    """Of a row's number on the wire: 2 for bfloat16 and float16."""
    union_rows: float | None = None
    """Distinct rows of all workers' steps together; None if no two share a row."""
    compute_s: float | None = None
    """Seconds of a worker between its rows and its push; None for one pass over the rows."""

    @property
    def rows_per_message(self) -> float:
        """m: rows of a message to one shard."""
        return self.rows / self.shards

    @property
    def row_bytes(self) -> int:
        """Of a row in memory."""
        return 4 * self.dim

    @property
    def wire_row_bytes(self) -> int:
        """Of a row on the wire, without its id."""
        return self.number_bytes * self.dim

    @property
    def updated_rows(self) -> float:
        """Rows that one shard updates in a step."""
        union = self.workers * self.rows if self.union_rows is None else self.union_rows
        return union / self.shards

    @property
    def description_bytes(self) -> int:
        """Header and meta part of a pull or push."""
        return _HEADER + 8 * (_TABLE_FIELDS * self.tables + _TAIL_FIELDS)

    @property
    def ask_bytes(self) -> float:
        """Over TCP: bytes of a pull to one shard."""
        return self.description_bytes + ID_BYTES * self.rows_per_message

    @property
    def answer_bytes(self) -> float:
        """Of its answer."""
        return _HEADER + self.wire_row_bytes * self.rows_per_message

    @property
    def push_bytes(self) -> float:
        """Of a push to one shard."""
        return self.ask_bytes + self.wire_row_bytes * self.rows_per_message


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of CPU of one part of a step; a shard's part is of one message."""

    step: float = 0.0
    step_table: float = 0.0
    message: float = 0.0
    message_table: float = 0.0
    row: float = 0.0
    byte: float = 0.0
    """Per byte of rows in memory, D · 4 a row."""
    far_byte: float = 0.0
    """More than that when a step's rows and gradients do not stay in caches; see `far`."""

    def of_messages(self, messages: float, tables: int) -> float:
        """Seconds that do not depend on rows."""
        once = self.step + self.step_table * tables
        return once + messages * (self.message + self.message_table * tables)

    def of_rows(self, rows: float, row_bytes: float, far: float) -> float:
        """Seconds that rows take."""
        return rows * (self.row + row_bytes * (self.byte + far * self.far_byte))


def far(step_bytes: float) -> float:
    """How much of a step's rows and gradients is beyond the caches, 0 to 1.

    A step keeps some four arrays of the size of its rows in turn: up to an eighth of a cache of 32
    MB they stay there, from half of it on they do not.

    >>> far(1e6), far(8e6), far(1e9)
    (0.0, 0.5, 1.0)
    """
    if step_bytes <= _NEAR_BYTES:
        return 0.0
    return min(1.0, math.log(step_bytes / _NEAR_BYTES) / math.log(_FAR_BYTES / _NEAR_BYTES))


_NEAR_BYTES, _FAR_BYTES = 4e6, 16e6


@dataclass(frozen=True, slots=True)
class Roles:
    """The parts of a step over one transport."""

    ask: Cost
    """Worker: build and send pulls."""
    take: Cost
    """Worker: receive answers."""
    push: Cost
    """Worker: build and send pushes."""
    answer: Cost
    """Shard: read a pull, gather its rows and send them."""
    apply: Cost
    """Shard: read a push and update its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a machine's CPU takes for everything; see `benchmarks.scaling.calibrate`."""

    arena: Roles
    tcp: Roles
    """Without what moves with bytes on the wire: `send_byte`, `receive_byte`, `checksum_byte`."""
    compute: Cost
    """Worker: gradients from rows, one pass."""
    reduce: Cost
    """Shard: sum of the workers' gradients by row, per row of each worker."""
    send_byte: float
    receive_byte: float
    checksum_byte: float
    """On either side."""
    far_send_byte: float = 0.0
    """More than `send_byte` when a step's rows do not stay in caches; see `far`."""
    far_receive_byte: float = 0.0
    convert_number: float
    """float32 to 16 bits or back, on either side."""
    wake: float
    """From a byte in a socket until the sleeping process runs."""
    contention: float
    """How much longer work on rows takes while another core works on rows."""

    def roles(self, transport: Transport) -> Roles:
        """The costs over a transport."""
        return self.arena if transport == "arena" else self.tcp

    def scaled(self, **factors: float) -> Self:
        """With some of the single numbers multiplied."""
        return replace(self, **{name: getattr(self, name) * f for name, f in factors.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where it runs."""

    cores: float = math.inf
    """Shared by all processes; infinite for a core each."""
    bytes_per_s: float = math.inf
    """Of a host's network card, in each direction."""
    round_trip_s: float = 0.0
    shards_per_host: int = 1
    workers_per_host: int = 1


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of CPU for one part: what rows take is slower beside another core's rows."""

    fixed: float
    memory: float = 0.0

    def seconds(self, contention: float = 1.0) -> float:
        """Together."""
        return self.fixed + self.memory * contention

    def __add__(self, other: Work) -> Work:
        return Work(self.fixed + other.fixed, self.memory + other.memory)

    def __mul__(self, factor: float) -> Work:
        return Work(self.fixed * factor, self.memory * factor)


@dataclass(frozen=True, slots=True)
class Parts:
    """The CPU work of a step; a worker's for all shards, a shard's for one worker unless said."""

    take: Work
    """Worker, after the bytes have come."""
    compute: Work
    push: Work
    """Worker, before the bytes go."""
    ask: Work
    accept_push: Work
    """Shard: message work of a push."""
    accept_pull: Work
    answer: Work
    """Shard: rows of one worker's pull, before the bytes go."""
    apply: Work
    """Shard: sums and updates of all workers' pushes of a step."""
    send_push: Work
    """Worker: bytes to the socket."""
    send_ask: Work
    receive_rows: Work
    """Worker: bytes from the socket."""
    receive_push: Work
    """Shard, from one worker."""
    receive_ask: Work
    send_rows: Work

    @classmethod
    def of(cls, case: Case, costs: Costs, machine: Machine) -> Parts:
        """From the costs."""
        k, tables, n, m = case.shards, case.tables, case.rows, case.rows_per_message
        roles, tcp = costs.roles(case.transport), case.transport == "tcp"
        narrow = costs.convert_number * case.dim * (case.number_bytes != 4)

        # One machine's processes share its caches.
        shared = machine.cores < math.inf
        of_worker = far(n * case.row_bytes * (case.workers if shared else 1))
        of_shard = far(m * case.row_bytes * case.workers * (k if shared else 1))

        def part(cost: Cost, messages: float, rows: float, extra: float = 0.0) -> Work:
            beyond = of_shard if cost in (roles.answer, roles.apply) else of_worker
            on_rows = cost.of_rows(rows, case.row_bytes, beyond) + extra * rows
            return Work(cost.of_messages(messages, tables), on_rows)

        def moved(byte: float, size: float) -> Work:
            return Work(byte * size if tcp else 0.0)

        def sent(size: float, beyond: float) -> Work:
            return moved(costs.send_byte + beyond * costs.far_send_byte, size)

        def received(size: float, beyond: float) -> Work:
            return moved(costs.receive_byte + beyond * costs.far_receive_byte, size)

        check = costs.checksum_byte
        compute = part(costs.compute, k, n)
        updates = roles.apply.of_rows(case.updated_rows, case.row_bytes, of_shard)
        updates += narrow * m * case.workers
        sums = costs.reduce.of_rows(m, case.row_bytes, of_shard) * case.workers * (case.workers > 1)
        return cls(
            take=part(roles.take, k, n, narrow) + moved(check, k * case.answer_bytes),
            compute=compute if case.compute_s is None else Work(case.compute_s),
            push=part(roles.push, k, n, narrow) + moved(check, k * case.push_bytes),
            ask=part(roles.ask, k, n) + moved(check, k * case.ask_bytes),
            accept_push=part(roles.apply, 1, 0) + moved(check, case.push_bytes),
            accept_pull=part(roles.answer, 1, 0) + moved(check, case.ask_bytes),
            answer=part(roles.answer, 0, m, narrow) + moved(check, case.answer_bytes),
            apply=Work(0.0, updates + sums),
            send_push=sent(k * case.push_bytes, of_worker),
            send_ask=sent(k * case.ask_bytes, of_worker),
            receive_rows=received(k * case.answer_bytes, of_worker),
            receive_push=received(case.push_bytes, of_shard),
            receive_ask=received(case.ask_bytes, of_shard),
            send_rows=sent(case.answer_bytes, of_shard),
        )

    def worker(self) -> Work:
        """All of one worker's step."""
        return (self.take + self.compute + self.push + self.ask
                + self.send_push + self.send_ask + self.receive_rows)  # fmt: skip

    def shard(self, workers: int) -> Work:
        """All of one shard's step."""
        one = (self.accept_push + self.accept_pull + self.answer
               + self.receive_push + self.receive_ask + self.send_rows)  # fmt: skip
        return one * workers + self.apply


@dataclass(frozen=True, slots=True)
class Prediction:
    """A step's time, and what it comes from."""

    step_s: float
    bound: str
    """The busiest of `loads`."""
    loads: Mapping[str, float]
    """Seconds per step that each resource is busy: `shard CPU`, `worker CPU`, `shard network`,
    `worker network`, `cores`."""

    @property
    def busy(self) -> float:
        """The busiest's share of the step; the rest is waiting for one another."""
        return self.loads[self.bound] / self.step_s


def step(case: Case, costs: Costs, machine: Machine) -> Prediction:
    """The formula."""
    loads = busy(case, costs, machine)
    most = max(loads, key=lambda name: loads[name])
    version, pull = _chains(case, costs, machine)
    # With lookahead s, a version's way through workers and shards may last 1 + s steps, and s pulls
    # are under way while a worker computes.
    ahead = case.lookahead
    waited = max(version / (1 + ahead), pull / ahead) if ahead else version
    return Prediction(max(waited, loads[most]), most, loads)


def busy(case: Case, costs: Costs, machine: Machine) -> dict[str, float]:
    """Seconds per step that each resource has work for: no step is shorter."""
    parts = Parts.of(case, costs, machine)
    several = costs.contention if machine.cores > 1 and machine.cores < math.inf else 1.0
    worker = parts.worker().seconds()
    shard = parts.shard(case.workers).seconds(several if case.shards > 1 else 1.0)
    loads = {"worker CPU": worker, "shard CPU": shard}
    if machine.cores < math.inf:
        loads["cores"] = (case.workers * worker + case.shards * shard) / machine.cores
    if case.transport == "tcp" and machine.bytes_per_s < math.inf:
        up, down = case.push_bytes + case.ask_bytes, case.answer_bytes
        of_worker = case.shards * max(up, down) * machine.workers_per_host
        of_shard = case.workers * max(up, down) * min(machine.shards_per_host, case.shards)
        loads["worker network"] = of_worker / machine.bytes_per_s
        loads["shard network"] = of_shard / machine.bytes_per_s
    return loads


def _chains(case: Case, costs: Costs, machine: Machine) -> tuple[float, float]:
    """Seconds from a version to the next, when nobody works ahead, and of a pull on its own.

    Three phases: gradients; pushes and updates; answers. A worker serves its shards one after the
    other, and a shard its workers, so that both sides work at the same time but for the first
    message and the last.
    """
    p, w, k = Parts.of(case, costs, machine), case.workers, case.shards
    cores, mu = machine.cores, costs.contention if 1 < machine.cores < math.inf else 1.0
    of_shard, of_worker = (mu if n > 1 else 1.0 for n in (k, w))

    compute = p.compute.seconds(of_worker) * max(1.0, w / cores)
    push = (p.push + p.send_push).seconds(of_worker)
    ask = (p.ask + p.send_ask).seconds(of_worker)
    accept = (p.accept_push + p.receive_push).seconds(of_shard)
    accept_ask = (p.accept_pull + p.receive_ask).seconds(of_shard)
    apply, answer = p.apply.seconds(of_shard), p.answer.seconds(of_shard)
    take, receive, send = (x.seconds() for x in (p.take, p.receive_rows, p.send_rows))
    # Both ends of a message work at the same time, as its bytes come and go.
    last_push = max(p.accept_push.seconds(), accept - p.send_push.seconds() / k)
    net_push, net_rows = _network(case, machine)
    pushing = max(
        push + ask,
        max(push + last_push, w * accept + (w - 1) * accept_ask, net_push) + apply + accept_ask,
        (w * (push + ask) + k * (w * (accept + accept_ask) + apply)) / cores,
    )
    answering = max(
        w * (answer + send) + max(0.0, receive / k - send) + take / k,
        answer + max(send, receive) + take,
        net_rows + answer + take / k,
        (k * w * (answer + send) + w * (receive + take)) / cores,
    )
    hops = 2 * costs.wake + machine.round_trip_s
    return compute + pushing + answering + hops, ask + accept_ask + answering + hops


def _network(case: Case, machine: Machine) -> tuple[float, float]:
    """Seconds that the busiest card has with all pushes of a step, and with all answers."""
    if case.transport != "tcp":
        return 0.0, 0.0
    on_shards = case.workers * min(machine.shards_per_host, case.shards)
    messages = max(case.shards * min(machine.workers_per_host, case.workers), on_shards)
    per_byte = messages / machine.bytes_per_s
    return (case.push_bytes + case.ask_bytes) * per_byte, case.answer_bytes * per_byte
