"""`manta chaos` compares bits, and says which differ."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from ps.dense_variables import DenseValues
from ps.ragged import F32
from ps.snapshot import open_snapshot
from tests.support.snapshots import (
    dense_values,
    every_optimizer_spec,
    random_contents,
    write_snapshot,
)
from workers.chaos.compare import Comparison, compare_snapshots


@dataclass(frozen=True)
class Table:
    name: str
    arrays: dict[str | None, F32]

    @property
    def vocabulary_size(self) -> int:
        return len(self.arrays[None])

    @property
    def dim(self) -> int:
        return int(self.arrays[None].shape[1])

    @property
    def slot_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.arrays if name is not None)

    def read_rows(self, first_id: int, out_ND: F32, slot: str | None = None) -> None:
        out_ND[:] = self.arrays[slot][first_id : first_id + len(out_ND)]


@dataclass(frozen=True)
class Dense:
    arrays: DenseValues

    def values(self) -> DenseValues:
        return self.arrays


@dataclass(frozen=True)
class Snapshot:
    tables: tuple[Table, ...]
    dense: Dense | None
    step: int = 100
    fences: tuple[int, ...] | None = (100, 100)


def numbers(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def snapshot() -> Snapshot:
    users = Table("users", {None: numbers(50, 4), "m": numbers(50, 4), "v": numbers(50, 4)})
    items = Table("items", {None: numbers(7, 1)})
    dense = DenseValues(trainable=numbers(9), slots={"m": numbers(9)}, state=numbers(2))
    return Snapshot((users, items), Dense(dense))


def compared(other: Snapshot, piece_bytes: int = 48) -> Comparison:
    """In pieces of three rows of four numbers."""
    return compare_snapshots(snapshot(), other, piece_bytes)


def test_equal_snapshots_are_identical() -> None:
    comparison = compared(snapshot())
    assert comparison.identical
    assert (comparison.tables, comparison.slots, comparison.dense) == (2, 2, 20)
    assert comparison.numbers == 3 * 200 + 7 + 20
    assert str(comparison) == ("yes (2 tables, 2 slots, 20 dense numbers; 627 numbers at step 100)")


@pytest.mark.parametrize("piece_bytes", [1, 48, 1 << 20])
@pytest.mark.parametrize("slot", [None, "v"])
def test_one_bit_of_a_table_is_found(slot: str | None, piece_bytes: int) -> None:
    other = snapshot()
    other.tables[0].arrays[slot].view(np.uint32)[17, 2] ^= 1
    (difference,) = compared(other, piece_bytes).differences
    assert difference.where == (
        "table 'users', rows" if slot is None else "table 'users', slot 'v'"
    )
    assert difference.what.startswith("id 17, column 2: ")
    assert (difference.count, difference.total) == (1, 200)
    mine, its = (s.tables[0].arrays[slot].view(np.uint32)[17, 2] for s in (snapshot(), other))
    assert f"0x{mine:08x}) undisturbed" in difference.what
    assert f"0x{its:08x}) disturbed" in difference.what


def test_the_first_of_many_differences_is_named_and_all_are_counted() -> None:
    other = snapshot()
    other.tables[0].arrays["m"][20:40] += 1
    (difference,) = compared(other).differences
    assert difference.what.startswith("id 20, column 0")
    assert str(difference).startswith("table 'users', slot 'm': 80 of 200 numbers differ; first id")


def test_zeros_of_two_signs_differ_and_equal_nans_do_not() -> None:
    one, other = snapshot(), snapshot()
    for s, zero in ((one, 0.0), (other, -0.0)):
        s.tables[0].arrays[None][3] = np.nan
        s.tables[1].arrays[None][2] = zero
    (difference,) = compare_snapshots(one, other).differences
    assert difference.where == "table 'items', rows"


@pytest.mark.parametrize("part", ["dense values", "dense slot 'm'", "dense state"])
def test_one_bit_of_the_dense_model_is_found(part: str) -> None:
    other = snapshot()
    assert other.dense is not None
    values = other.dense.arrays
    array = {"dense values": values.trainable, "dense state": values.state}.get(
        part, values.slots["m"]
    )
    array.view(np.uint32)[1] ^= 1 << 31
    (difference,) = compared(other).differences
    assert difference.where == part
    assert difference.what.startswith("number 1: ")


def test_step_and_fences_must_be_equal() -> None:
    found = compared(replace(snapshot(), step=99, fences=(100, 99))).differences
    assert [d.where for d in found] == ["step", "fences"]
    assert str(found[0]) == "step: 100 undisturbed, 99 disturbed"


def test_tables_that_one_run_lacks_are_differences() -> None:
    whole = snapshot()
    extra = Table("more", {None: numbers(2, 2)})
    wider = Table("items", {None: numbers(7, 2)})
    assert not compared(replace(whole, tables=whole.tables[:1])).identical
    assert not compared(replace(whole, tables=(*whole.tables, extra))).identical
    (difference,) = compared(replace(whole, tables=(whole.tables[0], wider))).differences
    assert str(difference) == "table 'items': (7, 1, ()) against (7, 2, ())"


def test_a_dense_model_that_one_run_lacks_is_a_difference() -> None:
    whole = snapshot()
    assert not compared(replace(whole, dense=None)).identical
    assert whole.dense is not None
    shorter = replace(whole.dense.arrays, trainable=numbers(8), slots={})
    found = compared(replace(whole, dense=Dense(shorter))).differences
    assert [str(d) for d in found] == [
        "dense values: 9 numbers against 8",
        "dense slot 'm': 9 numbers against none",
    ]


def test_snapshots_of_two_shard_counts_are_compared_by_id(tmp_path: Path) -> None:
    spec = every_optimizer_spec()
    contents = random_contents(spec)

    def written(name: str, num_shards: int) -> Comparison:
        folder = write_snapshot(
            tmp_path / name, spec, contents, dense=dense, num_shards=num_shards, fences=(6, 6)
        )
        return compare_snapshots(whole, open_snapshot(folder))

    dense = dense_values("m", "v")
    first = write_snapshot(tmp_path / "a", spec, contents, dense=dense, fences=(6, 6))
    whole = open_snapshot(first)
    assert written("b", 3).identical
    slot = spec.table("users").optimizer.slot_names[0]
    contents["users"][slot][299, 7] += 1
    (difference,) = written("c", 2).differences
    assert difference.where == f"table 'users', slot '{slot}'"
    assert difference.what.startswith("id 299, column 7")


@dataclass(frozen=True)
class Counting(Table):
    read: list[int] = field(default_factory=list)

    def read_rows(self, first_id: int, out_ND: F32, slot: str | None = None) -> None:
        self.read.append(len(out_ND))
        super().read_rows(first_id, out_ND, slot)


def test_a_big_table_is_read_in_pieces() -> None:
    table = Counting("big", {None: numbers(10, 4)})
    whole = Snapshot((table,), None)
    assert compare_snapshots(whole, whole, piece_bytes=64).identical
    assert table.read == [4, 4, 4, 4, 2, 2]
