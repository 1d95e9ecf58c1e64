"""`manta verify`: tables, slots and dense models that do not fit together are found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ps.config import SGD, Adagrad, AdagradMomentum, Adam, FeatureConfig, TableConfig
from ps.custom_optimizer import CustomOptimizer
from ps.disk import Disk
from ps.export_file import allocate, write_rows
from ps.folders import write_variables
from ps.partition import Layout
from ps.ragged import F32
from ps.spec import EmbeddingSpec, resolve
from ps.storage import Storage
from ps.table_parts import PartTarget, PartWriter
from ps.verify import verify
from tests.support.damage import (
    CONTENTS,
    KINDS,
    SHARDS,
    SPEC,
    all_kinds,
    copied,
    edit,
    entries_of,
    file_of,
    files_of,
    found,
    seal,
    sound_dense,
    table,
    write_version,
)
from tests.support.snapshots import (
    Contents,
    dense_values,
    every_optimizer_spec,
    random_contents,
    write_snapshot,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_version(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def version(sound: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of a sound version, to be damaged."""
    return copied(sound[getattr(request, "param", "snapshot")], tmp_path)


def old_array(folder: Path, file: str, rows: F32) -> None:
    """Another array in the place of one of format 1 or of an export, sealed."""
    path = folder / file
    write_rows(allocate(path, *rows.shape), 0, rows)
    seal(folder, path)


@pytest.mark.parametrize(
    ("version", "file"),
    [
        ("old", "tables/users/rows.arrow"),
        ("old", "tables/users/slots/velocities.arrow"),
        ("export", "tables/users.arrow"),
    ],
    indirect=["version"],
)
@pytest.mark.parametrize("shape", [(299, 8), (301, 8), (300, 7)])
def test_an_array_of_another_shape_is_found(
    version: Path, file: str, shape: tuple[int, int]
) -> None:
    old_array(version, file, np.zeros(shape, np.float32))
    (finding,) = found(version)
    assert finding.startswith(f"rows: {file}: ")
    assert "expected" in finding


@all_kinds
def test_a_file_of_something_else_is_found(version: Path) -> None:
    for start in ("users", "tables/users"):
        for path in [f for f in files_of(version) if start in str(f.relative_to(version))]:
            path.write_bytes(b"no Arrow file, sealed nevertheless" * 9)
            seal(version, path)
    findings = found(version)
    assert len(findings) == {"old": 3, "export": 1}.get(verify(version).kind, 3)
    assert all(finding.startswith("rows: ") for finding in findings)


def part(folder: Path, shard: int, spec: EmbeddingSpec, rows: int, name: str = "users") -> Path:
    """Another part in the place of one, sealed; its rows and slots are ones."""
    (entry,) = (
        e for e in entries_of(json.loads((folder / "manifest.json").read_text())["tables"])
        if e["file"].startswith(f"{name}.{shard}-of-")
    )  # fmt: skip
    target = PartTarget(str(folder), ".", "new", shard, SHARDS)
    writer = PartWriter(target, spec.table(name), Storage.at(folder, Disk()))
    ones = np.ones((rows, spec.table(name).dim), dtype=np.float32)
    writer.append(ones, dict.fromkeys(spec.table(name).optimizer.slot_names, ones))
    path = folder / entry["file"]
    (folder / writer.close().file).rename(path)
    seal(folder, path)
    return path


def users(**changes: Any) -> EmbeddingSpec:
    config = {"vocabulary_size": 300, "dim": 8, "optimizer": Adam(), "name": "users"} | changes
    return resolve({"user": FeatureConfig(TableConfig(**config))})


OWNED = [Layout.of(SPEC, SHARDS).placements["users"].num_local_rows(s) for s in range(SHARDS)]


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({}, -1, "rows, expected"),
        ({}, 4, "rows, expected"),
        ({"dim": 7}, 0, "columns"),
        ({"optimizer": Adagrad()}, 0, "columns"),
        ({"optimizer": SGD()}, 0, "columns"),
        ({"optimizer": AdagradMomentum()}, 0, "columns"),
    ],
)
def test_a_part_of_other_rows_or_slots_is_found(
    version: Path, changes: dict[str, Any], extra: int, message: str
) -> None:
    path = part(version, 1, users(**changes), OWNED[1] + extra)
    (finding,) = found(version)
    assert finding.startswith(f"rows: {path.name}: ")
    assert message in finding


