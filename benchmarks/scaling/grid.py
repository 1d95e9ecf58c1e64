"""Whole steps, measured: shards and workers in processes of their own, cell by cell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.ps.processes import Child
from benchmarks.scaling.model import Case, Transport
from benchmarks.scaling.running import (
    Batch,
    Setup,
    Shards,
    Worker,
    make_batches,
    timed_steps,
)
from ps.wire.server import Endpoint

_TRIAL_STEPS, _FIRST_STEPS = 6, 3
_MIN_STEPS, _MAX_STEPS = 12, 400
_TRANSPORTS: tuple[Transport, ...] = ("arena", "tcp")


@dataclass(frozen=True)
class Measured:
    """A case, and the median step of each round, in seconds."""

    case: Case
    rounds: Sequence[float]

    @property
    def step_s(self) -> float:
        """The median of the rounds."""
        return float(np.median(self.rounds))


@dataclass(frozen=True)
class Plan:
    """Which cells, how long."""

    dims: Sequence[int] = (16, 64, 128)
    shards: Sequence[int] = (1, 2, 4)
    workers: Sequence[int] = (1, 2)
    rows: Sequence[int] = (1_000, 10_000, 100_000)
    cell_s: float = 0.35
    """Of each cell in each round."""
    rounds: int = 3

    def cases(self) -> Iterator[list[Case]]:
        """Cells of the same processes together: the grid, and a few beside it."""
        for dim in self.dims:
            for shards in self.shards:
                for workers in self.workers:
                    case = Case(shards=shards, workers=workers, rows=0, dim=dim)
                    yield [
                        replace(case, rows=n, transport=t) for n in self.rows for t in _TRANSPORTS
                    ]
        for workers in self.workers:
            more = Case(shards=2, workers=workers, rows=10_000, dim=64, lookahead=1)
            yield [replace(more, transport=t) for t in _TRANSPORTS]
            many = Case(shards=2, workers=workers, rows=26 * 400, dim=16, tables=26)
            yield [replace(many, transport=t, lookahead=s) for s in (0, 1) for t in _TRANSPORTS]


def measured(plan: Plan) -> Iterator[Measured]:
    """The cells of a plan, as they are done."""
    for cases in plan.cases():
        yield from _measured(cases, plan)


def _measured(cases: Sequence[Case], plan: Plan) -> Iterable[Measured]:
    first = cases[0]
    setup = Setup(shards=first.shards, workers=first.workers, dim=first.dim, tables=first.tables)
    shards = Shards(setup)
    workers = [
        Child(_work, setup, shards.endpoints, shards.token, rank) for rank in range(setup.workers)
    ]
    rounds: dict[Case, list[float]] = defaultdict(list)
    order = np.random.default_rng(0)
    try:
        version = 0
        for _ in range(plan.rounds):
            for i in order.permutation(len(cases)):
                version, step_s = _cell(workers, cases[i], version, plan.cell_s)
                rounds[cases[i]].append(step_s)
    finally:
        for worker in workers:
            worker.kill()
        shards.close()
    return [Measured(case, rounds[case]) for case in cases]


def _cell(workers: Sequence[Child], case: Case, version: int, cell_s: float) -> tuple[int, float]:
    """The version after it, and the median step of all workers."""
    trial = _run(workers, case, version, _TRIAL_STEPS)
    steps = int(np.clip(cell_s / trial, _MIN_STEPS, _MAX_STEPS))
    step_s = _run(workers, case, version + _TRIAL_STEPS, steps)
    return version + _TRIAL_STEPS + steps, step_s


def _run(workers: Sequence[Child], case: Case, version: int, steps: int) -> float:
    for worker in workers:
        worker.send((case, version, steps))
    return float(np.mean([worker.receive() for worker in workers]))


def _work(
    pipe: Connection, setup: Setup, endpoints: Sequence[Endpoint], token: bytes, rank: int
) -> None:
    batches: dict[int, list[Batch]] = {}
    with suppress(EOFError):
        while True:
            case, version, steps = pipe.recv()
            if case.rows not in batches:
                batches[case.rows] = make_batches(setup, case.rows, rank)
            worker = Worker(setup, endpoints, token, rank, case.transport, version)
            laps = timed_steps(worker, batches[case.rows], case.lookahead, steps)
            worker.close()
            pipe.send(_median_step(laps))


def _median_step(laps: Sequence[float]) -> float:
    """Of two steps at a time: with lookahead a short one follows a long one."""
    steady = np.array(laps[min(_FIRST_STEPS, len(laps) // 2) :])
    return float(np.median((steady[1:] + steady[:-1]) / 2))
