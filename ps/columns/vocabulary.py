"""A vocabulary: distinct strings or integers, and the place of each; vocabulary files.

`pyarrow.compute.index_in` would build its hash table anew in every call (72 ms for 10⁶ words), so
the index is made once, here. The module knows no column.
"""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ps.errors import ConfigError
from ps.kernels.fingerprint import U8, U64, find_strings, fingerprint64, index_strings
from ps.ragged import I64

_INTEGER = re.compile(rb"\s*[+-]?[0-9]+\s*")
_RECORD_HEADER = struct.Struct("<QI")
_RECORD_FOOTER_BYTES = 4


class Vocabulary:
    """V distinct keys, numbered from 0."""

    def __init__(self, keys: pa.Array, owner: str, source: str) -> None:
        """Index the keys.

        Args:
            keys: integers or strings, without nulls; kept as int64 or large_binary [V].
            owner: the column, for error messages.
            source: where the keys come from, for error messages.

        Raises:
            ConfigError: no key, one that occurs twice, a null, or not strings or int64.
        """
        if len(keys) == 0:
            raise ConfigError(f"{source} must be non-empty, column_name: {owner}")
        if keys.null_count:
            raise ConfigError(f"column '{owner}': {source} holds {keys.null_count} nulls")
        try:
            self.keys = keys.cast(pa.int64() if pa.types.is_integer(keys.type) else STRING)
        except pa.ArrowInvalid as e:
            raise ConfigError(f"column '{owner}': bad {source}: {e}") from None
        if self.is_integer:
            numbers = integers(self.keys)
            self._order = np.argsort(numbers, kind="stable")
            self._sorted = numbers[self._order]
            repeats = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
            duplicate = int(self._order[repeats[0] + 1]) if repeats.size else -1
        else:
            data, offsets = string_buffers(self.keys)
            self._places, duplicate = index_strings(data, offsets, fingerprint64(data, offsets))
        if duplicate >= 0:
            raise ConfigError(
                f"Duplicate keys in {source}, column_name: {owner}: number {duplicate}, "
                f"{self.keys[duplicate].as_py()!r}, was there before"
            )

    @property
    def is_integer(self) -> bool:
        """Whether keys are integers rather than strings."""
        return bool(pa.types.is_integer(self.keys.type))

    def __len__(self) -> int:
        return len(self.keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and bool(self.keys.equals(other.keys))

    def __hash__(self) -> int:
        return hash((len(self.keys), self.keys[0]))

    def find(self, values: Any) -> I64:
        """int64 [N]: number of each value, an integer array or a large_binary; -1 if unknown."""
        if self.is_integer:
            numbers = np.asarray(values, dtype=np.int64)
            place = np.minimum(np.searchsorted(self._sorted, numbers), len(self) - 1)
            return np.where(self._sorted[place] == numbers, self._order[place], -1)
        query, query_offsets = string_buffers(values)
        hashes = fingerprint64(query, query_offsets)
        data, offsets = string_buffers(self.keys)
        return find_strings(self._places, data, offsets, query, query_offsets, hashes)


STRING = pa.large_binary()
"""How strings are kept: bytes, UTF-8 if they came as text, with 64-bit offsets."""


def is_string(dtype: pa.DataType) -> bool:
    """Whether an Arrow type holds text or bytes."""
    kinds = pa.types
    return bool(
        kinds.is_string(dtype)
        or kinds.is_large_string(dtype)
        or kinds.is_binary(dtype)
        or kinds.is_large_binary(dtype)
        or kinds.is_string_view(dtype)
        or kinds.is_binary_view(dtype)
        or kinds.is_fixed_size_binary(dtype)
    )


def string_buffers(strings: pa.LargeBinaryArray) -> tuple[U8, I64]:
    """(bytes, int64 offsets [N + 1]) of an array without nulls, uncopied."""
    _, offset_buffer, data_buffer = strings.buffers()
    if len(strings) == 0:
        return np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)
    data = np.frombuffer(data_buffer or b"", dtype=np.uint8)
    return data, offsets[strings.offset : strings.offset + len(strings) + 1]


