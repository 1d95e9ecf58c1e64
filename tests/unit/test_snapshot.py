"""Snapshots read back what was written, on any number of shards, and name what is damaged."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ps.columns as fc
from ps.config import CustomCombiner, FeatureConfig, TableConfig
from ps.errors import ExportError, SnapshotError
from ps.export import open_export
from ps.partition import Layout, Placement
from ps.ragged import F32
from ps.snapshot import Snapshot, export_snapshot, load_shard, open_snapshot
from ps.spec import resolve
from tests.support.exports import raw_columns
from tests.support.old_snapshots import write_old_snapshot
from tests.support.reference import same_bits
from tests.support.snapshots import (
    OPTIMIZERS,
    SIZES,
    VARIABLES,
    Contents,
    contents_of,
    dense_values,
    every_optimizer_spec,
    part_of,
    random_contents,
    small,
    small_spec,
    write_snapshot,
)

SPEC = every_optimizer_spec()
CONTENTS = random_contents(SPEC)
DENSE = dense_values("momenta", "velocities")


def write(root: Path, step: int = 6, num_shards: int = 2) -> Path:
    return write_snapshot(root, SPEC, CONTENTS, step=step, dense=DENSE, num_shards=num_shards)


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def same(found: Contents, wanted: Contents) -> bool:
    return found.keys() == wanted.keys() and all(
        found[t].keys() == wanted[t].keys()
        and all(same_bits(found[t][k], wanted[t][k]) for k in wanted[t])
        for t in wanted
    )


def loaded(snapshot: Snapshot, table: str, placement: Placement, shard: int) -> dict[str, F32]:
    """A shard's rows and slots in local order, each row of which came once."""
    names = ("rows", *snapshot.table(table).slot_names)
    shape = (placement.num_local_rows(shard), snapshot.table(table).dim)
    arrays = {name: np.full(shape, np.nan, np.float32) for name in names}
    count = 0
    for first, rows, slots in load_shard(snapshot, table, placement, shard):
        for name, values in {"rows": rows, **slots}.items():
            arrays[name][first : first + len(values)] = values
        count += len(rows)
    assert count == shape[0]
    return arrays


def test_rows_slots_and_dense_values_read_back_are_those_written(tmp_path: Path) -> None:
    snapshot = open_snapshot(write(tmp_path), verify=True)
    assert (snapshot.version, snapshot.step, snapshot.seed) == ("step-000000006", 6, 3)
    assert (snapshot.job, snapshot.created[-6:]) == ("test", "+00:00")
    assert snapshot.features == SPEC.features
    for table in SPEC.tables:
        found = snapshot.table(table.name)
        assert (found.vocabulary_size, found.dim) == SIZES[table.name]
        assert found.combiner == "sum"
        assert found.optimizer == OPTIMIZERS[table.name].describe()
        arrays = {"rows": found.rows} | {slot: found.slot(slot) for slot in found.slot_names}
        assert arrays.keys() == CONTENTS[table.name].keys()
        for name, values in arrays.items():
            assert same_bits(values, CONTENTS[table.name][name])
            assert not values.flags.writeable
    dense = snapshot.dense
    assert dense is not None
    assert dense.variables == VARIABLES
    values = dense.values()
    assert same_bits(values.trainable, DENSE.trainable)
    assert same_bits(values.state, DENSE.state)
    assert values.slots.keys() == DENSE.slots.keys()
    assert all(same_bits(values.slots[name], DENSE.slots[name]) for name in DENSE.slots)
    assert {name: v.shape for name, v in dense.named().items()} == {
        "kernel": (2, 3),
        "scale": (),
        "mean": (3,),
    }


