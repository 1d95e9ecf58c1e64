"""Parts: the rows and slots of one table on one shard, as an Arrow file. Writing them.

A part has the shard's rows in local order, in columns `row` and one per slot, each
FixedSizeList<float32> [D]; uncompressed, so that pandas, polars and DuckDB read it without us.
Every record batch but the last has the same number of rows, which stands in the schema's metadata:
so any row is found without an index, and equal rows make equal files however they came.

`ps.part_reader` reads parts; which parts make a snapshot is the affair of `ps.snapshot`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import xxhash

from ps.errors import StorageError
from ps.folders import file_name
from ps.ragged import F32
from ps.spec import TableSpec
from ps.storage import Sink, Storage

BATCH_ROWS = b"rows_per_batch"
_BATCH_BYTES = 2 << 20
_MAX_FILE_NAME = 255


@dataclass(frozen=True, slots=True)
class PartTarget:
    """Where a shard writes its parts of one snapshot; travels to the shard."""

    location: str = field(repr=False)
    """A storage's `uri`, which may hold credentials."""
    folder: str
    """The snapshot's folder in it."""
    attempt: str
    """Stands in the file names, so that no two attempts at a snapshot share a file."""
    shard: int
    num_shards: int


@dataclass(frozen=True, slots=True)
class SealedPart:
    """A part that is whole and durable."""

    table: str
    shard: int
    file: str
    """Its name in the snapshot's folder."""
    size_bytes: int
    checksum: str
    """`xxh3:` and 32 hexadecimal digits."""
    num_rows: int


class PartWriter:
    """Writes one table's rows of one shard, in local row order."""

    def __init__(self, target: PartTarget, table: TableSpec, storage: Storage) -> None:
        """Start a part.

        Args:
            target: where; `storage` is at its location.
            table: whose rows.
            storage: takes the file.

        Raises:
            StorageError: the system refuses.
        """
        self._target = target
        self._table = table
        self._slots = table.optimizer.slot_names
        num_columns = 1 + len(self._slots)
        self._batch_rows = batch_rows(table.dim, num_columns)
        schema = part_schema(table.dim, self._slots)
        self._schema = schema.with_metadata({BATCH_ROWS: str(self._batch_rows)})
        self._started = np.empty((num_columns, 0, table.dim), dtype=np.float32)
        """Columns of a batch that is not full yet."""
        self._num_started = 0
        self._num_rows = 0
        self._name = part_name(target, table.name)
        self._file: AbstractContextManager[Sink] = storage.writer(
            str(PurePosixPath(target.folder, self._name))
        )
        self._sink = self._file.__enter__()
        self._is_open = True
        try:
            self._out = pa.ipc.new_file(
                self._sink, self._schema, options=pa.ipc.IpcWriteOptions(allow_64bit=True)
            )
        except BaseException:
            self.abandon()
            raise

    def append(self, rows_ND: F32, slots: Mapping[str, F32]) -> None:
        """Write the rows that follow. Any number of rows; a big batch is written without a copy.

        Args:
            rows_ND: float32 [N, D], contiguous; may be changed afterwards.
            slots: every slot of the table, the same.

        Raises:
            StorageError: the system refuses; the part can only be abandoned then.
        """
        assert slots.keys() == set(self._slots), "every slot, and no other"
        columns = [np.ascontiguousarray(c) for c in (rows_ND, *(slots[s] for s in self._slots))]
        wanted = (np.float32, (rows_ND.shape[0], self._table.dim))
        assert all((c.dtype, c.shape) == wanted for c in columns), "float32 [N, D]"
        first, end = 0, rows_ND.shape[0]
        while first < end:
            if self._num_started == 0 and end - first >= self._batch_rows:
                count = self._batch_rows
                self._write([c[first : first + count] for c in columns])
            else:
                count = min(end - first, self._batch_rows - self._num_started)
                self._start(columns, first, count)
                if self._num_started == self._batch_rows:
                    self._write_started()
            first += count
        self._num_rows += end

    def close(self) -> SealedPart:
        """Make the part whole and durable.

        Raises:
            StorageError: the system refuses; nothing is left of the part.
        """
        try:
            if self._num_started:
                self._write_started()
            self._out.close()
        except BaseException:
            self.abandon()
            raise
        self._is_open = False
        self._file.__exit__(None, None, None)
        return SealedPart(
            self._table.name,
            self._target.shard,
            self._name,
            self._sink.size,
            self._sink.checksum,
            self._num_rows,
        )

    def abandon(self) -> None:
        """Remove what was written, as far as the storage lets us; nothing after `close`."""
        if self._is_open:
            self._is_open = False
            cause = StorageError(f"'{self._name}' was abandoned")
            self._file.__exit__(type(cause), cause, None)

    def _start(self, columns: Sequence[F32], first: int, count: int) -> None:
        """Copy rows to the batch that is not full yet."""
        if self._started.shape[1] == 0:
            shape = (len(columns), self._batch_rows, self._table.dim)
            self._started = np.empty(shape, dtype=np.float32)
        place = slice(self._num_started, self._num_started + count)
        for started, column in zip(self._started, columns, strict=True):
            started[place] = column[first : first + count]
        self._num_started += count

    def _write_started(self) -> None:
        self._write([column[: self._num_started] for column in self._started])
        self._num_started = 0

    def _write(self, columns: Sequence[F32]) -> None:
        arrays = [_fixed_size_list(c) for c in columns]
        self._out.write_batch(pa.record_batch(arrays, schema=self._schema))


def part_schema(dim: int, slots: Sequence[str]) -> pa.Schema:
    """The columns of a part: `row`, then the slots in their order."""
    return pa.schema([(name, pa.list_(pa.float32(), dim)) for name in ("row", *slots)])


def part_name(target: PartTarget, table: str) -> str:
    """The name of a part's file: the table's, unless that is too long.

    >>> part_name(PartTarget("/x", "step-000000001", "a1b2", 0, 3), "site/ads")
    'site%2Fads.0-of-3.a1b2.arrow'
    """
    end = f".{target.shard}-of-{target.num_shards}.{target.attempt}.arrow"
    start = file_name(table)
    if len(start) + len(end) > _MAX_FILE_NAME:
        digest = xxhash.xxh3_64_hexdigest(start.encode())
        start = f"{start[: _MAX_FILE_NAME - len(end) - len(digest) - 1]}~{digest}"
    return start + end


def batch_rows(dim: int, num_columns: int) -> int:
    """Rows of a full record batch: the power of two that fills 1 to 2 MiB.

    >>> batch_rows(16, 2), batch_rows(10**6, 3)
    (16384, 1)
    """
    return 1 << (max(1, _BATCH_BYTES // (4 * dim * num_columns)).bit_length() - 1)


def _fixed_size_list(rows_ND: F32) -> pa.Array:
    """The rows as an Arrow array on the same memory."""
    values = pa.Array.from_buffers(
        pa.float32(), rows_ND.size, [None, pa.py_buffer(rows_ND)], null_count=0
    )
    return pa.FixedSizeListArray.from_arrays(values, rows_ND.shape[1])
