"""DLRM from end to end, Manta against TensorFlow: `python -m benchmarks.dlrm`.

A full run takes some 5 minutes and 5 GB. Both sides run in rounds, each in processes of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks.dlrm import report
from benchmarks.dlrm.case import CHUNK, ROWS, Case
from benchmarks.dlrm.result import SKIPPED, Run
from benchmarks.dlrm.rounds import PARTS, run_round
from benchmarks.kernels.report import print_table, targets_table

REPORT = Path(__file__).parents[2] / "docs" / "benchmarks-dlrm.md"


def main() -> None:
    """Run, print, and write the report if asked to."""
    args = _arguments()
    started, load = time.time(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="manta-dlrm-") as folder:
        case = Case(Path(folder) / "data", ROWS // 10 if args.quick else ROWS, args.steps)
        case.prepare()
        runs: list[Run] = []
        for number in range(1 if args.quick else 2):
            runs += run_round(case, args.only, whole=number == 0 and not args.quick)
    console = Console(width=None if sys.stdout.isatty() else 160)
    found = report.section(runs)
    for table in (*found.tables, targets_table([found])):
        print_table(console, table)
    if args.write:
        head = report.about((time.time() - started) / 60, load)
        REPORT.write_text(report.markdown(head, found))
        console.print(f"wrote {REPORT}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dlrm", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, default=8 * CHUNK, help="of every run")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, one short round")
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.name}")
    args = parser.parse_args()
    if args.steps < (SKIPPED + 1) * CHUNK:
        parser.error(f"--steps must be at least {(SKIPPED + 1) * CHUNK}")
    return args


if __name__ == "__main__":
    main()
