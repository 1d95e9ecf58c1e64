"""The costs of this machine, each from a measurement of its own; none from a step's time.

One worker and one shard do one thing at a time, pulls only, then steps; each reads the CPU clock of
its own thread, which neither waiting nor other processes' turns move. What does not depend on rows
comes from messages without rows: for the worker one or eight shards, one or 26 tables, four
equations for four unknowns; for a shard one or two of them, each with a process and (here) a core
of its own, for with eight processes on a few cores each finds its code out of the caches. The rest
is spread over rows and bytes by least squares over sizes and dims.
"""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import numpy as np
import xxhash

from benchmarks.ps.processes import Child
from benchmarks.scaling.model import Case, Cost, Costs, Roles, Transport, far
from benchmarks.scaling.running import Batch, Setup, Shards, Worker, make_batches
from ps.client import PendingPull
from ps.wire.messages import WireFormat

_ROLES = ("ask", "take", "compute", "push", "answer", "apply")
_MANY_SHARDS, _MANY_TABLES = 8, 26
_DIMS = (16, 64, 128)
_SIZES = (2_000, 20_000, 100_000)
_BLOCKS = 5
"""Of every probe: the median of so many counts."""
_TRANSPORTS: tuple[Transport, ...] = ("arena", "tcp")
Seconds = dict[str, float]


@dataclass(frozen=True)
class Probe:
    """CPU seconds of the parts of a step (`_ROLES`), of one worker, and of all shards together."""

    shards: int
    tables: int
    rows: int
    dim: int
    seconds: Seconds


class Prober:
    """Workers in this process, one after the other in one thread."""

    def __init__(self, shards: Shards, budget_s: float) -> None:
        self._shards = shards
        self._budget_s = budget_s
        self._version = 0
        self._turn = 0
        """Goes on from count to count, so that a batch's rows have left the caches."""

    def probe(self, rows: int, transport: Transport) -> Probe:
        """Pulls only, then steps."""
        setup = self._shards.setup
        workers = [self._worker(rank, transport) for rank in range(setup.workers)]
        batches = [make_batches(setup, rows, rank) for rank in range(setup.workers)]
        self._steps(workers, batches, 4)
        start = time.perf_counter()
        self._steps(workers, batches, 4)
        count = int(np.clip(self._budget_s / _BLOCKS * 4 / (time.perf_counter() - start), 4, 100))
        blocks = [self._block(workers, batches, count) for _ in range(_BLOCKS)]
        seconds = {role: float(np.median([b[role] for b in blocks])) for role in _ROLES}
        self._version = workers[0].version
        for worker in workers:
            worker.close()
        return Probe(setup.shards, setup.tables, rows, setup.dim, seconds)

    def _worker(self, rank: int, transport: Transport) -> Worker:
        shards = self._shards
        return Worker(shards.setup, shards.endpoints, shards.token, rank, transport, self._version)

    def _block(
        self, workers: Sequence[Worker], batches: Sequence[Sequence[Batch]], count: int
    ) -> Seconds:
        seconds, of_steps = self._on_shards(lambda: self._steps(workers, batches, count))
        _, of_pulls = self._on_shards(lambda: self._pulls(workers, batches, count))
        return seconds | {"answer": of_pulls / count, "apply": (of_steps - of_pulls) / count}

    def _on_shards(self, run: Callable[[], Seconds]) -> tuple[Seconds, float]:
        before = self._shards.cpu_s()
        seconds = run()
        return seconds, self._shards.cpu_s() - before

    def _pulls(
        self, workers: Sequence[Worker], batches: Sequence[Sequence[Batch]], count: int
    ) -> Seconds:
        for _ in range(count):
            self._turn += 1
            for worker, of_worker in zip(workers, batches, strict=True):
                _pull(worker, of_worker[self._turn % len(of_worker)]).result()
        return {}

    def _steps(
        self, workers: Sequence[Worker], batches: Sequence[Sequence[Batch]], count: int
    ) -> Seconds:
        laps = []
        for _ in range(count):
            self._turn += 1
            todo = []
            for worker, of_worker in zip(workers, batches, strict=True):
                batch = of_worker[self._turn % len(of_worker)]
                clock = [time.thread_time()]
                pending = _pull(worker, batch)
                clock.append(time.thread_time())
                rows = pending.result().rows
                clock.append(time.thread_time())
                grads = worker.gradients(rows)
                clock.append(time.thread_time())
                todo.append((worker, batch, grads, clock))
                del pending, rows, grads
            for worker, batch, grads, clock in todo:
                again = time.thread_time()
                worker.push(batch, grads)
                laps.append([*np.diff(clock), time.thread_time() - again])
            del todo, grads
        for worker in workers:
            worker.client.flush()
        return dict(
            zip(("ask", "take", "compute", "push"), np.median(laps, 0).tolist(), strict=True)
        )


def _pull(worker: Worker, batch: Batch) -> PendingPull:
    return worker.pull(batch, worker.version, worker.version)


