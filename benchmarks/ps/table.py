"""The table, its two shards and the batches: the same for every contender.

With `ours`, the only module that knows the product's own functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ps.initializers import RandomUniform, table_key
from ps.kernels.combine import gather_rows
from ps.memory import empty
from ps.optimizers import SGD
from ps.partition import DistinctRows, Layout, distinct_rows
from ps.ragged import F32, I64
from ps.rowstore import RowStore
from ps.spec import EmbeddingSpec, TableSpec

NAME, NUM_ROWS, DIM = "table", 1_000_000, 64
SHARDS = 2
RATE = 1.0
"""So that those whose update has no rate in it need not multiply."""
SIZES = (1_000, 10_000, 100_000)
"""Distinct rows of a step."""
_ROWS_IN_TURN = 320_000
"""Of all batches of a size: 80 MB of rows, where the caches have 32. (Of 1,000 rows: 16 MB.)"""
_MAX_BATCHES = 64
_SLABS_AT_ONCE = 64

SPEC = EmbeddingSpec(
    (
        TableSpec(
            name=NAME,
            vocabulary_size=NUM_ROWS,
            dim=DIM,
            combiner="sum",
            initializer=RandomUniform(),
            optimizer=SGD(RATE),
        ),
    ),
    (),
)
LAYOUT = Layout.of(SPEC, SHARDS)


@dataclass(frozen=True, eq=False)
class Batch:
    """Distinct rows, ordered by shard, with a gradient for each."""

    rows: DistinctRows
    grads: F32

    @property
    def local_rows(self) -> list[I64]:
        """Rows of each shard."""
        return [self.rows.of_shard(shard) for shard in range(SHARDS)]

    def parts(self, array: F32) -> list[F32]:
        """What each shard has of an array with one entry per row."""
        return [array[a:b] for a, b in pairwise(self.rows.shard_splits)]


def num_batches(size: int) -> int:
    """How many batches of a size take turns."""
    return min(_MAX_BATCHES, _ROWS_IN_TURN // size)


def make_batches(sizes: Sequence[int]) -> dict[int, list[Batch]]:
    """Batches by size, of which no two share a row; the same in every process."""
    rng = np.random.default_rng(0)
    grads = rng.random((max(sizes) + 10_000, DIM), dtype=np.float32)
    grads -= np.float32(0.5)
    placement = LAYOUT.placements[NAME]
    batches = {}
    for size in sizes:
        ids = np.random.default_rng(size).permutation(NUM_ROWS)
        batches[size] = [
            Batch(
                distinct_rows(ids[i * size : (i + 1) * size].copy(), placement)[0],
                grads[37 * i : 37 * i + size],
            )
            for i in range(num_batches(size))
        ]
    return batches


def most_rows(batches: Sequence[Batch]) -> int:
    """The most rows that one shard has of a batch."""
    return int(max(np.diff(b.rows.shard_splits).max() for b in batches))


def initial_rows(shard: int) -> Iterator[tuple[slice, F32]]:
    """(local rows, their first values) of a shard, many at a time."""
    table, placement = SPEC.tables[0], LAYOUT.placements[NAME]
    key = table_key(0, NAME)
    slabs = list(placement.slabs(shard))
    for i in range(0, len(slabs), _SLABS_AT_ONCE):
        some = slabs[i : i + _SLABS_AT_ONCE]
        ids = np.concatenate([np.arange(s.first_id, s.first_id + s.num_rows) for s in some])
        first = some[0].first_local_row
        yield slice(first, first + ids.size), table.initializer.rows(key, ids, DIM)


def local_rows(shard: int) -> int:
    """Rows of a shard."""
    return LAYOUT.placements[NAME].num_local_rows(shard)


def fill(rows: F32, shard: int) -> None:
    """Give the rows of a shard their first values."""
    for span, values in initial_rows(shard):
        rows[span] = values


class Store:
    """A shard's rows, with the product's kernels: for those who differ in the transport only."""

    def __init__(self, shard: int) -> None:
        self._store = RowStore.zeros((local_rows(shard), DIM), SGD(RATE))
        fill(self._store.rows, shard)
        self._out: F32 = empty((0, DIM))

    def gather(self, local: I64, out: F32 | None = None) -> F32:
        """Rows of a shard, in `out` or in memory that the next call uses again."""
        if out is None:
            if len(self._out) < local.size:
                self._out = empty((local.size, DIM))
            out = self._out[: local.size]
        gather_rows(self._store.rows, local, out)
        return out

    def apply(self, local: I64, grads: F32) -> None:
        """One step of SGD."""
        self._store.apply(local, grads, RATE, distinct=True)