@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 9)), min_size=1, max_size=3),
    written_by=st.integers(0, 5),
    num_shards=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_what_some_shards_wrote_others_load_and_any_rows_can_be_read(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[int, int]],
    written_by: int,
    num_shards: int,
    data: st.DataObject,
) -> None:
    """0 shards write format 1."""
    kinds = st.sampled_from(list(OPTIMIZERS.values()))
    spec = resolve(
        [
            FeatureConfig(
                TableConfig(*size, optimizer=data.draw(kinds), combiner="sum", name=f"{n}")
            )
            for n, size in enumerate(sizes)
        ]
    )
    contents, root = random_contents(spec, seed=written_by), tmp_path_factory.mktemp("any")
    if written_by:
        write_snapshot(root, spec, contents, num_shards=written_by)
    else:
        write_old_snapshot(root, spec, contents)
    snapshot = open_snapshot(root)
    assert snapshot.num_shards == max(1, written_by)
    assert same(contents_of(snapshot), contents)
    placements = Layout.of(spec, num_shards).placements
    for table in spec.tables:
        for shard in range(num_shards):
            found = loaded(snapshot, table.name, placements[table.name], shard)
            for name, values in contents[table.name].items():
                assert same_bits(found[name], part_of(values, placements[table.name], shard))
    table = data.draw(st.sampled_from(snapshot.tables))
    first = data.draw(st.integers(0, table.vocabulary_size))
    out = np.full((data.draw(st.integers(0, table.vocabulary_size - first)), table.dim), np.nan)
    out = out.astype(np.float32)
    slot = data.draw(st.sampled_from([None, *table.slot_names]))
    again = pickle.loads(pickle.dumps(table))  # as other processes get it
    again.read_rows(first, out, slot)
    wanted = contents[table.name][slot or "rows"]
    assert same_bits(out, wanted[first : first + len(out)])


@pytest.mark.parametrize("written_by", [2, "format 1"])
def test_a_table_of_many_pieces_comes_back(tmp_path: Path, written_by: int | str) -> None:
    """12 MB with its slot: several record batches per part, several pieces of a file."""
    table = TableConfig(400_001, 4, optimizer=OPTIMIZERS["site/ads"], combiner="sum", name="t")
    spec = resolve([FeatureConfig(table)])
    contents = random_contents(spec)
    if isinstance(written_by, int):
        write_snapshot(tmp_path, spec, contents, num_shards=written_by)
    else:
        write_old_snapshot(tmp_path, spec, contents)
    snapshot = open_snapshot(tmp_path)
    assert same(contents_of(snapshot), contents)
    placement = Layout.of(spec, 3).placements["t"]
    for shard in range(3):
        found = loaded(snapshot, "t", placement, shard)
        for name, values in contents["t"].items():
            assert same_bits(found[name], part_of(values, placement, shard))
    out = np.empty((250_000, 4), np.float32)
    snapshot.table("t").read_rows(99_999, out, "accumulators")
    assert same_bits(out, contents["t"]["accumulators"][99_999:349_999])


def test_fences_cursor_and_job_come_back(tmp_path: Path) -> None:
    cursor = {"epoch": 2, "batch": 17, "order": [3, 1, 2], "data": "день"}
    found = small(tmp_path, fences=[6, 7, 2**40], cursor=cursor, job="ads", num_shards=3)
    assert (found.fences, found.cursor, found.job) == ((6, 7, 2**40), cursor, "ads")
    assert (found.format_version, found.num_shards) == (2, 3)
    plain = small(tmp_path, step=7)
    assert (plain.fences, plain.cursor, plain.num_shards) == (None, None, 1)


def test_transforms_and_their_vocabularies_come_back_and_are_exported(tmp_path: Path) -> None:
    configs = fc.configs_from_columns(raw_columns())
    spec = resolve(dict(configs.feature_config))
    folder = write_snapshot(tmp_path, spec, random_contents(spec), transforms=configs.transforms)
    snapshot = open_snapshot(tmp_path, verify=True)
    exported = open_export(export_snapshot(snapshot, tmp_path / "export")).transforms
    for found in (snapshot.transforms, exported):
        assert found.keys() == configs.transforms.keys()
        for name, wanted in configs.transforms.items():
            assert found[name].to_json() == wanted.to_json()
            keys = found[name].vocabulary
            assert (keys is None) == (wanted.vocabulary is None)
            assert keys is None or keys.equals(wanted.vocabulary)
    (path, *_) = folder.glob("vocabulary.*")
    path.write_bytes(b"ARROW1\0\0" + path.read_bytes()[8:][::-1])
    with pytest.raises(SnapshotError, match=rf"{path}' does not hold a vocabulary: "):
        open_snapshot(tmp_path)


