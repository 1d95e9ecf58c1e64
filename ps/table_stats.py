"""What the numbers of a table look like, of tables of any size: counts, bounds, means, norms.

Takes float32 rows in pieces, in any order, and keeps a few numbers only. Sums run in float64. This
module knows no file: see `ps.verify` and `ps.contents`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ps.ragged import F32

CHUNK_BYTES = 16 << 20
"""What is read at a time."""
_BLOCK_VALUES = 1 << 16
"""What is looked at at a time: its float64 copy stays in the second-level cache."""

ReadRows = Callable[[int, F32, str | None], None]
"""`read(first_id, out_ND, slot)`: see `ps.snapshot.SnapshotTable.read_rows`."""

NEVER_NEGATIVE = {
    "Adagrad": ("accumulators",),
    "AdagradMomentum": ("accumulators",),
    "Adam": ("velocities",),
    "FTRL": ("accumulators",),
}
"""Slots that are sums or means of squares, by optimizer."""


@dataclass(slots=True)
class ImpossibleValues:
    """Values that training should never leave, counted."""

    may_be_negative: bool = True
    """False for arrays of which `NEVER_NEGATIVE` tells."""
    nan: int = 0
    inf: int = 0
    negative: int = 0
    """0 if they may be."""
    first_non_finite: int | None = None
    """The first row with a NaN or an infinity, as its caller numbers rows."""
    first_negative: int | None = None

    @property
    def non_finite(self) -> int:
        """NaNs and infinities."""
        return self.nan + self.inf

    def add(self, first_row: int, rows_ND: F32) -> None:
        """Count those of float32 [N, D]; its rows are numbered from `first_row` on.

        Pieces of one array come with rising row numbers.
        """
        for start, block_ND in _blocks(rows_ND):
            if not _all_finite(block_ND):
                nan_N, inf_N = np.isnan(block_ND).sum(axis=1), np.isinf(block_ND).sum(axis=1)
                self.nan += int(nan_N.sum())
                self.inf += int(inf_N.sum())
                if self.first_non_finite is None:
                    self.first_non_finite = first_row + start + int(np.argmax(nan_N + inf_N > 0))
            if not self.may_be_negative and not block_ND.min() >= 0:  # also if that is NaN
                negative_N = (block_ND < 0).sum(axis=1)
                self.negative += int(negative_N.sum())
                if self.first_negative is None and negative_N.any():
                    self.first_negative = first_row + start + int(np.argmax(negative_N > 0))

    def merge(self, other: ImpossibleValues, renumber: Callable[[int], int]) -> None:
        """Add those of other rows of the array, whose numbers `renumber` makes this one's."""
        self.nan += other.nan
        self.inf += other.inf
        self.negative += other.negative
        for name in ("first_non_finite", "first_negative"):
            known, found = getattr(self, name), getattr(other, name)
            if found is not None:
                number = renumber(found)
                setattr(self, name, number if known is None else min(known, number))


@dataclass(slots=True)
class ArrayStats:
    """Figures of one float32 array [V, D]: a table's rows, or one slot of them."""

    values: int = 0
    """V · D."""
    min: float | None = None
    """Of the finite values, as are max, mean and std; None if there are none."""
    max: float | None = None
    zero_rows: int = 0
    """Rows of which every value is 0."""
    nan: int = 0
    inf: int = 0
    _finite: int = 0
    _mean: float = 0.0
    _squares: float = 0.0
    """Σ(x - mean)²."""
    _norms: float = 0.0
    _finite_rows: int = 0

    def add(self, rows_ND: F32) -> None:
        """Take in float32 [N, D]."""
        for _, block_ND in _blocks(rows_ND):
            self._add(block_ND)

    @property
    def mean(self) -> float | None:
        """Mean of the finite values."""
        return self._mean if self._finite else None

    @property
    def std(self) -> float | None:
        """Standard deviation of the finite values (divided by their number)."""
        return math.sqrt(self._squares / self._finite) if self._finite else None

    @property
    def mean_norm(self) -> float | None:
        """Mean of the rows' L2 norms √Σx², without rows that have NaN or infinity."""
        return self._norms / self._finite_rows if self._finite_rows else None

    def to_json(self) -> dict[str, Any]:
        """The figures by name."""
        names = ("min", "max", "mean", "std", "mean_norm", "zero_rows", "nan", "inf")
        return {name: getattr(self, name) for name in names}

    def _add(self, block_ND: F32) -> None:
        self.values += block_ND.size
        values = rows_ND = block_ND
        if not _all_finite(block_ND):
            self.nan += int(np.isnan(block_ND).sum())
            self.inf += int(np.isinf(block_ND).sum())
            finite_ND = np.isfinite(block_ND)
            values, rows_ND = block_ND[finite_ND], block_ND[finite_ND.all(axis=1)]
        if values.size:
            self._combine(values.astype(np.float64))
        exact_ND = rows_ND.astype(np.float64)
        # Not BLAS: its threads wait for each other on a busy machine.
        squares_N = np.einsum("nd,nd->n", exact_ND, exact_ND)
        self._norms += float(np.sqrt(squares_N).sum())
        self._finite_rows += len(rows_ND)
        self.zero_rows += int((squares_N == 0).sum())

    def _combine(self, values: np.ndarray) -> None:
        """Mean and squares of two sets from those of each (Chan, Golub, LeVeque, 1979)."""
        low, high, mean = float(values.min()), float(values.max()), float(values.mean())
        self.min = low if self.min is None else min(self.min, low)
        self.max = high if self.max is None else max(self.max, high)
        values = values.ravel() - mean
        count, total = values.size, self._finite + values.size
        change = mean - self._mean
        self._squares += float(np.einsum("n,n->", values, values))
        self._squares += change * change * self._finite * count / total
        self._mean += change * count / total
        self._finite = total


