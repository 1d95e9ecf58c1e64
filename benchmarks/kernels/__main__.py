"""Run all kernels against their peers: `make bench-kernels`, or `python -m benchmarks.kernels`.

A full run takes some 20 minutes and 10 GB, and writes `docs/benchmarks.md`; `--only`, `--tables`
and `--quick` make it shorter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.kernels import cases, machine
from benchmarks.kernels.options import Options
from benchmarks.kernels.parts import PARTS, run_apart
from benchmarks.kernels.report import markdown, print_table, targets_table

TABLES = {size.key: size for size in cases.TABLES}
QUICK_TABLES = ("1Mx16", "1Mx64")
REPORT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def main() -> None:
    """Run, print, and write the report of a full run."""
    args = _arguments()
    options = Options(
        cell_s=0.7 if args.quick else 3.0,
        tables=[TABLES[key] for key in args.tables or (QUICK_TABLES if args.quick else TABLES)],
        quick=args.quick,
    )
    load = os.getloadavg()[0]
    console = Console(width=None if sys.stdout.isatty() else 160)
    sections = []
    for part in args.only:
        section = run_apart(part, options)
        sections.append(section)
        for table in section.tables:
            print_table(console, table)
    print_table(console, targets_table(sections))
    if args.write or (args.only == PARTS and not args.tables and not args.quick):
        minutes = (time.time() - options.start) / 60
        about = machine.about(minutes, load)
        REPORT.write_text(markdown("Benchmarks of the kernels", about, sections))
        console.print(f"wrote {REPORT}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tables", nargs="+", choices=TABLES, help="of the combine")
    parser.add_argument("--quick", action="store_true", help="small tables, few runs")
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.name} in any case")
    return parser.parse_args()


if __name__ == "__main__":
    main()
