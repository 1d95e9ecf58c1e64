"""What one run of one contender gave."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from benchmarks.dlrm.case import OptimizerName

SKIPPED = 2
"""Chunks at the start that are not counted: compilation, first touch of memory, full queues."""


@dataclass(frozen=True)
class Run:
    """One contender, once."""

    who: str
    optimizer: OptimizerName
    rates: list[float]
    """Examples per second, chunk by chunk."""
    loss: float
    """Mean of the first chunk."""
    parts: dict[str, float] = field(default_factory=dict)
    """Parts of a worker's time by cause, behind the skipped chunks."""

    @property
    def counted(self) -> list[float]:
        """The rates that count."""
        return self.rates[SKIPPED:]


def rate(runs: list[Run]) -> float:
    """Examples per second: the median over the chunks of several runs of one contender."""
    return float(np.median([r for run in runs for r in run.counted]))
