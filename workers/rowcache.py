"""`RowCache`: rows that a worker keeps from earlier pulls, so that hot ones are pulled less often.

Async mode only: a kept row is what its shard had up to `max_age` steps of this worker ago, on top
of the staleness that the mode allows. Pushes are not applied to kept rows, the worker's own
neither: a row learns of them when it is pulled again. Only pulls get smaller; pushes name all rows
as before.

Which rows are kept depends on the sequence of batches alone. One thread uses a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ps.errors import ConfigError
from ps.kernels.rowcache import copy_rows, split_fresh
from ps.keymap import KeyMap
from ps.memory import empty, zeros
from ps.partition import DistinctRows
from ps.ragged import F32, I64
from ps.spec import EmbeddingSpec

_FREE = -1
_SEEN_AT_ONCE = 1024
"""Rows that the hand looks at in one go, at least."""


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """What a cache has of a batch; the rest is to be pulled."""

    step: int
    missing: DistinctRows
    """The rows to pull, M of U, in their order."""
    places: I64
    """int64 [M]: place of each among the rows of the batch."""
    rows: F32
    """float32 [U, D]: the kept rows; anything where rows are missing."""


class RowCache:
    """Kept rows of one table."""

    def __init__(self, dim: int, capacity: int, max_age: int) -> None:
        """An empty cache.

        Args:
            dim: D, length of a row.
            capacity: most rows that it keeps.
            max_age: steps after its pull that a row may still be read at; 0 for the same step only.

        Raises:
            ConfigError: no room for a row, or an age below 0.
        """
        if capacity < 1:
            raise ConfigError(f"a cache needs room for at least 1 row, got {capacity}")
        if max_age < 0:
            raise ConfigError(f"the age of cached rows must be at least 0 steps, got {max_age}")
        self.hits = self.misses = self.evictions = 0
        """Distinct rows that were there; that had to be pulled; that made room for others."""
        self._capacity = capacity
        self._max_age = max_age
        self._map = KeyMap(capacity)
        self._rows: F32 = zeros((capacity, dim))
        self._ids: I64 = np.zeros(capacity, dtype=np.int64)
        self._pulled_at: I64 = np.full(capacity, _FREE, dtype=np.int64)
        self._used = np.zeros(capacity, dtype=np.bool_)
        self._hand = 0

    def __len__(self) -> int:
        """How many rows it keeps, fresh and old."""
        return len(self._map)

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows that it has room for."""
        return self._rows.nbytes

    def lookup(self, distinct: DistinctRows, step: int) -> Lookup:
        """Copy the rows that may be read at `step`, and say which must be pulled for it."""
        kept = self._map.find(distinct.ids)
        fresh, places = np.empty_like(kept), np.empty_like(kept)
        oldest = step - self._max_age
        num_fresh = split_fresh(kept, self._pulled_at, oldest, self._used, fresh, places)
        fresh, places = fresh[:num_fresh], places[: kept.size - num_fresh]
        rows: F32 = empty((kept.size, self._rows.shape[1]))
        copy_rows(self._rows, kept[fresh], rows, fresh)
        self.hits += fresh.size
        self.misses += places.size
        splits = np.searchsorted(places, distinct.shard_splits)
        missing = DistinctRows(distinct.ids[places], distinct.local_rows[places], splits)
        return Lookup(step, missing, places, rows)

    def fill(self, lookup: Lookup, pulled: F32) -> F32:
        """float32 [U, D]: the rows of the batch, once the missing ones, [M, D], are there.

        They are kept from now on. Lookups are filled in the order of their steps.
        """
        copy_rows(pulled, np.arange(len(pulled)), lookup.rows, lookup.places)
        self._keep(lookup.missing.ids, pulled, lookup.step)
        return lookup.rows

    def _keep(self, ids_M: I64, rows_MD: F32, step: int) -> None:
        ids = ids_M[: self._capacity]
        # As if none were there yet: those that are have aged, and go when the hand comes by.
        excess = len(self) + ids.size - self._capacity
        if excess > 0:
            self._evict(excess, step)
        places, _ = self._map.insert(ids)
        copy_rows(rows_MD, np.arange(ids.size), self._rows, places)
        self._ids[places] = ids
        self._pulled_at[places] = step

    def _evict(self, num_rows: int, step: int) -> None:
        """Drop rows in turn, but those read since their last turn, if they may be read still."""
        while num_rows > 0:
            seen = slice(self._hand, self._hand + max(_SEEN_AT_ONCE, 2 * num_rows))
            pulled_at = self._pulled_at[seen]
            goes = (pulled_at != _FREE) & ~(self._used[seen] & (step - pulled_at <= self._max_age))
            gone = self._hand + np.flatnonzero(goes)[:num_rows]
            stop = int(gone[-1]) + 1 if gone.size == num_rows else min(seen.stop, self._capacity)
            self._used[self._hand : stop] = False  # so those that come to these places are unused
            self._map.erase(self._ids[gone])
            self._pulled_at[gone] = _FREE
            self._hand = stop % self._capacity
            self.evictions += gone.size
            num_rows -= gone.size


def row_caches(spec: EmbeddingSpec, num_rows: int, max_age: int) -> dict[str, RowCache]:
    """A cache per table, each with room for `num_rows` rows, or all rows of a smaller table.

    Raises:
        ConfigError: as for `RowCache`.
    """
    return {
        table.name: RowCache(table.dim, min(num_rows, table.vocabulary_size), max_age)
        for table in spec.tables
    }


def looked_up(
    caches: Mapping[str, RowCache], distinct: Mapping[str, DistinctRows], step: int
) -> dict[str, Lookup]:
    """What the caches have of a batch, by table."""
    return {name: cache.lookup(distinct[name], step) for name, cache in caches.items()}


def filled(
    caches: Mapping[str, RowCache], lookups: Mapping[str, Lookup], pulled: Mapping[str, F32]
) -> dict[str, F32]:
    """The rows of a batch by table, from what was kept and what was pulled."""
    return {name: cache.fill(lookups[name], pulled[name]) for name, cache in caches.items()}
