"""float32 to bfloat16 and back, for numbers that travel: in order, one pass, no rows.

A bfloat16 is the upper half of a float32; rounded to the nearest, ties to even.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ps.kernels.compiled import kernel

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]

_HALF, _ONE, _UPPER = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
_EXPONENT, _NARROW_EXPONENT = np.uint32(0x7F800000), np.uint32(0x7F80)


@kernel(writes=("numbers_N",))
def to_bfloat16(bits_N: U32, numbers_N: U16) -> int:
    """Round the float32 numbers of these bits; returns how many are, or become, infinite or NaN."""
    bad = np.int64(0)
    for i in range(np.uint64(bits_N.size)):
        bits = bits_N[i]
        upper = np.uint32(bits + np.uint32(_HALF + ((bits >> _UPPER) & _ONE))) >> _UPPER
        numbers_N[i] = np.uint16(upper)
        bad += np.int64((bits & _EXPONENT) == _EXPONENT)
        bad += np.int64((upper & _NARROW_EXPONENT) == _NARROW_EXPONENT)
    return int(bad)


@kernel(writes=("bits_N",))
def from_bfloat16(numbers_N: U16, bits_N: U32) -> None:
    """The bits of the float32 numbers."""
    for i in range(np.uint64(bits_N.size)):
        bits_N[i] = np.uint32(numbers_N[i]) << _UPPER