@dataclass(frozen=True, slots=True, eq=False)
class TableStats:
    """Figures of a table."""

    rows: ArrayStats
    slots: dict[str, ArrayStats]
    untouched_rows: int | None
    """Rows whose slots all have their first values: no step has changed them, as far as the
    optimizer tells. None if it has no slots, or starts them with something unknown."""

    def to_json(self) -> dict[str, Any]:
        """The figures by name."""
        slots = {name: stats.to_json() for name, stats in self.slots.items()}
        return {
            "untouched_rows": self.untouched_rows,
            "rows": self.rows.to_json(),
            "slots": slots,
        }


def table_stats(
    read: ReadRows, num_rows: int, dim: int, initial_slots: Mapping[str, float | None]
) -> TableStats:
    """Read a table once, 16 MiB at a time, and count.

    Args:
        read: reads rows, or one slot of them.
        num_rows: V.
        dim: D.
        initial_slots: the slots, each with the constant that it starts with, None if unknown.
    """
    rows, slots = ArrayStats(), {name: ArrayStats() for name in initial_slots}
    tells = bool(initial_slots) and None not in initial_slots.values()
    untouched = 0
    step = max(1, min(num_rows, CHUNK_BYTES // (4 * dim)))
    buffer = np.empty((step, dim), dtype=np.float32)
    for first_id in range(0, num_rows, step):
        rows_ND = buffer[: num_rows - first_id]
        read(first_id, rows_ND, None)
        rows.add(rows_ND)
        untouched_N = np.ones(len(rows_ND), dtype=bool)
        for slot, initial in initial_slots.items():
            read(first_id, rows_ND, slot)
            slots[slot].add(rows_ND)
            if tells:
                assert initial is not None
                untouched_N &= (rows_ND == np.float32(initial)).all(axis=1)
        untouched += int(untouched_N.sum())
    return TableStats(rows, slots, untouched if tells else None)


def initial_slots(optimizer: Mapping[str, Any], slots: tuple[str, ...]) -> dict[str, float | None]:
    """What each slot of a table starts with, from the optimizer's description in a manifest.

    >>> ftrl = {"name": "FTRL", "initial_accumulator_value": 0.5}
    >>> initial_slots(ftrl, ("accumulators", "linears"))
    {'accumulators': 0.5, 'linears': 0.0}
    """
    starts: dict[str, float | None] = dict.fromkeys(slots)
    match optimizer.get("name"):
        case "Adagrad" | "FTRL":
            first = _number(optimizer.get("initial_accumulator_value"))
            starts = {slot: first if slot == "accumulators" else 0.0 for slot in slots}
        case "Adam" | "AdagradMomentum":
            starts = dict.fromkeys(slots, 0.0)
        case "CustomOptimizer":
            values = optimizer.get("slot_initializers")
            if isinstance(values, list) and len(values) == len(slots):
                starts = dict(zip(slots, map(_number, values), strict=True))
    return starts


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _all_finite(block_ND: F32) -> bool:
    """Quicker than looking at each: the least and the greatest value are NaN if there is one."""
    return math.isfinite(block_ND.min()) and math.isfinite(block_ND.max())


def _blocks(rows_ND: F32) -> Iterator[tuple[int, F32]]:
    """The rows in pieces that stay in a cache, each with the place of its first row."""
    step = max(1, _BLOCK_VALUES // rows_ND.shape[1])
    for start in range(0, len(rows_ND), step):
        yield start, rows_ND[start : start + step]
