"""What is looked up: table sizes, ids drawn uniformly or from a Zipf distribution, batches."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ps import memory
from ps.ragged import F32, I64

Draw = Literal["uniform", "Zipf"]
DRAWS: tuple[Draw, ...] = ("uniform", "Zipf")
BAGS = (1, 20, 100)
ZIPF_EXPONENT = 1.05
NUM_BATCHES = 4
_FILL_ROWS = 1 << 18


@dataclass(frozen=True)
class Size:
    """Rows × columns of a table."""

    rows: int
    dim: int

    def __str__(self) -> str:
        return f"{self.rows // 1_000_000}M×{self.dim}"

    @property
    def key(self) -> str:
        """As it is given on the command line."""
        return str(self).replace("×", "x")


TABLES = (Size(1_000_000, 16), Size(1_000_000, 64), Size(10_000_000, 64), Size(4_000_000, 128))


@dataclass(frozen=True)
class Batch:
    """Bags of equal size: ids int64 [N], splits int64 [B + 1]."""

    ids_N: I64
    splits_B1: I64

    @property
    def num_bags(self) -> int:
        return self.splits_B1.size - 1

    @property
    def bag(self) -> int:
        return self.ids_N.size // self.num_bags


@dataclass(frozen=True)
class Gradients:
    """What arrives: ids int64 [N] of rows and a gradient float32 [N, D] for each."""

    ids_N: I64
    grads_ND: F32


def make_batches(num_rows: int, draw: Draw, bag: int) -> list[Batch]:
    """Batches of about 400k ids, 100k in bags of one."""
    count = 100_000 if bag == 1 else 400_000
    rng = np.random.default_rng(bag)
    splits = np.arange(0, count + 1, bag)
    return [Batch(draw_ids(num_rows, draw, count, rng), splits) for _ in range(NUM_BATCHES)]


def draw_ids(num_rows: int, draw: Draw, count: int, rng: np.random.Generator) -> I64:
    """Ids in [0, num_rows); under Zipf, which ids are the frequent ones is random but fixed."""
    if draw == "uniform":
        return rng.integers(0, num_rows, count)
    cumulative, id_of_rank = _zipf(num_rows)
    ids: I64 = id_of_rank[np.searchsorted(cumulative, rng.random(count) * cumulative[-1])]
    return ids


@functools.lru_cache(maxsize=1)
def _zipf(num_rows: int) -> tuple[npt.NDArray[np.float64], I64]:
    cumulative = np.cumsum(np.arange(1, num_rows + 1) ** -ZIPF_EXPONENT)
    return cumulative, np.random.default_rng(7).permutation(num_rows)


def fill_random(rows_VD: F32, seed: int = 0) -> None:
    """Fill with numbers from [-0.5, 0.5)."""
    rng = np.random.default_rng(seed)
    for start in range(0, len(rows_VD), _FILL_ROWS):
        part = rows_VD[start : start + _FILL_ROWS]
        part[:] = rng.random(part.shape, dtype=np.float32)
        part -= np.float32(0.5)


def make_gradients(ids: list[I64], dim: int) -> list[Gradients]:
    """A random gradient for each id, batch by batch."""
    batches = []
    for seed, ids_N in enumerate(ids):
        grads_ND: F32 = memory.empty((ids_N.size, dim))
        fill_random(grads_ND, seed + 1)
        aligned_N: I64 = memory.empty(ids_N.shape, np.int64)
        aligned_N[:] = ids_N
        batches.append(Gradients(aligned_N, grads_ND))
    return batches
