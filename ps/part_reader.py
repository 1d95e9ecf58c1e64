"""Reading parts: from front to back with the checksum on the way, for any shard, or some rows.

See `ps.table_parts` for what a part is. Whatever is in a damaged file, it ends in a
`SnapshotError` that names the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa

from ps.errors import SnapshotError, StorageError
from ps.memory import empty
from ps.partition import Placement
from ps.ragged import F32
from ps.storage import Checksum, Source, Storage
from ps.table_parts import BATCH_ROWS, SealedPart, part_schema

Rows = tuple[int, F32, dict[str, F32]]
"""(first local row, rows [n, D], slots [n, D] by name); read-only, and valid until the next."""

_MAGIC = b"ARROW1\0\0"
_SMALL_BYTES = 64 << 10
_SKIP_BYTES = 1 << 20


def load_parts(
    storage: Storage,
    parts: Sequence[SealedPart],
    written: Placement,
    wanted: Placement,
    shard: int,
    *,
    dim: int,
    slots: Sequence[str],
) -> Iterator[Rows]:
    """The rows of a shard, from the parts of one table that any number of shards wrote.

    Every part that has rows of the shard is read from front to back, and its checksum compared
    before its last rows are handed out.

    Args:
        storage: at the snapshot's folder.
        parts: of all shards that wrote the table.
        written: where the rows were.
        wanted: where they shall be.
        shard: one of `wanted`.
        dim: D.
        slots: names of all slots, in the order in which they were written.

    Yields:
        All rows of the shard, each once, in no fixed order; see `Rows`.

    Raises:
        SnapshotError: the parts are not those of `written`, or one is damaged.
        StorageError: a part is missing or cannot be read.
    """
    by_shard = _check_parts(storage, parts, written, wanted)
    if (written.num_shards, written.offset) == (wanted.num_shards, wanted.offset):
        yield from read_part(storage, by_shard[shard], dim=dim, slots=slots)
        return
    for part in by_shard:
        common = _CommonSlabs(written, part.shard, wanted, shard)
        if not common.any(part.num_rows):
            continue
        for first, rows_ND, slots_ND in read_part(storage, part, dim=dim, slots=slots):
            for place, to in common.within(first, first + len(rows_ND)):
                here = slice(place.start - first, place.stop - first)
                yield to, rows_ND[here], {name: s[here] for name, s in slots_ND.items()}


def read_part(
    storage: Storage, part: SealedPart, *, dim: int, slots: Sequence[str]
) -> Iterator[Rows]:
    """All rows of a part, in order; its checksum is compared before the last are handed out.

    Args:
        storage: at the snapshot's folder.
        part: as its manifest describes it.
        dim: D.
        slots: names of all slots, in the order in which they were written.

    Raises:
        SnapshotError: it is damaged or something else.
        StorageError: it is missing or cannot be read.
    """
    name = storage.name(part.file)
    with storage.stream(part.file) as source:
        file = _CheckedFile(source, name, part)
        held: Rows | None = None
        with _damage(name):
            if file.read(len(_MAGIC)) != _MAGIC:
                raise _damaged(name, "it does not start as an Arrow file")
            # Behind its first bytes an Arrow file is an Arrow stream, followed by a list of places.
            batches = pa.ipc.open_stream(pa.PythonFile(file, "r"))
            _check_schema(name, batches.schema, part_schema(dim, slots))
        end = 0
        while True:
            with _damage(name):
                try:
                    columns = _columns(name, batches.read_next_batch(), dim)
                except StopIteration:
                    break
            if held is not None:
                yield held
            held = (end, columns[0], dict(zip(slots, columns[1:], strict=True)))
            end += len(columns[0])
        if end != part.num_rows:
            raise _damaged(name, f"{end} rows, expected {part.num_rows}")
        file.finish()
        if held is not None:
            yield held


class PartRows:
    """Any rows of a part, without its checksum. A context manager; not for several threads."""

    def __init__(
        self,
        storage: Storage,
        part: SealedPart,
        *,
        dim: int,
        slots: Sequence[str],
        slot: str | None = None,
    ) -> None:
        """Open a part for its rows, or for one of its slots.

        Raises:
            SnapshotError: it is damaged or something else.
            StorageError: it is missing or cannot be read.
        """
        self._name = storage.name(part.file)
        self._num_rows = part.num_rows
        self._dim = dim
        column = 0 if slot is None else 1 + list(slots).index(slot)
        self._last: tuple[int, F32] = (-1, np.empty((0, dim), dtype=np.float32))
        self._file = storage.open(part.file)
        try:
            with _damage(self._name):
                options = pa.ipc.IpcReadOptions(included_fields=[column])
                self._batches = pa.ipc.open_file(self._file, options=options)
                schema = self._batches.schema
                _check_schema(self._name, schema, pa.schema([part_schema(dim, slots)[column]]))
                self._batch_rows = max(1, int((schema.metadata or {}).get(BATCH_ROWS, b"0")))
                if self._batches.num_record_batches != -(-part.num_rows // self._batch_rows):
                    raise _damaged(self._name, "wrong number of record batches")
        except BaseException:
            self._file.close()
            raise

    def read(self, first_local_row: int, out_ND: F32) -> None:
        """Fill `out_ND`, float32 [N, D], with the rows from `first_local_row` on.

        Raises:
            SnapshotError: the part is damaged.
            StorageError: it cannot be read.
        """
        assert out_ND.shape[1:] == (self._dim,), "rows of the table"
        end = first_local_row + len(out_ND)
        assert 0 <= first_local_row <= end <= self._num_rows, "rows of the part"
        row = first_local_row
        while row < end:
            number, place = divmod(row, self._batch_rows)
            found = self._batch(number)[place : place + end - row]
            out_ND[row - first_local_row : row - first_local_row + len(found)] = found
            row += len(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _batch(self, number: int) -> F32:
        if self._last[0] != number:
            with _damage(self._name):
                (rows_ND,) = _columns(self._name, self._batches.get_batch(number), self._dim)
            if len(rows_ND) != min(self._batch_rows, self._num_rows - number * self._batch_rows):
                raise _damaged(self._name, f"{len(rows_ND)} rows in record batch {number}")
            self._last = number, rows_ND
        return self._last[1]


class _CheckedFile:
    """A part as Arrow reads it: into memory that is used again, with the checksum on the way."""

    closed = False

    def __init__(self, source: Source, name: str, part: SealedPart) -> None:
        self._source = source
        self._name = name
        self._part = part
        self._left = part.size_bytes
        self._checksum = Checksum()
        # Two, for a batch is handed out when the next one has been read.
        self._buffers = [np.empty(0, dtype=np.uint8)] * 2

    def read(self, size: int) -> memoryview:
        """The next bytes, valid until the next but one call for so many."""
        if size > self._left:
            raise _damaged(self._name, f"a piece of {size} bytes, where {self._left} are left")
        data = memoryview(bytearray(size)) if size < _SMALL_BYTES else self._reused(size)
        if self._source.fill(data) < size:
            raise _damaged(self._name, f"shorter than {self._part.size_bytes} bytes")
        self._checksum.add(data)
        self._left -= size
        return data

    def finish(self) -> None:
        """Read what is left and compare the checksum."""
        while self._left:
            self.read(min(self._left, _SKIP_BYTES))
        if self._source.fill(bytearray(1)):
            raise _damaged(self._name, f"longer than {self._part.size_bytes} bytes")
        found, wanted = str(self._checksum), self._part.checksum
        if found != wanted:
            raise _damaged(self._name, f"its checksum is {found}, expected {wanted!r:.80}")

    def _reused(self, size: int) -> memoryview:
        older, newer = self._buffers
        if older.size < size:
            older = empty((size,), np.uint8)
        self._buffers = [newer, older]
        return older[:size].data


class _CommonSlabs:
    """The slabs that a shard of one placement and a shard of another have in common."""

    def __init__(self, written: Placement, writer: int, wanted: Placement, shard: int) -> None:
        self._rows = written.slab_rows
        self._num_writers, self._num_wanted = written.num_shards, wanted.num_shards
        self._first_slab = (writer - written.offset) % written.num_shards
        first_wanted = (shard - wanted.offset) % wanted.num_shards
        self._every = wanted.num_shards // math.gcd(written.num_shards, wanted.num_shards)
        self._first = next(
            (
                place
                for place in range(self._every)
                if self._slab(place) % wanted.num_shards == first_wanted
            ),
            None,
        )

    def any(self, num_rows: int) -> bool:
        """Whether there are some among the writer's so many rows."""
        return self._first is not None and self._first * self._rows < num_rows

    def within(self, first: int, end: int) -> Iterator[tuple[slice, int]]:
        """Of the writer's local rows `first:end` those in common, and where they are wanted."""
        assert self._first is not None, "there are some"
        behind = -(-(first // self._rows - self._first) // self._every)
        place = self._first + self._every * max(0, behind)
        while place * self._rows < end:
            start = place * self._rows
            low, high = max(first, start), min(end, start + self._rows)
            to = self._slab(place) // self._num_wanted * self._rows
            yield slice(low, high), to + low - start
            place += self._every

    def _slab(self, place: int) -> int:
        return self._first_slab + place * self._num_writers


def _check_parts(
    storage: Storage, parts: Sequence[SealedPart], written: Placement, wanted: Placement
) -> list[SealedPart]:
    """The parts by shard, if they are those of the placement."""
    by_shard = sorted(parts, key=lambda part: part.shard)
    if [part.shard for part in by_shard] != list(range(written.num_shards)):
        raise SnapshotError(
            f"'{storage.location}': a table of {written.num_shards} shards has parts of shards "
            f"{[part.shard for part in by_shard]!s:.80}"
        )
    for part in by_shard:
        num_rows = written.num_local_rows(part.shard)
        if part.num_rows != num_rows:
            raise SnapshotError(
                f"'{storage.name(part.file)}': {part.num_rows} rows, where shard {part.shard} of "
                f"{written.num_shards} has {num_rows}"
            )
    sizes = [(p.vocabulary_size, p.slab_rows) for p in (written, wanted)]
    if sizes[0] != sizes[1]:
        raise SnapshotError(
            f"'{storage.location}': its tables are cut otherwise: (vocabulary_size, slab_rows) "
            f"is {sizes[0]}, expected {sizes[1]}"
        )
    return by_shard


def _check_schema(name: str, found: pa.Schema, wanted: pa.Schema) -> None:
    if not found.equals(wanted):
        columns = [", ".join(map(str, s))[:200] for s in (wanted, found)]
        raise SnapshotError(f"'{name}': expected columns [{columns[0]}], got [{columns[1]}]")


def _columns(name: str, batch: pa.RecordBatch, dim: int) -> list[F32]:
    """The columns as arrays [n, D] on the batch's memory."""
    batch.validate()  # buffers too short would crash the process
    columns: list[F32] = []
    for column in batch.columns:
        values = column.values
        if column.null_count or values.null_count or len(values) != batch.num_rows * dim:
            raise _damaged(name, "a record batch has nulls")
        columns.append(values.to_numpy(zero_copy_only=True).reshape(batch.num_rows, dim))
    return columns


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """What Arrow says of a file it cannot read, as a `SnapshotError`."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, ValueError, MemoryError, pa.ArrowException) as e:
        raise _damaged(name, " ".join(str(e).split())[:200]) from e


def _damaged(name: str, what: str) -> SnapshotError:
    return SnapshotError(f"'{name}' is damaged: {what}")