def calibrated(budget_s: float) -> Costs:
    """Measure everything, about `budget_s` seconds for each of some 40 measurements."""
    without_rows = {t: dict[tuple[int, int], Probe]() for t in _TRANSPORTS}
    with_rows: dict[Transport, list[Probe]] = {t: [] for t in _TRANSPORTS}
    for shards, tables in itertools.product((1, 2, _MANY_SHARDS), (1, _MANY_TABLES)):
        setup = Setup(shards=shards, workers=1, dim=16, tables=tables, table_rows=200_000)
        processes = 1 if shards == _MANY_SHARDS else None
        for transport, probe in _probed(setup, (tables * shards,), budget_s, processes):
            without_rows[transport][shards, tables] = probe
    for dim in _DIMS:
        setup = Setup(shards=1, workers=1, dim=dim)
        for transport, probe in _probed(setup, _SIZES, budget_s):
            with_rows[transport].append(probe)
    arena, compute = _fitted(without_rows["arena"], with_rows["arena"])
    tcp, _ = _fitted(without_rows["tcp"], with_rows["tcp"], arena)
    checksum = checksum_byte()
    moving = _socket_bytes(tcp, with_rows["tcp"], checksum)
    costs = Costs(
        arena=arena,
        tcp=tcp,
        compute=compute,
        reduce=Cost(),
        checksum_byte=checksum,
        **moving,
        convert_number=convert_number(),
        wake=wake_s(),
        contention=1.0,
    )
    costs = replace(costs, reduce=_reduce(arena, budget_s))
    return replace(costs, contention=_contention(budget_s))


def _probed(
    setup: Setup, sizes: Sequence[int], budget_s: float, processes: int | None = None,
    transports: Sequence[Transport] = _TRANSPORTS,
) -> list[tuple[Transport, Probe]]:  # fmt: skip
    shards = Shards(setup, processes)
    try:
        prober = Prober(shards, budget_s)
        return [(t, prober.probe(rows, t)) for rows in sizes for t in transports]
    finally:
        shards.close()


def _fitted(
    small: dict[tuple[int, int], Probe], big: Sequence[Probe], rows_as: Roles | None = None
) -> tuple[Roles, Cost]:
    """The costs over one transport; what rows take is that of `rows_as`, if it is given."""
    costs: dict[str, Cost] = {}
    for role in _ROLES:
        cost = _of_messages({key: p.seconds[role] for key, p in small.items()}, role)
        if rows_as is None or role == "compute":
            cost = _of_rows(cost, [(p, p.seconds[role]) for p in big])
        else:
            known: Cost = getattr(rows_as, role)
            cost = replace(cost, row=known.row, byte=known.byte, far_byte=known.far_byte)
        costs[role] = cost
    compute = costs.pop("compute")
    return Roles(**costs), compute


def _of_messages(seconds: dict[tuple[int, int], float], role: str) -> Cost:
    """step + step_table·T + message·K + message_table·K·T through four points."""
    if role in ("answer", "apply"):  # of one message
        one, many = (float(np.mean([seconds[k, t] / k for k in (1, 2)])) for t in (1, _MANY_TABLES))
        slope = max(0.0, (many - one) / (_MANY_TABLES - 1))
        return Cost(message=max(0.0, one - slope), message_table=slope)
    points = sorted((k, t) for k, t in seconds if k != 2)
    design = np.array([[1, t, k, k * t] for k, t in points], dtype=float)
    x = _least_squares(design, np.array([seconds[p] for p in points]))
    return Cost(step=x[0], step_table=x[1], message=x[2], message_table=x[3])


def _of_rows(cost: Cost, probes: Sequence[tuple[Probe, float]], workers: int = 1) -> Cost:
    sizes = [p.rows * 4 * p.dim for p, _ in probes]
    design = np.array([
        (p.rows, size, size * far(workers * size))
        for (p, _), size in zip(probes, sizes, strict=True)
    ], dtype=float)  # fmt: skip
    rest = np.array([max(0.0, s - cost.of_messages(1, 1)) for _, s in probes])
    weights = 1 / np.array([s for _, s in probes])
    row, byte, far_byte = _least_squares(design, rest, weights)
    return replace(cost, row=row, byte=byte, far_byte=far_byte)


def _least_squares(
    design: np.ndarray, values: np.ndarray, weights: np.ndarray | None = None
) -> list[float]:
    """The best numbers that are not negative; relative errors count."""
    weights = 1 / np.maximum(values, 1e-9) if weights is None else weights
    a, b = design * weights[:, None], values * weights
    best: tuple[float, np.ndarray] = (np.inf, np.zeros(a.shape[1]))
    for subset in range(1, 1 << a.shape[1]):
        columns = [c for c in range(a.shape[1]) if subset >> c & 1]
        x = np.zeros(a.shape[1])
        x[columns] = np.linalg.lstsq(a[:, columns], b, rcond=None)[0]
        error = float(np.sum((a @ x - b) ** 2))
        if np.all(x >= 0) and error < best[0] * (1 - 1e-9):
            best = error, x
    return [float(v) for v in best[1]]


