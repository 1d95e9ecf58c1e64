"""What was found, as tables and targets: on the terminal and in `docs/benchmarks.md`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.kernels.timing import Timing

OURS, LIMIT = "Manta", "limit"
Unit = Literal["M/s", "ms", "µs"]
"""Millions per second; milliseconds of a run; microseconds of one of its `count`."""
Row = tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One case, in which everyone did the same work: `count` rows, ids or keys per run."""

    case: Row
    count: int
    timings: dict[str, Timing]

    def times(self, peer: str, ours: str = OURS) -> float:
        """How many times faster ours is: the ratio of the medians."""
        return self.timings[peer].median / self.timings[ours].median

    def __str__(self) -> str:
        return " ".join(self.case)


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the first `num_labels` columns name the case."""

    title: str
    header: Row
    rows: Sequence[Row]
    num_labels: int


@dataclass(frozen=True)
class Target:
    """A figure that was to be reached: at least (or at most) `wanted`."""

    what: str
    wanted: float
    measured: float
    where: str = ""
    unit: str = "×"
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    @property
    def row(self) -> Row:
        """The target as a row of a table."""
        measured = f"{number(self.measured)}{self.unit}"
        return (
            self.what,
            f"{'≤' if self.at_most else '≥'} {self.wanted:g}{self.unit}",
            f"{measured} ({self.where})" if self.where else measured,
            "met" if self.met else "not met",
        )


@dataclass(frozen=True)
class Section:
    """One part of the benchmark: what was measured, and how far it is from what was wanted."""

    title: str
    text: str
    tables: Sequence[Table]
    targets: Sequence[Target]


def lowest(what: str, wanted: float, cells: Iterable[Cell], peers: Sequence[str]) -> list[Target]:
    """`wanted` times faster than the peers in every cell; nothing where none was measured."""
    found = [(c.times(p), f"{p}, {c}") for c in cells for p in peers if p in c.timings]
    return [Target(what, wanted, *min(found))] if found else []


def median_of_limit(what: str, wanted_percent: float, cells: Iterable[Cell]) -> list[Target]:
    """The median of our shares of the limit; nothing where the limit was not measured."""
    shares = [100 * c.times(LIMIT) for c in cells if LIMIT in c.timings]
    return [Target(what, wanted_percent, float(np.median(shares)), unit="%")] if shares else []


def lowest_of_limit(what: str, wanted_percent: float, cells: Iterable[Cell]) -> list[Target]:
    """The lowest of our shares of the limit, likewise."""
    shares = [(100 * c.times(LIMIT), str(c)) for c in cells if LIMIT in c.timings]
    return [Target(what, wanted_percent, *min(shares), unit="%")] if shares else []


def number(value: float) -> str:
    """At least two digits, at most two decimals."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(title: str, labels: Row, cells: Sequence[Cell], unit: Unit) -> Table:
    """A row per cell: our median (10th to 90th percentile), the limit, every peer and its ratio."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.timings))
    peers = [name for name in names if name not in (OURS, LIMIT)]
    limit = (f"{LIMIT}, {unit}", "of the limit") if LIMIT in names else ()
    header = (*labels, f"{OURS}, {unit}", *limit, *(f"{p}, {unit}" for p in peers))
    rows = [
        (
            *cell.case,
            _spread(cell, unit),
            *((_median(cell, LIMIT, unit), f"{100 * cell.times(LIMIT):.0f}%") if limit else ()),
            *(
                f"{_median(cell, p, unit)} ({number(cell.times(p))}×)" if p in cell.timings else "–"
                for p in peers
            ),
        )
        for cell in cells
    ]
    return Table(title, header, rows, len(labels))


def _figure(cell: Cell, seconds: float, unit: Unit) -> str:
    match unit:
        case "M/s":
            return number(cell.count / seconds / 1e6)
        case "ms":
            return number(seconds * 1e3)
        case "µs":
            return number(seconds / cell.count * 1e6)


def _median(cell: Cell, name: str, unit: Unit) -> str:
    return _figure(cell, cell.timings[name].median, unit)


def _spread(cell: Cell, unit: Unit) -> str:
    ours = cell.timings[OURS]
    ends = (ours.high, ours.low) if unit == "M/s" else (ours.low, ours.high)
    low, high = (_figure(cell, s, unit) for s in ends)
    return f"{_median(cell, OURS, unit)} ({low}–{high})"


# --- output ---------------------------------------------------------------------------------------


def targets_table(sections: Sequence[Section]) -> Table:
    """Every target, what was measured in the worst of its cells, and whether that is enough."""
    rows = [target.row for section in sections for target in section.targets]
    return Table("Targets", ("what", "target", "measured", "verdict"), rows, 4)


def print_table(console: Console, table: Table) -> None:
    """A table on the terminal."""
    shown = RichTable(title=table.title, title_justify="left")
    for column, name in enumerate(table.header):
        shown.add_column(name, justify="left" if column < table.num_labels else "right")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)


def markdown(title: str, about: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole report."""
    lines = [f"# {title}", "", *about, ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.text, ""]
        for part in section.tables:
            lines += _markdown_table(part)
    lines += ["## Targets", "", *_markdown_table(targets_table(sections), title=False)]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: Table, title: bool = True) -> list[str]:
    rule = ["---" if c < table.num_labels else "---:" for c in range(len(table.header))]
    rows = [" | ".join(row) for row in (table.header, rule, *table.rows)]
    return [*([f"### {table.title}", ""] if title else []), *(f"| {r} |" for r in rows), ""]
