"""`Ragged`: the ids (and weights) of one feature for a batch of examples, in CSR form.

The bags of training, and TensorFlow's RaggedTensor of rank 2 in lookups. It knows no table and no
combiner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from ps.errors import InputError

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

_INT64, _FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Ids of B examples; example b owns `ids[row_splits[b]:row_splits[b + 1]]`."""

    ids: I64
    """int64 [N]; N ids of all examples, one after the other."""
    row_splits: I64
    """int64 [B + 1]; starts at 0, never falls, ends at N (TensorFlow's `row_splits`)."""
    weights: F32 | None = None
    """float32 [N], or None for all ones."""

    def __post_init__(self) -> None:
        ids, splits = as_ids(self.ids), as_ids(self.row_splits, "row_splits")
        if splits.size < 1 or splits[0] != 0 or splits[-1] != ids.size:
            raise InputError(
                f"row_splits must start at 0 and end at the number of ids {ids.size}, "
                f"got {splits[:1].tolist()} … {splits[-1:].tolist()}"
            )
        # Two splits that are right cannot fall; of more, a difference could overflow.
        if splits.size > 2 and np.count_nonzero(splits[1:] < splits[:-1]):
            raise InputError("row_splits must not fall")
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "row_splits", splits)
        if self.weights is not None:
            weights = as_weights(self.weights)
            if weights.shape != ids.shape:
                raise InputError(f"got {weights.size} weights for {ids.size} ids")
            object.__setattr__(self, "weights", weights)

    @property
    def num_examples(self) -> int:
        """B, the number of examples."""
        return self.row_splits.size - 1

    @property
    def positions(self) -> I64:
        """int64 [N]: each id's place within its example, from 0."""
        return np.arange(self.ids.size) - np.repeat(self.row_splits[:-1], np.diff(self.row_splits))

    @classmethod
    def from_lists(
        cls,
        ids: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]] | None = None,
    ) -> Ragged:
        """Build from one list of ids (and one of weights) per example.

        >>> Ragged.from_lists([[1, 2], [], [3]]).row_splits.tolist()
        [0, 2, 2, 3]
        """
        splits = _splits(ids)
        flat = as_ids([i for row in ids for i in row])
        if weights is None:
            return cls(flat, splits)
        if not np.array_equal(_splits(weights), splits):
            raise InputError("weights must have one value per id, in the same nesting")
        return cls(flat, splits, as_weights([w for row in weights for w in row]))

    @classmethod
    def from_dense(cls, ids: npt.ArrayLike) -> Ragged:
        """Build from ids [B]: exactly one id per example."""
        flat = as_ids(ids)
        return cls(flat, np.arange(flat.size + 1, dtype=np.int64))

    def to_lists(self) -> list[list[int]]:
        """The ids as one list per example."""
        return [self.ids[start:stop].tolist() for start, stop in pairwise(self.row_splits)]

    def slice(self, start: int, stop: int) -> Ragged:
        """Examples start … stop - 1, without copying ids or weights."""
        lo, hi = self.row_splits[start], self.row_splits[stop]
        weights = None if self.weights is None else self.weights[lo:hi]
        return Ragged(self.ids[lo:hi], self.row_splits[start : stop + 1] - lo, weights)


def as_integers(values: npt.ArrayLike, what: str) -> I64:
    """Values of any shape as a contiguous int64 array.

    Args:
        values: integers; an empty array may have any type, as `np.array([])` has.
        what: plural noun for error messages.

    Raises:
        InputError: not integers, or an integer beyond int64.
    """
    if _is_ready(values, _INT64):
        return values
    try:
        array = np.asarray(values)
    except (OverflowError, ValueError) as e:
        raise InputError(f"{what} must be an array of integers: {e}") from None
    if array.size == 0:
        return np.zeros(array.shape, dtype=np.int64)
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise InputError(f"{what} must fit int64, got {array.max()}")
    if array.dtype.kind not in "iu":
        raise InputError(f"{what} must be integers, got {array.dtype}")
    return np.asarray(array, dtype=np.int64, order="C")


def as_ids(values: npt.ArrayLike, what: str = "ids") -> I64:
    """Values as a contiguous int64 [N] array.

    Raises:
        InputError: not one-dimensional, not integers, or an integer beyond int64.
    """
    array = as_integers(values, what)
    if array.ndim != 1:
        raise InputError(f"{what} must have one dimension, got shape {list(array.shape)}")
    return array


def as_weights(values: npt.ArrayLike) -> F32:
    """Values as a contiguous float32 [N] array (TensorFlow documents this cast)."""
    if _is_ready(values, _FLOAT32) and values.ndim == 1:
        return values
    try:
        array = np.asarray(values)
    except ValueError as e:
        raise InputError(f"weights must be a flat list of numbers: {e}") from None
    if array.ndim != 1:
        raise InputError(f"weights must have one dimension, got shape {list(array.shape)}")
    if array.size and array.dtype.kind not in "iuf":
        raise InputError(f"weights must be numbers, got {array.dtype}")
    with np.errstate(over="ignore"):  # beyond float32 is infinity, as in TensorFlow
        return np.ascontiguousarray(array, dtype=np.float32)


def _is_ready(values: npt.ArrayLike, dtype: np.dtype[Any]) -> TypeGuard[npt.NDArray[Any]]:
    """Whether a cast would give back the same array; small requests feel what a cast costs."""
    return type(values) is np.ndarray and values.dtype == dtype and values.flags.c_contiguous


def _splits(rows: Sequence[Sequence[object]]) -> I64:
    splits = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=splits[1:])
    return splits
