"""Rows in fewer bytes, for serving: float16, bfloat16, or int8 with a scale and offset per row.

Kernels read such rows in place of float32 rows, and each number is the float32 that `dequantized`
gives. With M = max |x| of a row, a number x of it comes back as

    float16    x rounded to 11 bits: off by at most 2⁻¹¹·|x|, or 2⁻²⁵ if that is more
    bfloat16   x rounded to 8 bits: off by at most 2⁻⁸·|x|, or 2⁻¹³⁴ if that is more
    int8       scale·q + offset, with offset = min, scale = (max - min) / 255 and
               q = (x - offset) / scale rounded to an integer: off by at most
               scale/2 + 2⁻²¹·M, or 2⁻¹⁴¹ if that is more; a row of equal numbers is exact

All in float32, rounded to the nearest after each operation, ties to even.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ps.errors import DataError
from ps.kernels.combine import gather_rows
from ps.kernels.rows import NarrowFormat, QuantizedRows, record_bytes
from ps.memory import empty
from ps.ragged import F32, I64

__all__ = ["QuantizedRows", "dequantized", "quantized"]

_CHUNK_NUMBERS = 1 << 16
"""Quantized at a time, so that what lies between the steps stays in the cache."""

_Records = npt.NDArray[np.uint8]


def quantized(rows_VD: F32, format: NarrowFormat) -> QuantizedRows:
    """The rows, float32 [V, D], in another format. A row's record depends on that row alone.

    Raises:
        DataError: a row holds NaN or infinity, or numbers too far out for the format: beyond
            65504 (float16) or, from minimum to maximum, beyond what float32 holds (int8).
    """
    num_rows, dim = rows_VD.shape
    records = empty((num_rows, record_bytes(format, dim)), np.uint8)
    step = max(1, _CHUNK_NUMBERS // max(1, dim))
    for start in range(0, num_rows, step):
        chunk = slice(start, start + step)
        with np.errstate(all="ignore"):  # what does not fit is found in the result
            fits = _WRITERS[format](rows_VD[chunk], records[chunk])
        if not fits.all():
            row = start + int(np.argmin(fits))
            raise DataError(
                f"row {row} does not fit {format}: it holds NaN or infinity, or goes beyond the "
                f"format's range; its numbers go from {rows_VD[row].min()} to {rows_VD[row].max()}"
            )
    return QuantizedRows(format, dim, records)


def dequantized(rows: QuantizedRows, ids_N: I64 | None = None) -> F32:
    """float32 [N, D]: the rows of ids in [0, V), or all of them."""
    ids = np.arange(rows.num_rows) if ids_N is None else ids_N
    assert ids.min(initial=0) >= 0, "an id is negative"
    assert ids.max(initial=-1) < rows.num_rows, f"an id is not below {rows.num_rows}"
    out_ND: F32 = empty((ids.size, rows.dim))
    gather_rows(rows, ids, out_ND)
    return out_ND


def _write_float16(rows_ND: F32, records: _Records) -> npt.NDArray[np.bool_]:
    narrow = records.view(np.float16)
    narrow[...] = rows_ND
    return _finite(narrow)


def _write_bfloat16(rows_ND: F32, records: _Records) -> npt.NDArray[np.bool_]:
    bits = np.ascontiguousarray(rows_ND).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    upper = rounded >> np.uint32(16)
    records.view(np.uint16)[...] = upper
    return _finite(rows_ND) & _finite((upper << np.uint32(16)).view(np.float32))


def _write_int8(rows_ND: F32, records: _Records) -> npt.NDArray[np.bool_]:
    offset_N1, high_N1 = rows_ND.min(axis=1, keepdims=True), rows_ND.max(axis=1, keepdims=True)
    scale_N1 = (high_N1 - offset_N1) / np.float32(255)
    header = records[:, :8]
    header[:, :4], header[:, 4:] = scale_N1.view(np.uint8), offset_N1.view(np.uint8)
    step_N1 = np.where(scale_N1 > 0, scale_N1, np.float32(1))
    places_ND = np.rint((rows_ND - offset_N1) / step_N1)
    records[:, 8:] = np.minimum(places_ND, np.float32(255))
    return _finite(scale_N1 * np.float32(255) + offset_N1)


def _finite(numbers_ND: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    finite_N: npt.NDArray[np.bool_] = np.isfinite(numbers_ND).all(axis=1)
    return finite_N


_WRITERS: dict[NarrowFormat, Callable[[F32, _Records], npt.NDArray[np.bool_]]] = {
    "float16": _write_float16,
    "bfloat16": _write_bfloat16,
    "int8": _write_int8,
}
