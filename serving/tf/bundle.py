"""Where the tensors of a TensorFlow checkpoint lie in its files, so that rows can be read alone.

TensorFlow's own `RestoreV2` reads a whole stored tensor even when it is asked for a few rows. The
data files hold plain little-endian arrays; the index file says where, as a sorted table of keys in
LevelDB's format (`tensorflow/core/lib/io/table_format.txt`) whose values are `BundleEntryProto`.
Slices of one tensor have keys of their own (`tensorflow/core/util/saved_tensor_slice_util.h`).
"""

from __future__ import annotations

import bisect
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import tensor_bundle_pb2

from ps.errors import CheckpointError
from ps.ragged import F32

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_BLOCK_TRAILER_BYTES = 5  # compression type, CRC


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive rows of a tensor, stored in one place."""

    first_row: int
    num_rows: int
    path: str
    offset: int


class Bundle:
    """The tensors of a checkpoint by key."""

    def __init__(self, prefix: str) -> None:
        """Read the index.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        self.prefix = prefix
        try:
            with open(f"{prefix}.index", "rb") as file:
                values = dict(_read_table(file.read()))
            header = _Header.FromString(values.pop(b""))
            entries = {key: _Entry.FromString(value) for key, value in values.items()}
            self._slices = {key: e for key, e in entries.items() if key.startswith(b"\0")}
            self._tensors = {k.decode(): e for k, e in entries.items() if k not in self._slices}
        except OSError as e:
            raise CheckpointError(f"checkpoint '{prefix}': {e.strerror or e}") from e
        except (ValueError, LookupError, struct.error, DecodeError) as e:
            raise CheckpointError(f"'{prefix}.index' is no TensorFlow index: {e!r}") from e
        if header.endianness != _Header.LITTLE:
            raise CheckpointError(f"'{prefix}.index' is not that of a little-endian checkpoint")
        self._num_shards = header.num_shards
        self._pieces: dict[str, list[_Piece]] = {}

    @property
    def keys(self) -> list[str]:
        """Keys of tensors, sorted."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(d.size for d in self._tensors[key].shape.dim)

    def dtype(self, key: str) -> str:
        """The name of a tensor's dtype, such as "float" (float32)."""
        name: str = types_pb2.DataType.Name(self._tensors[key].dtype)
        return name.removeprefix("DT_").lower()

    def read_rows(self, key: str, first_row: int, out_ND: F32) -> None:
        """Fill `out_ND`, C-contiguous float32 [N, D], with rows of a float32 tensor [V, D].

        Raises:
            CheckpointError: a row is in no slice, or a data file is too short.
        """
        if key not in self._pieces:
            self._pieces[key] = self._pieces_of(key)
        pieces, row, last = self._pieces[key], first_row, first_row + len(out_ND)
        row_bytes = 4 * out_ND.shape[1]
        at = bisect.bisect_right(pieces, row, key=lambda piece: piece.first_row) - 1
        while row < last:
            if not 0 <= at < len(pieces) or not 0 <= row - pieces[at].first_row < max(
                1, pieces[at].num_rows
            ):
                raise CheckpointError(f"checkpoint '{self.prefix}': '{key}' lacks row {row}")
            piece = pieces[at]
            stop = min(last, piece.first_row + piece.num_rows)
            offset = piece.offset + (row - piece.first_row) * row_bytes
            _read_at(piece.path, offset, out_ND[row - first_row : stop - first_row])
            row, at = stop, at + 1

    def _pieces_of(self, key: str) -> list[_Piece]:
        entry = self._tensors[key]
        num_rows, dim = self.shape(key)
        if not entry.slices:
            return [_Piece(0, num_rows, self._data_file(entry.shard_id), entry.offset)]
        pieces = []
        for slice_ in entry.slices:
            rows, columns = map(_extent, slice_.extent, (num_rows, dim))
            if columns != (0, dim):
                raise CheckpointError(
                    f"checkpoint '{self.prefix}': '{key}' is cut by columns, {columns} of {dim}; "
                    "only slices of whole rows can be read"
                )
            stored = self._slices.get(_slice_key(key, slice_))
            if stored is None:
                raise CheckpointError(f"checkpoint '{self.prefix}': a slice of '{key}' is missing")
            pieces.append(_Piece(*rows, self._data_file(stored.shard_id), stored.offset))
        return sorted(pieces, key=lambda piece: piece.first_row)

    def _data_file(self, shard: int) -> str:
        return f"{self.prefix}.data-{shard:05d}-of-{self._num_shards:05d}"


_Header = tensor_bundle_pb2.BundleHeaderProto
_Entry = tensor_bundle_pb2.BundleEntryProto


def _read_at(path: str, offset: int, out: F32) -> None:
    left = out.data.cast("B")
    try:
        with open(path, "rb", buffering=0) as file:
            while left:
                count = os.preadv(file.fileno(), [left], offset)
                if count == 0:
                    raise CheckpointError(f"'{path}' ends at byte {offset}, within a tensor")
                left, offset = left[count:], offset + count
    except OSError as e:
        raise CheckpointError(f"'{path}' cannot be read: {e.strerror or e}") from e


def _extent(extent: Any, size: int) -> tuple[int, int]:
    """(start, length); an extent without a length is the whole axis."""
    return (extent.start, extent.length) if extent.HasField("length") else (0, size)


def _read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a table file, in order."""
    footer = data[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise ValueError("no table footer")
    at = 0
    numbers = []
    for _ in range(4):  # offset and size of the metaindex block, then of the index block
        number, at = _varint(footer, at)
        numbers.append(number)
    for _, handle in _read_block(data, numbers[2], numbers[3]):
        offset, at = _varint(handle, 0)
        size, _ = _varint(handle, at)
        yield from _read_block(data, offset, size)


def _read_block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    block = data[offset : offset + size + _BLOCK_TRAILER_BYTES]
    if len(block) < size + _BLOCK_TRAILER_BYTES or size < 4:
        raise ValueError("a block is cut off")
    if block[size] != 0:
        raise ValueError(f"a block has compression {block[size]}, which TensorFlow does not write")
    (num_restarts,) = struct.unpack("<I", block[size - 4 : size])
    end, at, key = size - 4 - 4 * num_restarts, 0, b""
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        value_size, at = _varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + value_size]
        at += value_size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _slice_key(name: str, slice_: Any) -> bytes:
    """`EncodeTensorNameSlice`: in TensorFlow's ordered code, whose bytes sort as their values."""
    out = _number(0) + _text(name.encode()) + _number(len(slice_.extent))
    for extent in slice_.extent:
        whole = not extent.HasField("length")
        out += _signed(0 if whole else extent.start) + _signed(-1 if whole else extent.length)
    return out


def _number(value: int) -> bytes:
    digits = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return bytes([len(digits)]) + digits


def _text(value: bytes) -> bytes:
    return value.replace(b"\0", b"\0\xff") + b"\0\1"  # UTF-8 has no byte FF


def _signed(value: int) -> bytes:
    """As many leading ones as there are bytes, then the number; all inverted below zero."""
    magnitude = ~value if value < 0 else value
    size = magnitude.bit_length() // 7 + 1
    header = ((1 << size) - 1) << (7 * size)
    encoded = header | magnitude
    if value < 0:
        encoded ^= (1 << (8 * size)) - 1
    return encoded.to_bytes(size, "big")
