"""The Arrow file of one table or slot: allocate it, write rows into it, read or map it.

An Arrow IPC file, uncompressed, with one record batch of one column `row`, FixedSizeList<float32>
[D]. Its body is one contiguous [V, D] array in id order, which shards fill in parallel with
`write_rows` and readers map; pandas, polars and DuckDB read it without us. This module knows no
manifest and no version: see `ps.folders`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from ps.errors import StorageError
from ps.memory import CACHE_LINE
from ps.ragged import F32

_HOLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RowFile:
    """Where the rows of a table lie in its file; travels to the shards that write them."""

    path: str
    data_offset: int
    """Byte at which row 0 starts."""
    num_rows: int
    dim: int


def row_schema(dim: int) -> pa.Schema:
    """The Arrow schema of a table file."""
    return pa.schema([("row", pa.list_(pa.float32(), dim))])


def write_rows(row_file: RowFile, first_id: int, rows_ND: F32) -> None:
    """Write rows first_id … first_id + N - 1 in place. Any number of processes may do so at once.

    Args:
        row_file: from a writer's `row_file`.
        first_id: id of `rows_ND[0]`.
        rows_ND: float32 [N, D].

    Raises:
        StorageError: wrong dtype or shape, rows outside the table, or the disk refuses.
    """
    offset = _check_rows(row_file, first_id, rows_ND)
    if rows_ND.size == 0:
        return
    left = np.ascontiguousarray(rows_ND).data.cast("B")
    with writing(row_file.path):
        handle = os.open(row_file.path, os.O_WRONLY)
        try:
            while left:
                written = os.pwrite(handle, left, offset)
                left, offset = left[written:], offset + written
        finally:
            os.close(handle)


def read_rows(row_file: RowFile, first_id: int, out_ND: F32) -> None:
    """Fill `out_ND`, float32 [N, D], with rows first_id … first_id + N - 1.

    Reads instead of mapping, so that the memory of a process that goes over a large table stays
    what it allocates.

    Raises:
        StorageError: wrong dtype or shape, rows outside the table, or the file ends too early.
    """
    offset = _check_rows(row_file, first_id, out_ND)
    if out_ND.size == 0:
        return
    rows_ND = out_ND if out_ND.flags.c_contiguous else np.empty(out_ND.shape, dtype=np.float32)
    left = rows_ND.data.cast("B")
    try:
        with open(row_file.path, "rb", buffering=0) as file:
            while left:
                count = os.preadv(file.fileno(), [left], offset)
                if count == 0:
                    raise StorageError(f"'{row_file.path}' ends at byte {offset}, within its rows")
                left, offset = left[count:], offset + count
    except OSError as e:
        raise StorageError(f"'{row_file.path}' cannot be read: {e.strerror or e}") from e
    if rows_ND is not out_ND:
        out_ND[:] = rows_ND


def fill_rows(
    target: RowFile, fill: Callable[[int, F32], object], chunk_bytes: int = 16 << 20
) -> None:
    """Write a whole table, some rows at a time.

    Args:
        target: where to.
        fill: `fill(first_id, out_ND)` puts rows first_id … first_id + N - 1 into `out_ND`, which
            is C-contiguous float32 [N, D].
        chunk_bytes: size of `out_ND`.

    Raises:
        StorageError: the disk refuses.
    """
    step = max(1, chunk_bytes // (4 * target.dim))
    buffer = np.empty((min(step, target.num_rows), target.dim), dtype=np.float32)
    for first_id in range(0, target.num_rows, step):
        rows = buffer[: target.num_rows - first_id]
        fill(first_id, rows)
        write_rows(target, first_id, rows)


def _check_rows(row_file: RowFile, first_id: int, rows_ND: F32) -> int:
    """The byte at which the rows start in the file, if they fit it."""
    where = f"'{row_file.path}'"
    if rows_ND.dtype != np.float32 or rows_ND.ndim != 2 or rows_ND.shape[1] != row_file.dim:
        raise StorageError(
            f"{where}: rows must be float32 [N, {row_file.dim}], "
            f"got {rows_ND.dtype} {list(rows_ND.shape)}"
        )
    last = first_id + rows_ND.shape[0]
    if first_id < 0 or last > row_file.num_rows:
        allowed = f"[0, {row_file.num_rows})"
        raise StorageError(f"{where}: rows [{first_id}, {last}) are outside {allowed}")
    return row_file.data_offset + first_id * row_file.dim * 4


class _HoleWriter(io.FileIO):
    """Leaves out what is long, which is the zeros of a new table: the file system has them."""

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size < _HOLE_BYTES:
            return super().write(data)
        self.seek(size, os.SEEK_CUR)
        return size


def allocate(path: Path, num_rows: int, dim: int) -> RowFile:
    """Make the file of a table of zeros [V, D], without holding it in memory.

    Row 0 starts at a cache line: a row of 16 float32 then lies in one line rather than two.
    """
    _write_zeros(path, num_rows, dim, padding=0)
    _write_zeros(path, num_rows, dim, padding=-_data_offset(path) % CACHE_LINE)
    _reserve(path)
    return RowFile(str(path), _data_offset(path), num_rows, dim)


def _write_zeros(path: Path, num_rows: int, dim: int, padding: int) -> None:
    """The file, with so many bytes more before its rows (a multiple of 8: Arrow's alignment)."""
    num_values = num_rows * dim
    zeros = path.with_suffix(".zeros")
    with zeros.open("wb") as file:
        file.truncate(num_values * 4)
    with pa.memory_map(str(zeros)) as source:
        values = pa.Array.from_buffers(
            pa.float32(), num_values, [None, source.read_buffer(num_values * 4)], null_count=0
        )
        rows = pa.FixedSizeListArray.from_arrays(values, dim)
        schema = row_schema(dim).with_metadata({"padding": "." * padding})
        batch = pa.record_batch([rows], schema=schema)
        options = pa.ipc.IpcWriteOptions(allow_64bit=True)
        with (
            _HoleWriter(path, "w") as sink,
            pa.ipc.new_file(sink, batch.schema, options=options) as out,
        ):
            out.write_batch(batch)
    zeros.unlink()


def _reserve(path: Path) -> None:
    """Take the disk space now, so that a full disk shows before hours of writing."""
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as e:
            if e.errno == errno.ENOSPC:
                raise  # other errors: this file system cannot reserve, and that is all right


def map_rows(path: Path, num_rows: int, dim: int) -> F32:
    """The rows as a read-only float32 [V, D] array on the memory-mapped file.

    Raises:
        StorageError: it is not an Arrow file, or not of this shape.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if not reader.schema.equals(row_schema(dim)):
            wanted, found = (", ".join(map(str, s)) for s in (row_schema(dim), reader.schema))
            raise StorageError(f"'{path}': expected columns [{wanted}], got [{found}]")
        if reader.num_record_batches != 1:
            raise StorageError(f"'{path}': {reader.num_record_batches} record batches, expected 1")
        batch = reader.get_batch(0)
        batch.validate()  # buffers too short would crash the process
        column = batch.column(0)
    except (OSError, pa.ArrowException) as e:
        raise StorageError(f"'{path}' is not an Arrow file: {e}") from e
    if len(column) != num_rows or column.null_count or column.values.null_count:
        raise StorageError(f"'{path}': {len(column)} rows, expected {num_rows} without nulls")
    rows: F32 = column.values.to_numpy(zero_copy_only=True).reshape(num_rows, dim)
    return rows


def open_rows(path: Path, num_rows: int, dim: int) -> RowFile:
    """The file of a table that is there, for `read_rows`.

    Raises:
        StorageError: see `map_rows`.
    """
    map_rows(path, num_rows, dim)
    return RowFile(str(path), _data_offset(path), num_rows, dim)


def _data_offset(path: Path) -> int:
    with pa.memory_map(str(path)) as source:
        start = source.read_buffer(1).address
        column = pa.ipc.open_file(source).get_batch(0).column(0)
        return cast(int, column.values.buffers()[1].address - start)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a small file and make it durable."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(root: Path) -> None:
    """See that files can be made in `root`, or in the nearest folder above it that exists.

    Raises:
        StorageError: they cannot.
    """
    with writing(root):
        folder = root.absolute()
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turns what the disk refuses into a `StorageError` about `path`."""
    try:
        yield
    except OSError as e:
        raise StorageError(f"cannot write '{path}': {e.strerror or e}") from e
