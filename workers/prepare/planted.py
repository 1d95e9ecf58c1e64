"""What the two synthetic data sets share: blocks of rows, and the score of the planted model.

Rows are made in blocks of a fixed size, each with its own generator seeded by (seed, kind, block).
So row i is the same whatever the number of rows, and memory does not grow with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from workers.prepare.mixing import U64, mix
from workers.prepare.report import ColumnReport

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

BLOCK_ROWS = 16_384
"""Rows per block. Part of the data's definition: another size gives other rows."""

_AUC_BINS = 1 << 16


@dataclass(frozen=True, slots=True)
class Block:
    """`BLOCK_ROWS` rows."""

    columns: Mapping[str, Any]
    """Output columns by name: NumPy arrays, or Arrow arrays for lists."""
    in_test: npt.NDArray[np.bool_]
    """Which rows are test rows."""


class Generator(Protocol):
    """Makes the blocks of one synthetic data set and scores its own planted model."""

    columns: dict[str, ColumnReport]
    labels: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def block(self, index: int, num_rows: int) -> Block:
        """The first `num_rows` rows of a block; its test rows are added to the score."""
        ...

    def noise_floor(self) -> dict[str, float]:
        """Score of the planted model on the test rows made so far; empty if there are none."""
        ...


def block_generator(*key: int) -> np.random.Generator:
    """A NumPy generator that depends on the key alone."""
    return np.random.Generator(np.random.SFC64(list(key)))


def sigmoid(x: F64) -> F64:
    """`1 / (1 + exp(-x))`, float64."""
    return np.asarray(1.0 / (1.0 + np.exp(-x)), np.float64)


def centred_parts(values: npt.NDArray[np.integer[Any]], key: int, parts: int) -> list[F64]:
    """Up to four independent numbers of mean 0 and variance 1 for every value, from one hash.

    Each is uniform, made of 16 bits of `mix(values, key)`.
    """
    hashed: U64 = mix(values, key)
    scale = np.sqrt(12.0) / 65_536
    return [
        (((hashed >> np.uint64(16 * part)) & np.uint64(0xFFFF)) + 0.5 - 32_768.0) * scale
        for part in range(parts)
    ]


class StreamingAuc:
    """Area under the ROC curve from a histogram of 65,536 bins; ties within a bin count half."""

    def __init__(self) -> None:
        self._counts = np.zeros((2, _AUC_BINS), np.int64)

    def add(self, probability: F64, positive: npt.NDArray[np.bool_]) -> None:
        """Add examples; `probability` float64 in [0, 1]."""
        bins = np.minimum((probability * _AUC_BINS).astype(np.int64), _AUC_BINS - 1)
        for label in (0, 1):
            self._counts[label] += np.bincount(bins[positive == label], minlength=_AUC_BINS)

    def value(self) -> float | None:
        """The area in [0, 1]; None unless there are both positives and negatives."""
        negatives, positives = self._counts
        pairs = float(negatives.sum()) * float(positives.sum())
        if pairs == 0:
            return None
        below = np.cumsum(negatives) - negatives
        return float((positives * (below + negatives / 2)).sum() / pairs)
