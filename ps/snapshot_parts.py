"""Tables of snapshots: one part per shard that wrote them, any of whose rows can be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ps.manifest import Manifest
from ps.part_reader import PartRows, load_parts
from ps.partition import Placement
from ps.ragged import F32
from ps.storage import Storage
from ps.table_parts import SealedPart


@dataclass(frozen=True, slots=True)
class PartFiles:
    """The parts of one table."""

    storage: Storage
    """The snapshot's folder."""
    parts: tuple[SealedPart, ...]
    """By shard."""
    written: Placement
    """Which rows each has."""
    dim: int
    slot_names: tuple[str, ...]

    @classmethod
    def open(
        cls, manifest: Manifest, entry: Any, shape: tuple[int, int], num_shards: int
    ) -> PartFiles:
        """Open the parts of a table [V, D] from its entry in the manifest.

        Raises:
            StorageError: a part is missing, or has not its size.
        """
        table = manifest.field(entry, "name", str)
        slab_rows, offset = (manifest.field(entry, key, int) for key in ("slab_rows", "offset"))
        if slab_rows < 1 or slab_rows & (slab_rows - 1) or not 0 <= offset < num_shards:
            raise manifest.error(f"table '{table}': no placement has {slab_rows=} and {offset=}")
        written = Placement(shape[0], slab_rows, num_shards, offset)
        slots = manifest.field(entry, "slots", list)
        if any(type(slot) is not str for slot in slots) or len({*slots, "row"}) <= len(slots):
            raise manifest.error(f"table '{table}': 'slots' must hold names, got {slots!r:.80}")
        parts = [_open_part(manifest, e, table) for e in manifest.field(entry, "parts", list)]
        wanted = [(shard, written.num_local_rows(shard)) for shard in range(num_shards)]
        if [(part.shard, part.num_rows) for part in parts] != wanted:
            raise manifest.error(f"table '{table}': its parts are not those of {num_shards} shards")
        return cls(manifest.storage, tuple(parts), written, shape[1], tuple(slots))

    def whole(self, slot: str | None) -> F32:
        """float32 [V, D], read-only: the rows, or a slot."""
        rows = np.empty((self.written.vocabulary_size, self.dim), dtype=np.float32)
        self.read(0, rows, slot)
        rows.flags.writeable = False
        return rows

    def read(self, first_id: int, out_ND: F32, slot: str | None) -> None:
        """Fill `out_ND` with rows first_id … first_id + N - 1."""
        end_id = first_id + len(out_ND)
        if not len(out_ND):
            return
        placement, size = self.written, self.written.slab_rows
        slabs = range(first_id // size, -(-end_id // size))
        for part in self.parts:
            own = range(_first_own(slabs.start, placement, part.shard), slabs.stop,
                        placement.num_shards)  # fmt: skip
            if not own:
                continue
            with PartRows(
                self.storage, part, dim=self.dim, slots=self.slot_names, slot=slot
            ) as rows:
                for slab in own:
                    low, high = max(first_id, slab * size), min(end_id, (slab + 1) * size)
                    local = slab // placement.num_shards * size + low - slab * size
                    rows.read(local, out_ND[low - first_id : high - first_id])

    def load(self, wanted: Placement, shard: int) -> Iterator[tuple[int, F32, dict[str, F32]]]:
        """(first local row, rows, slots) of all that a shard owns; see `ps.snapshot.load_shard`."""
        return load_parts(
            self.storage,
            self.parts,
            self.written,
            wanted,
            shard,
            dim=self.dim,
            slots=self.slot_names,
        )


def _first_own(slab: int, placement: Placement, shard: int) -> int:
    """The first slab from `slab` on that lives on a shard."""
    return slab + (shard - placement.offset - slab) % placement.num_shards


def _open_part(manifest: Manifest, entry: Any, table: str) -> SealedPart:
    sealed = manifest.file(entry)
    return SealedPart(
        table=table,
        shard=manifest.field(entry, "shard", int),
        file=sealed.file,
        size_bytes=sealed.size_bytes,
        checksum=sealed.checksum,
        num_rows=manifest.field(entry, "num_rows", int),
    )
