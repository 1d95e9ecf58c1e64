"""Pulls and pushes as frames.

A PULL's or PUSH's `meta` holds int64 numbers: `FIELDS` per table and `TAIL` at the end (see
`ps.step_message`). Over shared memory they say where the arrays lie, and nothing else travels. Over
TCP the places mean nothing, and the arrays follow as the payload, without gaps:

    per table: local rows (int64), row splits (int64, tables with bags)
    per table: weights (float32, tables with weights)
    PUSH only: dense gradients (float32), non-trainable values (float32)
    PUSH only, per table: gradients

The payload of ROWS is dense values, non-trainable values, and rows per table. Rows and gradients
are float32, or 16 bits wide with another `wire_dtype`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from ps.errors import ProtocolError
from ps.kernels.narrow import from_bfloat16, to_bfloat16
from ps.memory import empty
from ps.messages import Bags, Pull, Push, Rows, no_weights
from ps.quantized import QuantizedRows, dequantized, quantized
from ps.ragged import F32
from ps.step_message import FIELDS, NO_PLACE, TAIL, StepMessage
from ps.wire.arena import Segment, segment_and_offset
from ps.wire.frames import Frame, Header, Kind

WireDtype = Literal["float32", "bfloat16", "float16"]
Buffers = Sequence[memoryview]


@dataclass(frozen=True, slots=True)
class WireFormat:
    """What both sides of a connection know of its messages."""

    dims: tuple[int, ...]
    """D of every table."""
    dtype: WireDtype = "float32"
    """Of rows and gradients on the way. A number x becomes x·(1 + e) with |e| ≤ 2⁻⁸ (bfloat16) or
    2⁻¹¹ (float16, or off by 2⁻²⁵ if that is more); what does not fit is an error."""
    max_payload_bytes: int = 1 << 30
    """Largest payload, and largest answer, that is taken."""

    @property
    def meta_bytes(self) -> int:
        """Size of a PULL's or PUSH's meta part."""
        return 8 * (FIELDS * len(self.dims) + TAIL)

    @property
    def item(self) -> np.dtype[Any]:
        """Of the arrays that carry rows and gradients."""
        return np.dtype(np.float32 if self.dtype == "float32" else np.uint16)

    def narrowed(self, rows: F32) -> npt.NDArray[Any]:
        """Rows [n, D] as they travel.

        Raises:
            DataError: a number does not fit.
        """
        if self.dtype == "float32":
            return rows
        if self.dtype == "bfloat16":
            numbers = empty(rows.shape, np.uint16)
            bits = np.ascontiguousarray(rows).view(np.uint32)
            if to_bfloat16(bits.reshape(-1), numbers.reshape(-1)) == 0:
                return numbers
        return quantized(rows, self.dtype).records.view(np.uint16)  # and its errors

    def widened(self, numbers: npt.NDArray[Any]) -> F32:
        """What has travelled as rows, float32 [..., D]."""
        if self.dtype == "float32":
            return numbers
        if self.dtype == "bfloat16":
            rows = empty(numbers.shape)
            flat = np.ascontiguousarray(numbers).reshape(-1)
            from_bfloat16(flat, rows.view(np.uint32).reshape(-1))
            return rows
        dim = numbers.shape[-1]
        records = np.ascontiguousarray(numbers).reshape(-1, dim).view(np.uint8)
        return dequantized(QuantizedRows(self.dtype, dim, records)).reshape(numbers.shape)


class _TableNumbers(NamedTuple):
    """`FIELDS` of a table."""

    entries: int
    bags: int
    local_rows: int
    row_splits: int
    weights: int
    values: int

    @property
    def num_values(self) -> int:
        """Rows to come, or gradients: one per entry or per bag."""
        return self.entries if self.bags < 0 else self.bags


class _Arrays(Protocol):
    """Where a message's arrays are."""

    def read(self, place: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """An array of the message, in the order of the payload."""
        ...

    def read_checked(self, place: int, size: int) -> Any:
        """The same for int64 numbers that will be checked, and must not change after that."""
        ...


class _Inline:
    """Arrays that came with the frame."""

    def __init__(self, payload: Buffers) -> None:
        self._memory = payload[0] if payload else memoryview(b"")
        self._next = 0

    def read(self, place: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        array: npt.NDArray[Any] = np.ndarray(shape, dtype, self._memory, self._next)
        self._next += array.nbytes
        return array

    def read_checked(self, place: int, size: int) -> Any:
        return self.read(place, (size,), np.int64)


class _Shared:
    """Arrays in the worker's arena."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def read(self, place: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        number, offset = segment_and_offset(place)
        if not 0 <= number < len(self._segments):
            raise ProtocolError(f"an array lies in segment {number} of {len(self._segments)}")
        segment = self._segments[number]
        try:
            return np.ndarray(shape, dtype, segment.pages, offset)
        except (TypeError, ValueError):  # NumPy checks the bounds
            raise ProtocolError(
                f"an array {list(shape)} at {offset} goes beyond its segment of "
                f"{segment.size} bytes"
            ) from None

    def read_checked(self, place: int, size: int) -> Any:
        return self.read(place, (size,), np.int64).copy()


class Incoming:
    """The pulls and pushes that one worker sends to a shard."""

    def __init__(self, format: WireFormat, shared: bool) -> None:
        self._format = format
        self._dims, self._item = format.dims, format.item
        self._numbers_in = struct.Struct(f"<{format.meta_bytes // 8}q")
        self._meta: bytes | None = None
        """The meta part that was parsed last: a frame's is looked at several times."""
        self._parsed: tuple[list[_TableNumbers], tuple[int, int, int, int]] = ([], (0, 0, 0, 0))
        self._shared = shared
        self.segments: list[Segment] = []
        """Of the worker's arena, if it is `shared`."""

    def place(self, header: Header, meta: bytes) -> Buffers:
        """Memory for a payload: see `ps.wire.frames.Place`."""
        if self._shared or header.kind not in (Kind.PULL, Kind.PUSH):
            raise ProtocolError(f"a {header.kind.name} with a payload, which it has not here")
        size = self._payload_bytes(header, meta)
        if size != header.payload_bytes:
            raise ProtocolError(
                f"a {header.kind.name} with a payload of {header.payload_bytes} bytes, its "
                f"description makes {size}"
            )
        return [memoryview(cast("Any", empty((header.payload_bytes,), np.uint8)))]

    def pull(self, frame: Frame) -> tuple[Pull, Rows | None]:
        """The pull, and the arrays of the arena that its answer goes to, None without one.

        Raises:
            ProtocolError: sizes or places that cannot be.
        """
        tables, (dense_place, dense, state_place, state) = self._numbers(frame.header, frame.meta)
        arrays = self._arrays(frame)
        local_rows, bags = self._rows_and_bags(arrays, tables)
        into = None
        if self._shared:
            into = Rows(
                frame.header.version,
                self._values(arrays, tables),
                arrays.read(dense_place, (dense,), np.float32),
                arrays.read(state_place, (max(0, state),), np.float32),
            )
        header, direct = frame.header, self._format.dtype == "float32"
        pull = Pull(header.worker, header.step, header.version, local_rows, bags,
                    into if direct else None)  # fmt: skip
        return pull, into

    def push(self, frame: Frame) -> Push:
        """The push; its gradients stay where they are.

        Raises:
            ProtocolError: sizes or places that cannot be.
        """
        tables, (dense_place, dense, state_place, state) = self._numbers(frame.header, frame.meta)
        arrays = self._arrays(frame)
        local_rows, bags = self._rows_and_bags(arrays, tables)
        dense_grad = arrays.read(dense_place, (dense,), np.float32)
        values = None if state < 0 else arrays.read(state_place, (state,), np.float32)
        grads = tuple(map(self._format.widened, self._values(arrays, tables)))
        header = frame.header
        return Push(header.worker, header.step, local_rows, grads, dense_grad, values, bags)

    def _arrays(self, frame: Frame) -> _Arrays:
        if self._shared:
            return _Shared(self.segments)
        header = frame.header  # `place` has looked at payloads that there are
        if not header.payload_bytes and (size := self._payload_bytes(header, frame.meta)):
            raise ProtocolError(f"a {frame.header.kind.name} without its payload of {size} bytes")
        return _Inline(frame.payload)

    def _rows_and_bags(
        self, arrays: _Arrays, tables: Sequence[_TableNumbers]
    ) -> tuple[tuple[npt.NDArray[np.int64], ...], tuple[Bags | None, ...]]:
        rows, splits = [], []
        for table in tables:
            rows.append(arrays.read_checked(table.local_rows, table.entries))
            if table.bags >= 0:
                splits.append(arrays.read_checked(table.row_splits, table.bags + 1))
        if not splits:
            return tuple(rows), ()
        bags: list[Bags | None] = []
        for table in tables:
            weights = no_weights()
            if table.bags >= 0 and table.weights != NO_PLACE:
                weights = arrays.read(table.weights, (table.entries,), np.float32)
            bags.append(Bags(splits.pop(0), weights) if table.bags >= 0 else None)
        return tuple(rows), tuple(bags)

    def _values(self, arrays: _Arrays, tables: Sequence[_TableNumbers]) -> tuple[Any, ...]:
        return tuple(
            arrays.read(table.values, (table.num_values, dim), self._item)
            for table, dim in zip(tables, self._dims, strict=True)
        )

    def _numbers(
        self, header: Header, meta: bytes
    ) -> tuple[list[_TableNumbers], tuple[int, int, int, int]]:
        if meta is self._meta:
            return self._parsed
        if len(meta) != self._format.meta_bytes:
            raise ProtocolError(
                f"a {header.kind.name} describes its tables in {len(meta)} bytes, "
                f"wanted {self._format.meta_bytes}"
            )
        numbers = self._numbers_in.unpack(meta)
        tail: tuple[int, int, int, int] = numbers[-TAIL:]
        most, size, row_bytes = self._format.max_payload_bytes, 0, self._item.itemsize
        tables = []
        for i, dim in enumerate(self._dims):
            table = _TableNumbers(*numbers[i * FIELDS : (i + 1) * FIELDS])
            if not (0 <= table.entries <= most and -1 <= table.bags <= most):
                raise ProtocolError(
                    f"a {header.kind.name} with {table.entries} entries in {table.bags} bags"
                )
            size += table.num_values * dim * row_bytes
            tables.append(table)
        if not (0 <= tail[1] <= most and -1 <= tail[3] <= most):
            raise ProtocolError(f"a {header.kind.name} with {tail[1]} and {tail[3]} dense values")
        if size > most:
            raise ProtocolError(
                f"a {header.kind.name} of {size} bytes of rows, at most {most} are taken"
            )
        self._meta, self._parsed = meta, (tables, tail)
        return self._parsed

    def _payload_bytes(self, header: Header, meta: bytes) -> int:
        tables, tail = self._numbers(header, meta)
        size = 0
        for table, dim in zip(tables, self._format.dims, strict=True):
            size += 8 * table.entries
            if table.bags >= 0:
                size += 8 * (table.bags + 1)
                size += 4 * table.entries * (table.weights != NO_PLACE)
            if header.kind == Kind.PUSH:
                size += table.num_values * dim * self._item.itemsize
        if header.kind == Kind.PUSH:
            size += 4 * (tail[1] + max(0, tail[3]))
        return size


def rows_payload(format: WireFormat, rows: Rows) -> list[memoryview]:
    """The payload of ROWS."""
    return _buffers([rows.dense, rows.state, *map(format.narrowed, rows.rows)])


def write_rows(format: WireFormat, rows: Rows, into: Rows) -> None:
    """Put an answer into the arena, where the shard did not write it there at once.

    Raises:
        ProtocolError: there is room for other numbers of dense values.
        DataError: a number does not fit the format.
    """
    check_sizes(rows, into)
    for values, out in zip(rows.rows, into.rows, strict=True):
        out[...] = format.narrowed(values)
    into.dense[...] = rows.dense
    into.state[...] = rows.state


def check_sizes(rows: Rows, into: Rows) -> None:
    """See that a worker has room for exactly what the shard has.

    Raises:
        ProtocolError: its dense values are of another number.
    """
    seen, wanted = (into.dense.size, into.state.size), (rows.dense.size, rows.state.size)
    if seen != wanted:
        raise ProtocolError(f"a pull with room for {seen} dense values, the shard has {wanted}")


def pull_payload(message: StepMessage, shard: int) -> list[memoryview]:
    """The payload of a PULL."""
    pull = message.pull(shard)
    return _buffers(_rows_first(pull.local_rows, pull.bags))


def push_payload(message: StepMessage, shard: int) -> list[memoryview]:
    """The payload of a PUSH; gradients are as wide as `message` has them."""
    push = message.push(shard)
    state = [] if push.state is None else [push.state]
    first = _rows_first(push.local_rows, push.bags)
    return _buffers([*first, push.dense_grad, *state, *push.grads])


def rows_places(message: StepMessage, shard: int) -> list[memoryview]:
    """Where the payload of ROWS goes: the shard's part of the pull's arrays."""
    into = message.pull(shard).into
    assert into is not None, "a pull has room for its answer"
    return _buffers([into.dense, into.state, *into.rows])


def _rows_first(
    local_rows: Sequence[npt.NDArray[np.int64]], bags: Sequence[Bags | None]
) -> list[npt.NDArray[Any]]:
    arrays: list[npt.NDArray[Any]] = []
    for i, rows in enumerate(local_rows):
        arrays.append(rows)
        if bags and (of_table := bags[i]) is not None:
            arrays.append(of_table.row_splits)
    return arrays + [b.weights for b in bags if b is not None]


def _buffers(arrays: Sequence[npt.NDArray[Any]]) -> list[memoryview]:
    whole = (cast("Any", np.ascontiguousarray(array)) for array in arrays if array.size)
    return [memoryview(array).cast("B") for array in whole]
