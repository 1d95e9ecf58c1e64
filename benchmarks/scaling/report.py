"""Tables of what was measured and predicted, for the terminal and `docs/scaling.md`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from benchmarks.scaling.grid import Measured
from benchmarks.scaling.model import Case, Cost, Costs, Machine, Roles, step
from benchmarks.scaling.predict import TableText
from benchmarks.scaling.simulate import simulated_step

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
COSTS = Path(__file__).with_name("costs.json")
WANTED = 0.25
_US, _NS = 1e6, 1e9


@dataclass(frozen=True)
class Cell:
    """A measured step, and both predictions of it, in seconds."""

    measured: Measured
    formula_s: float
    simulated_s: float

    @classmethod
    def of(cls, measured: Measured, costs: Costs) -> Cell:
        """Predict what was measured, on this machine."""
        machine = Machine(cores=float(os.cpu_count() or 1))
        case = measured.case
        formula = step(case, costs, machine).step_s
        return cls(measured, formula, simulated_step(case, costs, machine))

    @property
    def error(self) -> float:
        """Of the formula, relative to the measured step."""
        return self.formula_s / self.measured.step_s - 1

    @property
    def simulated_error(self) -> float:
        """Of the simulation."""
        return self.simulated_s / self.measured.step_s - 1

    def __str__(self) -> str:
        times = f"{_ms(self.measured.step_s)} / {_ms(self.formula_s)} ({self.error:+.0%})"
        return times if abs(self.error) <= WANTED else f"**{times}**"


def costs_tables(costs: Costs) -> list[TableText]:
    """The calibrated numbers."""
    rows = [
        [f"{name}, {transport}", *_cost_cells(getattr(costs.roles(transport), name))]
        for transport in ("arena", "tcp")
        for name in (f.name for f in fields(Roles))
    ]
    rows += [["compute", *_cost_cells(costs.compute)], ["reduce", *_cost_cells(costs.reduce)]]
    header = (
        "",
        "step, µs",
        "· tables",
        "message, µs",
        "· tables",
        "row, ns",
        "byte, ns",
        "far, ns",
    )
    single = [
        ["far_send_byte, far_receive_byte, ns",
         f"{costs.far_send_byte * _NS:.3f}, {costs.far_receive_byte * _NS:.3f}"],
        ["send_byte, receive_byte, checksum_byte, ns", ", ".join(
            f"{x * _NS:.3f}" for x in (costs.send_byte, costs.receive_byte, costs.checksum_byte)
        )],
        ["convert_number, ns", f"{costs.convert_number * _NS:.2f}"],
        ["wake, µs", f"{costs.wake * _US:.0f}"],
        ["contention", f"{costs.contention:.2f}"],
    ]  # fmt: skip
    return [
        TableText("Costs, seconds of CPU", header, rows),
        TableText("Single numbers", ("", ""), single),
    ]


def _cost_cells(cost: Cost) -> list[str]:
    per_message = (cost.step, cost.step_table, cost.message, cost.message_table)
    return [*(f"{x * _US:.1f}" for x in per_message),
            f"{cost.row * _NS:.2f}", f"{cost.byte * _NS:.3f}",
            f"{cost.far_byte * _NS:.3f}"]  # fmt: skip


def grid_tables(cells: Sequence[Cell]) -> list[TableText]:
    """Measured and predicted, a table per transport, and the cells beside the grid."""
    grid = [c for c in cells if _in_grid(c.measured.case)]
    tables = []
    for transport in ("arena", "tcp"):
        of_it = [c for c in grid if c.measured.case.transport == transport]
        columns = sorted({(c.measured.case.dim, c.measured.case.rows) for c in of_it})
        lines = sorted({(c.measured.case.shards, c.measured.case.workers) for c in of_it})
        found = {_place(c.measured.case): str(c) for c in of_it}
        rows = [
            [f"{k} shards, {w} workers", *(found.get((k, w, *col), "–") for col in columns)]
            for k, w in lines
        ]
        header = ("", *(f"{n:,} × {d}" for d, n in columns))
        title = f"{transport}: measured / predicted step in ms, by rows × dim"
        tables.append(TableText(title, header, rows))
    beside = [[_name(c.measured.case), str(c)] for c in cells if not _in_grid(c.measured.case)]
    return [*tables, TableText("Beside the grid", ("", "measured / predicted, ms"), beside)]


def misses_table(cells: Sequence[Cell]) -> TableText:
    """Cells that are not within the aim, with the spread of their rounds."""
    rows = []
    for cell in sorted(cells, key=lambda c: -abs(c.error)):
        if abs(cell.error) > WANTED:
            rounds = ", ".join(_ms(s) for s in sorted(cell.measured.rounds))
            errors = f"{cell.error:+.0%}", f"{cell.simulated_error:+.0%}"
            rows.append([_name(cell.measured.case), rounds, *errors])
    header = ("", "measured rounds, ms", "formula", "simulation")
    return TableText(f"Cells off by more than {WANTED:.0%}", header, rows)


def summary(cells: Sequence[Cell]) -> str:
    """How far off, in a paragraph."""
    lines = []
    for name, errors in (
        ("formula", [abs(c.error) for c in cells]),
        ("simulation", [abs(c.simulated_error) for c in cells]),
    ):
        within = sum(e <= WANTED for e in errors)
        lines.append(
            f"The {name} is within {WANTED:.0%} of the measured step in {within} of {len(errors)} "
            f"cells; the median error is {np.median(errors):.0%}, the largest {max(errors):.0%}."
        )
    return "\n".join(lines)


def _in_grid(case: Case) -> bool:
    return case.tables == 1 and case.lookahead == 0


def _place(case: Case) -> tuple[int, int, int, int]:
    return case.shards, case.workers, case.dim, case.rows


def _name(case: Case) -> str:
    return (
        f"{case.shards} shards, {case.workers} workers, {case.rows:,} rows × {case.dim}, "
        f"{case.tables} tables, {case.transport}, lookahead {case.lookahead}"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.01 else f"{seconds * 1e3:.1f}"


def save_costs(costs: Costs, path: Path = COSTS) -> None:
    """As JSON."""
    path.write_text(json.dumps(asdict(costs), indent=1) + "\n")


def load_costs(path: Path = COSTS) -> Costs:
    """What `save_costs` has written."""
    known = json.loads(path.read_text())
    for transport in ("arena", "tcp"):
        known[transport] = Roles(**{k: Cost(**v) for k, v in known[transport].items()})
    return Costs(**known | {name: Cost(**known[name]) for name in ("compute", "reduce")})


def write_block(name: str, text: str, path: Path = DOCUMENT) -> None:
    """Replace what stands between a document's markers of that name."""
    begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    old = path.read_text()
    assert len(pattern.findall(old)) == 1, f"{path.name} has one part '{name}'"
    new = f"{begin}\n\n{text}\n\n{end}"
    path.write_text(pattern.sub(lambda _: new, old))
