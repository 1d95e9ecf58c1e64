"""Parts of tables: every row comes back once, for any number of shards, or an error says where."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.config import SGD, Adagrad, Adam, FeatureConfig, TableConfig
from ps.disk import Disk
from ps.errors import SnapshotError, StorageError
from ps.faults import FaultyDisk
from ps.optimizers import Optimizer
from ps.part_reader import PartRows, load_parts, read_part
from ps.partition import Placement
from ps.ragged import F32
from ps.spec import TableSpec, resolve
from ps.storage import Storage
from ps.table_parts import PartTarget, PartWriter, SealedPart, batch_rows, part_name

OPTIMIZERS: list[Optimizer] = [SGD(), Adagrad(), Adam()]
Columns = dict[str, F32]
"""float32 [V, D]: "row" and every slot."""


class QuickDisk(Disk):
    """Waits for nothing: these tests crash no machine."""

    def sync(self, fd: int) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass


def table_spec(num_rows: int, dim: int, optimizer: Optimizer, name: str = "t") -> TableSpec:
    return resolve(
        {"f": FeatureConfig(TableConfig(num_rows, dim, optimizer=optimizer, name=name))}
    ).tables[0]


def contents(table: TableSpec) -> Columns:
    """Every value another one."""
    names = ("row", *table.optimizer.slot_names)
    size = table.vocabulary_size * table.dim
    values = np.arange(len(names) * size, dtype=np.float32)
    shape = (len(names), table.vocabulary_size, table.dim)
    return dict(zip(names, values.reshape(shape), strict=True))


def local_ids(placement: Placement, shard: int) -> list[int]:
    return [slab.first_id + k for slab in placement.slabs(shard) for k in range(slab.num_rows)]


def write_parts(
    storage: Storage,
    table: TableSpec,
    columns: Columns,
    placement: Placement,
    pieces: Sequence[int] = (7,),
    attempt: str = "a",
) -> list[SealedPart]:
    """All shards' parts in `storage`, cut into pieces of so many rows, round and round."""
    parts = []
    for shard in range(placement.num_shards):
        target = PartTarget(storage.uri, "", attempt, shard, placement.num_shards)
        writer = PartWriter(target, table, storage)
        left, sizes = local_ids(placement, shard), itertools.cycle(pieces)
        while left:
            size = next(sizes)
            now, left = left[:size], left[size:]
            writer.append(
                columns["row"][now], {s: columns[s][now] for s in table.optimizer.slot_names}
            )
        parts.append(writer.close())
    return parts


def shape_of(table: TableSpec) -> dict[str, object]:
    return {"dim": table.dim, "slots": table.optimizer.slot_names}


def read(storage: Storage, part: SealedPart, table: TableSpec) -> list[tuple[int, F32]]:
    """First local rows, and copies of the rows."""
    return [(first, rows.copy()) for first, rows, _ in read_part(storage, part, **shape_of(table))]  # type: ignore[arg-type]


