"""A shard's tables to and from files, piece by piece: the shard serves workers in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ps.export_file import RowFile, write_rows
from ps.ragged import F32
from ps.shard import ShardState


def load_rows(
    state: ShardState, table: str, pieces: Iterable[tuple[int, F32, dict[str, F32]]]
) -> Iterator[None]:
    """Take (first local row, rows, slots) pieces of a table, as `ps.snapshot` reads them.

    Raises:
        ProtocolError: a piece does not fit the table.
    """
    for first_local_row, rows, slots in pieces:
        state.write_rows(table, first_local_row, rows, slots)
        yield


def write_pieces(
    state: ShardState, version: int, table: str, rows: RowFile, slots: Mapping[str, RowFile]
) -> Iterator[int]:
    """Write this shard's rows of a table, and the named slots; yields the rows of each slab.

    Raises:
        ProtocolError: the shard is not at `version`, or has not stayed there.
    """
    for slab, row_view, slot_views in state.slabs(table):
        state.check_version(version)
        write_rows(rows, slab.first_id, row_view)
        for name, file in slots.items():
            write_rows(file, slab.first_id, slot_views[name])
        yield slab.num_rows
