"""Which items a user rated in the training rows, for every row, without a loop over rows.

Owns the grouping of ratings by user and the leave-one-out rule. Knows nothing about files.
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
    """The training ratings grouped by user, oldest first; equal times keep the file's order."""

    def __init__(self, train: Ratings, num_users: int) -> None:
        order = np.lexsort((train.timestamp, train.user))
        self._item = train.item[order]
        self._rating = train.rating[order]
        self._splits = np.zeros(num_users + 1, np.int64)
        np.cumsum(np.bincount(train.user, minlength=num_users), out=self._splits[1:])

    def of_rows(self, user: I64, item: I64, max_history: int) -> tuple[I64, F32, I64]:
        """The `max_history` most recent training items of each row's user, without its own item.

        Args:
            user: int64 `[R]`, user of each row.
            item: int64 `[R]`, the row's own item: it never appears in the row's history.
            max_history: most items per row, 1 or more.

        Returns:
            Items int64, their ratings float32 (oldest first in each row), row_splits `[R + 1]`.
        """
        end = self._splits[user + 1]
        length = np.minimum(end - self._splits[user], max_history + 1)
        position, splits = slices_of(end - length, length)
        others = self._item[position] != np.repeat(item, length)
        position, splits = position[others], keep_where(others, splits)
        length = np.diff(splits)
        # A row whose own item is not among its last max_history + 1 still has one too many.
        surplus = length > max_history
        keep = np.ones(len(position), np.bool_)
        keep[splits[:-1][surplus]] = False
        position, splits = position[keep], keep_where(keep, splits)
        return self._item[position], self._rating[position], splits
