"""Zipf-distributed ids over a bounded vocabulary, exact and in constant memory.

Rejection-inversion: W. Hörmann, G. Derflinger, "Rejection-inversion to generate variates from
monotone discrete distributions", ACM TOMACS 6(3), 1996. Accepts more than nine draws in ten.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ps.errors import DataError

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Draw = Callable[[int, I64], F64]


def from_generator(rng: np.random.Generator) -> Draw:
    """Draws taken one after the other from a NumPy generator."""
    return lambda attempt, positions: rng.random(len(positions))


class ZipfSampler:
    """Draws ids with P(rank k) proportional to `(k + 1) ** -exponent`, k in `[0, num_ids)`.

    Ranks are scattered over the vocabulary by a fixed affine bijection, because in real tables hot
    ids are not neighbours: `id = (rank * stride) % num_ids`, so the hottest id is always 0.
    """

    def __init__(self, num_ids: int, exponent: float) -> None:
        if not 1 <= num_ids <= 2**31:
            raise DataError(f"vocabulary size is {num_ids}, wanted 1 to {2**31}")
        if not 0 <= exponent <= 10:
            raise DataError(f"Zipf exponent is {exponent}, wanted 0 (all alike) to 10")
        self.num_ids = num_ids
        self._exponent = exponent
        self._low = self._integral(1.5) - 1.0
        self._high = self._integral(num_ids + 0.5)
        second = self._integral(2.5) - 2.0**-exponent
        self._surely_accepted = 2.0 - float(self._inverse(np.array([second]))[0])
        self._stride = coprime_stride(num_ids)

    def sample(self, draw: Draw, size: int) -> I64:
        """Ids int64 `[size]`; `draw` as in `sample_ranks`."""
        rank = self.sample_ranks(draw, size)
        rank *= self._stride
        rank %= self.num_ids
        return rank

    def sample_ranks(self, draw: Draw, size: int) -> I64:
        """Ranks int64 `[size]`, 0 is the most frequent.

        Args:
            draw: `draw(attempt, positions)` gives one number in [0, 1) per position still open.
                A pure function of both makes the result one too.
            size: Number of ranks.
        """
        everywhere = np.arange(size)
        rank, accepted = self._attempt(draw(0, everywhere))
        missing = everywhere[~accepted]
        attempt = 1
        while len(missing):
            again, accepted = self._attempt(draw(attempt, missing))
            rank[missing[accepted]] = again[accepted]
            missing = missing[~accepted]
            attempt += 1
        return rank

    def _attempt(self, uniform: F64) -> tuple[I64, npt.NDArray[np.bool_]]:
        area = self._high + uniform * (self._low - self._high)
        x = self._inverse(area)
        nearest = np.clip(np.floor(x + 0.5), 1, self.num_ids)
        accepted = nearest - x <= self._surely_accepted
        unsure = np.flatnonzero(~accepted)
        k = nearest[unsure]
        accepted[unsure] = area[unsure] >= self._integrals(k + 0.5) - k**-self._exponent
        return nearest.astype(np.int64) - 1, accepted

    def _integral(self, x: float) -> float:
        return float(self._integrals(np.array([x]))[0])

    def _integrals(self, x: F64) -> F64:
        """Integral of `t ** -exponent` from 1 to x; continuous in the exponent at 1."""
        log = np.log(x)
        power = 1.0 - self._exponent
        return log if abs(power) < 1e-9 else np.expm1(power * log) / power

    def _inverse(self, area: F64) -> F64:
        """The x whose `_integrals` is `area`."""
        power = 1.0 - self._exponent
        if abs(power) < 1e-9:
            return np.exp(area)
        return np.exp(np.log1p(np.maximum(power * area, -1.0)) / power)


def coprime_stride(num_ids: int) -> int:
    """A step near the golden ratio of `num_ids` that visits every id.

    >>> sorted(i * coprime_stride(10) % 10 for i in range(10)) == list(range(10))
    True
    """
    stride = max(1, round(num_ids * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, num_ids) != 1:
        stride += 1
    return stride
