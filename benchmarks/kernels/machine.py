"""Where and with what a run was made."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.kernels import limit

_PACKAGES = (
    "numpy", "numba", "tensorflow", "keras", "torch", "fbgemm-gpu-cpu", "pandas",
)  # fmt: skip


def about(minutes: float, load: float) -> list[str]:
    """The head of the report: paragraphs of Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return [
        "<!-- Written by `make bench-kernels`; do not edit. -->",
        "",
        "Written by `make bench-kernels`, which measures everything in one run on one machine:",
        "read the ratios. The contenders of a cell first show that they give the same numbers;",
        "then they run in turn, in a new random order each round, each on the next of several",
        "batches, so that nobody finds its rows in the caches. Figures are medians, with the 10th",
        "and 90th percentile of ours in brackets; in brackets behind a peer's figure is how many",
        "times faster Manta is (the ratio of the medians). A target stands beside the worst of its",
        "cells.",
        "",
        f"- Machine: {cpu()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB, "
        f"{platform.system()} {platform.release()}, huge pages `{huge_pages()}`",
        f"- Python {platform.python_version()}, {versions}, {limit.describe()}",
        f"- Commit {commit()}, {datetime.now(UTC):%Y-%m-%d}, {minutes:.0f} minutes, at most "
        f"{_peak_gib():.1f} GiB; load of the machine before it began: {load:.1f}",
    ]


def rss_gib() -> float:
    """Memory that the process has now."""
    found = re.search(r"VmRSS:\s+(\d+)", _read("/proc/self/status"))
    return int(found[1]) / 2**20 if found else 0.0


def huge_percent(address: int) -> float:
    """How much of the mapping at an address is on huge pages."""
    inside = False
    sizes = {}
    for line in _read("/proc/self/smaps").splitlines():
        if bounds := re.match(r"(\w+)-(\w+) ", line):
            if inside:
                break
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and (size := re.match(r"(\w+):\s+(\d+) kB", line)):
            sizes[size[1]] = int(size[2])
    return 100 * sizes["AnonHugePages"] / sizes["Rss"] if inside else 0.0


def cpu() -> str:
    """The processor's name."""
    found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    return found[1] if found else platform.machine()


def memory_gib() -> float:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def huge_pages() -> str:
    """When the system gives huge pages."""
    found = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return found[1] if found else "unknown"


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def commit() -> str:
    """What is checked out."""

    def git(*args: str) -> str:
        command = ["git", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
