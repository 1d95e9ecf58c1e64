"""`Cut`: the state of a shard at one moment, read piece by piece while the shard goes on.

Copy on write, row by row: before a record changes the first time after the cut, and before its
piece was copied, it is saved aside. So the memory that a cut takes is what training touches while
it is read, and never more than the tables. A step of an optimizer that changes rows nobody touched
(non-lazy Adam) saves all that is left of its table at once.

Most of the copying may be another thread's: it copies rows as they are, changing or not, and the
thread that owns the shard then puts in those that were saved since the cut. Whatever was read half
changed is among them. All but `copy_piece` is for the owner's thread; there are no locks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ps.errors import ProtocolError
from ps.kernels.records import U32, patch_saved, save_records, split_records
from ps.memory import empty, zeros
from ps.ragged import F32, I64
from ps.rowstore import FlatStore, RowStore


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Consecutive local rows of one table, as copies."""

    table: int
    """Place of the table in `EmbeddingSpec.tables`."""
    rows: F32
    """float32 [n, D]."""
    slots: dict[str, F32]
    """float32 [n, D] each, C-contiguous as the rows are."""
    arrays: F32
    """float32 [1 + slots, n, D]: what both are views of."""


class Cut:
    """All of a shard at one version. The shard calls `save`; whoever writes it the rest."""

    def __init__(
        self,
        version: int,
        fences: tuple[int, ...],
        tables: Sequence[RowStore],
        dense: FlatStore,
        state: F32,
        entries_applied: int,
    ) -> None:
        self.version = version
        self.fences = fences
        """Per worker: the step that the shard expects next."""
        self.entries_applied = entries_applied
        """`LogEntry.version` of the last one that the state contains."""
        values = dense.arrays[:, : dense.values.size].copy()
        self.dense: F32 = values[0]
        """float32 [p]: a copy, as everything here."""
        self.dense_slots: dict[str, F32] = dict(
            zip(dense.optimizer.slot_names, values[1:], strict=True)
        )
        self.state = state.copy()
        """float32 [s]: the non-trainable values."""
        self._tables = [_TableCut(store) for store in tables]
        self._table = 0
        self._closed = False

    @property
    def is_open(self) -> bool:
        """Whether there is something left to copy, so that rows must be saved."""
        return not self._closed and any(not table.is_over for table in self._tables[self._table :])

    @property
    def saved_bytes(self) -> int:
        """Memory held for saved rows."""
        return sum(table.saved_bytes for table in self._tables)

    def save(self, table: int, index: I64 | None) -> None:
        """Rows int64 [n] of a table are about to change, or all of them: keep what is not copied.

        Rows may repeat.
        """
        if not self._closed:
            self._tables[table].save(index)

    def next_piece(self, max_bytes: int = 2 << 20) -> Piece | None:
        """Copy the next rows of a table with their slots; None at the end.

        They take at most so many bytes, or are one row. Tables come in order, and their local rows
        in order; a table without any has no piece.

        Raises:
            ProtocolError: the cut was closed, which is not its end.
        """
        piece = self.copy_piece(max_bytes)
        if piece is not None:
            self.seal(piece)
        return piece

    def copy_piece(self, max_bytes: int = 2 << 20) -> Piece | None:
        """`next_piece` but for what `seal` does, in any one thread, while the owner's goes on.

        Raises:
            ProtocolError: see `next_piece`.
        """
        self._check_open()
        place = self._table
        while place < len(self._tables) and self._tables[place].is_over:
            place += 1
        if place == len(self._tables):
            self._table = place
            return None
        arrays, names = self._tables[place].copied_rows(max_bytes)
        return Piece(place, arrays[0], dict(zip(names, arrays[1:], strict=True)), arrays)

    def seal(self, piece: Piece) -> None:
        """Make the piece from `copy_piece` what the rows were at the cut; the next one may follow.

        Raises:
            ProtocolError: see `next_piece`.
        """
        self._check_open()
        self._table = piece.table
        self._tables[piece.table].pass_rows(piece.arrays)

    def _check_open(self) -> None:
        if self._closed:
            raise ProtocolError(f"the cut of version {self.version} was given up")

    def close(self) -> None:
        """Save no more rows and free the saved ones. Closing twice, or at the end, is fine."""
        if self._table < len(self._tables):
            self._closed = True
        for table in self._tables:
            table.free()


class _TableCut:
    """The rows of one table: which are passed, and which are saved."""

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self._passed = 0
        self._count = 0
        self.free()

    @property
    def is_over(self) -> bool:
        return self._passed == len(self._store.rows)

    @property
    def saved_bytes(self) -> int:
        return self._saved[: self._count].nbytes

    def free(self) -> None:
        self._places: U32 = zeros((0,), np.uint32)
        self._saved: F32 = zeros((0, self._store.records.shape[1]))

    def save(self, index: I64 | None) -> None:
        if self.is_over:
            return
        records = self._store.records
        if not self._places.size:
            # Room for all of them takes no memory before it is written to, from its start on.
            assert len(records) < 2**32, "places are 32-bit numbers"
            self._places, self._saved = zeros((len(records),), np.uint32), zeros(records.shape)
        if index is None:
            index = np.arange(self._passed, len(records), dtype=np.int64)
        self._count = save_records(
            records, index, self._passed, self._places, self._count, self._saved
        )

    def copied_rows(self, max_bytes: int) -> tuple[F32, tuple[str, ...]]:
        records, names = self._store.records, self._store.optimizer.slot_names
        num_rows, dim = self._store.rows.shape
        count = max(1, min(num_rows - self._passed, max_bytes // (4 * records.shape[1])))
        out: F32 = empty((1 + len(names), count, dim))
        split_records(records, self._passed, out)
        return out, tuple(names)

    def pass_rows(self, arrays_AND: F32) -> None:
        if self._places.size:
            patch_saved(self._places, self._saved, self._passed, arrays_AND)
        self._passed += arrays_AND.shape[1]
        if self.is_over:
            self.free()
