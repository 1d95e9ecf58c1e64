"""Examples from Parquet: streamed, mixed in a fixed order, split over workers.

The order is a function of (seed, epoch, number of workers). Row groups are put in a random order
and laid end to end; worker w reads the w-th of `num_workers` equal spans of that sequence (reading
a row group on the border twice is cheaper than uneven workers), and mixes its rows within windows
of `shuffle_rows`. An incomplete last batch is left out in training and padded in evaluation. A
"worker" is a rank of the job here: one process may read for several.

A place in the input is the number of an epoch and of a batch in it: reading on from there draws the
same random numbers as reading up to there, but reads none of the windows that lie before.

A window becomes NumPy as a whole, without a copy where Arrow allows; batches are views of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from ps.errors import DataError
from ps.kernels.bags import take_bags
from ps.ragged import F32, I64, Ragged
from workers.columns import bag_column, check_schema, number_column, one_each, splits_of
from workers.config import DataConfig, FeatureEntry
from workers.prefetch import Prefetched
from workers.raw_inputs import ColumnInput, Positions

_NO_WEIGHTS = np.zeros(0, dtype=np.float32)


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

    @property
    def num_examples(self) -> int:
        """B."""
        return self.labels.size


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
        ahead: int = 0,
    ) -> None:
        """Read the schema and the row counts; no rows yet.

        Args:
            path: a Parquet file, or a folder of them.
            data: which columns are the label and the dense values.
            features: the columns of ids, and of their weights.
            columns: features of embedding columns.
            worker: whose span of the rows is read, of `num_workers`.
            num_workers: that share the rows.
            seed: of the order of training.
            ahead: windows that a thread reads before they are needed; 0 for no thread.

        Raises:
            DataError: no such file, no rows, a column missing or of the wrong type.
        """
        self._data = data
        self._features = features
        self._column_inputs = columns or {}
        self._worker = worker
        self._num_workers = num_workers
        self._seed = seed
        self._ahead = ahead
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

    def epoch(self, epoch: int, batch_size: int, first_batch: int = 0) -> Iterator[Batch]:
        """The full batches of this worker in one epoch, mixed, from `first_batch` on."""
        steps = self.steps_per_epoch(batch_size) - first_batch
        if steps <= 0:
            return
        order = np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._groups))
        share = self.num_rows // self._num_workers
        pieces = self._span(order, self._worker * share, (self._worker + 1) * share)
        rng = np.random.default_rng([self._seed, 1, epoch, self._worker])
        windows = self._mixed(pieces, rng, first_batch * batch_size)
        with Prefetched(windows, self._ahead, name="windows") as ready:
            batches = _rebatched(ready, batch_size)
            yield from (batch for _, batch in zip(range(steps), batches, strict=False))

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """All examples of this worker's span, once, in file order; the last batch is padded."""
        bounds = [k * self.num_rows // self._num_workers for k in range(self._num_workers + 1)]
        order = np.arange(len(self._groups))
        pieces = self._span(order, bounds[self._worker], bounds[self._worker + 1])
        with Prefetched(map(self._read, pieces), self._ahead, name="windows") as ready:
            for batch in _rebatched(ready, batch_size, keep_rest=True):
                yield _padded(batch, batch_size - batch.num_examples)

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

    def _read(self, piece: _Piece) -> Batch:
        table = self._groups[piece.group].to_table(schema=self._schema, columns=self._columns)
        return self._to_batch(table.slice(piece.start, piece.stop - piece.start))

    def _windows(self, pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
        """Pieces that are mixed together."""
        window: list[_Piece] = []
        for piece in pieces:
            window.append(piece)
            if sum(part.stop - part.start for part in window) >= self._data.shuffle_rows:
                yield window
                window = []
        if window:
            yield window

    def _mixed(
        self, pieces: Sequence[_Piece], rng: np.random.Generator, skip: int
    ) -> Iterator[Batch]:
        """The windows, each mixed, without the first `skip` rows of all that would come."""
        for window in self._windows(pieces):
            num_rows = sum(piece.stop - piece.start for piece in window)
            # Also of a window that is skipped: those behind it must find the same numbers.
            order = rng.permutation(num_rows) if self._data.shuffle_rows else None
            if num_rows <= skip:
                skip -= num_rows
                continue
            first, skip = skip, 0
            # No name for the window, which would keep it in memory while the next one is read.
            yield _sliced(_joined([self._read(piece) for piece in window], order), first, num_rows)

    def _to_batch(self, table: pa.Table) -> Batch:
        bags: dict[str, Ragged | Positions] = {
            name: bag_column(table, f.column or name, f.weights)
            for name, f in self._features.items()
        }
        for name, source in self._column_inputs.items():
            bags[name] = source.read(table)
        dense = np.empty((table.num_rows, len(self._data.dense)), dtype=np.float32)
        for i, column in enumerate(self._data.dense):
            dense[:, i] = number_column(table, column)
        labels = number_column(table, self._data.label)
        return Batch(bags, dense, labels, np.ones(table.num_rows, dtype=np.float32))


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


def _rebatched(
    windows: Iterable[Batch], batch_size: int, keep_rest: bool = False
) -> Iterator[Batch]:
    """Cut windows into batches that do not stop at the windows' borders."""
    parts: list[Batch] = []
    missing = batch_size
    for window in windows:
        start = 0
        while start < window.num_examples:
            parts.append(_sliced(window, start, start + missing))
            start += missing
            missing -= parts[-1].num_examples
            if not missing:
                yield _joined(parts)
                parts, missing = [], batch_size
    if keep_rest and parts:
        yield _joined(parts)


def _sliced(batch: Batch, start: int, stop: int) -> Batch:
    """Examples start … stop - 1, as far as there are; views."""
    stop = min(stop, batch.num_examples)
    if (start, stop) == (0, batch.num_examples):
        return batch
    bags = {name: _sliced_bag(bag, start, stop) for name, bag in batch.bags.items()}
    part = slice(start, stop)
    return Batch(bags, batch.dense[part], batch.labels[part], batch.example_weights[part])


def _sliced_bag(bag: Ragged | Positions, start: int, stop: int) -> Ragged | Positions:
    if isinstance(bag, Positions):
        length = _length(bag)
        return Positions(bag.bags.slice(start * length, stop * length), bag.lengths[start:stop])
    if _is_one_each(bag):
        weights = None if bag.weights is None else bag.weights[start:stop]
        return Ragged(bag.ids[start:stop], one_each(stop - start), weights)
    return bag.slice(start, stop)


def _joined(parts: Sequence[Batch], order: I64 | None = None) -> Batch:
    """The examples of all parts, in the order of the parts, or in another."""
    if len(parts) == 1 and order is None:
        return parts[0]
    bags = {
        name: _joined_bags([part.bags[name] for part in parts], order) for name in parts[0].bags
    }
    numbers = [
        _laid(arrays, order)
        for arrays in zip(*((p.dense, p.labels, p.example_weights) for p in parts), strict=True)
    ]
    return Batch(bags, *numbers)


def _joined_bags(parts: Sequence[Ragged | Positions], order: I64 | None) -> Ragged | Positions:
    positions = [part for part in parts if isinstance(part, Positions)]
    bags = [part for part in parts if isinstance(part, Ragged)]
    if not positions:
        return _concatenated(bags) if order is None else _taken(_concatenated(bags), order)
    assert not bags, "a feature is of one kind"
    joined, lengths = _concatenated([p.bags for p in positions]), [p.lengths for p in positions]
    if order is None:
        return Positions(joined, np.concatenate(lengths))
    length = _length(positions[0])
    places = (order[:, None] * length + np.arange(length)).reshape(-1)
    return Positions(_taken(joined, places), np.concatenate(lengths)[order])


def _concatenated(bags: Sequence[Ragged]) -> Ragged:
    if len(bags) == 1:
        return bags[0]
    if all(map(_is_one_each, bags)):
        splits = one_each(sum(bag.num_examples for bag in bags))
    else:
        splits = splits_of(np.concatenate([np.diff(bag.row_splits) for bag in bags]))
    weights: F32 | None = None
    if any(bag.weights is not None for bag in bags):  # no weights are all ones
        weights = _laid(
            [np.ones(b.ids.size, np.float32) if b.weights is None else b.weights for b in bags]
        )
    return Ragged(_laid([bag.ids for bag in bags]), splits, weights)


def _taken(bag: Ragged, order: I64) -> Ragged:
    """The bags in another order."""
    if _is_one_each(bag):
        weights = None if bag.weights is None else _laid([bag.weights], order)
        return Ragged(_laid([bag.ids], order), bag.row_splits, weights)
    splits = splits_of(np.diff(bag.row_splits)[order])
    ids = _room(bag.ids.shape, bag.ids.dtype)
    given = _NO_WEIGHTS if bag.weights is None else bag.weights
    weights = _room(given.shape, given.dtype)
    take_bags(bag.ids, bag.row_splits, given, order, ids, weights)
    return Ragged(ids, splits, None if bag.weights is None else weights)


def _laid(arrays: Sequence[np.ndarray], order: I64 | None = None) -> np.ndarray:
    """One array after the other, and then their entries in another order."""
    joined = arrays[0]
    if len(arrays) > 1:
        shape = (sum(map(len, arrays)), *joined.shape[1:])
        joined = np.concatenate(arrays, out=_room(shape, joined.dtype))
    if order is None:
        return joined
    # Not mode "raise", which would copy `out`.
    return joined.take(order, axis=0, out=_room(joined.shape, joined.dtype), mode="clip")


def _room(shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
    """Memory of Arrow's pool, which keeps that of arrays that are gone.

    NumPy would give it back, and the system clears new memory page by page.
    """
    return np.ndarray(shape, kind, pa.allocate_buffer(math.prod(shape) * kind.itemsize))


def _is_one_each(bag: Ragged) -> bool:
    """Whether every example has one id, as a column of numbers without nulls has."""
    return bag.row_splits is one_each(bag.num_examples)


def _length(sequences: Positions) -> int:
    return sequences.bags.num_examples // max(1, sequences.num_examples)


def _padded(batch: Batch, missing: int) -> Batch:
    """The same examples and `missing` empty ones of weight 0."""
    if missing == 0:
        return batch
    bags = {name: _padded_bag(bag, missing) for name, bag in batch.bags.items()}
    rows = (0, missing)
    return Batch(
        bags,
        np.pad(batch.dense, (rows, (0, 0))),
        np.pad(batch.labels, rows),
        np.pad(batch.example_weights, rows),
    )


def _padded_bag(bag: Ragged | Positions, missing: int) -> Ragged | Positions:
    if isinstance(bag, Positions):
        return Positions(
            _with_empty(bag.bags, missing * _length(bag)), np.pad(bag.lengths, (0, missing))
        )
    return _with_empty(bag, missing)


def _with_empty(bag: Ragged, missing: int) -> Ragged:
    """The same bags and `missing` empty ones."""
    return Ragged(bag.ids, np.pad(bag.row_splits, (0, missing), mode="edge"), bag.weights)
