"""Which shard owns which row: id ↔ (shard, local row).

A table's rows are cut into slabs of R consecutive ids. Slab s lives on shard
`(s + offset) mod num_shards`, as that shard's `s div num_shards`-th slab of the table. R depends on
the table alone, never on the number of shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ps.kernels.dedup import distinct_by_shard
from ps.ragged import I64
from ps.spec import EmbeddingSpec, TableSpec

SLAB_BYTES = 128 * 1024
MIN_SLABS = 64


def slab_rows(table: TableSpec) -> int:
    """R: the power of two that fills about 128 KiB, less if the table had under 64 slabs then."""
    by_bytes = SLAB_BYTES // (4 * table.dim)
    by_count = table.vocabulary_size // MIN_SLABS
    return 1 << (max(1, min(by_bytes, by_count)).bit_length() - 1)


@dataclass(frozen=True, slots=True)
class Slab:
    """Consecutive ids that lie together on one shard."""

    first_id: int
    first_local_row: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one table's rows live."""

    vocabulary_size: int
    slab_rows: int
    """A power of two."""
    num_shards: int
    offset: int
    """The shard of slab 0, so that small tables do not all start on shard 0."""

    def slabs(self, shard: int) -> Iterator[Slab]:
        """The slabs of a shard, in the order of its local rows."""
        num_slabs = -(-self.vocabulary_size // self.slab_rows)
        first = (shard - self.offset) % self.num_shards
        for place, slab in enumerate(range(first, num_slabs, self.num_shards)):
            first_id = slab * self.slab_rows
            count = min(self.slab_rows, self.vocabulary_size - first_id)
            yield Slab(first_id, place * self.slab_rows, count)

    def num_local_rows(self, shard: int) -> int:
        """Rows of the table that a shard holds."""
        num_slabs = -(-self.vocabulary_size // self.slab_rows)
        first = (shard - self.offset) % self.num_shards
        rows = len(range(first, num_slabs, self.num_shards)) * self.slab_rows
        last_is_here = first < num_slabs and (num_slabs - 1 - first) % self.num_shards == 0
        return rows - (num_slabs * self.slab_rows - self.vocabulary_size) * last_is_here


@dataclass(frozen=True, slots=True, eq=False)
class DistinctRows:
    """The distinct ids of a batch for one table, ordered by shard."""

    ids: I64
    """int64 [U]."""
    local_rows: I64
    """int64 [U]: each id's row on its shard."""
    shard_splits: I64
    """int64 [num_shards + 1]: shard k owns entries splits[k]:splits[k + 1]."""

    def of_shard(self, shard: int) -> I64:
        """Local rows of one shard."""
        return self.local_rows[self.shard_splits[shard] : self.shard_splits[shard + 1]]


def distinct_rows(ids_N: I64, placement: Placement) -> tuple[DistinctRows, I64]:
    """Deduplicate ids and order them by shard.

    Returns:
        The distinct rows, and int64 [N]: the place of each given id among them.
    """
    (rows,), index = distinct_rows_of_tables(ids_N, np.array([0, ids_N.size]), [placement])
    return rows, index


def distinct_rows_of_tables(
    ids_N: I64, tables_T1: I64, placements: Sequence[Placement]
) -> tuple[list[DistinctRows], I64]:
    """`distinct_rows` of several tables at once; table t has ids `tables[t]:tables[t + 1]`.

    Returns:
        The distinct rows per table, and int64 [N]: the place of each id among those of its table.
    """
    slab_rows = np.array([p.slab_rows for p in placements], dtype=np.int64)
    offsets = np.array([p.offset for p in placements], dtype=np.int64)
    (num_shards,) = {p.num_shards for p in placements}
    ids, local, distinct, splits, index = distinct_by_shard(
        ids_N, tables_T1, slab_rows, offsets, num_shards
    )
    bounds = pairwise(distinct.tolist())
    rows = [DistinctRows(ids[a:b], local[a:b], splits[t]) for t, (a, b) in enumerate(bounds)]
    return rows, index


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a job lives: table rows, and slices of the flat dense vectors."""

    placements: dict[str, Placement]
    num_shards: int
    dense_splits: tuple[int, ...]
    """Bounds of the shards' slices of the trainable dense vector, num_shards + 1 of them."""
    state_splits: tuple[int, ...]
    """The same for non-trainable dense values (batch-norm statistics)."""

    @classmethod
    def of(
        cls, spec: EmbeddingSpec, num_shards: int, dense_size: int = 0, state_size: int = 0
    ) -> Layout:
        """The layout of a job."""
        placements = {
            table.name: Placement(
                table.vocabulary_size, slab_rows(table), num_shards, i % num_shards
            )
            for i, table in enumerate(spec.tables)
        }
        return cls(
            placements,
            num_shards,
            div_splits(dense_size, num_shards),
            div_splits(state_size, num_shards),
        )


def div_splits(size: int, parts: int) -> tuple[int, ...]:
    """Bounds of `parts` contiguous slices, the first `size mod parts` one longer.

    >>> div_splits(13, 5)
    (0, 3, 6, 9, 11, 13)
    """
    base, longer = divmod(size, parts)
    return tuple(k * base + min(k, longer) for k in range(parts + 1))


def slices(vector: np.ndarray, splits: Sequence[int]) -> list[np.ndarray]:
    """Cut a flat vector at the given bounds."""
    return [vector[a:b] for a, b in pairwise(splits)]