@settings(max_examples=80)
@given(
    num_rows=st.integers(1, 90),
    dim=st.integers(1, 3),
    optimizer=st.sampled_from(OPTIMIZERS),
    slab_rows=st.sampled_from([1, 2, 4, 16]),
    shards=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    offsets=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    pieces=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    rows_per_batch=st.sampled_from([1, 2, 8, 64]),
)
def test_any_shards_read_what_any_shards_wrote(
    tmp_path_factory: pytest.TempPathFactory,
    num_rows: int,
    dim: int,
    optimizer: Optimizer,
    slab_rows: int,
    shards: tuple[int, int],
    offsets: tuple[int, int],
    pieces: list[int],
    rows_per_batch: int,
) -> None:
    table = table_spec(num_rows, dim, optimizer)
    columns = contents(table)
    storage = Storage.at(tmp_path_factory.mktemp("parts"), QuickDisk())
    written, wanted = (
        Placement(num_rows, slab_rows, n, offset % n)
        for n, offset in zip(shards, offsets, strict=True)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ps.table_parts.batch_rows", lambda *_: rows_per_batch)
        parts = write_parts(storage, table, columns, written, pieces)
    assert [p.num_rows for p in parts] == [written.num_local_rows(s) for s in range(len(parts))]
    for shard in range(wanted.num_shards):
        ids = local_ids(wanted, shard)
        found = {name: np.full((len(ids), dim), np.nan, np.float32) for name in columns}
        times = np.zeros(len(ids), dtype=int)
        for first, rows, slots in load_parts(
            storage, parts, written, wanted, shard, dim=dim, slots=optimizer.slot_names
        ):
            here = slice(first, first + len(rows))
            times[here] += 1
            for name, values in {"row": rows, **slots}.items():
                found[name][here] = values
        assert (times == 1).all()
        for name, values in columns.items():
            np.testing.assert_array_equal(found[name], values[ids], strict=True)
    check_spans(storage, parts, table, columns, written)


def check_spans(
    storage: Storage,
    parts: list[SealedPart],
    table: TableSpec,
    columns: Columns,
    placement: Placement,
) -> None:
    """Random access to the first and the last third of each part, row and last slot."""
    for part in parts:
        ids = local_ids(placement, part.shard)
        third = -(-len(ids) // 3)
        for name in {"row", *columns}:
            slot = None if name == "row" else name
            with PartRows(storage, part, **shape_of(table), slot=slot) as some:  # type: ignore[arg-type]
                for first, end in ((0, third), (len(ids) - third, len(ids))):
                    out = np.empty((end - first, table.dim), np.float32)
                    some.read(first, out)
                    np.testing.assert_array_equal(out, columns[name][ids[first:end]])


def test_equal_rows_make_equal_files(tmp_path: Path) -> None:
    table = table_spec(50_000, 16, Adagrad())
    columns = contents(table)
    storage, placement = Storage.at(tmp_path), Placement(50_000, 1024, 1, 0)
    checksums = {
        write_parts(storage, table, columns, placement, pieces, f"a{k}")[0].checksum
        for k, pieces in enumerate([(50_000,), (1000, 16_384, 3), (20_000,)])
    }
    assert len(checksums) == 1


def test_pandas_reads_a_part(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = table_spec(20, 2, Adam())
    columns = contents(table)
    (part,) = write_parts(Storage.at(tmp_path), table, columns, Placement(20, 4, 1, 0))
    frame = pandas.read_feather(tmp_path / part.file)
    assert list(frame.columns) == ["row", *table.optimizer.slot_names]
    for name, values in columns.items():
        np.testing.assert_array_equal(np.stack(frame[name].to_numpy()), values)


def test_only_parts_with_rows_of_the_shard_are_read(tmp_path: Path) -> None:
    table = table_spec(64, 2, SGD())
    storage, written = Storage.at(tmp_path), Placement(64, 4, 4, 1)
    parts = write_parts(storage, table, contents(table), written)
    for wanted, shard, needed in [
        (written, 2, {2}),
        (Placement(64, 4, 2, 0), 0, {1, 3}),
        (Placement(64, 4, 8, 0), 3, {0}),
        (Placement(64, 4, 3, 0), 1, {0, 1, 2, 3}),
    ]:
        for part in parts:
            (tmp_path / part.file).rename(tmp_path / f"{part.shard}.away")
        for part in parts:
            if part.shard in needed:
                (tmp_path / f"{part.shard}.away").rename(tmp_path / part.file)
        rows = list(load_parts(storage, parts, written, wanted, shard, dim=2, slots=()))
        assert sum(len(r) for _, r, _ in rows) == wanted.num_local_rows(shard)
        for part in parts:
            if part.shard not in needed:
                (tmp_path / f"{part.shard}.away").rename(tmp_path / part.file)


Small = tuple[Storage, TableSpec, SealedPart, bytes]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """A part of three record batches, and its bytes."""
    monkeypatch.setattr("ps.table_parts.batch_rows", lambda *_: 4)
    table = table_spec(10, 2, Adagrad())
    storage = Storage.at(tmp_path, QuickDisk())
    (part,) = write_parts(storage, table, contents(table), Placement(10, 2, 1, 0))
    return storage, table, part, (tmp_path / part.file).read_bytes()


def overwrite(storage: Storage, part: SealedPart, data: bytes) -> None:
    """In place: ext4 waits for the disk when a file is emptied first."""
    with open(storage.name(part.file), "r+b") as file:
        file.write(data)
        file.truncate()


def damaged(small: Small, data: bytes) -> None:
    """The part with these bytes is refused, before its last rows; random access never crashes."""
    storage, table, part, _ = small
    overwrite(storage, part, data)
    seen = 0
    with pytest.raises(SnapshotError, match=f"^'{storage.name(part.file)}'"):  # noqa: PT012
        for _, rows, _ in read_part(storage, part, **shape_of(table)):  # type: ignore[arg-type]
            seen += len(rows)
    assert seen <= 8
    try:
        with PartRows(storage, part, **shape_of(table), slot="accumulators") as some:  # type: ignore[arg-type]
            some.read(0, np.empty((10, 2), np.float32))
    except SnapshotError:
        pass


def test_any_damaged_byte(small: Small) -> None:
    data = small[3]
    for place in range(len(data)):
        bits = (0xFF, 0x01, 0x80)[place % 3]
        damaged(small, data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :])


def test_any_truncation(small: Small) -> None:
    for size in (*range(0, len(small[3]), 4), len(small[3]) - 1):
        damaged(small, small[3][:size])


def test_bytes_too_many(small: Small) -> None:
    data = small[3]
    damaged(small, data + b"\0")
    damaged(small, data + data)
    for place in range(0, len(data), 8):
        damaged(small, data[:place] + bytes(8) + data[place:])


def test_a_manifest_that_fits_the_damage_is_not_believed(small: Small) -> None:
    storage, table, part, data = small
    for place in range(0, len(data), 8):
        other = SealedPart("t", 0, part.file, place, part.checksum, part.num_rows)
        damaged((storage, table, other, data), data[:place])
    overwrite(storage, part, data)
    for num_rows in (0, 9, 11):
        other = SealedPart("t", 0, part.file, part.size_bytes, part.checksum, num_rows)
        with pytest.raises(SnapshotError, match="10 rows, expected"):
            read(storage, other, table)
    for checksum in ("", "xxh3:", "sha256:" + part.checksum[5:]):
        other = SealedPart("t", 0, part.file, part.size_bytes, checksum, part.num_rows)
        with pytest.raises(SnapshotError, match="its checksum is"):
            read(storage, other, table)


def test_rows_before_the_damage_are_handed_out(small: Small) -> None:
    storage, table, part, data = small
    overwrite(storage, part, data[:-1] + b"?")
    found = []
    with pytest.raises(SnapshotError, match="its checksum is"):  # noqa: PT012
        for first, rows, _ in read_part(storage, part, **shape_of(table)):  # type: ignore[arg-type]
            found.append((first, len(rows)))
    assert found == [(0, 4), (4, 4)]


def test_parts_of_something_else(small: Small) -> None:
    storage, table, part, _ = small
    here = Placement(10, 2, 1, 0)

    def load(
        parts: list[SealedPart], written: Placement = here, wanted: Placement = here, dim: int = 2
    ) -> Iterator[object]:
        return load_parts(storage, parts, written, wanted, 0, dim=dim, slots=("accumulators",))

    assert len(list(load([part]))) == 3
    for bad, problem in [
        (load([]), "has parts of shards"),
        (load([part, part]), "has parts of shards"),
        (load([part], Placement(12, 2, 1, 0), Placement(12, 2, 1, 0)), "10 rows, where shard 0"),
        (load([part], here, Placement(10, 4, 1, 0)), "cut otherwise"),
        (load([part], dim=3), "expected columns"),
        (load_parts(storage, [part], here, here, 0, dim=2, slots=("a",)), "expected columns"),
    ]:
        with pytest.raises(SnapshotError, match=problem):
            list(bad)
    with pytest.raises(SnapshotError, match="expected columns"):
        PartRows(storage, part, dim=3, slots=("accumulators",))
    storage.remove(part.file)
    for act in (lambda: list(load([part])), lambda: PartRows(storage, part, **shape_of(table))):  # type: ignore[arg-type]
        with pytest.raises(StorageError, match=f"cannot read '.*{part.file}': No such file"):
            act()


def test_any_operation_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ps.local_storage._SINK_BYTES", 4096)
    table = table_spec(3000, 2, Adagrad())
    columns = contents(table)
    for number in itertools.count(1):
        disk = FaultyDisk.at(number, errno.ENOSPC, torn=0.3)
        storage = Storage.at(tmp_path / "root", disk)
        writer = None
        try:
            writer = PartWriter(PartTarget(storage.uri, "s", "a", 0, 1), table, storage)
            for first in range(0, 3000, 500):
                here = slice(first, first + 500)
                writer.append(columns["row"][here], {"accumulators": columns["accumulators"][here]})
            part = writer.close()
        except StorageError as e:
            problem = str(e)
        else:
            break
        finally:
            if writer is not None:
                writer.abandon()
        assert problem.startswith("cannot write '")
        assert problem.endswith(": No space left on device")
        assert not list(tmp_path.rglob("*.arrow")), disk.counts
    assert number > 10
    assert read(storage.below("s"), part, table)[0][1].shape == (3000, 2)


def test_an_abandoned_part_is_gone(tmp_path: Path) -> None:
    table = table_spec(10, 2, SGD())
    writer = PartWriter(PartTarget(str(tmp_path), "s", "a", 0, 1), table, Storage.at(tmp_path))
    writer.append(np.zeros((10, 2), np.float32), {})
    writer.abandon()
    writer.abandon()
    assert os.listdir(tmp_path / "s") == []


def test_names_fit_a_file_system(tmp_path: Path) -> None:
    names = [part_name(PartTarget("", "", "0" * 32, 10**4, 10**4), "ü/" * 25 + c) for c in "abc"]
    longest = [part_name(PartTarget("", "", "0" * 32, 0, 10**4), "a" * 239 + c) for c in "abc"]
    for name in names + longest:
        (tmp_path / name).touch()
    assert len({*names, *longest}) == 6


def test_a_target_travels_and_shows_no_credentials() -> None:
    target = PartTarget("s3://key:hush@bucket/x", "s", "a", 1, 2)
    assert pickle.loads(pickle.dumps(target)) == target
    assert "hush" not in repr(target)


def test_batches_are_of_a_size_that_suits_the_processor() -> None:
    for dim, num_columns in [(1, 1), (10, 2), (16, 2), (64, 3), (4096, 3)]:
        size = 4 * dim * num_columns * batch_rows(dim, num_columns)
        assert 1 << 20 <= size <= 2 << 20
