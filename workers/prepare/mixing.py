"""Stateless random numbers: a 64-bit mix of (seed, stream, id), the same on every machine.

Steele, Lea, Flood: "Fast splittable pseudorandom number generators" (OOPSLA 2014), the
finaliser of SplitMix64. Used where a value must be a pure function of an id.
"""

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def stream_key(*parts: int) -> int:
    """One 64-bit key from several integers; their order matters."""
    key = 0
    for part in parts:
        key = int(mix(np.array([(key + _GOLDEN + part) & _MASK], np.uint64))[0])
    return key


def mix(values: npt.NDArray[np.integer], key: int = 0) -> U64:
    """splitmix64 of `values + key`, element by element; a bijection of 64-bit numbers.

    Args:
        values: integers of any shape; int64 is taken modulo 2**64.
        key: 64-bit key from `stream_key`.
    """
    z = values.astype(np.uint64)
    z += np.uint64(key)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def uniform(values: npt.NDArray[np.integer], key: int) -> F64:
    """A number in [0, 1) for every value: the top 53 bits of `mix`."""
    return (mix(values, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53
