"""Reading a version's files to the last byte, once each: checksums, and the values of row files.

What is wrong is a `Damage`, not an exception, so that one damaged file hides nothing of the others.
Memory stays at 16 MiB whatever the file's size, and storage may be remote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xxhash

from ps.errors import StorageError
from ps.storage import Source, Storage
from ps.stored_rows import StoredRows
from ps.table_stats import CHUNK_BYTES, ImpossibleValues
from ps.version_files import ListedFile


class _Hash(Protocol):
    def update(self, data: Any, /) -> object: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with a file."""

    check: str
    """manifest, file, checksum or rows."""
    message: str


def file_damage(storage: Storage, listed: ListedFile) -> Damage | None:
    """What is wrong with a file, as far as it can be seen without reading it."""
    if listed.size_bytes is None or _hash_of(listed.checksum) is None:
        return Damage("manifest", "has no size or no checksum that is known here")
    try:
        if not storage.exists(listed.file):
            return Damage("file", "is missing")
        found = storage.size(listed.file)
    except StorageError as e:  # also of a path that leads out of the version folder
        return Damage("file", str(e))
    if found != listed.size_bytes:
        return Damage("file", f"has {found} bytes, but the manifest says {listed.size_bytes}")
    return None


def checksum_damage(storage: Storage, listed: ListedFile) -> Damage | None:
    """Read a file and compare its checksum."""
    try:
        with _reading(storage, listed) as reader:
            reader.skip(reader.size)
            return reader.damage()
    except StorageError as e:
        return Damage("file", str(e))


def scan_rows(
    storage: Storage,
    listed: ListedFile,
    shape: tuple[int, int],
    values: ImpossibleValues,
) -> Damage | None:
    """Read a row file (`ps.export_file`); compare its checksum and its shape.

    Args:
        storage: of the version.
        listed: its entry in the manifest; its size is right.
        shape: [V, D], as the manifest says.
        values: counts its values.
    """
    num_rows, dim = shape
    try:
        with _reading(storage, listed) as reader:
            try:
                rows = StoredRows.open(storage, listed.file, reader.size, shape)
            except StorageError as e:
                reader.skip(reader.size)
                return reader.damage() or Damage("rows", str(e))
            reader.skip(rows.data_offset)
            step = max(1, min(num_rows, CHUNK_BYTES // (4 * dim)))
            buffer = np.empty((step, dim), dtype=np.float32)
            for first_row in range(0, num_rows, step):
                rows_ND = buffer[: num_rows - first_row]
                reader.read(rows_ND)
                values.add(first_row, rows_ND)
            reader.skip(reader.size - reader.place)
            return reader.damage()
    except StorageError as e:
        return Damage("file", str(e))


class _HashedReader:
    """Reads a file from its start, and hashes what it reads."""

    def __init__(self, source: Source, listed: ListedFile) -> None:
        hashed = _hash_of(listed.checksum)
        assert hashed is not None, "see `file_damage`"
        assert listed.size_bytes is not None, "see `file_damage`"
        self._source = source
        self._hash, self._wanted = hashed
        self._listed = listed
        self.size = listed.size_bytes
        self.place = 0

    def read(self, out_ND: np.ndarray) -> None:
        """Fill a contiguous array with the next bytes."""
        if self._source.fill(out_ND.data) < out_ND.nbytes:
            raise StorageError(f"'{self._listed.file}' became shorter while it was read")
        self._hash.update(out_ND.data)
        self.place += out_ND.nbytes

    def skip(self, size: int) -> None:
        """Hash the next `size` bytes."""
        buffer = np.empty(min(size, CHUNK_BYTES), dtype=np.uint8)
        end = self.place + size
        while self.place < end:
            self.read(buffer[: end - self.place])

    def damage(self) -> Damage | None:
        """Whether the checksum of what was read is another one than that wanted."""
        seen, kind = self._hash.hexdigest(), (self._listed.checksum or "").partition(":")[0]
        if seen == self._wanted:
            return None
        message = f"is {kind}:{seen}, but the manifest says {self._listed.checksum}"
        return Damage("checksum", message)


@contextmanager
def _reading(storage: Storage, listed: ListedFile) -> Iterator[_HashedReader]:
    with storage.stream(listed.file) as source:
        yield _HashedReader(source, listed)


def _hash_of(checksum: str | None) -> tuple[_Hash, str] | None:
    """A hash to feed, and the digits that it must come to."""
    kind, _, digits = (checksum or "").partition(":")
    match kind:
        case "sha256":
            return hashlib.sha256(), digits
        case "xxh3":
            return xxhash.xxh3_128(), digits
    return None
