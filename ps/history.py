"""`History`: what the last versions of a shard were, for pulls that come late.

Per version, the rows that the next step changed, as they were; to read a version, the rows as they
are are overwritten by what has changed since, the newest change first. Reading is for recovery and
may be slow; keeping costs one copy of the touched rows per step. The whole table is kept per
version if its optimizer changes rows that no step touches (non-lazy Adam).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from ps.ragged import F32, I64


class OldRows:
    """Rows of one table that a step changed, as they were before it."""

    def __init__(self, index: I64 | None, rows: F32) -> None:
        """Take local rows int64 [n], or None for all, and their values float32 [n, D].

        A row that repeats must have the same values every time. Nobody may change the arrays.
        """
        self._index = index
        self._rows = rows
        self._order: I64 | None = None

    def put(self, local_rows: I64, out_ND: F32) -> None:
        """Overwrite out[i] if row `local_rows[i]` is among them."""
        if self._index is None:
            out_ND[:] = self._rows[local_rows]
            return
        if not self._index.size:
            return
        if self._order is None:  # most versions are never asked for
            self._order = np.argsort(self._index, kind="stable")
        places = np.searchsorted(self._index, local_rows, sorter=self._order)
        places = self._order[np.minimum(places, self._index.size - 1)]
        found = self._index[places] == local_rows
        out_ND[found] = self._rows[places[found]]


class OldVersion:
    """What a step changed, as it was."""

    def __init__(self, tables: Sequence[OldRows], dense: F32, state: F32) -> None:
        """Take the tables' rows, and copies of the dense values [p] and non-trainable ones [s]."""
        self.tables = tables
        self.dense = dense
        self.state = state


class History:
    """The last `num_versions` versions before the one that a shard is at."""

    def __init__(self, num_versions: int) -> None:
        self._versions: deque[OldVersion] = deque(maxlen=num_versions)

    def __len__(self) -> int:
        """How many versions back can be read."""
        return len(self._versions)

    def keep(self, version: OldVersion) -> None:
        """What the next step changes; the oldest version is forgotten if there are too many."""
        self._versions.append(version)

    def clear(self) -> None:
        """Forget all: the state is replaced."""
        self._versions.clear()

    def put_rows(self, table: int, behind: int, local_rows: I64, out_ND: F32) -> None:
        """Make rows as they are, float32 [n, D], those of `behind` versions ago.

        Args:
            table: place of the table.
            behind: from 1 to `len(self)`.
            local_rows: int64 [n]: which rows these are; a row may repeat.
            out_ND: changed.
        """
        for back in range(1, behind + 1):  # what an older version says is put over it
            self._versions[-back].tables[table].put(local_rows, out_ND)

    def flat(self, behind: int) -> tuple[F32, F32]:
        """(dense values [p], non-trainable values [s]) of so many versions ago."""
        version = self._versions[-behind]
        return version.dense, version.state
