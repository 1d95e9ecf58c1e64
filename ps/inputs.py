"""What a lookup takes: ids, and perhaps weights, in one of four forms over NumPy.

`Dense`, `Sparse` and `Ragged` stand for TensorFlow's Tensor, SparseTensor and RaggedTensor, each
with lookup rules of its own (see `ps.lookup`); `Bags` is the form of HTTP. An input that exists is
well-formed. This module knows no table.
"""

from __future__ import annotations

from dataclasses import dataclass

from ps.errors import InputError
from ps.ragged import F32, I64, Ragged, as_ids, as_integers, as_weights

__all__ = ["Bags", "Dense", "Input", "Ragged", "Sparse"]


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """One row per id."""

    ids: I64
    """int64 of any shape, a scalar too; other integers are cast."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", as_integers(self.ids, "ids"))


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """Ids, and weights, at coordinates; leading dimensions are rows, the last one is reduced."""

    indices: I64
    """int64 [N, rank]: coordinate of each id; rank at least 1. They may come in any order, repeat
    or lie outside `dense_shape`: the lookup decides what that means, as in TensorFlow."""
    ids: I64
    """int64 [N]."""
    dense_shape: tuple[int, ...]
    """[rank]; any sequence of sizes >= 0 becomes a tuple."""
    weights: F32 | None = None
    """float32 [N], or None for all ones; other numbers are cast, as TensorFlow documents."""

    def __post_init__(self) -> None:
        sizes = as_ids(self.dense_shape, "dense_shape")
        if sizes.size < 1 or sizes.min() < 0:
            raise InputError(f"dense_shape must hold one size or more, >= 0, got {sizes.tolist()}")
        object.__setattr__(self, "dense_shape", tuple(sizes.tolist()))
        object.__setattr__(self, "ids", as_ids(self.ids))
        indices = as_integers(self.indices, "indices")
        if indices.shape != (self.ids.size, sizes.size):
            raise InputError(
                f"indices must have shape [{self.ids.size}, {sizes.size}]: a row per id, a column "
                f"per dimension; got {list(indices.shape)}"
            )
        object.__setattr__(self, "indices", indices)
        if self.weights is None:
            return
        object.__setattr__(self, "weights", as_weights(self.weights))
        if self.weights.shape != self.ids.shape:
            raise InputError(f"got {self.weights.size} weights for {self.ids.size} ids")

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.dense_shape)


@dataclass(frozen=True, slots=True, eq=False)
class Bags:
    """Ids of B examples under the rules of sparse input, but always with B rows as the answer.

    TensorFlow has no such input. It is what HTTP and its clients mean by a list of lists.
    """

    entries: Ragged
    """Ids and weights in CSR form."""


Input = Dense | Sparse | Ragged
"""Inputs that TensorFlow has too."""
