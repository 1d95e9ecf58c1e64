"""Who is timed, and how: in turn, in random order, medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_TURN_S = 0.02
"""A fast contender runs several times in its turn, up to about this long."""


@dataclass(frozen=True)
class Contender:
    """One way of doing the work: a call per batch, so that no run finds its rows in the cache."""

    name: str
    calls: Sequence[Callable[[], object]]
    before: Callable[[int], object] | None = None
    """Done before a run of call i, outside the measured time."""

    def run(self, i: int) -> object:
        """The result of call i, not measured."""
        if self.before:
            self.before(i)
        return self.calls[i]()

    def seconds(self, i: int) -> float:
        """How long call i takes now."""
        if self.before:
            self.before(i)
        start = time.perf_counter()
        self.calls[i]()
        return time.perf_counter() - start


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender's runs: the median, the 10th and the 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        low, median, high = np.percentile(seconds, [10, 50, 90])
        return cls(float(median), float(low), float(high))


def interleaved(
    contenders: Sequence[Contender], budget_s: float, rounds: tuple[int, int] = (5, 25)
) -> dict[str, Timing]:
    """Time all contenders in rounds: each has its turn in each round, in a new random order.

    Which batch comes next goes on from contender to contender, so that a run's rows are not those
    that the run before it has left in the caches.
    """
    rng = np.random.default_rng(0)
    num_batches = len(contenders[0].calls)
    once = [min(c.seconds(0), c.seconds(num_batches - 1)) for c in contenders]
    repeats = [int(np.clip(_TURN_S / s, 1, 4)) for s in once]
    round_s = sum(r * s for r, s in zip(repeats, once, strict=True))
    seconds: list[list[float]] = [[] for _ in contenders]
    batch = 0
    for _ in range(int(np.clip(budget_s / round_s, *rounds))):
        for c in rng.permutation(len(contenders)):
            for _ in range(repeats[c]):
                seconds[c].append(contenders[c].seconds(batch % num_batches))
                batch += 1
    return {c.name: Timing.of(s) for c, s in zip(contenders, seconds, strict=True)}


def best_of(variants: Sequence[Contender]) -> Contender:
    """The variant with the lowest median of a few interleaved runs."""
    timings = interleaved(variants, budget_s=0.5, rounds=(3, 10))
    return min(variants, key=lambda v: timings[v.name].median)
