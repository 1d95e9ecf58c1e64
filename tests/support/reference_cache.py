"""The plain twins of `ps.kernels.rowcache`, and of `workers.rowcache.RowCache` with a dict."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ps.ragged import F32, I64
from tests.support.reference_map import ReferenceMap


def split_fresh(
    kept_U: I64, pulled_at_C: I64, oldest: int, used_C: npt.NDArray[np.bool_]
) -> tuple[I64, I64, npt.NDArray[np.bool_]]:
    """(places of fresh rows, places of the others, the marks of the cache's rows)."""
    fresh_U = np.array([row >= 0 and pulled_at_C[row] >= oldest for row in kept_U], dtype=bool)
    used = used_C.copy()
    used[kept_U[fresh_U]] = True
    return np.flatnonzero(fresh_U), np.flatnonzero(~fresh_U), used


def copy_rows(rows_VD: F32, from_N: I64, out_WD: F32, to_N: I64) -> F32:
    """float32 [W, D]: out with rows copied into it, in order."""
    out = out_WD.copy()
    for source, target in zip(from_N, to_N, strict=True):
        out[target] = rows_VD[source]
    return out


class ReferenceCache:
    """What a `RowCache` keeps and gives."""

    def __init__(self, capacity: int, max_age: int) -> None:
        self.capacity, self.max_age = capacity, max_age
        self.map = ReferenceMap()
        self.rows: dict[int, F32] = {}
        self.pulled_at: dict[int, int] = {}
        self.used: set[int] = set()
        self.hand = 0
        self.hits = self.misses = self.evictions = 0

    def __len__(self) -> int:
        return len(self.map)

    def lookup(self, ids_U: I64, step: int) -> dict[int, F32]:
        """The kept rows that may be read, by id."""
        found = {i: self.rows[i] for i in ids_U.tolist() if i in self.rows and self.fresh(i, step)}
        self.used |= found.keys()
        self.hits += len(found)
        self.misses += ids_U.size - len(found)
        return found

    def fill(self, ids_M: I64, pulled_MD: F32, step: int) -> None:
        """Keep what was pulled."""
        ids_M = ids_M[: self.capacity]
        excess = len(self) + ids_M.size - self.capacity
        while excess > 0:
            excess -= self.turn(step)
        self.map.insert(ids_M)
        for i, row in zip(ids_M.tolist(), pulled_MD, strict=False):
            self.rows[i], self.pulled_at[i] = row, step

    def fresh(self, i: int, step: int) -> bool:
        return step - self.pulled_at[i] <= self.max_age

    def turn(self, step: int) -> int:
        """Drop the row under the hand unless it gets a second chance; how many that are."""
        here = [i for i, place in self.map.row_of.items() if place == self.hand]
        self.hand = (self.hand + 1) % self.capacity
        gone = [i for i in here if i not in self.used or not self.fresh(i, step)]
        self.used.difference_update(here)
        for i in gone:
            del self.rows[i], self.pulled_at[i]
            self.map.erase(np.array([i]))
        self.evictions += len(gone)
        return len(gone)
