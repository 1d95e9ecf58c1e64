"""Row formats: how the D numbers of one row lie in memory, and how a kernel reads them.

A row is a record of `record_bytes(format, dim)` bytes; records follow one another without gaps and
may start at any address.

    float32    D × 4 bytes
    float16    D × 2 bytes, IEEE half floats
    bfloat16   D × 2 bytes, the upper halves of float32
    int8       float32 scale, float32 offset, then D × 1 byte q: the row is scale·q + offset,
               rounded after the multiplication and after the addition
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numba.core.typing.templates import signature

from ps.kernels.compiled import inline
from ps.kernels.vector import (
    CACHE_LINE,
    Vector,
    VectorType,
    _intrinsic,
    load,
    load_bfloat16,
    load_float16,
    load_scalar,
    load_uint8,
    prefetch,
)

NarrowFormat = Literal["float16", "bfloat16", "int8"]
RowFormat = Literal["float32", NarrowFormat]


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedRows:
    """A table's rows in one of the narrow formats, made by `ps.quantized.quantized`."""

    format: NarrowFormat
    dim: int
    """D, length of a row."""
    records: npt.NDArray[np.uint8]
    """uint8 [V, `record_bytes(format, dim)`], C-contiguous: an array or a memory map."""

    def __post_init__(self) -> None:
        size = record_bytes(self.format, self.dim)
        assert self.records.shape[1:] == (size,), f"records have {size} bytes"

    @property
    def num_rows(self) -> int:
        """V."""
        return len(self.records)

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return self.records.nbytes


def record_bytes(format: RowFormat, dim: int) -> int:
    """Bytes of a row of D numbers, hence from one row to the next."""
    return _HEADER_BYTES[format] + number_bytes(format) * dim


def number_bytes(format: RowFormat) -> int:
    """Bytes of one number of a row."""
    return _NUMBER_BYTES[format]


@inline
def prefetch_row(record: int, size: int) -> None:
    """Ask for every cache line of `size` bytes of a record.

    Asking for every other line of rows of 512 bytes, and leaving the rest to the hardware, made two
    cores faster on uniform ids (79 against 69 million rows/s) and one core slower on Zipf ids (93
    against 110), whose rows are often in a cache.
    """
    for start in range(0, size, CACHE_LINE):
        prefetch(record + start)
    prefetch(record + size - 1)  # records need not start at a cache line


@_intrinsic
def load_columns(context: Any, format: RowFormat, record: int, first: int, lanes: int) -> Any:
    """Columns first … first + lanes - 1 of the row whose record is at an address, as float32.

    The format and the number of lanes are constants where the kernel is compiled.
    """
    constants: Any = (format, lanes)
    name, n = (constant.literal_value for constant in constants)
    function = _LOADS[name](n)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        inner = signature(sig.return_type, *sig.args[1:3])
        return context.compile_internal(builder, function, inner, args[1:3])

    return VectorType(n)(format, record, first, lanes), emit


def _load_float32(lanes: int) -> Callable[[int, int], Vector]:
    return lambda record, first: load(record + 4 * first, lanes)


def _load_float16(lanes: int) -> Callable[[int, int], Vector]:
    return lambda record, first: load_float16(record + 2 * first, lanes)


def _load_bfloat16(lanes: int) -> Callable[[int, int], Vector]:
    return lambda record, first: load_bfloat16(record + 2 * first, lanes)


def _load_int8(lanes: int) -> Callable[[int, int], Vector]:
    def load_row(record: int, first: int) -> Vector:
        scale, offset = load_scalar(record), load_scalar(record + 4)
        row: Vector = load_uint8(record + 8 + first, lanes) * scale + offset
        return row

    return load_row


_HEADER_BYTES: dict[RowFormat, int] = {"float32": 0, "float16": 0, "bfloat16": 0, "int8": 8}
_NUMBER_BYTES: dict[RowFormat, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_LOADS: dict[RowFormat, Callable[[int], Callable[[int, int], Vector]]] = {
    "float32": _load_float32,
    "float16": _load_float16,
    "bfloat16": _load_bfloat16,
    "int8": _load_int8,
}
