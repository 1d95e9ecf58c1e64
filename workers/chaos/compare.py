"""Whether two snapshots hold the same bits: rows, slots, dense values, state, fences and step.

Numbers are compared as the 32 bits that they are: −0.0 is not 0.0 here, and a NaN is equal to
itself. Tables are read in pieces, so that their size does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ps.dense_variables import DenseValues
from ps.ragged import F32

PIECE_BYTES = 16 << 20


class ComparedTable(Protocol):
    """What is asked of a snapshot's table; see `ps.snapshot.SnapshotTable`."""

    @property
    def name(self) -> str:
        """Of the table."""

    @property
    def vocabulary_size(self) -> int:
        """Number of rows."""

    @property
    def dim(self) -> int:
        """Numbers of a row."""

    @property
    def slot_names(self) -> tuple[str, ...]:
        """Of the optimizer's slots."""

    def read_rows(self, first_id: int, out_ND: F32, slot: str | None = None) -> None:
        """Fill `out_ND` with the rows from `first_id` on, or a slot of them."""


class ComparedDense(Protocol):
    """What is asked of a snapshot's dense model."""

    def values(self) -> DenseValues:
        """The flat values."""


class ComparedSnapshot(Protocol):
    """What is asked of a snapshot; see `ps.snapshot.Snapshot`."""

    @property
    def step(self) -> int:
        """Number of steps applied."""

    @property
    def fences(self) -> tuple[int, ...] | None:
        """Per rank: the step that is expected next."""

    @property
    def tables(self) -> Sequence[ComparedTable]:
        """All tables."""

    @property
    def dense(self) -> ComparedDense | None:
        """The dense model, None without one."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One array, or one figure, that is not the same."""

    where: str
    what: str
    """The first difference: where, and both values."""
    count: int = 1
    """Numbers that differ."""
    total: int = 1
    """Numbers compared."""

    def __str__(self) -> str:
        """One line."""
        if self.total == 1:
            return f"{self.where}: {self.what}"
        return f"{self.where}: {self.count:,} of {self.total:,} numbers differ; first {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What two snapshots have in common, and what not."""

    step: int
    """Of the first one."""
    tables: int
    slots: int
    """Slot arrays of all tables."""
    dense: int
    """Numbers of the dense model, its slots and its state."""
    numbers: int
    """Numbers compared in all."""
    differences: tuple[Difference, ...]

    @property
    def identical(self) -> bool:
        """Whether no bit differs."""
        return not self.differences

    def __str__(self) -> str:
        """The verdict, in one line."""
        answer = "yes" if self.identical else "NO"
        return (
            f"{answer} ({self.tables} tables, {self.slots} slots, {self.dense:,} dense numbers; "
            f"{self.numbers:,} numbers at step {self.step})"
        )


def compare_snapshots(
    undisturbed: ComparedSnapshot, disturbed: ComparedSnapshot, piece_bytes: int = PIECE_BYTES
) -> Comparison:
    """Compare everything that training goes on from.

    Args:
        undisturbed: how it should be.
        disturbed: how it is.
        piece_bytes: how much of a table is held at a time.

    Raises:
        SnapshotError: one of them cannot be read.
    """
    differences = [
        Difference(name, f"{a} undisturbed, {b} disturbed")
        for name, a, b in (
            ("step", undisturbed.step, disturbed.step),
            ("fences", undisturbed.fences, disturbed.fences),
        )
        if a != b
    ]
    tables, differing = _pairs(undisturbed.tables, disturbed.tables)
    differences += differing
    numbers = slots = 0
    for one, other in tables:
        slots += len(one.slot_names)
        for slot in (None, *one.slot_names):
            numbers += one.vocabulary_size * one.dim
            differences += _compare_rows(one, other, slot, piece_bytes)
    dense = 0
    if undisturbed.dense is not None and disturbed.dense is not None:
        dense, differing = _compare_dense(undisturbed.dense.values(), disturbed.dense.values())
        differences += differing
    elif undisturbed.dense is not None or disturbed.dense is not None:
        differences.append(Difference("dense model", "only one of the two has one"))
    return Comparison(
        step=undisturbed.step,
        tables=len(tables),
        slots=slots,
        dense=dense,
        numbers=numbers + dense,
        differences=tuple(differences),
    )


def _pairs(
    ones: Sequence[ComparedTable], others: Sequence[ComparedTable]
) -> tuple[list[tuple[ComparedTable, ComparedTable]], list[Difference]]:
    """The tables that both have, in the same shape; what is not so."""
    by_name = {table.name: table for table in others}
    pairs, differences = [], []
    for one in ones:
        other = by_name.pop(one.name, None)
        if other is None:
            differences.append(Difference(f"table '{one.name}'", "only in the undisturbed run"))
        elif (mine := _shape(one)) != (its := _shape(other)):
            differences.append(Difference(f"table '{one.name}'", f"{mine} against {its}"))
        else:
            pairs.append((one, other))
    differences += [Difference(f"table '{name}'", "only in the disturbed run") for name in by_name]
    return pairs, differences


def _shape(table: ComparedTable) -> tuple[int, int, tuple[str, ...]]:
    return table.vocabulary_size, table.dim, tuple(table.slot_names)


def _compare_rows(
    one: ComparedTable, other: ComparedTable, slot: str | None, piece_bytes: int
) -> Iterator[Difference]:
    """At most one difference, of one array of a table."""
    count, first = 0, ""
    piece = max(1, piece_bytes // (4 * one.dim))
    for first_id in range(0, one.vocabulary_size, piece):
        shape = (min(piece, one.vocabulary_size - first_id), one.dim)
        mine, its = np.empty(shape, np.float32), np.empty(shape, np.float32)
        one.read_rows(first_id, mine, slot)
        other.read_rows(first_id, its, slot)
        differing = _bits(mine) != _bits(its)
        found = int(np.count_nonzero(differing))
        if found and not count:
            row, column = divmod(int(np.argmax(differing)), one.dim)
            first = f"id {first_id + row}, column {column}: {_values(mine, its, (row, column))}"
        count += found
    if count:
        array = "rows" if slot is None else f"slot '{slot}'"
        yield Difference(
            f"table '{one.name}', {array}", first, count, one.vocabulary_size * one.dim
        )


def _compare_dense(one: DenseValues, other: DenseValues) -> tuple[int, list[Difference]]:
    """How many numbers were compared; the differences."""
    mine, its = _dense_arrays(one), _dense_arrays(other)
    numbers, differences = 0, []
    for name in [*mine, *(name for name in its if name not in mine)]:
        if name not in mine or name not in its or mine[name].shape != its[name].shape:
            sizes = [str(arrays[name].size) if name in arrays else "none" for arrays in (mine, its)]
            differences.append(Difference(name, f"{sizes[0]} numbers against {sizes[1]}"))
            continue
        a, b = mine[name], its[name]
        numbers += a.size
        differing = _bits(a) != _bits(b)
        if differing.any():
            first = int(np.argmax(differing))
            what = f"number {first}: {_values(a, b, (first,))}"
            differences.append(Difference(name, what, int(np.count_nonzero(differing)), a.size))
    return numbers, differences


def _dense_arrays(values: DenseValues) -> Mapping[str, F32]:
    slots = {f"dense slot '{name}'": slot for name, slot in values.slots.items()}
    return {"dense values": values.trainable, **slots, "dense state": values.state}


def _bits(values: F32) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


def _values(a: F32, b: F32, at: tuple[int, ...]) -> str:
    one, other = (f"{v[at]!s} (0x{int(_bits(v)[at]):08x})" for v in (a, b))
    return f"{one} undisturbed, {other} disturbed"
