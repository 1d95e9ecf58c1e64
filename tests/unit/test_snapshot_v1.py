"""Snapshots in format 1, whole arrays in files of rows, open and load as they always did."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ps.errors import SnapshotError, StorageError
from ps.export import open_export
from ps.export_file import RowFile, allocate, open_rows, read_rows, write_rows
from ps.partition import Layout
from ps.snapshot import export_snapshot, load_shard, open_snapshot
from tests.support.old_snapshots import write_old_snapshot
from tests.support.reference import same_bits
from tests.support.snapshots import (
    VARIABLES,
    contents_of,
    dense_values,
    every_optimizer_spec,
    random_contents,
    small_spec,
)

SPEC = every_optimizer_spec()
CONTENTS = random_contents(SPEC)
DENSE = dense_values("momenta", "velocities")
SMALL = small_spec()


def test_everything_reads_back_and_is_exported(tmp_path: Path) -> None:
    folder = write_old_snapshot(tmp_path / "s", SPEC, CONTENTS, dense=DENSE)
    snapshot = open_snapshot(tmp_path / "s", verify=True)
    assert snapshot.location == str(folder)
    assert (snapshot.format_version, snapshot.num_shards) == (1, 1)
    assert (snapshot.step, snapshot.seed, snapshot.job) == (6, 3, "test")
    assert (snapshot.fences, snapshot.cursor) == (None, None)
    assert snapshot.features == SPEC.features
    found = contents_of(snapshot)
    for table, arrays in CONTENTS.items():
        assert found[table].keys() == arrays.keys()
        assert all(same_bits(found[table][name], values) for name, values in arrays.items())
        assert not any(values.flags.writeable for values in found[table].values())
    assert snapshot.dense is not None
    assert snapshot.dense.variables == VARIABLES
    values = snapshot.dense.values()
    assert same_bits(values.trainable, DENSE.trainable)
    assert same_bits(values.state, DENSE.state)
    assert all(same_bits(values.slots[name], DENSE.slots[name]) for name in DENSE.slots)
    export = open_export(export_snapshot(snapshot, tmp_path / "export"), verify=True)
    for table, arrays in CONTENTS.items():
        assert same_bits(export.tables[table].rows_VD, arrays["rows"])


@pytest.mark.parametrize("file", ["tables/t/rows.arrow", "tables/t/slots/linears.arrow",
                                  "dense.arrow", "dense_slots/momenta.arrow"])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    path = write_old_snapshot(tmp_path, SMALL, random_contents(SMALL), dense=DENSE) / file
    data = path.read_bytes()
    placement = Layout.of(SMALL, 2).placements["t"]
    for place in (len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(SnapshotError, match=rf"{path}' is damaged: sha256"):
            open_snapshot(tmp_path, verify=True)
    path.write_bytes(data)
    changed = bytearray(data)
    changed[open_rows(path, 4, 2).data_offset if "tables" in file else len(data) // 2] ^= 1
    path.write_bytes(changed)  # what Arrow does not see
    damaged = open_snapshot(tmp_path)
    if file.startswith("tables"):
        for shard in range(2):
            with pytest.raises(SnapshotError, match=rf"{path}' is damaged: sha256"):
                list(load_shard(damaged, "t", placement, shard))
        os.truncate(path, 300)
        with pytest.raises(SnapshotError, match=rf"{path}' ends within its rows"):
            list(load_shard(damaged, "t", placement, 0))
    else:
        assert damaged.dense is not None
        with pytest.raises(SnapshotError, match=rf"{path}' is damaged: sha256"):
            damaged.dense.values()
    path.write_bytes(data[:-1])
    with pytest.raises(SnapshotError, match=rf"{path}': {len(data) - 1} bytes, but the manifest"):
        open_snapshot(tmp_path)
    path.unlink()
    with pytest.raises(SnapshotError, match=rf"{path}': No such file"):
        open_snapshot(tmp_path)


def test_a_wrong_manifest_is_refused(tmp_path: Path) -> None:
    path = write_old_snapshot(tmp_path, SMALL, random_contents(SMALL)) / "manifest.json"
    good = json.loads(path.read_text())
    for key, value, message in (
        ("rows", {"file": "/etc/passwd", "size_bytes": 1, "sha256": ""}, "outside the version"),
        ("rows", {"file": "x", "size_bytes": 1, "checksum": "xxh3:"}, "'sha256' must be of type"),
        ("slots", [{}], "'name' must be of type str"),
        ("vocabulary_size", 5, "4 rows, expected 5"),
    ):
        path.write_text(json.dumps(good | {"tables": [good["tables"][0] | {key: value}]}))
        with pytest.raises(SnapshotError, match=message):
            open_snapshot(tmp_path)


def test_rows_beyond_two_to_the_31_are_found(tmp_path: Path) -> None:
    """A sparse file: 2³¹ + 9 rows of one column, 8 GiB, of which a few blocks exist."""
    num_rows = 2**31 + 9
    file = RowFile(str(tmp_path / "rows"), 200, num_rows, 1)
    with open(file.path, "wb") as out:
        out.truncate(file.data_offset + 4 * num_rows)
    rows = np.arange(1.0, 8.0, dtype=np.float32)[:, None]
    for first in (2**31 - 3, num_rows - 7):
        write_rows(file, first, rows)
        found = np.zeros_like(rows)
        read_rows(file, first, found)
        assert same_bits(found, rows)
    assert os.stat(file.path).st_blocks * 512 < 1 << 20
    with pytest.raises(StorageError, match=rf"are outside \[0, {num_rows}\)"):
        read_rows(file, num_rows - 1, rows.copy())


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    file = allocate(tmp_path / "rows.arrow", 5, 2)
    assert open_rows(tmp_path / "rows.arrow", 5, 2) == file
    os.truncate(file.path, file.data_offset + 12)
    with pytest.raises(StorageError, match=r"rows\.arrow' ends at byte"):
        read_rows(file, 0, np.zeros((5, 2), np.float32))
    os.unlink(file.path)
    with pytest.raises(StorageError, match=r"rows\.arrow' cannot be read: No such file"):
        read_rows(file, 0, np.zeros((5, 2), np.float32))