def test_a_sealed_part_of_the_right_form_is_sound(version: Path) -> None:
    part(version, 1, users(), OWNED[1])
    assert found(version) == []


def test_parts_that_do_not_have_every_id_once_are_found(version: Path) -> None:
    keep = (version / "manifest.json").read_text()

    def lies(change: Callable[[dict[str, Any]], object]) -> list[str]:
        edit(version, lambda manifest: change(table(manifest, "users")))
        findings = found(version)
        (version / "manifest.json").write_text(keep)
        return findings

    where = "rows: table 'users': "
    (finding,) = lies(lambda t: t["parts"].pop())
    assert finding == where + "has parts of shards [0, 1], but 3 shards wrote it"
    (finding,) = lies(lambda t: t["parts"].append({**t["parts"][0], "file": "x"}))[1:]
    assert finding == where + "has parts of shards [0, 1, 2, 0], but 3 shards wrote it"
    (finding,) = lies(lambda t: t["parts"][2].update(num_rows=5))
    assert finding == where + f"has a part of 5 rows, but shard 2 owns {OWNED[2]}"
    assert len(lies(lambda t: t.update(vocabulary_size=200))) > 0
    (finding,) = lies(lambda t: t.update(slab_rows=3))
    assert finding.startswith("manifest: table 'users': no placement on 3 shards")
    (finding,) = lies(lambda t: t.update(offset=3))
    assert finding.startswith("manifest: table 'users': no placement on 3 shards")


@pytest.mark.parametrize("version", ["snapshot", "old"], indirect=True)
def test_a_table_without_one_of_its_slots_is_found(version: Path) -> None:
    edit(version, lambda manifest: table(manifest, "users")["slots"].pop())
    finding = found(version)[0]
    assert finding == (
        "slots: table 'users': Adam has slots ['momenta', 'velocities'], but ['momenta'] are here"
    )


@pytest.mark.parametrize("version", ["snapshot", "old"], indirect=True)
def test_slots_of_another_optimizer_are_found(version: Path) -> None:
    edit(version, lambda manifest: table(manifest, "users")["optimizer"].update(name="FTRL"))
    (finding,) = found(version)
    assert finding.startswith("slots: table 'users': FTRL has slots ['accumulators', 'linears']")
    edit(version, lambda manifest: table(manifest, "users")["optimizer"].update(name="Lion"))
    assert found(version) == ["manifest: table 'users': optimizer 'Lion' is not known"]


def with_values(name: str, array: str, *cells: tuple[int, int, float]) -> Contents:
    contents = {t: dict(arrays) for t, arrays in CONTENTS.items()}
    values = contents[name][array].copy()
    for row, column, value in cells:
        values[row, column] = value
    contents[name][array] = values
    return contents


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_are_found_and_may_be_allowed(kind: str, tmp_path: Path) -> None:
    cells = ((299, 0, np.nan), (41, 7, -np.inf), (41, 0, np.nan))
    path = write_version(kind, tmp_path, with_values("users", "rows", *cells))
    assert found(path) == ["values: table 'users', rows: 2 NaN and 1 infinite, the first in row 41"]
    assert found(path, allow_non_finite=True) == []
    (report,) = (t for t in verify(path, allow_non_finite=True).tables if t.name == "users")
    assert (report.nan["rows"], report.inf["rows"], report.num_findings) == (2, 1, 0)
    assert "3 NaN or infinite: sound" in report.line()


@pytest.mark.parametrize("kind", ["snapshot", "old"])
@pytest.mark.parametrize(("name", "slot"), [("users", "velocities"), ("site/ads", "accumulators")])
def test_slots_below_zero_that_cannot_be_are_found(
    kind: str, name: str, slot: str, tmp_path: Path
) -> None:
    path = write_version(kind, tmp_path, with_values(name, slot, (90, 1, -1e-30), (96, 0, -2.0)))
    (finding,) = found(path, allow_non_finite=True)
    assert finding == (
        f"values: table '{name}', {slot}: 2 below 0, which cannot be, the first in row 90"
    )


def test_slots_that_may_be_below_zero_are_sound(tmp_path: Path) -> None:
    for name, slot in (("users", "momenta"), ("site/ads", "linears")):
        contents = with_values(name, slot, (3, 0, -1.0))
        assert found(write_version("snapshot", tmp_path / slot, contents)) == []