def test_arrow_reads_the_files_without_us(tmp_path: Path) -> None:
    folder = write(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    placements = Layout.of(SPEC, 2).placements
    for table in manifest["tables"]:
        arrays = CONTENTS[table["name"]]
        for part in table["parts"]:
            found = pa.ipc.open_file(str(folder / part["file"])).read_all()
            assert found.column_names == ["row", *table["slots"]]
            for column, values in zip(found.columns, arrays.values(), strict=True):
                seen = column.combine_chunks().values.to_numpy().reshape(-1, table["dim"])
                own = part_of(values, placements[table["name"]], part["shard"])
                assert same_bits(seen, own)
    dense = pa.ipc.open_file(str(folder / manifest["dense"]["file"])).read_all()
    assert dense["name"].to_pylist() == [v.name for v in VARIABLES]
    assert np.concatenate(dense["values"].to_pylist()).astype(np.float32).tolist() == [
        *DENSE.trainable.tolist(),
        *DENSE.state.tolist(),
    ]


def test_every_damaged_file_is_named_and_so_is_the_snapshot_before(tmp_path: Path) -> None:
    small(tmp_path, step=3, num_shards=2)
    folder = Path(small(tmp_path, num_shards=2).location)
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    assert len(files) == 5
    hint = rf"; '{tmp_path}' has other snapshots, of steps 3: .* '(.*step-000000003)'$"
    for path in files:
        data = path.read_bytes()
        for place in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
            changed = bytearray(data)
            changed[place] ^= 1
            path.write_bytes(changed)
            with pytest.raises(SnapshotError, match=rf"{path}' is damaged: xxh3 .*{hint}"):
                open_snapshot(folder, verify=True)
            if path.name.startswith("t."):
                damaged, shard = open_snapshot(folder), int(path.name[2])
                placement = Layout.of(small_spec(), 2).placements["t"]
                with pytest.raises(SnapshotError, match=f"{path}'"):
                    list(load_shard(damaged, "t", placement, shard))
            else:
                dense = open_snapshot(folder).dense
                assert dense is not None
                with pytest.raises(SnapshotError, match=f"{path}' is damaged"):
                    dense.values()
        path.write_bytes(data[:-1])
        with pytest.raises(
            SnapshotError, match=rf"{path}': {len(data) - 1} bytes, but the manifest says .*{hint}"
        ):
            open_snapshot(tmp_path)
        path.unlink()
        with pytest.raises(SnapshotError, match=rf"{path}': No such file.*{hint}") as e:
            open_snapshot(tmp_path)
        path.write_bytes(data)
        assert open_snapshot(str(e.value).rpartition("'")[0].rpartition("'")[2]).step == 3
    assert open_snapshot(tmp_path, verify=True).step == 6


def test_without_latest_the_message_says_what_is_there(tmp_path: Path) -> None:
    for step in (3, 4):
        small(tmp_path, step=step)
    (tmp_path / "LATEST").write_text("step-000000005\n")
    with pytest.raises(SnapshotError, match=r"names step-000000005, which has no .* steps 3, 4:"):
        open_snapshot(tmp_path)
    (tmp_path / "LATEST").write_bytes(b"\xff\xfe")
    with pytest.raises(SnapshotError, match=r"must hold a name like .* steps 3, 4:"):
        open_snapshot(tmp_path)
    (tmp_path / "LATEST").unlink()
    with pytest.raises(SnapshotError, match=r"neither LATEST nor .* steps 3, 4: "):
        open_snapshot(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", 3, r"format_version 3 is newer than this Manta knows \(2\); install a"),
        ("format_version", 0, "format_version must be from 1 to 2, got 0"),
        ("version", "v000001", "'version' must look like step-000000123"),
        ("step", None, "'step' must be of type int"),
        ("seed", "3", "'seed' must be of type int"),
        ("num_shards", 0, "'num_shards' must be at least 1, got 0"),
        ("num_shards", 3, "its parts are not those of 3 shards"),
        ("fences", ["1"], "'fences' must hold ints"),
        ("cursor", [], "'cursor' must be of type dict"),
        ("tables", [{}], "'vocabulary_size' must be of type int"),
        ("tables", [], "no table 't'"),
        ("tables.0.slab_rows", 3, "no placement has slab_rows=3"),
        ("tables.0.offset", 2, "no placement has slab_rows=1 and offset=2"),
        ("tables.0.slots", ["row"], "'slots' must hold names"),
        ("tables.0.slots", ["a", "a"], "'slots' must hold names"),
        ("tables.0.parts", [], "its parts are not those of 2 shards"),
        ("tables.0.parts.1.num_rows", 3, "its parts are not those of 2 shards"),
        ("tables.0.parts.1.file", "../x", "file '../x' is outside the version folder"),
        ("tables.0.parts.1.file", "\ud800", "is no name"),
        ("tables.0.parts.1.checksum", "md5:0", "'checksum' must begin with xxh3:"),
        ("features.0.max_sequence_length", -1, "max_sequence_length must be in"),
        ("dense", 5, "'dense' must be of type dict"),
        ("dense", {"model": {}}, "'variables' must be of type list"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line(
    tmp_path: Path, path: str, value: object, message: str
) -> None:
    file = Path(small(tmp_path, num_shards=2).location) / "manifest.json"
    manifest = place = json.loads(file.read_text())
    *parents, key = path.split(".")
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[key] = value
    file.write_text(json.dumps(manifest))
    with pytest.raises(SnapshotError, match=message) as e:
        open_snapshot(tmp_path)
    assert str(e.value).startswith(f"'{file}': ")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("first", [-1, 3])
def test_rows_outside_a_table_and_arrays_of_another_kind_are_refused(
    tmp_path: Path, first: int
) -> None:
    table = small(tmp_path).table("t")
    with pytest.raises(
        SnapshotError, match=rf"'t': rows \[{first}, {first + 2}\) are outside \[0, 4"
    ):
        table.read_rows(first, np.zeros((2, 2), np.float32))
    for out in (np.zeros((2, 3), np.float32), np.zeros((2, 2)), np.zeros(4, np.float32)):
        with pytest.raises(SnapshotError, match=r"must be float32 \[N, 2\], got float"):
            table.read_rows(0, out)


def test_latest_names_the_snapshot_written_last(tmp_path: Path) -> None:
    write(tmp_path, step=6)
    write(tmp_path, step=2_000_000_000)
    assert open_snapshot(tmp_path).version == "step-2000000000"
    write(tmp_path, step=7)
    assert open_snapshot(tmp_path).step == 7
    assert visible(tmp_path) == [
        "LATEST",
        "step-000000006",
        "step-000000007",
        "step-2000000000",
    ]


def test_an_export_of_a_snapshot_has_its_rows_and_its_dense_model(tmp_path: Path) -> None:
    snapshot = open_snapshot(write(tmp_path / "snapshots"))
    export = open_export(export_snapshot(snapshot, tmp_path / "export"), verify=True)
    assert (export.version, export.step, export.job) == ("v000001", 6, "test")
    assert export.features == {f.name: f for f in SPEC.features}
    for table in SPEC.tables:
        assert same_bits(export.tables[table.name].rows_VD, CONTENTS[table.name]["rows"])
        assert export.tables[table.name].combiner == "sum"
    assert export.dense_model == {"name": "mlp", "params": {"hidden": [8]}}
    assert list(export.dense_variables()) == ["kernel", "scale", "mean"]


def test_a_table_with_a_custom_combiner_is_kept_but_not_exported(tmp_path: Path) -> None:
    spec = small_spec(combiner=CustomCombiner("package.module:function", 3))
    snapshot = open_snapshot(write_snapshot(tmp_path, spec, random_contents(spec)))
    assert snapshot.table("t").combiner == "custom"
    with pytest.raises(ExportError, match="table 't': serving cannot run a custom combiner"):
        export_snapshot(snapshot, tmp_path / "export")


def test_what_is_no_snapshot_says_so(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"snapshot '.*nowhere': no such folder"):
        open_snapshot(tmp_path / "nowhere")
    with pytest.raises(SnapshotError, match="is no snapshot: it has neither LATEST"):
        open_snapshot(tmp_path)
    export_snapshot(small(tmp_path / "s"), tmp_path / "export")
    with pytest.raises(SnapshotError, match="must hold a name like step-000000123, got 'v000001'"):
        open_snapshot(tmp_path / "export")


def test_an_export_can_leave_out_the_dense_model(tmp_path: Path) -> None:
    export = open_export(export_snapshot(small(tmp_path / "s"), tmp_path / "e", dense=False))
    assert export.dense_model is None
    assert export.dense_variables() == {}
