"""`python -m benchmarks.scaling`: costs of this machine, the grid, predictions.

Without --calibrate, --grid or --predict: all three, some 7 minutes and 4 GiB. --grid and --predict
alone take the costs that were written last.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from benchmarks.scaling import predict, report
from benchmarks.scaling.calibrate import calibrated
from benchmarks.scaling.grid import Plan, measured
from benchmarks.scaling.model import Costs
from benchmarks.scaling.predict import TableText

_QUICK = Plan(dims=(64,), shards=(1, 2), rows=(1_000, 10_000), cell_s=0.1, rounds=1)


def main() -> None:
    """Run what is asked for."""
    options = _parsed()
    everything = not (options.calibrate or options.grid or options.predict)
    load = os.getloadavg()[0]
    if options.calibrate or everything:
        costs = calibrated(0.05 if options.quick else 0.25)
        _put("costs", [_about(load), *_markdown(report.costs_tables(costs))], options.write)
        if options.write:
            report.save_costs(costs)
    else:
        costs = report.load_costs()
    if options.grid or everything:
        _put("measured", [_about(load), *_grid(costs, _QUICK if options.quick else Plan())],
             options.write)  # fmt: skip
    if options.predict or everything:
        _put("predicted", _markdown(predict.tables(costs)), options.write)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--calibrate", action="store_true", help="measure the costs")
    parser.add_argument("--grid", action="store_true", help="measure steps, and compare")
    parser.add_argument("--predict", action="store_true", help="predict clusters")
    parser.add_argument("--quick", action="store_true", help="few cells, short")
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md and costs.json")
    return parser.parse_args()


def _grid(costs: Costs, plan: Plan) -> list[str]:
    cells, start = [], time.monotonic()
    for one in measured(plan):
        cells.append(report.Cell.of(one, costs))
        print(f"{time.monotonic() - start:4.0f} s  {one.case}: {cells[-1]}", flush=True)
    tables = [*report.grid_tables(cells), report.misses_table(cells)]
    return [report.summary(cells), *_markdown([t for t in tables if t.rows])]


def _about(load: float) -> str:
    return (
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {os.cpu_count()} cores, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}; load of the machine before it "
        f"began: {load:.1f}."
    )


def _markdown(tables: Sequence[TableText]) -> list[str]:
    return [table.markdown for table in tables]


def _put(name: str, paragraphs: Sequence[str], write: bool) -> None:
    text = "\n\n".join(paragraphs)
    print(text, flush=True)
    if write:
        report.write_block(name, text)


if __name__ == "__main__":
    main()
