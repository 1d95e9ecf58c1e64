"""`StepMessage`: what one worker says to all shards in one step, and where each shard's part lies.

A pull and a push have the same form. Per table there are local rows, ordered by shard, and values:
the rows to come (pull) or their gradients (push). Each array is in one piece, and a shard's part is
a span of it; so rows of all shards arrive side by side, in the array that is combined from.
Nothing here is changed once it is made; that it is not frozen saves microseconds per message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ps.messages import Bags, Pull, Push, Rows
from ps.partition import Layout
from ps.ragged import F32, I64

FIELDS = 6
"""Numbers that describe a table's part: entries, bags (-1 for rows as they are), and the places of
local rows, row splits, weights (-1 for none) and values."""
TAIL = 4
"""After the tables: place and size of the dense values, place and size of the non-trainable ones
(-1 for none)."""
NO_PLACE = -1
_FEW = 8
"""Parts (of a table, on a shard) up to which Python's numbers are quicker than arrays."""


@dataclass(slots=True, eq=False)
class BagsByShard:
    """Bags of entries, cut by shard; every shard has all bags, some of them empty."""

    row_splits: I64
    """int64 [num_shards, bags + 1]; each line starts at 0."""
    weights: F32
    """float32 [N], ordered as the local rows, or empty for all ones."""

    @property
    def count(self) -> int:
        """Number of bags."""
        return int(self.row_splits.shape[1]) - 1


@dataclass(slots=True, eq=False)
class TablePart:
    """What a message says of one table."""

    local_rows: I64
    """int64 [N], ordered by shard."""
    shard_splits: I64
    """int64 [num_shards + 1]: the entries of each shard."""
    values: Any
    """[N, D]; with bags [num_shards, bags, D] for a pull, and [bags, D] for a push, which every
    shard gets. float32, or 16-bit numbers as uint16."""
    bags: BagsByShard | None = None


@dataclass(slots=True, eq=False)
class Places:
    """Where the arrays of a table lie in an arena."""

    local_rows: int
    values: int
    row_splits: int = NO_PLACE
    weights: int = NO_PLACE


