"""What was found, as tables: on the terminal and in `docs/benchmarks-dlrm.md`."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np

from benchmarks.dlrm.case import BATCH, OptimizerName
from benchmarks.dlrm.result import Run, rate
from benchmarks.kernels.report import Section, Table, Target, number, targets_table

_PACKAGES = ("numpy", "tensorflow", "keras", "ray")
_MOST_PPM = 100
_TEXT = """\
Written by `python -m benchmarks.dlrm --write`: read the ratios. DLRM, with the layers of
`configs/criteo.yaml`, on 26 tables with 10 million rows in all, in the proportions of Criteo's,
dim 16, 13 numbers, batch 4096, on Zipf-distributed ids. Manta runs the whole job: 2 shards, and
workers that read Parquet. TensorFlow runs in one process with a thread per core; its batches are in
memory before it starts, but for *from Parquet*, where a thread reads ahead. *tables*: a variable
per table; *one*: all in one variable, with offsets; both with `tf.unique`, `unsorted_segment_sum`
and `ResourceSparseApplyAdagradV2` (or a scatter, for SGD) around a dense step that XLA compiles.
*Keras*: `keras.layers.Embedding` and a Keras optimizer. Its Adagrad adds epsilon to and takes the
root of the whole accumulator in every step, and squares each gradient of a row by itself rather
than their sum: slower, and not quite the same training. Everyone starts from the same values.
Figures are medians over all rounds, with the 10th and 90th percentile in brackets. Two workers
share a batch of 4096."""


def section(runs: Sequence[Run]) -> Section:
    """Everything that was found."""
    return Section("DLRM", _TEXT, [_rates(runs), _times(runs)], _targets(runs))


def _targets(runs: Sequence[Run]) -> list[Target]:
    """At least TensorFlow's best, per optimizer; and the same losses."""
    found = []
    for optimizer in ("Adagrad", "SGD"):
        ours, theirs = _ours(runs, optimizer, " 1 worker"), _peers(runs, optimizer)
        if ours and theirs:
            name, best = max(theirs.items(), key=lambda item: item[1])
            setting, fastest = max(ours.items(), key=lambda item: item[1])
            what = f"{optimizer}: examples/s of 1 worker over those of {name}"
            found.append(Target(what, 1.0, fastest / best, setting))
    strict = [r.loss for r in runs if r.who.startswith("Manta") and "lookahead 0" in r.who]
    peers = [r.loss for r in runs if r.who == "TensorFlow, one" and r.optimizer == "Adagrad"]
    if strict and peers:
        what = "Adagrad, lookahead 0: relative difference of the first 20 losses' mean"
        ppm = 1e6 * abs(strict[0] / peers[0] - 1)
        found.append(Target(what, _MOST_PPM, ppm, unit=" ppm", at_most=True))
    return found


def about(minutes: float, load: float) -> list[str]:
    """The head of the report."""
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return [
        "# DLRM from end to end",
        "",
        "<!-- Written by `python -m benchmarks.dlrm --write`; do not edit. -->",
        "",
        _TEXT,
        "",
        f"- Machine: {os.cpu_count()} cores, {platform.system()} {platform.release()}; load before "
        f"it began: {load:.1f}",
        f"- Python {platform.python_version()}, {versions}; {datetime.now(UTC):%Y-%m-%d}, "
        f"{minutes:.0f} minutes",
    ]


def _named(runs: Sequence[Run]) -> dict[tuple[str, OptimizerName], list[Run]]:
    named: dict[tuple[str, OptimizerName], list[Run]] = {}
    for run in runs:
        named.setdefault((run.who, run.optimizer), []).append(run)
    return named


def _peers(runs: Sequence[Run], optimizer: str) -> dict[str, float]:
    """Examples per second of TensorFlow's ways."""
    return {
        who: rate(group)
        for (who, name), group in _named(runs).items()
        if who.startswith("TensorFlow") and name == optimizer
    }


def _ours(runs: Sequence[Run], optimizer: str, having: str) -> dict[str, float]:
    return {
        who: rate(group)
        for (who, name), group in _named(runs).items()
        if who.startswith("Manta") and name == optimizer and having in who
    }


def _rates(runs: Sequence[Run]) -> Table:
    rows = []
    for (who, optimizer), group in _named(runs).items():
        low, high = np.percentile([r for run in group for r in run.counted], [10, 90])
        median = rate(group)
        best = max(_peers(runs, optimizer).values(), default=float("nan"))
        rows.append(
            (
                who,
                optimizer,
                f"{median:,.0f} ({low:,.0f}–{high:,.0f})",
                number(1e3 * BATCH / median),
                f"{number(median / best)}×",
            )
        )
    header = ("who", "optimizer", "examples/s", "step, ms", "of TensorFlow's best")
    return Table("Examples per second", header, rows, 2)


def _times(runs: Sequence[Run]) -> Table:
    """Milliseconds of a worker's step by cause."""
    groups = {key: group for key, group in _named(runs).items() if group[0].parts}
    causes = list(dict.fromkeys(c for group in groups.values() for c in group[0].parts))
    rows = []
    for (who, optimizer), group in groups.items():
        step_ms = 1e3 * BATCH / rate(group)
        parts = {c: float(np.median([run.parts[c] for run in group])) for c in causes}
        rows.append((who, optimizer, *(number(step_ms * parts[c]) for c in causes)))
    header = ("who", "optimizer", *(f"{cause}, ms" for cause in causes))
    return Table("Where a worker's step goes", header, rows, 2)


def markdown(head: Sequence[str], found: Section) -> str:
    """The whole report."""
    lines = [*head, ""]
    for table in (*found.tables, targets_table([found])):
        rule = ["---" if c < table.num_labels else "---:" for c in range(len(table.header))]
        rows = [" | ".join(row) for row in (table.header, rule, *table.rows)]
        lines += [f"## {table.title}", "", *(f"| {row} |" for row in rows), ""]
    return "\n".join(lines).rstrip() + "\n"
