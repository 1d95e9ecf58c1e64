"""Criteo-like rows of any number, with a click probability that a model can learn.

    logit = intercept + sum_c w_c(id_c) + sum_(c,d) v_c(id_c) * v_d(id_d) + sum_j a_j * I_j

`w` and `v` are hashes of (seed, column, id) with mean 0, so no table is held in memory. Ids are
Zipf-distributed. `label` is 1 with probability sigmoid(logit); about one in four is.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ps.errors import DataError
from workers.prepare.criteo import CATEGORICAL_NAMES, INTEGER_NAMES, criteo_columns
from workers.prepare.mixing import stream_key
from workers.prepare.planted import (
    BLOCK_ROWS,
    F64,
    Block,
    StreamingAuc,
    block_generator,
    centred_parts,
    sigmoid,
)
from workers.prepare.report import ColumnReport
from workers.prepare.zipf import ZipfSampler, from_generator

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

KAGGLE_TABLE_SIZES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
"""Distinct values of C1..C26 in the Kaggle data set, as published with DLRM."""

POSITIVE_RATE = 0.25
_PAIRS = ((0, 1), (4, 5), (7, 8), (13, 16))
_WEIGHT_STD = 1.0 / np.sqrt(26)
_PAIR_STD = 0.3
_DENSE_STD = 0.6
_MIN_TABLE = 2
_KIND, _WEIGHTS, _DENSE, _CALIBRATION = 2, 21, 22, 23


@dataclass(frozen=True, slots=True, kw_only=True)
class CriteoShape:
    """Options of the Criteo-like kind."""

    total_vocabulary: int = 1_000_000
    """Rows of all 26 tables together."""
    table_sizes: str = "skewed"
    """`skewed`: in the proportions of the Kaggle data set; `equal`: all alike."""

    def __post_init__(self) -> None:
        if self.table_sizes not in ("skewed", "equal"):
            raise DataError(f"table_sizes is '{self.table_sizes}', wanted 'skewed' or 'equal'")
        least = _MIN_TABLE * len(CATEGORICAL_NAMES)
        if self.total_vocabulary < least:
            raise DataError(f"total_vocabulary is {self.total_vocabulary}, wanted {least} or more")

    def vocabulary_sizes(self) -> list[int]:
        """Size of each of C1..C26, at least 2; they sum to `total_vocabulary` exactly.

        >>> sum(CriteoShape(total_vocabulary=1000).vocabulary_sizes())
        1000
        """
        parts = KAGGLE_TABLE_SIZES if self.table_sizes == "skewed" else (1,) * 26
        spare = self.total_vocabulary - _MIN_TABLE * len(parts)
        sizes = [_MIN_TABLE + spare * part // sum(parts) for part in parts]
        sizes[parts.index(max(parts))] += self.total_vocabulary - sum(sizes)
        return sizes


class CriteoGenerator:
    """Makes Criteo-like rows block by block; see the module docstring for the model."""

    def __init__(
        self, shape: CriteoShape, seed: int, test_fraction: float, exponent: float
    ) -> None:
        sizes = shape.vocabulary_sizes()
        self.columns: dict[str, ColumnReport] = criteo_columns(sizes)
        self.labels: dict[str, tuple[str, ...]] = {}
        self.notes: tuple[str, ...] = ("no id stands for 'missing'; id 0 is the most frequent one",)
        self._seed = seed
        self._test_fraction = test_fraction
        self._samplers = [ZipfSampler(size, exponent) for size in sizes]
        self._keys = [stream_key(seed, _WEIGHTS, column) for column in range(len(sizes))]
        rng = block_generator(seed, _KIND, _DENSE)
        self._dense_scale = rng.uniform(0.5, 3.0, len(INTEGER_NAMES)).astype(np.float32)
        slope = rng.normal(size=len(INTEGER_NAMES))
        self._slope = slope / np.linalg.norm(slope) * _DENSE_STD
        self._auc = StreamingAuc()
        self._intercept = 0.0
        self._intercept = self._calibrated_intercept()

    def block(self, index: int, num_rows: int) -> Block:
        """The first `num_rows` rows of a block; its test rows are added to the score."""
        rng = block_generator(self._seed, _KIND, 0, index)
        ids_CB, dense_IB, logit_B = self._features(rng)
        probability_B = sigmoid(logit_B)
        clicked_B = rng.random(BLOCK_ROWS) < probability_B
        in_test_B = rng.random(BLOCK_ROWS) < self._test_fraction
        columns: dict[str, Any] = {"label": clicked_B[:num_rows].astype(np.float32)}
        columns |= {n: x[:num_rows] for n, x in zip(INTEGER_NAMES, dense_IB, strict=True)}
        columns |= {n: x[:num_rows] for n, x in zip(CATEGORICAL_NAMES, ids_CB, strict=True)}
        in_test_B = in_test_B[:num_rows]
        self._auc.add(probability_B[:num_rows][in_test_B], clicked_B[:num_rows][in_test_B])
        return Block(columns, in_test_B)

    def noise_floor(self) -> dict[str, float]:
        """`test_auc` of the planted probability."""
        auc = self._auc.value()
        return {} if auc is None else {"test_auc": auc}

    def _features(self, rng: np.random.Generator) -> tuple[list[I64], F32, F64]:
        draw = from_generator(rng)
        ids_CB = [sampler.sample(draw, BLOCK_ROWS) for sampler in self._samplers]
        # Like log1p of a count: 18 % zeros, then an exponential tail; variance about 1.
        raw_IB = rng.standard_exponential((len(INTEGER_NAMES), BLOCK_ROWS), np.float32)
        dense_IB = np.maximum(raw_IB - np.float32(0.2), 0)
        logit_B = self._intercept + self._slope @ dense_IB.astype(np.float64)
        dense_IB *= self._dense_scale[:, None]
        in_pairs = {column for pair in _PAIRS for column in pair}
        factors = {}
        for column, ids_B in enumerate(ids_CB):
            parts = centred_parts(ids_B, self._keys[column], 2 if column in in_pairs else 1)
            logit_B += _WEIGHT_STD * parts[0]
            factors[column] = parts[-1]
        for left, right in _PAIRS:
            logit_B += _PAIR_STD * factors[left] * factors[right]
        return ids_CB, dense_IB, logit_B

    def _calibrated_intercept(self) -> float:
        """The intercept that gives `POSITIVE_RATE` on one extra block, by bisection."""
        logit_B = self._features(block_generator(self._seed, _KIND, _CALIBRATION))[2]
        low, high = -20.0, 20.0
        for _ in range(50):
            middle = (low + high) / 2
            too_many = sigmoid(logit_B + middle).mean() > POSITIVE_RATE
            low, high = (low, middle) if too_many else (middle, high)
        return low
