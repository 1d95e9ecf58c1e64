"""What a user rated (or who rated an item) in the training rows, for every row at once.

Owns the grouping of ratings and the leave-one-out rule. Knows nothing about files.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


def slices_of(starts: I64, lengths: I64) -> tuple[I64, I64]:
    """Positions of many slices, one after the other.

    Args:
        starts: int64 `[R]`, first position of each slice.
        lengths: int64 `[R]`, 0 or more.

    Returns:
        Positions int64 `[sum(lengths)]` and row_splits int64 `[R + 1]`.

    >>> slices_of(np.array([5, 0]), np.array([2, 3]))[0].tolist()
    [5, 6, 0, 1, 2]
    """
    splits = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=splits[1:])
    positions = np.arange(splits[-1]) + np.repeat(starts - splits[:-1], lengths)
    return positions, splits


def keep_where(mask: npt.NDArray[np.bool_], splits: I64) -> I64:
    """Row splits that are left after dropping the values where `mask` is False."""
    kept = np.zeros(len(mask) + 1, np.int64)
    np.cumsum(mask, out=kept[1:])
    return kept[splits]


@dataclass(frozen=True, slots=True)
class Ratings:
    """Ratings as parallel columns, in file order."""

    user: I64
    item: I64
    rating: F32
    timestamp: I64

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: npt.NDArray[Any]) -> "Ratings":
        """The given rows (indices or mask), in that order."""
        return Ratings(self.user[rows], self.item[rows], self.rating[rows], self.timestamp[rows])


class TrainHistory:
    """Training ratings grouped by user (or item), oldest first; equal times keep file order.

    Below, `key` is what they are grouped by and `other` the other side: items of a user, or users
    of an item.
    """

    def __init__(self, key: I64, other: I64, train: Ratings, num_keys: int) -> None:
        order = np.lexsort((train.timestamp, key))
        self._other = other[order]
        self._rating = train.rating[order]
        self._splits = np.zeros(num_keys + 1, np.int64)
        np.cumsum(np.bincount(key, minlength=num_keys), out=self._splits[1:])

    def of_rows(self, key: I64, other: I64, max_history: int) -> tuple[I64, F32, I64]:
        """The `max_history` most recent training ratings of each row's key, without its own.

        Args:
            key: int64 `[R]`, user (or item) of each row.
            other: int64 `[R]`, the row's own item (or user): never in the row's own history.
            max_history: most ratings per row, 1 or more.

        Returns:
            The others int64, their ratings float32 (oldest first in each row), row_splits
            `[R + 1]`.
        """
        end = self._splits[key + 1]
        length = np.minimum(end - self._splits[key], max_history + 1)
        position, splits = slices_of(end - length, length)
        others = self._other[position] != np.repeat(other, length)
        position, splits = position[others], keep_where(others, splits)
        length = np.diff(splits)
        # A row whose own rating is not among its last max_history + 1 still has one too many.
        surplus = length > max_history
        keep = np.ones(len(position), np.bool_)
        keep[splits[:-1][surplus]] = False
        position, splits = position[keep], keep_where(keep, splits)
        return self._other[position], self._rating[position], splits
