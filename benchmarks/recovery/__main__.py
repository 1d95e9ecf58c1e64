"""What durability costs, and how long recovery takes: `python -m benchmarks.recovery`.

A full run takes some 7 minutes, 10 GiB of memory and 12 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from benchmarks.dlrm.case import Case
from benchmarks.recovery.disk import DiskRates, measure
from benchmarks.recovery.jobs import (
    Killed,
    Watched,
    Window,
    kill_a_shard,
    ray_detection_s,
    snapshot_cost,
)
from ps.cluster import ray_cluster
from workers.recovery_config import Durability

REPORT = Path(__file__).parents[2] / "docs" / "benchmarks-recovery.md"
ROWS = 16_800_000
"""2.15 GB with Adagrad's slot: 1.08 GB on each of two shards."""
EPOCH_STEPS = 80


def main() -> None:
    """Run, print, and write the report if asked to."""
    args = _arguments()
    started, load = time.time(), os.getloadavg()[0]
    scale = 10 if args.quick else 1
    with tempfile.TemporaryDirectory(prefix="manta-recovery-", dir=args.folder) as folder:
        root = Path(folder)
        disk = measure(root, (1 << 30) // scale, 2 if args.quick else 5)
        print(_disk_lines(disk), flush=True)
        case = Case(root / "data", ROWS // scale, EPOCH_STEPS)
        case.prepare()
        with ray_cluster(None, 4):
            ray_s = ray_detection_s(3)
            costs = _costs(case, root, args.quick)
            kills = _kills(case, root, args.quick)
    lines = [
        _head((time.time() - started) / 60, load, case),
        "## Disk\n",
        _disk_lines(disk),
        "\n## Training while snapshots are written\n",
        _cost_lines(costs),
        "\n## A killed shard\n",
        _kill_lines(kills, ray_s),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        REPORT.write_text(text)
        print(f"wrote {REPORT}")


def _costs(case: Case, root: Path, quick: bool) -> dict[Durability, Watched]:
    epochs, every = (10, 200) if quick else (40, 400)
    modes: tuple[Durability, ...] = ("none", "snapshot", "log")
    costs = {}
    for mode in modes:
        costs[mode] = snapshot_cost(case, root, mode, epochs if mode == "snapshot" else 10, every)
        print(f"  {mode}: {costs[mode].median_rate():,.0f} examples/s", flush=True)
    return costs


def _kills(case: Case, root: Path, quick: bool) -> list[Killed]:
    kills = []
    for number in range(1 if quick else 3):
        for mode in ("log", "snapshot"):
            folder = root / f"kill-{number}"
            # The newest snapshot is complete, and some hundred steps old.
            kills.append(kill_a_shard(case, folder, mode, 10, 400, 520))
            print(f"  {mode}: {kills[-1].total_s:.1f} s", flush=True)
    return kills


def _head(minutes: float, load: float, case: Case) -> str:
    gigabytes = case.rows * 128 / 1e9
    return (
        "# Recovery: what it costs and how long it takes\n\n"
        f"`python -m benchmarks.recovery --write`, {datetime.now(UTC):%Y-%m-%d}, "
        f"{os.cpu_count()} cores, load before {load:.1f}, {minutes:.0f} minutes. The job is that "
        f"of benchmarks-dlrm.md with {case.rows:,} rows ({gigabytes:.2f} GB with slots), 2 shards, "
        "1 worker, Adagrad. GB are 10⁹ bytes.\n"
    )


def _disk_lines(disk: DiskRates) -> str:
    rows = [
        "| | plain, GB/s | ours, GB/s | ratio (median) | wanted |",
        "|---|---|---|---|---|",
        _disk_row("write with fsync", disk.writes),
        _disk_row("read, not in the page cache", disk.reads),
    ]
    note = (
        f"\nOne shard's part of a snapshot, {disk.size_bytes / 1e9:.2f} GB, cut, written and read "
        f"back, in turn with a plain sequential file of that size ({len(disk.writes)} rounds). "
        "Reading verifies checksums and puts rows and slots into a table's records."
    )
    return "\n".join(rows) + "\n" + note


def _disk_row(what: str, pairs: tuple[tuple[float, float], ...]) -> str:
    plain, ours = (median(pair[k] for pair in pairs) for k in (0, 1))
    return (
        f"| {what} | {plain:.2f} | {ours:.2f} | {DiskRates.ratio(pairs):.0%} "
        f"({min(o / p for p, o in pairs):.0%} to {max(o / p for p, o in pairs):.0%}) | 60% |"
    )


def _cost_lines(costs: dict[Durability, Watched]) -> str:
    windows = costs["snapshot"].windows()
    kept = median(w.during / w.beside for w in windows)
    none = costs["none"].median_rate()
    rates = [
        f"| {mode} | {watched.median_rate():,.0f} | {watched.median_rate() / none:.0%} |"
        for mode, watched in costs.items()
    ]
    return "\n".join(
        [
            f"{len(windows)} snapshots of {windows[0].size_bytes / 1e9:.2f} GB, one every 400 "
            f"steps. While one is written, training makes **{kept:.0%}** of the steps that it "
            "makes in spans as long before and after (median; wanted 85%). A snapshot takes "
            f"{median(w.seconds for w in windows):.1f} s "
            f"({median(w.size_bytes / w.seconds for w in windows) / 1e9:.2f} GB/s), from the cut "
            "until its manifest is in place; the threads that write have the lowest priority.\n",
            "| snapshot | seconds | GB/s | steps/s meanwhile | steps/s beside | ratio |",
            "|---|---|---|---|---|---|",
            *(_window_row(k + 1, w) for k, w in enumerate(windows)),
            "",
            "Median throughput of whole runs, one after the other:\n",
            "| durability | examples/s | of none |",
            "|---|---|---|",
            *rates,
        ]
    )


def _window_row(number: int, w: Window) -> str:
    return (
        f"| {number} | {w.seconds:.2f} | {w.size_bytes / w.seconds / 1e9:.2f} | {w.during:.1f} | "
        f"{w.beside:.1f} | {w.during / w.beside:.0%} |"
    )


def _kill_lines(kills: list[Killed], ray_s: object) -> str:
    assert isinstance(ray_s, list)
    return "\n".join(
        [
            "SIGKILL of one of two shards in the middle of training, until a step is made that had "
            "not been made before, in seconds. `restart`: a new process with its kernels; "
            "`restore`: the snapshot; `log`: the commit log; `replay`: what workers send or "
            "compute again.\n",
            "| durability | detect | restart | restore | log | replay | total | steps again |",
            "|---|---|---|---|---|---|---|---|",
            *(_kill_row(k) for k in kills),
            "",
            f"Median total with the log: "
            f"**{median(k.total_s for k in kills if k.durability == 'log'):.1f} s** (wanted under "
            "10 s). Ray itself says that a killed actor is dead after "
            f"{median(ray_s) * 1000:.0f} ms (median of {len(ray_s)}, a pending call); the driver's "
            "connection to the shard's data plane ends after "
            f"{median(k.detect_s for k in kills) * 1000:.0f} ms.",
        ]
    )


def _kill_row(k: Killed) -> str:
    r = k.recovery
    return (
        f"| {k.durability} | {k.detect_s:.3f} | {r.restart_s:.2f} | {r.restore_s:.2f} | "
        f"{r.log_s:.2f} | {r.replay_s:.2f} | {k.total_s:.2f} | {r.steps_replayed} |"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, fewer rounds")
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.name}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
