"""`manta verify`: what is sound passes, and every kind of damage is found and named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ps.commands import app
from ps.errors import StorageError
from ps.storage import Storage
from ps.verify import verify
from ps.version_files import BrokenVersionError
from tests.support.damage import (
    KINDS,
    SHARDS,
    all_kinds,
    copied,
    edit,
    entries_of,
    file_of,
    files_of,
    found,
    table,
    write_version,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_version(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def version(sound: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of a sound version, to be damaged."""
    return copied(sound[getattr(request, "param", "snapshot")], tmp_path)


@all_kinds
def test_what_is_sound_passes(version: Path) -> None:
    result = verify(version)
    assert [*map(str, result.findings)] == []
    assert (result.step, result.version) == (6, version.name)
    assert result.num_files == sum(path.is_file() for path in version.rglob("*"))
    assert result.size_bytes == sum(p.stat().st_size for p in version.rglob("*") if p.is_file())
    assert {t.name: (t.vocabulary_size, t.dim, t.num_findings) for t in result.tables} == {
        "users": (300, 8, 0),
        "site/ads": (97, 4, 0),
        "plain": (5, 2, 0),
    }
    first, *tables, last = result.lines()
    assert str(version) in first
    assert [line.split(":")[0] for line in tables] == [f"table '{t.name}'" for t in result.tables]
    assert last == "ok"


