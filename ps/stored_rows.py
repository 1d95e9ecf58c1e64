"""A row file (`ps.export_file`) wherever it lies: where its rows start, and any of them.

`ps.export_file` maps such files, which takes a local one. Here a file's two ends are enough.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from ps.errors import StorageError
from ps.export_file import open_rows
from ps.ragged import F32
from ps.storage import Storage

_METADATA_BYTES = 1 << 16
"""More than an Arrow file has before its numbers, or after them."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """The rows of one file."""

    storage: Storage
    file: str
    data_offset: int
    """Byte at which row 0 starts."""
    dim: int

    @classmethod
    def open(cls, storage: Storage, file: str, size_bytes: int, shape: tuple[int, int]) -> Self:
        """Find the rows [V, D] in a file of this size.

        Raises:
            StorageError: it cannot be read, or does not hold such rows.
        """
        end_bytes = min(size_bytes, _METADATA_BYTES)
        head = _read_at(storage, file, 0, end_bytes)
        tail = _read_at(storage, file, size_bytes - end_bytes, end_bytes)
        # Arrow reads what lies between the ends as zeros, from a hole in a temporary file.
        with tempfile.NamedTemporaryFile(suffix=".arrow") as ends:
            ends.truncate(size_bytes)
            ends.write(head)
            ends.seek(size_bytes - end_bytes)
            ends.write(tail)
            ends.flush()
            try:
                offset = open_rows(Path(ends.name), *shape).data_offset
            except StorageError as e:
                raise StorageError(str(e).replace(ends.name, storage.name(file))) from None
        return cls(storage, file, offset, shape[1])

    def read(self, first_id: int, out_ND: F32) -> None:
        """Fill `out_ND`, float32 [N, D], with rows from `first_id` on, all of which are there.

        Raises:
            StorageError: the file cannot be read.
        """
        row_bytes = 4 * self.dim
        place = self.data_offset + first_id * row_bytes
        data = _read_at(self.storage, self.file, place, len(out_ND) * row_bytes)
        out_ND[:] = np.frombuffer(data, dtype=np.float32).reshape(out_ND.shape)


def _read_at(storage: Storage, file: str, place: int, size: int) -> bytes:
    try:
        with storage.open(file) as source:
            data: bytes = source.read_at(size, place)
    except (OSError, pa.ArrowException) as e:
        raise StorageError(f"'{storage.name(file)}' cannot be read: {e}") from e
    if len(data) < size:
        raise StorageError(f"'{storage.name(file)}' ends within its rows")
    return data
