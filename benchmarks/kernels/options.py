"""What a run was asked for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.kernels.cases import Size
from benchmarks.kernels.machine import rss_gib
from benchmarks.kernels.report import Cell


@dataclass(frozen=True)
class Options:
    """How long, on which tables."""

    cell_s: float
    """About how long to measure a cell."""
    tables: Sequence[Size]
    """Of the combine."""
    quick: bool
    """Smaller tables elsewhere."""
    start: float = field(default_factory=time.time)

    def done(self, part: str, cell: Cell) -> Cell:
        """Say that a cell is done."""
        print(f"{time.time() - self.start:5.0f} s, {rss_gib():.1f} GiB: {part}, {cell}", flush=True)
        return cell
