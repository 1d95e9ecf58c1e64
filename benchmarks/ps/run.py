"""Run all contenders, compare what they return, time them in turn, report."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.kernels import machine
from benchmarks.kernels.report import Cell, Section, markdown, print_table, targets_table
from benchmarks.kernels.timing import interleaved
from benchmarks.ps.contenders import Process, RemoteContender, contender
from benchmarks.ps.peers import ENTRIES, TEXT, targets, timings_table
from benchmarks.ps.processes import VERBOSE, memory_gib
from benchmarks.ps.table import DIM, NUM_ROWS, SHARDS, SIZES, num_batches

REPORT = Path(__file__).parents[2] / "docs" / "benchmarks-data-plane.md"
_PACKAGES = ("numpy", "numba", "ray", "tensorflow", "torch", "pyarrow")
_BUDGET_S, _QUICK_BUDGET_S = 25.0, 2.5
_ROUNDS, _QUICK_ROUNDS = (8, 20), (3, 4)
_TOLERANCE = 1e-6


def main(about: str | None) -> None:
    """Run, print, and write the report if that is wanted; `about` is for `--help`."""
    args = _arguments(about)
    if args.verbose:
        os.environ[VERBOSE] = "1"
    start, load = time.time(), os.getloadavg()[0]
    console = Console(width=None if sys.stdout.isatty() else 160)
    cells, peak_gib = _measure(args.only, args.rows, args.quick)
    section = Section(
        f"Pull and SGD push of a {NUM_ROWS // 1_000_000}M×{DIM} table on {SHARDS} shards",
        TEXT,
        [timings_table(cell) for cell in cells],
        targets(cells),
    )
    for table in (*section.tables, targets_table([section])):
        print_table(console, table)
    if args.write:
        head = _about((time.time() - start) / 60, load, peak_gib)
        REPORT.write_text(markdown("Benchmarks of the data plane", head, [section]))
        console.print(f"wrote {REPORT}")


def _measure(keys: Sequence[str], sizes: Sequence[int], quick: bool) -> tuple[list[Cell], float]:
    """The cells of all sizes, and the most memory that was seen."""
    start = time.time()

    def say(what: str) -> float:
        gib = memory_gib()
        print(f"{time.time() - start:5.0f} s, {gib:.1f} GiB: {what}", flush=True)
        return gib

    with ExitStack() as stack:
        processes = {}
        for key in keys:
            processes[key] = Process(f"benchmarks.ps.{ENTRIES[key].client}", sizes)
            stack.callback(processes[key].stop)
        for process in processes.values():
            process.wait_ready()
        seen = [say(f"started {', '.join(keys)}")]
        for size in sizes:
            _check(processes, size)
        seen.append(say("all have the same rows after the same steps"))
        cells = []
        for size in sizes:
            contenders = [c for key, process in processes.items() for c in _of(key, process, size)]
            budget_s, rounds = (_QUICK_BUDGET_S, _QUICK_ROUNDS) if quick else (_BUDGET_S, _ROUNDS)
            timings = interleaved(contenders, budget_s, rounds)
            cells.append(Cell((f"{size:,} rows",), size, timings))
            seen.append(say(f"measured {size:,} rows"))
    return cells, max(seen)


def _of(key: str, process: Process, size: int) -> list[RemoteContender]:
    steps = ENTRIES[key].steps
    return [contender(name, process, step, size) for name, step in steps.items()]


def _check(processes: dict[str, Process], size: int) -> None:
    """Let all take the same steps and compare what the last one returns.

    A process that has several kinds of step takes them kind by kind, and is compared with the
    others' rows after as many steps.
    """
    expected: list[np.ndarray] = []
    kinds = {key: list(ENTRIES[key].steps.items()) for key in processes if ENTRIES[key].checked}
    for round_ in range(max(map(len, kinds.values()), default=0)):
        for key, steps in kinds.items():
            name, step = steps[round_ % len(steps)]
            rows = _last_rows(processes[key], step, size)
            if len(expected) == round_:
                expected.append(rows)
            np.testing.assert_allclose(rows, expected[round_], atol=_TOLERANCE, err_msg=name)
    for key, process in processes.items():
        if not ENTRIES[key].checked:
            _last_rows(process, "step", size)  # to warm it up


def _last_rows(process: Process, step: str, size: int) -> np.ndarray:
    """Rows of batch 0 after a step with each batch."""
    last = num_batches(size) - 1
    for i in range(last):
        process.rows(step, size, i)
    return process.rows(step, size, last)


def _about(minutes: float, load: float, peak_gib: float) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return [
        "<!-- Written by `make bench-ps`; do not edit. -->",
        "",
        "Written by `make bench-ps` (`python -m benchmarks.ps --write`), which measures",
        "everything in one run on one machine: read the ratios. Every contender has processes",
        "of its own, started once; those with rows first show that they have the same after",
        "the same steps. Then all take turns, in a new random order each round, on the next of",
        "several batches that have no row in common. The time ends when the next batch's rows",
        "are there, so that no work is left to fall into the time of another; before it",
        "begins, the batch's own rows have been pulled and its gradients written where they",
        "are sent from, as in training. A turn is up to 40 steps one after the other, about 30",
        "ms, and its time is their median. Manta's shards and the servers of the bare sockets",
        "keep to a CPU each, as `cluster.pin_shards` has it; the other peers have no such option.",
        "",
        f"- Machine: {machine.cpu()}, {os.cpu_count()} cores, {machine.memory_gib():.0f} GiB, "
        f"{platform.system()} {platform.release()}, huge pages `{machine.huge_pages()}`",
        f"- Python {platform.python_version()}, {versions}",
        f"- Commit {machine.commit()}, {datetime.now(UTC):%Y-%m-%d}, {minutes:.0f} minutes, at "
        f"most {peak_gib:.1f} GiB; load of the machine before it began: {load:.1f}",
    ]


def _arguments(about: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ps", description=about)
    parser.add_argument("--only", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--rows", nargs="+", type=int, choices=SIZES, default=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="few runs")
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.name}")
    parser.add_argument("--verbose", action="store_true", help="show what the libraries say")
    return parser.parse_args()