def test_latest_of_a_root_is_followed(tmp_path: Path) -> None:
    write_version("snapshot", tmp_path)
    path = write_version("snapshot", tmp_path, step=7, fences=[7, 7])
    assert verify(tmp_path).location == str(path)
    assert found(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_any_flipped_byte_of_any_file_is_found(
    kind: str, sound: dict[str, Path], tmp_path: Path
) -> None:
    version = copied(sound[kind], tmp_path)
    for path in files_of(version):
        data = path.read_bytes()
        for place in (0, len(data) // 2, len(data) - 1):
            damaged = bytearray(data)
            damaged[place] ^= 0x10
            path.write_bytes(damaged)
            (finding,) = found(version)
            assert finding.startswith(f"checksum: {path.relative_to(version)}: is ")
        path.write_bytes(data)
    assert found(version) == []


@all_kinds
def test_every_missing_or_shortened_file_is_found(version: Path) -> None:
    for path in files_of(version):
        name, data = path.relative_to(version), path.read_bytes()
        path.write_bytes(data[:-1])
        (finding,) = found(version)
        assert finding.startswith(f"file: {name}: has {len(data) - 1} bytes, but the manifest")
        path.unlink()
        assert found(version) == [f"file: {name}: is missing"]
        path.mkdir()
        (finding,) = found(version)
        assert finding.startswith(f"file: {name}: ")
        path.rmdir()
        path.write_bytes(data)


@all_kinds
def test_files_that_the_system_does_not_let_us_read_are_found(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Storage, path: str) -> Any:
        raise StorageError(f"cannot read '{path}': Permission denied")

    monkeypatch.setattr("ps.local_storage.LocalStorage.stream", refuse)
    files = [str(path.relative_to(version)) for path in files_of(version)]
    wanted = [f"file: {file}: cannot read '{file}': Permission denied" for file in files]
    assert sorted(found(version)) == sorted(wanted)


def test_a_file_that_shrinks_while_it_is_read_is_found(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_of(version, "dense.")

    def before(self: Storage, file: str) -> int:
        return path.stat().st_size + 1 if file == path.name else real(self, file)

    real = type(Storage.at(version)).size
    edit(version, lambda manifest: manifest["dense"].update(size_bytes=path.stat().st_size + 1))
    monkeypatch.setattr(type(Storage.at(version)), "size", before)
    (finding,) = found(version)
    assert finding.endswith("became shorter while it was read")


def test_one_damaged_file_hides_nothing_of_the_others(version: Path) -> None:
    for path in files_of(version):
        path.unlink()
    result = verify(version)
    assert len(result.findings) == len(files_of(version))
    assert [t.num_findings for t in result.tables] == [SHARDS] * 3
    assert [*result.lines()][-1] == f"{len(result.findings)} findings"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a\0b"])
def test_no_file_outside_the_folder_is_read(version: Path, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        table(manifest, "plain")["parts"][1]["file"] = name

    edit(version, change)
    (finding,) = found(version)
    assert finding.startswith(f"file: {name}: ")
    assert "no path below" in finding


@all_kinds
@pytest.mark.parametrize("key", ["size_bytes", "checksum"])
def test_a_file_without_size_or_checksum_is_found(version: Path, key: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        entry = entries_of(manifest["tables"])[0]
        del entry["sha256" if key == "checksum" and "sha256" in entry else key]

    edit(version, change)
    (finding,) = found(version)
    assert finding.startswith("manifest: ")
    assert "has no size or no checksum that is known here" in finding


def test_a_file_that_is_listed_twice_is_found(version: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        parts = table(manifest, "plain")["parts"]
        parts[1] |= {key: parts[0][key] for key in ("file", "size_bytes", "checksum")}

    edit(version, change)
    assert [finding.rpartition(": ")[2] for finding in found(version)] == ["is listed twice"]


@pytest.mark.parametrize(
    ("fences", "cursor", "message"),
    [
        ([6, 7], {"ranks": 2}, "are [6, 7] at step 6"),
        ([5, 6], {"ranks": 2}, "are [5, 6] at step 6"),
        ([7, 7], {"ranks": 2}, "are [7, 7] at step 6"),
        ([6.0, 6], {"ranks": 2}, "are [6.0, 6] at step 6"),
        ([6], {"ranks": 2}, "are those of 1 ranks, but the cursor is of 2"),
        ([5, 6], {"ranks": 2, "mode": "async"}, "are [5, 6] at step 6"),
    ],
)
def test_fences_that_cannot_be_are_found(
    tmp_path: Path, fences: list[int], cursor: dict[str, Any], message: str
) -> None:
    path = write_version("snapshot", tmp_path, cursor=cursor)
    edit(path, lambda manifest: manifest.update(fences=fences))
    assert found(path) == [f"fences: manifest.json: {message}"]


def test_fences_that_are_none_are_found(version: Path) -> None:
    edit(version, lambda manifest: manifest.update(fences=6))
    assert found(version) == ["manifest: manifest.json: 'fences' must be of type list, got 6"]


@pytest.mark.parametrize(
    ("fences", "cursor"),
    [([6, 9], {"ranks": 2, "mode": "async"}), (None, None), ([6], {}), (None, {"ranks": 2})],
)
def test_fences_that_can_be_are_sound(tmp_path: Path, fences: Any, cursor: Any) -> None:
    assert found(write_version("snapshot", tmp_path, fences=fences, cursor=cursor)) == []


@all_kinds
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", "2", "'format_version' must be of type int"),
        ("format_version", 0, "is of format 0, which never was"),
        ("step", "6", "'step' must be of type int"),
        ("job", 3, "'job' must be of type str"),
        ("created", None, "'created' must be of type str"),
        ("tables", {}, "'tables' must be of type list"),
        ("features", None, "'features' must be of type list"),
        ("dense", 5, "'dense' must be of type dict"),
        ("tables.0.name", 7, "'name' must be of type str"),
        ("tables.0.vocabulary_size", 0, "must be at least [1, 1], got [0, "),
        ("tables.0.dim", None, "'dim' must be of type int"),
        ("tables.0.combiner", None, "'combiner' must be of type str"),
        ("features.0.table", "nowhere", "no table 'nowhere'"),
        ("features.0.max_sequence_length", -1, "max_sequence_length must be in"),
        ("dense.model", None, "'model' must be of type dict"),
    ],
)
def test_a_manifest_of_wrong_fields_is_found(
    version: Path, key: str, value: object, message: str
) -> None:
    *parents, last = key.split(".")

    def change(place: Any) -> None:
        for parent in parents:
            place = place[int(parent) if parent.isdigit() else parent]
        place[last] = value

    edit(version, change)
    findings = found(version)
    assert findings[0].startswith("manifest: ")
    assert message in findings[0]


@pytest.mark.parametrize(
    "key",
    ["seed", "num_shards", "tables.0.optimizer", "tables.0.optimizer.name", "tables.0.slots",
     "tables.0.parts", "tables.0.slab_rows", "tables.0.offset", "tables.0.parts.0.num_rows",
     "tables.0.parts.0.file", "dense.slots", "dense.variables", "dense.variables.0.shape"],
)  # fmt: skip
def test_a_snapshot_without_a_field_is_found(version: Path, key: str) -> None:
    *parents, last = key.split(".")

    def change(place: Any) -> None:
        for parent in parents:
            place = place[int(parent) if parent.isdigit() else parent]
        del place[last]

    edit(version, change)
    findings = found(version)
    assert any(f.startswith("manifest: ") and f"'{last}'" in f for f in findings)


@pytest.mark.parametrize("version", ["old"], indirect=True)
@pytest.mark.parametrize("key", ["rows", "slots"])
def test_an_old_table_without_its_files_is_found(version: Path, key: str) -> None:
    edit(version, lambda manifest: table(manifest, "users").pop(key))
    findings = found(version)
    assert findings[0].startswith("manifest: table 'users'")


def test_a_table_that_is_listed_twice_is_found(version: Path) -> None:
    edit(version, lambda manifest: manifest["tables"].append(table(manifest, "plain")))
    assert "manifest: table 'plain': is listed twice" in found(version)


def test_a_step_that_is_not_that_of_the_folder_is_found(tmp_path: Path) -> None:
    path = write_version("snapshot", tmp_path)
    edit(path, lambda manifest: manifest.update(step=7, fences=[7, 7]))
    message = "manifest: manifest.json: is of step 7, but lies in step-000000006"
    assert found(tmp_path) == [message]
    edit(path, lambda manifest: manifest.update(version="step-000000007"))
    of_version = "is of version 'step-000000007', but lies in step-000000006"
    assert found(tmp_path) == [f"manifest: manifest.json: {of_version}", message]


@pytest.mark.parametrize("kind", KINDS)
def test_a_latest_that_names_no_whole_version_is_found(kind: str, tmp_path: Path) -> None:
    root = write_version(kind, tmp_path).parent
    name = (root / "LATEST").read_text().strip()
    (root / name / "manifest.json").rename(root / name / "kept.json")
    assert found(root) == [f"latest: LATEST: names {name}, which has no manifest.json"]
    assert verify(root).kind == ("export" if kind == "export" else "snapshot")
    (root / "LATEST").write_text("newest")
    (finding,) = found(root)
    assert finding.startswith("latest: LATEST: must hold a name like step-000000123 or v000001")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 5000, '{"version": "x"}', "\x00"])
def test_a_manifest_that_is_none_is_found(version: Path, text: str) -> None:
    (version / "manifest.json").write_text(text)
    (finding,) = found(version)
    assert finding.startswith("manifest: manifest.json: ")


def test_what_cannot_be_checked_is_an_error(version: Path, tmp_path: Path) -> None:
    edit(version, lambda manifest: manifest.update(format_version=3))
    with pytest.raises(StorageError, match="format_version 3 is newer than this Manta knows"):
        verify(version)
    for path in (tmp_path, tmp_path / "nowhere", version / "dense.arrow"):
        with pytest.raises(StorageError, match=str(path)):
            verify(path)


def test_a_root_without_latest_names_a_version_that_is_there(version: Path) -> None:
    with pytest.raises(StorageError, match=f"it has {version.name}, give that folder"):
        verify(version.parent)


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(app, ["verify", *map(str, args)], catch_exceptions=False)


def test_exit_codes_are_for_scripts(version: Path, tmp_path: Path) -> None:
    result = run(version)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "ok")
    file_of(version, "plain").unlink()
    result = run(version)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (1, "1 finding")
    for wrong in ((tmp_path / "nowhere",), ("s3://",), (), (version, "--no-such-option")):
        result = run(*wrong)
        assert result.exit_code == 2
        assert result.stdout == ""


def test_json_is_one_document_with_every_finding(version: Path) -> None:
    document = json.loads(run(version, "--json").stdout)
    assert (document["ok"], document["findings"]) == (True, [])
    assert document["tables"][0]["nan"]["rows"] == 0
    file_of(version, "plain").unlink()
    result = run(version, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["ok"] is False
    (finding,) = document["findings"]
    assert (finding["check"], finding["message"]) == ("file", "is missing")


def test_errors_cross_processes() -> None:
    error = BrokenVersionError("snapshot", "/x", "step-000000001", "latest", "LATEST", "names it")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.check) == (str(error), "latest")
