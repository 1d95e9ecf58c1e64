"""Row values from (seed, table, id) alone.

A row's first value must not depend on the number of shards or on the order in which rows are
touched, so every number is drawn from a counter: element (id, column) of a table is the
`id * dim + column`-th output of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
number generators", OOPSLA 2014), started at a hash of the seed and the table's name.

The classes carry TensorFlow's names and arguments; `f(shape, dtype)` works as in TensorFlow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ps.errors import ConfigError
from ps.kernels.random import normal_rows, truncated_normal_rows, uniform_rows
from ps.ragged import F32, I64


class Initializer:
    """Base: subclasses say how row ids become row values."""

    def rows(self, key: np.uint64, ids_N: I64, dim: int) -> F32:
        """float32 [N, dim] values of the rows `ids_N`, int64 [N], of the table with this key."""
        raise NotImplementedError

    def __call__(self, shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> F32:
        """TensorFlow's calling convention: a whole table `[V, D]`, drawn with seed 0."""
        num_rows, dim = shape
        ids = np.arange(num_rows, dtype=np.int64)
        return self.rows(table_key(0, ""), ids, dim).astype(dtype, copy=False)


def table_key(seed: int, table: str) -> np.uint64:
    """The 64-bit start of a table's random sequence."""
    digest = hashlib.blake2b(f"{seed}\0{table}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


@dataclass(frozen=True)
class TruncatedNormal(Initializer):
    """Normal(mean, stddev) cut at two standard deviations."""

    mean: float = 0.0
    stddev: float = 0.05

    def rows(self, key: np.uint64, ids_N: I64, dim: int) -> F32:
        """See `Initializer.rows`."""
        return truncated_normal_rows(key, ids_N, dim, self.mean, self.stddev)


@dataclass(frozen=True)
class RandomNormal(Initializer):
    """Normal(mean, stddev)."""

    mean: float = 0.0
    stddev: float = 0.05

    def rows(self, key: np.uint64, ids_N: I64, dim: int) -> F32:
        """See `Initializer.rows`."""
        return normal_rows(key, ids_N, dim, self.mean, self.stddev)


@dataclass(frozen=True)
class RandomUniform(Initializer):
    """Uniform between minval and maxval."""

    minval: float = -0.05
    maxval: float = 0.05

    def __post_init__(self) -> None:
        if self.minval > self.maxval:
            raise ConfigError(f"RandomUniform: minval {self.minval} is above maxval {self.maxval}")

    def rows(self, key: np.uint64, ids_N: I64, dim: int) -> F32:
        """See `Initializer.rows`."""
        return uniform_rows(key, ids_N, dim, self.minval, self.maxval)


@dataclass(frozen=True)
class Constant(Initializer):
    """Every element is `value`."""

    value: float = 0.0

    def rows(self, key: np.uint64, ids_N: I64, dim: int) -> F32:
        """See `Initializer.rows`."""
        return np.full((ids_N.size, dim), self.value, dtype=np.float32)


@dataclass(frozen=True)
class RowIdInitializer(Initializer):
    """Row i is filled with i + offset (`tf.tpu.experimental.embedding.RowIdInitializer`)."""

    offset: int = 0

    def rows(self, key: np.uint64, ids_N: I64, dim: int) -> F32:
        """See `Initializer.rows`."""
        column = (ids_N + self.offset).astype(np.float32)
        return np.repeat(column[:, None], dim, axis=1)


INITIALIZERS: dict[str, type[Initializer]] = {
    cls.__name__: cls
    for cls in (TruncatedNormal, RandomNormal, RandomUniform, Constant, RowIdInitializer)
}
