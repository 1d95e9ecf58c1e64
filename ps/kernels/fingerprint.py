"""Fingerprint64 of byte strings, and an index of byte strings by it.

FarmHash's Fingerprint64 (https://github.com/google/farmhash, namespace farmhashna): the hash of
`tf.strings.to_hash_bucket_fast`, fixed for ever. Strings lie one after the other, as in Arrow:
string n is `data[offsets_N1[n]:offsets_N1[n + 1]]`. All arithmetic is uint64 and wraps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ps.kernels import inline, kernel
from ps.ragged import I64

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

_K0 = np.uint64(0xC3A5C85C97CB3127)
_K1 = np.uint64(0xB492B66FBE98F273)
_K2 = np.uint64(0x9AE16A3B2F90404F)


@kernel()
def fingerprint64(data: U8, offsets_N1: I64) -> U64:
    """uint64 [N]: the fingerprint of every string."""
    out = np.empty(offsets_N1.size - 1, dtype=np.uint64)
    for n in range(out.size):
        out[n] = _fingerprint(data, offsets_N1[n], offsets_N1[n + 1] - offsets_N1[n])
    return out


@kernel()
def index_strings(data: U8, offsets_N1: I64, hashes_N: U64) -> tuple[I64, int]:
    """A hash table of distinct strings, for `find_strings`.

    Returns (places, duplicate): open addressing, the number of a string or -1 in each slot; and
    the number of the first string that was there before, -1 if all are distinct.
    """
    size = 16
    while size < 2 * hashes_N.size:
        size *= 2
    places = np.full(size, -1, dtype=np.int64)
    for n in range(hashes_N.size):
        slot, found = _probe(places, data, offsets_N1, hashes_N[n], data, offsets_N1, n)
        if found >= 0:
            return places, n
        places[slot] = n
    return places, -1


@kernel()
def find_strings(
    places: I64, data: U8, offsets_V1: I64, query: U8, query_offsets_N1: I64, hashes_N: U64
) -> I64:
    """int64 [N]: the number of each queried string among the V indexed ones, -1 if it is none."""
    out = np.empty(hashes_N.size, dtype=np.int64)
    for n in range(hashes_N.size):
        _, out[n] = _probe(places, data, offsets_V1, hashes_N[n], query, query_offsets_N1, n)
    return out


@inline
def _probe(
    places: I64, data: U8, offsets: I64, key: np.uint64, query: U8, query_offsets: I64, n: int
) -> tuple[np.int64, np.int64]:
    """(slot, number) of the n-th queried string; its number is -1 if the slot is free."""
    start, length = query_offsets[n], query_offsets[n + 1] - query_offsets[n]
    mask = places.size - 1
    slot = np.int64(key & np.uint64(mask))
    while places[slot] >= 0:
        v = places[slot]
        if offsets[v + 1] - offsets[v] == length:
            same = 0
            while same < length and data[offsets[v] + same] == query[start + same]:
                same += 1
            if same == length:
                return slot, v
        slot = (slot + 1) & mask
    return slot, np.int64(-1)


@inline
def _fingerprint(s: U8, p: int, length: int) -> np.uint64:
    if length <= 16:
        return _up_to_16(s, p, length)
    if length <= 32:
        return _17_to_32(s, p, length)
    if length <= 64:
        return _33_to_64(s, p, length)
    return _long(s, p, length)


@inline
def _fetch64(s: U8, p: int) -> np.uint64:
    value = np.uint64(0)
    for i in range(8):
        value |= np.uint64(s[p + i]) << np.uint64(8 * i)
    return value


@inline
def _fetch32(s: U8, p: int) -> np.uint64:
    value = np.uint64(0)
    for i in range(4):
        value |= np.uint64(s[p + i]) << np.uint64(8 * i)
    return value


@inline
def _rotate(value: np.uint64, shift: int) -> np.uint64:
    return (value >> np.uint64(shift)) | (value << np.uint64(64 - shift))


@inline
def _shift_mix(value: np.uint64) -> np.uint64:
    return value ^ (value >> np.uint64(47))


@inline
def _hash_16(u: np.uint64, v: np.uint64, mul: np.uint64) -> np.uint64:
    a = _shift_mix((u ^ v) * mul)
    return _shift_mix((v ^ a) * mul) * mul


@inline
def _up_to_16(s: U8, p: int, length: int) -> np.uint64:
    size = np.uint64(length)
    mul = _K2 + size * np.uint64(2)
    if length >= 8:
        a = _fetch64(s, p) + _K2
        b = _fetch64(s, p + length - 8)
        c = _rotate(b, 37) * mul + a
        d = (_rotate(a, 25) + b) * mul
        return _hash_16(c, d, mul)
    if length >= 4:
        a = _fetch32(s, p)
        return _hash_16(size + (a << np.uint64(3)), _fetch32(s, p + length - 4), mul)
    if length > 0:
        y = np.uint64(s[p]) + (np.uint64(s[p + (length >> 1)]) << np.uint64(8))
        z = size + (np.uint64(s[p + length - 1]) << np.uint64(2))
        return _shift_mix(y * _K2 ^ z * _K0) * _K2
    return _K2


@inline
def _17_to_32(s: U8, p: int, length: int) -> np.uint64:
    mul = _K2 + np.uint64(length) * np.uint64(2)
    a = _fetch64(s, p) * _K1
    b = _fetch64(s, p + 8)
    c = _fetch64(s, p + length - 8) * mul
    d = _fetch64(s, p + length - 16) * _K2
    u = _rotate(a + b, 43) + _rotate(c, 30) + d
    return _hash_16(u, a + _rotate(b + _K2, 18) + c, mul)


@inline
def _33_to_64(s: U8, p: int, length: int) -> np.uint64:
    mul = _K2 + np.uint64(length) * np.uint64(2)
    a = _fetch64(s, p) * _K2
    b = _fetch64(s, p + 8)
    c = _fetch64(s, p + length - 8) * mul
    d = _fetch64(s, p + length - 16) * _K2
    y = _rotate(a + b, 43) + _rotate(c, 30) + d
    z = _hash_16(y, a + _rotate(b + _K2, 18) + c, mul)
    e = _fetch64(s, p + 16) * mul
    f = _fetch64(s, p + 24)
    g = (y + _fetch64(s, p + length - 32)) * mul
    h = (z + _fetch64(s, p + length - 24)) * mul
    u = _rotate(e + f, 43) + _rotate(g, 30) + h
    return _hash_16(u, e + _rotate(f + a, 18) + g, mul)


@inline
def _weak_32(s: U8, p: int, a: np.uint64, b: np.uint64) -> tuple[np.uint64, np.uint64]:
    """32 bytes and two seeds, with a weak guarantee, to two words."""
    a += _fetch64(s, p)
    last = _fetch64(s, p + 24)
    b = _rotate(b + a + last, 21)
    c = a
    a += _fetch64(s, p + 8) + _fetch64(s, p + 16)
    return a + last, b + _rotate(a, 44) + c


@inline
def _long(s: U8, p: int, length: int) -> np.uint64:
    """More than 64 bytes: blocks of 64, then the last 64 bytes once more."""
    seed = np.uint64(81)
    x = seed * _K2 + _fetch64(s, p)
    y = seed * _K1 + np.uint64(113)
    z = _shift_mix(y * _K2 + np.uint64(113)) * _K2
    v0, v1, w0, w1 = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    rest = (length - 1) & 63
    end = p + length - 1 - rest
    while p != end:
        x = _rotate(x + y + v0 + _fetch64(s, p + 8), 37) * _K1
        y = _rotate(y + v1 + _fetch64(s, p + 48), 42) * _K1
        x ^= w1
        y += v0 + _fetch64(s, p + 40)
        z = _rotate(z + w0, 33) * _K1
        v0, v1 = _weak_32(s, p, v1 * _K1, x + w0)
        w0, w1 = _weak_32(s, p + 32, z + w1, y + _fetch64(s, p + 16))
        x, z = z, x
        p += 64
    mul = _K1 + ((z & np.uint64(0xFF)) << np.uint64(1))
    p = end + rest - 63
    w0 += np.uint64(rest)
    v0 += w0
    w0 += v0
    nine = np.uint64(9)
    x = _rotate(x + y + v0 + _fetch64(s, p + 8), 37) * mul
    y = _rotate(y + v1 + _fetch64(s, p + 48), 42) * mul
    x ^= w1 * nine
    y += v0 * nine + _fetch64(s, p + 40)
    z = _rotate(z + w0, 33) * mul
    v0, v1 = _weak_32(s, p, v1 * mul, x + w0)
    w0, w1 = _weak_32(s, p + 32, z + w1, y + _fetch64(s, p + 16))
    u = _hash_16(v0, w0, mul) + _shift_mix(y) * _K0 + x  # x and z change places
    return _hash_16(u, _hash_16(v1, w1, mul) + z, mul)
