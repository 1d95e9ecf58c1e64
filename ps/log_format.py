"""Bytes of a commit log: one shard's changed rows, version by version.

    FOLDER/000000000123.log      segment: entries for versions 124, 125, …
    FOLDER/000000000123.log.new  segment that is being begun; no part of the log yet
    FOLDER/lock                  held by the process that writes

A segment is a header and entries, everything little-endian and padded to 8 bytes:

    header   magic, format, identity bytes, first version, XXH3-64 | identity (JSON)
    entry    magic, format, body bytes, version, synced version, counts, XXH3-64 | body
    body     fences | per table (rows, record width) | rows of each table | records of each table
             | dense | state

An entry's "synced version" was durable before a byte of the entry was written. A crash may leave
the entries of one group in any condition, the first torn and the last whole. So a bad entry of
version v is the torn tail that a crash leaves, unless a good one behind it says that v was durable.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from ps.errors import StorageError
from ps.messages import LogEntry

FORMAT = 1
SEGMENT_MAGIC = b"MANTALOG"
ENTRY_MAGIC = b"MLE\xa5"
MAX_ENTRY_BYTES = 1 << 32
"""Of one entry; a table of which every row changes in each step is better off with snapshots."""
MAX_IDENTITY_BYTES = 1 << 20

_SEGMENT = struct.Struct("<8sIIqQ")
_ENTRY = struct.Struct("<4sIQqqIIIIQQQ")
_CHECKSUM = struct.Struct("<Q")
_ENTRY_CHECKED = _ENTRY.size - _CHECKSUM.size
ENTRY_HEADER_BYTES = _ENTRY.size
Bytes = npt.NDArray[np.uint8]


class DamagedHeaderError(StorageError):
    """A segment has no whole header, and so nothing in it can be used."""


class EntryHeader(NamedTuple):
    """The fixed part of an entry."""

    magic: bytes
    format: int
    body_bytes: int
    version: int
    synced: int
    num_fences: int
    num_tables: int
    num_dense: int
    flags: int
    dense_size: int
    state_size: int
    checksum: int

    @property
    def size_bytes(self) -> int:
        """Of the whole entry, header and padding included."""
        return ENTRY_HEADER_BYTES + self.body_bytes


def encode_identity(identity: Mapping[str, Any]) -> bytes:
    """JSON that is the same for equal mappings."""
    return json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()


def segment_header(identity: bytes, version: int) -> bytes:
    """The start of a segment whose entries follow `version`."""
    start = _SEGMENT.pack(SEGMENT_MAGIC, FORMAT, len(identity), version, 0)[: -_CHECKSUM.size]
    padded = identity + bytes(-len(identity) % 8)
    return start + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(start + padded)) + padded


def read_segment_header(data: Bytes, name: str) -> tuple[int, bytes, int]:
    """(version that its entries follow, identity, offset of the first entry) of a segment.

    Raises:
        DamagedHeaderError: there is no whole one.
        StorageError: it is of a newer format.
    """
    start = data[: _SEGMENT.size].tobytes()
    if len(start) < _SEGMENT.size:
        raise DamagedHeaderError(f"'{name}', byte 0: the header is damaged")
    magic, number, identity_bytes, version, checksum = _SEGMENT.unpack(start)
    if magic == SEGMENT_MAGIC and number > FORMAT:
        raise StorageError(
            f"'{name}': format {number} of the commit log is newer than this version of manta, "
            f"which reads up to {FORMAT}"
        )
    end = _SEGMENT.size + _padded(identity_bytes)
    if magic != SEGMENT_MAGIC or identity_bytes > MAX_IDENTITY_BYTES or end > data.size:
        raise DamagedHeaderError(f"'{name}', byte 0: the header is damaged")
    rest = data[_SEGMENT.size : end].tobytes()
    if xxhash.xxh3_64_intdigest(start[: -_CHECKSUM.size] + rest) != checksum:
        raise DamagedHeaderError(f"'{name}', byte 0: the header is damaged")
    return version, rest[:identity_bytes], end


def check_identity(seen: bytes, wanted: bytes, name: str) -> None:
    """See that a segment is of this job and shard.

    Raises:
        StorageError: it is not; says which values differ.
    """
    if seen == wanted:
        return
    found, expected = json.loads(seen), json.loads(wanted)
    differing = [
        f"{key} {found.get(key)!r} instead of {expected.get(key)!r}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]
    raise StorageError(f"'{name}' is the log of another job or shard: {', '.join(differing)}")


def entry_bytes(entry: LogEntry) -> int:
    """Bytes of its arrays."""
    arrays = (array for table in entry.tables for array in table)
    return entry.dense.nbytes + entry.state.nbytes + sum(array.nbytes for array in arrays)


def encode_entry(entry: LogEntry, synced: int) -> list[bytes | memoryview]:
    """An entry as pieces to be written one behind the other; arrays are not copied.

    Raises:
        StorageError: it is bigger than `MAX_ENTRY_BYTES`.
    """
    rows = [np.ascontiguousarray(rows, dtype="<i8") for rows, _ in entry.tables]
    records = [np.ascontiguousarray(records, dtype="<f4") for _, records in entry.tables]
    counts = [*entry.fences]
    for rows_N, records_NR in zip(rows, records, strict=True):
        assert records_NR.shape[:1] == rows_N.shape, "a record for every row"
        counts += records_NR.shape
    dense = np.ascontiguousarray(entry.dense, dtype="<f4")
    state = np.ascontiguousarray(entry.state, dtype="<f4")
    arrays = [a.data.cast("B") for a in (*rows, *records, dense, state) if a.size]
    numbers = np.array(counts, dtype="<i8").tobytes()
    size = len(numbers) + sum(map(len, arrays))
    padding = bytes(-size % 8)
    if size > MAX_ENTRY_BYTES:
        raise StorageError(
            f"version {entry.version} changed {size} bytes of a shard, and the commit log takes "
            f"at most {MAX_ENTRY_BYTES}; use more shards, or durability: snapshot"
        )
    header = EntryHeader(
        ENTRY_MAGIC, FORMAT, size + len(padding), entry.version, synced, len(entry.fences),
        len(rows), dense.shape[0], 0, dense.shape[1], state.size, 0,
    )  # fmt: skip
    head = _ENTRY.pack(*header)
    body: list[bytes | memoryview] = [numbers, *arrays, padding]
    checksum = xxhash.xxh3_64(head[:_ENTRY_CHECKED])
    for piece in body:
        checksum.update(piece)
    return [head[:_ENTRY_CHECKED] + _CHECKSUM.pack(checksum.intdigest()), *body]


def read_entry_header(data: Bytes, offset: int) -> EntryHeader | None:
    """The header at an offset, if there is one and its body ends within the data."""
    start = data[offset : offset + ENTRY_HEADER_BYTES].tobytes()
    if len(start) < ENTRY_HEADER_BYTES:
        return None
    header = EntryHeader(*_ENTRY.unpack(start))
    whole = header.magic == ENTRY_MAGIC and header.format == FORMAT and header.body_bytes % 8 == 0
    return header if whole and header.size_bytes <= data.size - offset else None


def is_whole(data: Bytes, offset: int, header: EntryHeader) -> bool:
    """Whether the checksum of the entry at an offset is right."""
    view = data[offset : offset + header.size_bytes].data
    checksum = xxhash.xxh3_64(view[:_ENTRY_CHECKED])
    checksum.update(view[ENTRY_HEADER_BYTES:])
    return checksum.intdigest() == header.checksum


def decode_entry(data: Bytes, offset: int, header: EntryHeader) -> LogEntry:
    """The entry at an offset, checked before; its arrays are views of `data`."""
    at = offset + ENTRY_HEADER_BYTES
    end = at + header.body_bytes

    def take(kind: str, *shape: int) -> npt.NDArray[Any]:
        nonlocal at
        start, at = at, at + np.dtype(kind).itemsize * prod(shape)
        assert at <= end, "an entry with a good checksum says what it holds"
        return data[start:at].view(kind).reshape(shape)

    fences = tuple(take("<i8", header.num_fences).tolist())
    shapes: list[tuple[int, int]] = take("<i8", header.num_tables, 2).tolist()
    rows = [take("<i8", count) for count, _ in shapes]
    records = [take("<f4", *shape) for shape in shapes]
    return LogEntry(
        version=header.version,
        fences=fences,
        tables=tuple(zip(rows, records, strict=True)),
        dense=take("<f4", header.num_dense, header.dense_size),
        state=take("<f4", header.state_size),
    )


def find_entries(data: Bytes, offset: int) -> Iterator[EntryHeader]:
    """Headers of all whole entries from an offset on, wherever they start."""
    view = data.data
    step = 1 << 24
    for start in range(offset, len(view), step):
        window = view[start : start + step + len(ENTRY_MAGIC) - 1].tobytes()
        at = window.find(ENTRY_MAGIC)
        while at >= 0:
            header = read_entry_header(data, start + at)
            if header is not None and is_whole(data, start + at, header):
                yield header
            at = window.find(ENTRY_MAGIC, at + 1)


def _padded(size: int) -> int:
    return -(-size // 8) * 8
