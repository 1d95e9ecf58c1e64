"""Examples from Parquet: streamed, mixed in a fixed order, split over workers.

The order is a function of (seed, epoch, number of workers). Row groups are put in a random order
and laid end to end; worker w reads the w-th of `num_workers` equal spans of that sequence (reading
a row group on the border twice is cheaper than uneven workers), and mixes its rows within windows
of `shuffle_rows`. An incomplete last batch is left out in training and padded in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from ps.errors import DataError
from ps.ragged import F32, Ragged
from workers.columns import bag_column, check_schema, number_column
from workers.config import DataConfig, FeatureEntry
from workers.raw_inputs import ColumnInput, Positions


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B examples of one worker."""

    bags: dict[str, Ragged | Positions]
    """Ids (and weights) per feature."""
    dense: F32
    """float32 [B, number of dense columns]."""
    labels: F32
    """float32 [B]."""
    example_weights: F32
    """float32 [B]: 1, or 0 for examples that only fill up the last batch of an evaluation."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows `start` … `stop - 1` of one row group."""

    group: int
    start: int
    stop: int


class ExampleReader:
    """The examples of one data set, for one worker."""

    def __init__(
        self,
        path: Path,
        data: DataConfig,
        features: Mapping[str, FeatureEntry],
        columns: Mapping[str, ColumnInput] | None = None,
        *,
        worker: int = 0,
        num_workers: int = 1,
        seed: int = 0,
    ) -> None:
        """Read the schema and the row counts; no rows yet.

        Raises:
            DataError: no such file, no rows, a column missing or of the wrong type.
        """
        self._data = data
        self._features = features
        self._column_inputs = columns or {}
        self._worker = worker
        self._num_workers = num_workers
        self._seed = seed
        self._path = path
        dataset = _open(path)
        with _readable(path):
            files = list(dataset.get_fragments())
            self._groups = [group for file in files for group in file.split_by_row_group()]
        if not files:
            raise DataError(f"data set {path} has no files")
        for file in files:
            check_schema(file.physical_schema, data, features, Path(file.path))
            for column in self._column_inputs.values():
                column.check(file.physical_schema, Path(file.path))
        self._sizes: list[int] = [group.row_groups[0].num_rows for group in self._groups]
        self.num_rows = sum(self._sizes)
        if self.num_rows == 0:
            raise DataError(f"data set {path} has no rows")
        names = [data.label, *data.dense]
        for name, feature in features.items():
            names += [feature.column or name] + ([feature.weights] if feature.weights else [])
        for column in self._column_inputs.values():
            names += column.columns
        self._columns = list(dict.fromkeys(names))
        self._schema = self._common_schema([file.physical_schema for file in files])

    def _common_schema(self, schemas: list[pa.Schema]) -> pa.Schema:
        """The columns that are read, with types wide enough for every file."""
        used = [pa.schema([schema.field(name) for name in self._columns]) for schema in schemas]
        try:
            return pa.unify_schemas(used, promote_options="permissive")
        except pa.ArrowTypeError as e:
            raise DataError(f"data set {self._path}: its files differ: {e}") from None

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches that every worker has in an epoch; `batch_size` is per worker."""
        return self.num_rows // self._num_workers // batch_size

    def epoch(self, epoch: int, batch_size: int) -> Iterator[Batch]:
        """The full batches of this worker in one epoch, mixed."""
        steps = self.steps_per_epoch(batch_size)
        order = np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._groups))
        share = self.num_rows // self._num_workers
        pieces = self._span(order, self._worker * share, (self._worker + 1) * share)
        windows = self._mixed(pieces, np.random.default_rng([self._seed, 1, epoch, self._worker]))
        for _, batch in zip(range(steps), _rebatch(windows, batch_size), strict=False):
            yield self._to_batch(batch, batch_size)

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """All examples of this worker's span, once, in file order; the last batch is padded."""
        bounds = [k * self.num_rows // self._num_workers for k in range(self._num_workers + 1)]
        order = np.arange(len(self._groups))
        pieces = self._span(order, bounds[self._worker], bounds[self._worker + 1])
        tables = (self._read(piece) for piece in pieces)
        for batch in _rebatch(tables, batch_size, keep_rest=True):
            yield self._to_batch(batch, batch_size)

    def _span(self, order: np.ndarray, start: int, stop: int) -> list[_Piece]:
        """The pieces of rows start … stop - 1 of the row groups laid end to end in this order."""
        pieces, first = [], 0
        for group in order:
            size = self._sizes[group]
            lo, hi = max(start - first, 0), min(stop - first, size)
            if lo < hi:
                pieces.append(_Piece(int(group), lo, hi))
            first += size
        return pieces

    def _read(self, piece: _Piece) -> pa.Table:
        table = self._groups[piece.group].to_table(schema=self._schema, columns=self._columns)
        return table.slice(piece.start, piece.stop - piece.start)

    def _mixed(self, pieces: Sequence[_Piece], rng: np.random.Generator) -> Iterator[pa.Table]:
        window: list[pa.Table] = []
        for piece in pieces:
            window.append(self._read(piece))
            if sum(table.num_rows for table in window) >= self._data.shuffle_rows:
                yield self._mix(window, rng)
                window = []
        if window:
            yield self._mix(window, rng)

    def _mix(self, window: list[pa.Table], rng: np.random.Generator) -> pa.Table:
        table = pa.concat_tables(window)
        if self._data.shuffle_rows == 0:
            return table
        try:
            return table.take(pa.array(rng.permutation(table.num_rows)))
        except pa.ArrowInvalid as e:  # lists of more than 2³¹ values in all
            raise DataError(
                f"data set {self._path}: {table.num_rows} rows are too many to mix at once ({e}); "
                "lower data.shuffle_rows or write smaller row groups"
            ) from None

    def _to_batch(self, table: pa.Table, batch_size: int) -> Batch:
        count, missing = table.num_rows, batch_size - table.num_rows
        bags: dict[str, Ragged | Positions] = {
            name: _padded(bag_column(table, f.column or name, f.weights), missing)
            for name, f in self._features.items()
        }
        for name, source in self._column_inputs.items():
            bags[name] = _all_padded(source.read(table), missing)
        dense = np.zeros((batch_size, len(self._data.dense)), dtype=np.float32)
        for i, column in enumerate(self._data.dense):
            dense[:count, i] = number_column(table, column)
        labels = np.zeros(batch_size, dtype=np.float32)
        labels[:count] = number_column(table, self._data.label)
        return Batch(bags, dense, labels, (np.arange(batch_size) < count).astype(np.float32))


def _open(path: Path) -> pads.Dataset:
    with _readable(path):
        return pads.dataset(str(path), format="parquet")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"data set {path}: no such file or folder") from None
    except (pa.ArrowInvalid, OSError) as e:
        raise DataError(
            f"data set {path}: not readable as Parquet: {str(e).splitlines()[0]}"
        ) from None


def _rebatch(
    tables: Iterator[pa.Table], batch_size: int, keep_rest: bool = False
) -> Iterator[pa.Table]:
    """Cut a stream of tables into batches that do not stop at the tables' borders."""
    rest: pa.Table | None = None
    for table in tables:
        joined = table if rest is None else pa.concat_tables([rest, table])
        full = joined.num_rows // batch_size * batch_size
        for start in range(0, full, batch_size):
            yield joined.slice(start, batch_size)
        rest = joined.slice(full)
    if keep_rest and rest is not None and rest.num_rows:
        yield rest


def _all_padded(bag: Ragged | Positions, missing: int) -> Ragged | Positions:
    if not isinstance(bag, Positions) or missing == 0:
        return _padded(bag, missing) if isinstance(bag, Ragged) else bag
    length = bag.bags.num_examples // bag.num_examples
    return Positions(_padded(bag.bags, missing * length), np.pad(bag.lengths, (0, missing)))


def _padded(bag: Ragged, missing: int) -> Ragged:
    """The same bags with `missing` empty examples at the end."""
    if missing == 0:
        return bag
    splits = np.concatenate([bag.row_splits, np.full(missing, bag.row_splits[-1])])
    return Ragged(bag.ids, splits, bag.weights)
