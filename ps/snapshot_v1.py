"""Tables of snapshots in format 1: one file per array, with all rows in id order.

Nothing writes it any more. It was for local folders only, and is read from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ps.errors import StorageError
from ps.export_file import RowFile, map_rows, open_rows, read_rows
from ps.manifest import Digest, Manifest
from ps.partition import Placement
from ps.ragged import F32
from ps.storage import Source, Storage

_CHUNK_BYTES = 4 << 20
_TAIL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class WholeFiles:
    """The files of one table."""

    rows: RowFile
    slots: dict[str, RowFile]
    digests: dict[str, str]
    """`sha256:…` by path."""

    @classmethod
    def open(cls, manifest: Manifest, entry: Any, shape: tuple[int, int]) -> WholeFiles:
        """Open the files of a table [V, D] from its entry in the manifest.

        Raises:
            StorageError: a file does not hold it, or is not local.
        """
        digests: dict[str, str] = {}

        def opened(entry: Any) -> RowFile:
            sealed = manifest.file(entry)
            path = manifest.path(sealed.file)
            digests[str(path)] = sealed.checksum
            return open_rows(path, *shape)

        rows = opened(manifest.field(entry, "rows", dict))
        slots = {
            manifest.field(slot, "name", str): opened(slot)
            for slot in manifest.field(entry, "slots", list)
        }
        return cls(rows, slots, digests)

    @property
    def slot_names(self) -> tuple[str, ...]:
        """In the order of the manifest."""
        return tuple(self.slots)

    def whole(self, slot: str | None) -> F32:
        """float32 [V, D], read-only, memory-mapped."""
        file = self._file(slot)
        return map_rows(Path(file.path), file.num_rows, file.dim)

    def read(self, first_id: int, out_ND: F32, slot: str | None) -> None:
        """Fill `out_ND` with rows from `first_id` on."""
        read_rows(self._file(slot), first_id, out_ND)

    def load(self, wanted: Placement, shard: int) -> Iterator[tuple[int, F32, dict[str, F32]]]:
        """(first local row, rows, slots) of all that a shard owns; see `ps.snapshot.load_shard`.

        Goes over whole files, because their checksums are over whole files.
        """
        slab_bytes = 4 * self.rows.dim * wanted.slab_rows
        step = wanted.slab_rows * max(1, _CHUNK_BYTES // slab_bytes)
        own = list(wanted.slabs(shard))[::-1]
        with ExitStack() as stack:
            arrays = [
                _HashedRows(file, stack.enter_context(_stream(file)), self.digests[file.path])
                for file in (self.rows, *self.slots.values())
            ]
            for first in range(0, self.rows.num_rows, step):
                count = min(step, self.rows.num_rows - first)
                chunks = [array.read(count) for array in arrays]
                slabs = []
                while own and own[-1].first_id < first + count:
                    slabs.append(own.pop())
                if not slabs:
                    continue
                spans = [slice(s.first_id - first, s.first_id - first + s.num_rows) for s in slabs]
                rows, *slots = (np.concatenate([chunk[s] for s in spans]) for chunk in chunks)
                yield slabs[0].first_local_row, rows, dict(zip(self.slots, slots, strict=True))
            for array in arrays:
                array.check()

    def _file(self, slot: str | None) -> RowFile:
        return self.rows if slot is None else self.slots[slot]


class _HashedRows:
    """A file read once from its first byte to its last, for its rows and its checksum."""

    def __init__(self, file: RowFile, source: Source, checksum: str) -> None:
        self._file = file
        self._source = source
        self._digest = Digest(checksum)
        self._take(np.empty(file.data_offset, dtype=np.uint8))

    def read(self, count: int) -> F32:
        """The next rows, float32 [count, D]."""
        rows = np.empty((count, self._file.dim), dtype=np.float32)
        self._take(rows)
        return rows

    def check(self) -> None:
        """See that the whole file was what its checksum says."""
        buffer = bytearray(_TAIL_BYTES)
        while count := self._source.fill(buffer):
            self._digest.add(memoryview(buffer)[:count])
        self._digest.check(self._file.path)

    def _take(self, out: np.ndarray) -> None:
        if self._source.fill(out.data) < out.nbytes:
            raise StorageError(f"'{self._file.path}' ends within its rows")
        self._digest.add(out.data)


def _stream(file: RowFile) -> AbstractContextManager[Source]:
    path = Path(file.path)
    return Storage.at(path.parent).stream(path.name)
