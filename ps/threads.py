"""More than one core for a big piece of work: the same kernels on disjoint parts of it.

Kernels release the GIL, so plain threads do. A part owns what it writes (bags, rows), and nothing
is summed across parts: results have the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property, partial
from itertools import pairwise

import numpy as np

from ps.errors import ConfigError
from ps.kernels.combine import combine_rows
from ps.kernels.combine import gather_rows as gather_on_one
from ps.kernels.rows import QuantizedRows
from ps.ragged import F32, I64

MIN_PART_BYTES = 1 << 18
"""A thread is woken in some 20 µs, in which one core reads about this much."""


class Threads:
    """`count` threads, the caller's among them; the others are started when first needed."""

    def __init__(self, count: int = 1) -> None:
        """Take any number from 1.

        Raises:
            ConfigError: fewer.
        """
        if count < 1:
            raise ConfigError(f"threads must be at least 1, got {count}")
        self.count = count

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.count - 1, thread_name_prefix="kernels")

    def parts(self, size: int, minimum: int) -> list[slice]:
        """Cut range(size) evenly, one part per thread or fewer, each of at least `minimum`.

        >>> Threads(2).parts(10, 3)
        [slice(0, 5, None), slice(5, 10, None)]
        >>> Threads(2).parts(5, 3)
        [slice(0, 5, None)]
        """
        if self.count == 1:
            return [slice(0, size)]
        count = max(1, min(self.count, size // max(1, minimum)))
        return [slice(size * k // count, size * (k + 1) // count) for k in range(count)]

    def run(self, calls: Sequence[Callable[[], object]]) -> None:
        """Run calls at the same time and wait for all of them; raises what the first raised."""
        first, *others = calls
        if not others:
            first()
            return
        futures = [self._pool.submit(call) for call in others]
        try:
            first()
        finally:
            wait(futures)
        for future in futures:
            future.result()


ONE_THREAD = Threads()


def combine(
    threads: Threads,
    rows: F32 | QuantizedRows,
    index_N: I64,
    splits_B1: I64,
    weights_N: F32,
    combiner: int,
    out_BD: F32,
) -> None:
    """`ps.kernels.combine.combine_rows`, cut between bags into parts of as many entries."""
    parts = threads.parts(index_N.size, MIN_PART_BYTES // (4 * out_BD.shape[1]) + 1)
    if len(parts) == 1:
        combine_rows(rows, index_N, splits_B1, weights_N, combiner, out_BD)
        return
    first_bags = np.searchsorted(splits_B1, [part.start for part in parts])
    bounds = pairwise([*first_bags.tolist(), splits_B1.size - 1])
    threads.run(
        [
            partial(combine_rows, rows, index_N, splits_B1[a : b + 1], weights_N, combiner, out)
            for a, b in bounds
            if (out := out_BD[a:b]).size
        ]
    )


def gather_rows(threads: Threads, rows: F32 | QuantizedRows, index_N: I64, out_ND: F32) -> None:
    """`ps.kernels.combine.gather_rows`, cut between rows."""
    parts = threads.parts(index_N.size, MIN_PART_BYTES // (4 * out_ND.shape[1]) + 1)
    threads.run([partial(gather_on_one, rows, index_N[p], out_ND[p]) for p in parts])