def test_dense_values_that_cannot_be_are_found(tmp_path: Path) -> None:
    dense = sound_dense()
    dense.trainable[6], dense.state[0] = np.nan, np.inf
    dense.slots["velocities"][2] = -1.0
    dense.slots["momenta"][2] = -1.0
    assert found(write_version("snapshot", tmp_path, dense=dense)) == [
        "values: dense, scale: 1 NaN and 0 infinite, the first in element 0",
        "values: dense, mean: 0 NaN and 1 infinite, the first in element 0",
        "values: dense, velocities, kernel: 1 below 0, which cannot be, the first in element 2",
    ]


def test_without_a_dense_model_or_its_optimizer_it_is_sound(tmp_path: Path) -> None:
    for k, dense in enumerate((None, dense_values())):
        assert found(write_version("snapshot", tmp_path / str(k), dense=dense)) == []


def variables(folder: Path, start: str, **arrays: F32) -> None:
    path = file_of(folder, start)
    write_variables(str(path), arrays)
    seal(folder, path)


@pytest.mark.parametrize("version", ["snapshot", "old"], indirect=True)
def test_dense_variables_other_than_the_manifest_says_are_found(version: Path) -> None:
    scale, mean = np.zeros((), np.float32), np.zeros(3, np.float32)
    variables(version, "dense.", kernel=np.zeros((3, 2), np.float32), scale=scale, mean=mean)
    (finding,) = found(version)
    assert finding.startswith("dense: dense: holds ['kernel [3, 2]', 'scale []', 'mean [3]'], but")


@pytest.mark.parametrize("version", ["snapshot", "old"], indirect=True)
def test_dense_slots_of_other_shapes_are_found(version: Path) -> None:
    def change(manifest: dict[str, Any]) -> str:
        return str(manifest["dense"]["slots"][1]["file"])

    file = change(json.loads((version / "manifest.json").read_text()))
    variables(version, file, kernel=np.zeros((2, 3), np.float32))
    (finding,) = found(version)
    assert finding.startswith("dense: dense, velocities: holds ['kernel [2, 3]'], but")
    edit(version, lambda manifest: manifest["dense"]["slots"].pop())
    assert "slots: dense: " in found(version)[0]


@all_kinds
def test_dense_files_of_something_else_are_found(version: Path) -> None:
    path = file_of(version, "dense.")
    path.write_bytes(b"no Arrow file")
    seal(version, path)
    (finding,) = found(version)
    assert finding.startswith("dense: dense: ")


def test_a_vocabulary_of_something_else_is_found(version: Path) -> None:
    path = file_of(version, "vocabulary.")
    batch = pa.record_batch([pa.array([1, 2])], names=["other"])
    with pa.ipc.new_file(str(path), batch.schema) as out:
        out.write_batch(batch)
    seal(version, path)
    (finding,) = found(version)
    assert finding.startswith("manifest: manifest.json: ")
    assert "does not hold a vocabulary" in finding


def test_tables_larger_than_a_chunk_are_read_in_pieces(
    sound: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ps.verify_files.CHUNK_BYTES", 300)
    for kind in KINDS:
        assert found(sound[kind]) == []
    cells = ((299, 0, np.nan), (200, 7, np.inf))
    path = write_version("old", tmp_path, with_values("users", "rows", *cells))
    (finding,) = found(path)
    assert finding.endswith("1 NaN and 1 infinite, the first in row 200")


def custom(gradient: F32, table: F32, slots: Any, rate: Any, more: Any) -> Any:
    raise NotImplementedError


def test_a_custom_optimizer_has_the_slots_that_it_names(tmp_path: Path) -> None:
    optimizer = CustomOptimizer(custom, 0.1, ["a", "b"], [0.0, 1.0])
    spec = resolve({"f": FeatureConfig(TableConfig(9, 2, optimizer=optimizer, name="t"))})
    assert found(write_snapshot(tmp_path, spec, random_contents(spec))) == []


def test_every_optimizer_passes_on_any_number_of_shards(tmp_path: Path) -> None:
    spec = every_optimizer_spec()
    for shards in (1, 2, 5):
        path = write_snapshot(
            tmp_path / str(shards), spec, random_contents(spec), num_shards=shards
        )
        assert found(path) == []