def _socket_bytes(tcp: Roles, probes: Sequence[Probe], checksum: float) -> dict[str, float]:
    """Per byte sent and received by a shard: what TCP takes beyond rows, messages and checksums."""
    design, rest, weights = [], [], []
    for p in probes:
        case = Case(shards=1, workers=1, rows=p.rows, dim=p.dim, transport="tcp")
        for role, sent, received in (
            ("answer", case.answer_bytes, case.ask_bytes),
            ("apply", 0.0, case.push_bytes),
        ):
            cost: Cost = getattr(tcp, role)
            beyond = far(p.rows * case.row_bytes)
            known = cost.of_messages(1, 1) + cost.of_rows(p.rows, case.row_bytes, beyond)
            design.append([sent, received, beyond * sent, beyond * received])
            rest.append(max(0.0, p.seconds[role] - known - checksum * (sent + received)))
            weights.append(1 / p.seconds[role])
    names = ("send_byte", "receive_byte", "far_send_byte", "far_receive_byte")
    return dict(zip(names, _least_squares(np.array(design), np.array(rest), np.array(weights)),
                    strict=True))  # fmt: skip


def _reduce(arena: Roles, budget_s: float) -> Cost:
    """Sums by row: what two workers' pushes take beyond twice that of one."""
    probes = []
    for dim in _DIMS:
        setup = Setup(shards=1, workers=2, dim=dim)
        for _, probe in _probed(setup, (10_000, 50_000), budget_s, transports=("arena",)):
            apply = arena.apply
            beyond = far(2 * probe.rows * 4 * dim)
            alone = 2 * (apply.of_messages(1, 1) + apply.of_rows(probe.rows, 4 * dim, beyond))
            more = max(0.0, probe.seconds["apply"] - alone) / 2
            probes.append((probe, more))
    return _of_rows(Cost(), [(p, max(s, 1e-9)) for p, s in probes], workers=2)


def _contention(budget_s: float) -> float:
    """Rows of two shards at the same time against those of one."""
    seconds = []
    for shards in (1, 2):
        setup = Setup(shards=shards, workers=1, dim=64)
        ((_, probe),) = _probed(setup, (50_000 * shards,), 2 * budget_s, transports=("arena",))
        seconds.append((probe.seconds["answer"] + probe.seconds["apply"]) / shards)
    return max(1.0, seconds[1] / seconds[0])


def checksum_byte(size: int = 1 << 25) -> float:
    """Seconds per byte of XXH3-64, not all of them in caches."""
    data = b"\1" * (2 * size)  # bytes(n) would be one page of zeros, mapped many times
    halves = itertools.cycle([memoryview(data)[:size], memoryview(data)[size:]])
    return _median(lambda: xxhash.xxh3_64(next(halves)).intdigest(), 20) / size


def convert_number(rows: int = 20_000, dim: int = 64) -> float:
    """Seconds per number of float32 to bfloat16, and back: the mean of both."""
    format = WireFormat((dim,), "bfloat16")
    numbers = np.random.default_rng(0).random((rows, dim), dtype=np.float32)
    narrowed = format.narrowed(numbers)
    narrow = _median(lambda: format.narrowed(numbers), 20)
    widen = _median(lambda: format.widened(narrowed), 20)
    return (narrow + widen) / (2 * numbers.size)


def _median(call: Callable[[], object], count: int) -> float:
    seconds = []
    call()
    for _ in range(count):
        start = time.thread_time()
        call()
        seconds.append(time.thread_time() - start)
    return float(np.median(seconds))


def wake_s(count: int = 300) -> float:
    """Seconds from `send` to a Unix socket until the reader, who slept, returns from `recv`.

    Both sides are busy for a while before they send, as in a step: a core that has slept longer
    wakes up later. All processes of a machine have the same clock.
    """
    child = Child(_echo)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(child.receive())
    seconds = []
    for _ in range(count):
        _spin(_PAUSE_S)
        sent = time.perf_counter()
        sock.send(b"x")
        there_came, there_sent = _TWO_TIMES.unpack(sock.recv(_TWO_TIMES.size))
        seconds += [there_came - sent, time.perf_counter() - there_sent]
    sock.close()
    child.kill()
    return float(np.median(seconds))


_PAUSE_S = 1e-4
"""About as long as a shard sleeps between two messages of small steps."""
_TWO_TIMES = struct.Struct("<dd")


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _echo(pipe: Connection) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("")  # the system names it
    listener.listen()
    pipe.send(listener.getsockname())
    sock, _ = listener.accept()
    while sock.recv(1):
        came = time.perf_counter()
        _spin(_PAUSE_S)
        sock.send(_TWO_TIMES.pack(came, time.perf_counter()))
