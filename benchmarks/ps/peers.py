"""Who takes part: names, the processes behind them, and what they must reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.kernels.report import OURS, Cell, Row, Table, Target, lowest, number

KERNELS, TCP, IDLE, SOCKETS = (
    "kernels in one process", "Manta, TCP", "Manta, TCP, no kernels", "bare sockets",
)  # fmt: skip
RAY, RAY_SINGLY = "Ray actor calls", "Ray actor calls, one by one"
STRATEGY, SESSION = "TF ParameterServerStrategy", "TF session"
TORCH, TORCH_FUSED = "torch RPC", "torch RPC, one call"
FLIGHT = "Arrow Flight"


@dataclass(frozen=True)
class Entry:
    """A process, and the steps that it can do, by contender."""

    client: str
    steps: dict[str, str]
    checked: bool = True
    """Whether it has rows, which must be everybody's."""


_STEP = "step"
ENTRIES = {
    "kernels": Entry("ours:Kernels", {KERNELS: _STEP}),
    "arena": Entry("ours:Arena", {OURS: _STEP}),
    "tcp": Entry("ours:Tcp", {TCP: _STEP}),
    "idle": Entry("ours:IdleTcp", {IDLE: _STEP}, checked=False),
    "sockets": Entry("socket_peer:Sockets", {SOCKETS: _STEP}, checked=False),
    "flight": Entry("flight_peer:Flight", {FLIGHT: _STEP}),
    "torch": Entry("torch_peer:TorchRpc", {TORCH: _STEP, TORCH_FUSED: "step_in_one_call"}),
    "session": Entry("tf_peer:Session", {SESSION: _STEP}),
    "strategy": Entry("tf_peer:Strategy", {STRATEGY: _STEP}),
    "ray": Entry("ray_peer:RayActors", {RAY: _STEP, RAY_SINGLY: "step_one_by_one"}),
}

TEXT = f"""\
Milliseconds of one step of one worker and two shards on one machine: push the gradients of a batch,
wait until SGD has applied them, pull the rows of the next batch. *{OURS}* moves arrays through
shared memory. *{KERNELS}* is the least that a step can cost: both shards' kernels in one thread, no
communication. *{RAY}* go to both actors at once, a pull right behind a push; *one by one* waits for
each. *{STRATEGY}* runs one function per step on its worker, started there directly because its
`ClusterCoordinator` takes longer; *{SESSION}* runs the same step as a graph in a
`tf.compat.v1.Session` of the worker's own process. *{TORCH}* sends a push to both servers, waits,
and sends a pull; *one call* puts the next batch's pull into the push. *{SOCKETS}* move the bytes of
the TCP step and do nothing with them; beside them stands Manta's TCP transport with the kernels
taken out."""


def timings_table(cell: Cell) -> Table:
    """A row per contender, the fastest first."""
    rows: list[Row] = []
    for name, timing in sorted(cell.timings.items(), key=lambda item: item[1].median):
        figures = (timing.median, timing.low, timing.high)
        ratio = f"{number(cell.times(name))}×" if OURS in cell.timings else "–"
        rows.append(
            (name, *(f"{1e3 * s:.3g}" if s < 1 else f"{1e3 * s:.0f}" for s in figures), ratio)
        )
    header = (
        "contender",
        "median, ms",
        "10th percentile",
        "90th percentile",
        f"{OURS} is faster by",
    )
    return Table(f"{cell.count:,} distinct rows", header, rows, 1)


def targets(cells: Sequence[Cell]) -> list[Target]:
    """What is to be reached, where both sides were measured."""
    found: list[Target] = []
    for cell in cells:
        found += _targets(cell)
    return found


_FASTER: dict[str, tuple[tuple[str, ...], dict[int, float]]] = {
    "Ray actor calls": ((RAY, RAY_SINGLY), {1_000: 40, 10_000: 12, 100_000: 4}),
    "TensorFlow ParameterServerStrategy": ((STRATEGY,), {1_000: 25, 10_000: 12, 100_000: 5}),
    "TensorFlow session": ((SESSION,), {1_000: 25, 10_000: 12, 100_000: 5}),
    "torch RPC": ((TORCH,), {1_000: 10, 10_000: 5, 100_000: 3}),
    "torch RPC, one call": ((TORCH_FUSED,), {1_000: 10, 10_000: 5, 100_000: 3}),
}
_AT_MOST_MS = {1_000: 0.25}
_AT_MOST_KERNELS = {10_000: 1.3, 100_000: 1.4}
_PERCENT_OF_SOCKETS = 80


def _targets(cell: Cell) -> list[Target]:
    rows, timings = f"{cell.count:,} rows", cell.timings
    found: list[Target] = []
    if OURS in timings and cell.count in _AT_MOST_MS:
        seconds = timings[OURS].median
        wanted = _AT_MOST_MS[cell.count]
        found.append(Target(f"{rows}: a step", wanted, 1e3 * seconds, unit=" ms", at_most=True))
    if {OURS, KERNELS} <= set(timings) and cell.count in _AT_MOST_KERNELS:
        ratio, wanted = 1 / cell.times(KERNELS), _AT_MOST_KERNELS[cell.count]
        found.append(Target(f"{rows}: time of the kernels in one process", wanted, ratio,
                            at_most=True))  # fmt: skip
    if OURS in timings:
        for what, (peers, wanted_by_size) in _FASTER.items():
            if cell.count in wanted_by_size:
                what_of = f"{rows}: faster than {what}"
                found += lowest(what_of, wanted_by_size[cell.count], [cell], peers)
    if {IDLE, SOCKETS} <= set(timings):
        percent = 100 * cell.times(SOCKETS, IDLE)
        found.append(Target(f"{rows}: TCP, of a bare socket's speed", _PERCENT_OF_SOCKETS, percent,
                            unit="%"))  # fmt: skip
    return found