def integers(array: pa.Array) -> npt.NDArray[np.integer[Any]]:
    """The integers of an array, nulls as 0."""
    filled = array.fill_null(0) if array.null_count else array
    numbers: npt.NDArray[np.integer[Any]] = filled.to_numpy(zero_copy_only=False)
    return numbers


def hash_bucket(values: Any, num_buckets: int) -> I64:
    """int64 [N] in [0, num_buckets): `tf.strings.to_hash_bucket_fast`, integers as decimals.

    Args:
        values: an integer array or a large_binary.
        num_buckets: at least 1.
    """
    if isinstance(values, np.ndarray):
        values = pa.array(values).cast(pa.large_string()).cast(STRING)
    hashes: U64 = fingerprint64(*string_buffers(values))
    return (hashes % np.uint64(num_buckets)).astype(np.int64)


def vocabulary_array(values: Any, key: str) -> pa.Array:
    """Strings or integers as NumPy, and so TensorFlow, sees them: with one string, all are.

    Raises:
        ConfigError: something else.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if not isinstance(values, pa.Array):
        text = np.array(values).dtype.kind in "US"
        if text:
            values = [v if isinstance(v, bytes) else str(v) for v in values]
        try:
            values = pa.array(values, type=STRING if text else None)
        except (pa.ArrowException, OverflowError, UnicodeError) as e:
            raise ConfigError(f"column '{key}': bad vocabulary_list: {e}") from None
    if not (pa.types.is_integer(values.type) or is_string(values.type)):
        raise ConfigError(
            f"column_name: {key} vocabulary dtype must be string or integer. dtype: {values.type}."
        )
    return values


def read_vocabulary_file(path: str, size: int | None, is_integer: bool, key: str, kind: str) -> Any:
    r"""The keys of a vocabulary file, one per line, as an Arrow array.

    Args:
        path: text with a key per line, a last "\r" not counting; or a gzipped TFRecord file.
        size: take the first `size` keys only; None is all.
        is_integer: whether the keys are decimals.
        key: the column, for error messages.
        kind: "text" or "tfrecord_gzip".

    Raises:
        ConfigError: no such file, fewer keys than `size`, an empty line, not an integer.
    """
    try:
        lines = _records(path) if kind == "tfrecord_gzip" else _lines(path)
    except FileNotFoundError:
        raise ConfigError(f"vocabulary_file in {key} does not exist: {path}") from None
    except (OSError, EOFError, struct.error) as e:
        raise ConfigError(f"vocabulary_file in {key} cannot be read: {path}: {e}") from None
    size = len(lines) if size is None else size
    if size < 1:
        raise ConfigError(f"Invalid vocabulary_size in {key}: {path} holds no keys")
    if size > len(lines):
        raise ConfigError(
            f"Invalid vocab_size in {path}: column '{key}' expected {size} but got {len(lines)}"
        )
    lines = lines[:size]
    if not is_integer:
        if kind == "text" and b"" in lines:
            raise ConfigError(f"Invalid content in {path}: empty line {lines.index(b'')}")
        return pa.array(lines, type=STRING)
    for number, line in enumerate(lines):
        if not _INTEGER.fullmatch(line):
            raise ConfigError(f"Invalid content in {path}: line {number} is not a valid int64")
    try:
        return pa.array([int(line) for line in lines], type=pa.int64())
    except OverflowError as e:
        raise ConfigError(f"Invalid content in {path}: not a valid int64: {e}") from None


def _lines(path: str) -> list[bytes]:
    lines = Path(path).read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix(b"\r") for line in lines]


def _records(path: str) -> list[bytes]:
    """TFRecords: length, its checksum, bytes, their checksum; gzip has checked them all."""
    data = gzip.decompress(Path(path).read_bytes())
    records, place = [], 0
    while place < len(data):
        length, _ = _RECORD_HEADER.unpack_from(data, place)
        place += _RECORD_HEADER.size
        if place + length + _RECORD_FOOTER_BYTES > len(data):
            raise EOFError("the last record is cut off")
        records.append(data[place : place + length])
        place += length + _RECORD_FOOTER_BYTES
    return records
