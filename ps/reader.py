"""Reads of one table by checked ids: gathered, combined, or placed in sequences.

A table is one array, or a list of row shards: consecutive ranges of rows in order, TensorFlow's
"div" partitioning. Shards are never joined: the rows that a lookup needs are gathered first, as
they are from an array that is not C-contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from ps.config import Combiner
from ps.errors import IdRangeError, InputError
from ps.kernels.combine import COMBINER_CODES, scatter_sequences
from ps.kernels.dedup import distinct_ids, first_out_of_range
from ps.memory import empty
from ps.ragged import F32, I64, Ragged
from ps.threads import ONE_THREAD, Threads, combine, gather_rows

Rows = F32 | Sequence[F32]
"""float32 [V, D], or its row shards."""

_NO_WEIGHTS: F32 = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class TableReader:
    """A table as one feature sees it."""

    feature: str
    """For error messages."""
    table: str
    """For error messages."""
    rows: Rows
    threads: Threads = ONE_THREAD
    """That big reads are cut between."""

    @property
    def num_rows(self) -> int:
        """V, which bounds the ids."""
        rows = self.rows
        return len(rows) if isinstance(rows, np.ndarray) else sum(map(len, rows))

    @property
    def dim(self) -> int:
        """D, length of a row."""
        rows = self.rows
        return int((rows if isinstance(rows, np.ndarray) else rows[0]).shape[1])

    def check(self, ids_N: I64) -> None:
        """Refuse ids outside the table.

        Raises:
            IdRangeError: naming the first of them.
        """
        num_rows = self.num_rows
        bad = first_out_of_range(ids_N, num_rows)
        if bad >= 0:
            raise IdRangeError(self.feature, self.table, int(ids_N[bad]), num_rows)

    def gather(self, ids_N: I64) -> F32:
        """float32 [N, D]: the row of every id, which is checked."""
        self.check(ids_N)
        rows, index_N = self._local(ids_N)
        out_ND: F32 = empty((ids_N.size, self.dim))
        gather_rows(self.threads, rows, index_N, out_ND)
        return out_ND

    def combine(self, bag: Ragged, combiner: Combiner) -> F32:
        """float32 [B, D]: one vector per example; every id is checked, every weight counts."""
        self.check(bag.ids)
        rows, index_N = self._local(bag.ids)
        weights = _NO_WEIGHTS if bag.weights is None else bag.weights
        out_BD: F32 = empty((bag.num_examples, self.dim))
        code = COMBINER_CODES[combiner]
        combine(self.threads, rows, index_N, bag.row_splits, weights, code, out_BD)
        return out_BD

    def place(self, bag: Ragged, length: int) -> F32:
        """float32 [B, L, D]: the first L rows of each example, then zeros.

        The ids that are read must have been checked.
        """
        rows, index_N = self._local(bag.ids)
        out_BLD: F32 = empty((bag.num_examples, length, self.dim))
        scatter_sequences(rows, index_N, bag.row_splits, out_BLD)
        return out_BLD

    def _local(self, ids_N: I64) -> tuple[F32, I64]:
        """An array that holds the rows of the ids, and where in it they are."""
        shards = (self.rows,) if isinstance(self.rows, np.ndarray) else self.rows
        if len(shards) == 1 and shards[0].flags.c_contiguous:
            return shards[0], ids_N
        unique_U, index_N = distinct_ids(ids_N)
        bounds = np.cumsum([0, *map(len, shards)])
        shard_U = np.searchsorted(bounds, unique_U, side="right") - 1
        found_UD = np.zeros((unique_U.size, self.dim), dtype=np.float32)
        for k, shard in enumerate(shards):
            here = shard_U == k
            found_UD[here] = shard[unique_U[here] - bounds[k]]
        return found_UD, index_N


def checked_rows(table: str, rows: object) -> Rows:
    """Rows that a lookup can read, uncopied.

    Raises:
        InputError: not float32 [V, D], nor a list or tuple of such arrays of one D.
    """
    shards = rows if isinstance(rows, list | tuple) else (rows,)
    for shard in shards:
        if not isinstance(shard, np.ndarray) or shard.ndim != 2 or shard.dtype != np.float32:
            shown = f"{shard.dtype} {list(shard.shape)}" if isinstance(shard, np.ndarray) else shard
            raise InputError(f"table '{table}': rows must be a float32 [V, D] array, got {shown!r}")
    widths = {shard.shape[1] for shard in shards}
    if len(widths) != 1:
        raise InputError(f"table '{table}': row shards must have one D, got {sorted(widths)}")
    return cast("Rows", rows)