@dataclass(slots=True, eq=False)
class StepMessage:
    """A pull or a push, for all shards."""

    worker: int
    step: int
    version: int
    """Wanted by a pull; a push has none."""
    tables: Sequence[TablePart]
    layout: Layout
    dense: F32
    """float32 [P]: values to come, or their gradients."""
    state: F32 | None
    """float32 [S]; a push has it from worker 0 only."""
    places: Sequence[Places] = ()
    """Of the tables, in memory that is shared."""
    dense_place: int = NO_PLACE
    state_place: int = NO_PLACE

    def pull(self, shard: int) -> Pull:
        """The pull of one shard, to be answered into its part of the arrays."""
        assert self.state is not None, "a pull has room for all dense values"
        into = Rows(
            self.version,
            tuple(self._values(table, shard) for table in self.tables),
            self._of(shard, self.dense, self.layout.dense_splits),
            self._of(shard, self.state, self.layout.state_splits),
        )
        return Pull(
            self.worker, self.step, self.version, self._local_rows(shard), self._bags(shard), into
        )

    def push(self, shard: int) -> Push:
        """The push of one shard."""
        state = self.state
        return Push(
            self.worker,
            self.step,
            self._local_rows(shard),
            tuple(self._values(table, shard) for table in self.tables),
            self._of(shard, self.dense, self.layout.dense_splits),
            None if state is None else self._of(shard, state, self.layout.state_splits),
            self._bags(shard),
        )

    def rows_by_shard(self) -> I64:
        """int64 [num_shards]: rows (or bags) that each shard's values are of."""
        return self._summed(lambda t: 1)

    def names_bytes(self) -> I64:
        """int64 [num_shards]: bytes that say which rows, and how they make bags."""
        total = np.full(self.layout.num_shards, 8 * (FIELDS * len(self.tables) + TAIL))
        for table in self.tables:
            entries = np.diff(table.shard_splits)
            total += 8 * entries
            if table.bags is not None:
                total += 8 * (table.bags.count + 1) + 4 * entries * bool(table.bags.weights.size)
        return total

    def values_bytes(self) -> I64:
        """int64 [num_shards]: bytes of rows or gradients, and of the dense values."""
        total = self._summed(lambda t: t.values.shape[-1] * t.values.itemsize)
        total += 4 * np.diff(self.layout.dense_splits)
        return total if self.state is None else total + 4 * np.diff(self.layout.state_splits)

    def _summed(self, size: Callable[[TablePart], int]) -> I64:
        total = np.zeros(self.layout.num_shards, dtype=np.int64)
        for table in self.tables:
            one = np.diff(table.shard_splits) if table.bags is None else table.bags.count
            total += one * size(table)
        return total

    def descriptions(self) -> I64:
        """int64 [num_shards, tables · FIELDS + TAIL], with places; see `FIELDS` and `TAIL`."""
        shards, tables = self.layout.num_shards, self.tables
        if shards * len(tables) <= _FEW and all(table.bags is None for table in tables):
            return np.array([self._description(k) for k in range(shards)], dtype=np.int64)
        out = np.full((shards, len(tables) * FIELDS + TAIL), NO_PLACE, dtype=np.int64)
        of_tables = out[:, :-TAIL].reshape(shards, len(tables), FIELDS)
        splits_KT = np.array([t.shard_splits for t in tables], dtype=np.int64)
        splits_KT = splits_KT.reshape(len(tables), shards + 1).T
        starts = splits_KT[:-1]
        row_bytes = [t.values.shape[-1] * t.values.itemsize for t in tables]
        of_tables[:, :, 0] = splits_KT[1:] - starts
        of_tables[:, :, 2] = starts * 8 + [p.local_rows for p in self.places]
        of_tables[:, :, 5] = starts * row_bytes + [p.values for p in self.places]
        for i, table in enumerate(tables):
            if table.bags is not None:
                of_tables[:, i] = self._bags_description(table, self.places[i])
        for k in range(shards):
            out[k, -4:-2] = _place_and_size(self.dense_place, self.layout.dense_splits, k)
            if self.state is not None:
                out[k, -2:] = _place_and_size(self.state_place, self.layout.state_splits, k)
        return out

    def _description(self, k: int) -> list[int]:
        """One shard's numbers, of tables without bags: of few, this is quicker than NumPy."""
        numbers: list[int] = []
        for table, places in zip(self.tables, self.places, strict=True):
            start, stop = table.shard_splits[k : k + 2].tolist()
            row_bytes = table.values.shape[-1] * table.values.itemsize
            numbers += (
                stop - start, -1, places.local_rows + 8 * start, NO_PLACE, NO_PLACE,
                places.values + row_bytes * start,
            )  # fmt: skip
        numbers += _place_and_size(self.dense_place, self.layout.dense_splits, k)
        if self.state is None:
            return [*numbers, NO_PLACE, NO_PLACE]
        numbers += _place_and_size(self.state_place, self.layout.state_splits, k)
        return numbers

    def _bags_description(self, table: TablePart, places: Places) -> I64:
        assert table.bags is not None
        shards, bags = self.layout.num_shards, table.bags.count
        k = np.arange(shards)
        starts = table.shard_splits[:-1]
        weighted = places.weights != NO_PLACE
        part_bytes = table.values[0].nbytes if table.values.ndim == 3 else 0
        return np.stack(
            [
                np.diff(table.shard_splits),
                np.full(shards, bags),
                places.local_rows + 8 * starts,
                places.row_splits + 8 * (bags + 1) * k,
                places.weights + 4 * starts if weighted else np.full(shards, NO_PLACE),
                places.values + part_bytes * k,
            ],
            axis=1,
        )

    def _local_rows(self, shard: int) -> tuple[I64, ...]:
        return tuple(t.local_rows[_span(t.shard_splits, shard)] for t in self.tables)

    def _bags(self, shard: int) -> tuple[Bags | None, ...]:
        if all(table.bags is None for table in self.tables):
            return ()
        return tuple(_bags_of_shard(table, shard) for table in self.tables)

    def _values(self, table: TablePart, shard: int) -> Any:
        if table.bags is not None:
            return table.values[shard] if table.values.ndim == 3 else table.values
        return table.values[_span(table.shard_splits, shard)]

    def _of(self, shard: int, vector: F32, splits: Sequence[int]) -> F32:
        return vector[splits[shard] : splits[shard + 1]]


def _place_and_size(start: int, splits: Sequence[int], shard: int) -> tuple[int, int]:
    return start + 4 * splits[shard], splits[shard + 1] - splits[shard]


def _bags_of_shard(table: TablePart, shard: int) -> Bags | None:
    if table.bags is None:
        return None
    weights = table.bags.weights
    span = _span(table.shard_splits, shard)
    return Bags(table.bags.row_splits[shard], weights[span] if weights.size else weights)


def _span(splits: npt.NDArray[np.int64], shard: int) -> slice:
    return slice(splits[shard], splits[shard + 1])
