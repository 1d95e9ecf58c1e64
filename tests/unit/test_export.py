"""The export format: what is written is what is mapped, and nothing half-written is ever seen."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import ps.export
from ps.columns import Transform, categorical_column_with_vocabulary_list
from ps.config import FeatureConfig, TableConfig
from ps.errors import ExportError, StorageError
from ps.export import Export, ExportWriter, RowFile, open_export, write_rows
from ps.export_file import map_rows
from ps.spec import resolve
from tests.support.exports import ROWS_VD, small_export, small_features, small_spec, write_export

TABLES = ("sum", "mean", "sqrtn")


def write_small(root: Path) -> Path:
    return write_export(root, small_features(), dict.fromkeys(TABLES, ROWS_VD))


def edit_manifest(folder: Path, changes: Mapping[str, Any]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(changes)))


def visible(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_rows_read_back_are_the_rows_written(tmp_path: Path) -> None:
    rows_VD = np.random.default_rng(0).normal(size=(1000, 7)).astype(np.float32)
    features = {"ad": FeatureConfig(TableConfig(1000, 7, name="ads"))}
    write_export(tmp_path, features, {"ads": rows_VD})
    mapped = open_export(tmp_path).tables["ads"].rows_VD
    np.testing.assert_array_equal(mapped, rows_VD)
    assert mapped.dtype == np.float32
    assert not mapped.flags.writeable


def test_a_table_of_several_megabytes_is_allocated_as_a_hole(tmp_path: Path) -> None:
    spec = resolve({"ad": FeatureConfig(TableConfig(300_001, 3, name="ads"))})
    rows = np.ones((2, 3), dtype=np.float32)
    with ExportWriter(tmp_path, spec, step=0, job="j") as writer:
        write_rows(writer.row_file("ads"), 299_999, rows)
        writer.commit()
    mapped = open_export(tmp_path, verify=True).tables["ads"].rows_VD
    assert not mapped[:299_999].any()
    np.testing.assert_array_equal(mapped[299_999:], rows)


def test_shards_write_their_rows_in_parallel_from_a_pickled_row_file(tmp_path: Path) -> None:
    rows_VD = np.random.default_rng(1).normal(size=(4096, 5)).astype(np.float32)
    spec = resolve({"ad": FeatureConfig(TableConfig(4096, 5, name="ads"))})
    with ExportWriter(tmp_path, spec, step=0, job="j") as writer:
        sent = pickle.dumps(writer.row_file("ads"))

        def shard(first: int) -> None:
            write_rows(pickle.loads(sent), first, rows_VD[first : first + 64])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(shard, range(0, 4096, 64)))
        writer.commit()
    np.testing.assert_array_equal(open_export(tmp_path).tables["ads"].rows_VD, rows_VD)


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))
    assert small_export(tmp_path).tables["sum"].rows_VD.tolist() == ROWS_VD.tolist()


def test_a_table_file_is_one_arrow_column_that_others_can_read(tmp_path: Path) -> None:
    table = pa.ipc.open_file(write_small(tmp_path) / "tables" / "sum.arrow").read_all()
    assert table.schema == pa.schema([("row", pa.list_(pa.float32(), 2))])
    assert table["row"].num_chunks == 1
    assert table["row"].to_pylist() == ROWS_VD.tolist()


@pytest.mark.parametrize("name", ["site/ads", "..", "../../up", "a b%c", "größe", ".hidden"])
def test_any_table_name_makes_a_file_inside_the_version(tmp_path: Path, name: str) -> None:
    features = {"f": FeatureConfig(TableConfig(5, 2, name=name))}
    version = write_export(tmp_path, features, {name: ROWS_VD})
    assert len(list((version / "tables").iterdir())) == 1
    np.testing.assert_array_equal(open_export(tmp_path).tables[name].rows_VD, ROWS_VD)


def test_the_export_knows_tables_features_and_step(tmp_path: Path) -> None:
    export = small_export(tmp_path)
    assert (export.version, export.step, export.job) == ("v000001", 7, "test")
    assert export.path == tmp_path / "v000001"
    assert export.created.endswith("+00:00")
    assert export.features == {f.name: f for f in small_spec().features}
    table = export.tables["mean"]
    assert (table.vocabulary_size, table.dim, table.combiner) == (5, 2, "mean")
    assert table.size_bytes == (export.path / table.file).stat().st_size


def test_an_output_shape_survives_the_manifest(tmp_path: Path) -> None:
    table = TableConfig(5, 2, name="t")
    features = {"f": FeatureConfig(table, output_shape=[3, None]), "g": FeatureConfig(table)}
    write_export(tmp_path, features, {"t": ROWS_VD})
    export = open_export(tmp_path)
    assert export.features["f"].output_shape == (3, None)
    assert export.features["g"].output_shape is None


def test_dense_variables_keep_names_shapes_and_bits(tmp_path: Path) -> None:
    variables = {
        "kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scale": np.array(1.5, dtype=np.float32),
        "none": np.zeros((0, 4), dtype=np.float32),
    }
    spec = resolve({"f": FeatureConfig(TableConfig(5, 2, name="t"))})
    with ExportWriter(tmp_path, spec, step=0, job="j") as writer:
        writer.row_file("t")
        writer.add_dense(variables, {"name": "mlp", "layers": [8, 1]})
        writer.commit()
    export = open_export(tmp_path, verify=True)
    assert export.dense_model == {"name": "mlp", "layers": [8, 1]}
    found = export.dense_variables()
    assert list(found) == list(variables)
    for name, value in variables.items():
        np.testing.assert_array_equal(found[name], value, strict=True)


def test_without_a_dense_model_there_are_no_dense_variables(tmp_path: Path) -> None:
    export = small_export(tmp_path)
    assert export.dense_model is None
    assert export.dense_variables() == {}


def test_versions_count_up_and_latest_names_the_newest(tmp_path: Path) -> None:
    write_small(tmp_path)
    (tmp_path / "v000041").mkdir()
    assert write_small(tmp_path).name == "v000042"
    assert (tmp_path / "LATEST").read_text() == "v000042\n"
    assert open_export(tmp_path).version == "v000042"
    assert open_export(tmp_path / "v000001").version == "v000001"


def test_a_number_taken_by_another_writer_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target.name == "v000001":
            target.mkdir()
            (target / "theirs").touch()
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert write_small(tmp_path).name == "v000002"
    assert open_export(tmp_path).version == "v000002"


def test_a_relative_root_gives_shards_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ExportWriter(Path("out"), small_spec(), step=0, job="j") as writer:
        assert Path(writer.row_file("sum").path).is_absolute()


def test_an_exception_leaves_no_version_and_no_temporary_folder(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ExportWriter(tmp_path, small_spec(), step=9, job="j") as writer:
            write_rows(writer.row_file("sum"), 0, ROWS_VD)
            raise KeyboardInterrupt

    write_small(tmp_path)
    before = visible(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert visible(tmp_path) == before
    assert open_export(tmp_path).step == 7


def test_leaving_without_commit_publishes_nothing(tmp_path: Path) -> None:
    with ExportWriter(tmp_path, small_spec(), step=9, job="j") as writer:
        writer.row_file("sum")
    assert visible(tmp_path) == []


def write_failing_at(root: Path, patch: pytest.MonkeyPatch, call: str, k: int) -> str | None:
    """Write with the k-th `os.<call>` failing; returns the error's text, None if there was none."""
    real = getattr(os, call)
    counter = itertools.count(1)

    def fail(*args: Any, **options: Any) -> Any:
        if next(counter) == k:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **options)

    patch.setattr(os, call, fail)
    try:
        write_small(root)
    except StorageError as e:
        return str(e)
    finally:
        patch.undo()
    return None


@pytest.mark.parametrize("call", ["fsync", "pwrite", "open", "posix_fallocate"])
def test_a_disk_that_fails_at_any_call_leaves_the_old_or_the_new_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_small(tmp_path)
    for k in range(1, 100):
        error = write_failing_at(tmp_path, monkeypatch, call, k)
        assert not [p for p in visible(tmp_path) if p.startswith(".")]
        assert open_export(tmp_path, verify=True).tables["sum"].rows_VD[4, 1] == 10
        if error is None:
            break
        assert "No space left on device" in error
    assert k > 3


def test_a_commit_needs_every_table(tmp_path: Path) -> None:
    with ExportWriter(tmp_path, small_spec(), step=0, job="j") as writer:
        writer.row_file("sum")
        with pytest.raises(ExportError, match=r"no rows were written for \['mean', 'sqrtn'\]"):
            writer.commit()


def test_an_unknown_table_is_refused_by_name(tmp_path: Path) -> None:
    with (
        ExportWriter(tmp_path, small_spec(), step=0, job="j") as writer,
        pytest.raises(ExportError, match="no table 'max'"),
    ):
        writer.row_file("max")


@pytest.mark.parametrize(
    ("first", "rows", "message"),
    [
        (-1, np.zeros((1, 2), np.float32), r"rows \[-1, 0\) are outside \[0, 5\)"),
        (4, np.zeros((2, 2), np.float32), r"rows \[4, 6\) are outside \[0, 5\)"),
        (0, np.zeros((1, 2), np.float64), "got float64"),
        (0, np.zeros((1, 3), np.float32), r"float32 \[N, 2\], got float32 \[1, 3\]"),
        (0, np.zeros(2, np.float32), r"got float32 \[2\]"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    tmp_path: Path, first: int, rows: Any, message: str
) -> None:
    path = tmp_path / "t.arrow"
    path.write_bytes(b"\0" * 40)
    with pytest.raises(StorageError, match=message):
        write_rows(RowFile(str(path), 0, 5, 2), first, rows)
    assert path.read_bytes() == b"\0" * 40


def test_dense_variables_must_be_float32(tmp_path: Path) -> None:
    with (
        ExportWriter(tmp_path, small_spec(), step=0, job="j") as writer,
        pytest.raises(ExportError, match="dense 'w': must be float32, got float64"),
    ):
        writer.add_dense({"w": np.zeros(3)}, {})  # type: ignore[dict-item]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"nowhere': no such folder"):
        open_export(tmp_path / "nowhere")


def test_a_folder_that_is_no_export_says_so(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"neither LATEST nor manifest\.json"):
        open_export(tmp_path)


@pytest.mark.parametrize(
    ("latest", "message"),
    [
        ("v000009\n", r"names v000009, which has no manifest\.json"),
        ("../../etc", "must hold a name like v000001"),
        ("", "must hold a name like v000001"),
    ],
)
def test_a_wrong_pointer_is_refused(tmp_path: Path, latest: str, message: str) -> None:
    write_small(tmp_path)
    (tmp_path / "LATEST").write_text(latest)
    with pytest.raises(ExportError, match=message):
        open_export(tmp_path)


def test_a_truncated_table_is_named_with_both_sizes(tmp_path: Path) -> None:
    path = write_small(tmp_path) / "tables" / "mean.arrow"
    size = path.stat().st_size
    os.truncate(path, size - 8)
    with pytest.raises(
        ExportError, match=rf"mean\.arrow': {size - 8} bytes, but the manifest says {size}"
    ):
        open_export(tmp_path)


def test_a_missing_table_file_is_named(tmp_path: Path) -> None:
    (write_small(tmp_path) / "tables" / "mean.arrow").unlink()
    with pytest.raises(ExportError, match=r"mean\.arrow': No such file"):
        open_export(tmp_path)


def test_a_flipped_bit_shows_with_verify_only(tmp_path: Path) -> None:
    path = write_small(tmp_path) / "tables" / "mean.arrow"
    data = bytearray(path.read_bytes())
    place = data.index(np.float32(10).tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    open_export(tmp_path)
    with pytest.raises(ExportError, match=r"mean\.arrow' is damaged: sha256"):
        open_export(tmp_path, verify=True)


def replace_table(version: Path, data: bytes) -> None:
    (version / "tables" / "mean.arrow").write_bytes(data)
    manifest = json.loads((version / "manifest.json").read_text())
    for table in manifest["tables"]:
        if table["name"] == "mean":
            table["size_bytes"] = len(data)
    edit_manifest(version, manifest)


def arrow_bytes(column: Any, *, chunks: int = 1) -> bytes:
    sink = pa.BufferOutputStream()
    batch = pa.record_batch([column], names=["row"])
    with pa.ipc.new_file(sink, batch.schema) as out:
        for _ in range(chunks):
            out.write_batch(batch)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not an Arrow file"),
        (b"not arrow at all" * 9, "is not an Arrow file"),
        (arrow_bytes(pa.array([1.0])), "expected columns .*fixed_size_list"),
        (arrow_bytes(pa.array([[0.0] * 3] * 5, pa.list_(pa.float32(), 3))), "expected columns"),
        (arrow_bytes(pa.array([[0.0] * 2] * 5, pa.list_(pa.float32(), 2)), chunks=2), "2 record"),
        (arrow_bytes(pa.array([[0.0] * 2] * 4, pa.list_(pa.float32(), 2))), "4 rows, expected 5"),
        (arrow_bytes(pa.array([[0, 0]] * 4 + [None], pa.list_(pa.float32(), 2))), "without nulls"),
    ],
)
def test_a_table_file_of_another_form_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    replace_table(write_small(tmp_path), data)
    with pytest.raises(ExportError, match=message) as e:
        open_export(tmp_path)
    assert "mean.arrow" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2 is newer than this Manta knows"),
        ({"format_version": 0}, "format_version must be 1, got 0"),
        ({"format_version": "1"}, "'format_version' must be of type int, got '1'"),
        ({"version": "x\ny"}, "'version' must look like v000001"),
        ({"step": None}, "'step' must be of type int"),
        ({"tables": {}}, "'tables' must be of type list"),
        ({"tables": []}, "no table 'mean'"),
        ({"tables": [3]}, "'file' must be of type str"),
        ({"features": [{"name": "f"}]}, "'table' must be of type str"),
        ({"dense": {"model": {}}}, "'file' must be of type str"),
        ({"dense": {"model": {}, "file": "d"}}, "'size_bytes' must be of type int"),
        (
            {"dense": {"file": "../x", "size_bytes": 1, "sha256": "", "model": {}}},
            r"file '\.\./x' is outside the version folder",
        ),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    version = write_small(tmp_path)
    edit_manifest(version, changes)
    with pytest.raises(ExportError, match=message) as e:
        open_export(tmp_path)
    assert "\n" not in str(e.value)


def test_a_manifest_that_is_not_json_is_named(tmp_path: Path) -> None:
    (write_small(tmp_path) / "manifest.json").write_text("{")
    with pytest.raises(ExportError, match=r"manifest\.json' cannot be read"):
        open_export(tmp_path)


def test_mapped_rows_outlive_the_folder(tmp_path: Path) -> None:
    export: Export = small_export(tmp_path)
    for path in (export.path / "tables").iterdir():
        path.unlink()
    assert export.tables["sum"].rows_VD.sum() == 55


def test_any_flipped_byte_gives_rows_or_an_error_but_never_a_crash(tmp_path: Path) -> None:
    """Arrow maps what a damaged file claims; unchecked, that reads past the mapping."""
    whole = (write_small(tmp_path) / "tables" / "mean.arrow").read_bytes()
    path = tmp_path / "flipped.arrow"
    for place in range(len(whole)):
        path.unlink(missing_ok=True)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            rows_VD = map_rows(path, 5, 2)
        except StorageError:
            continue
        assert rows_VD.shape == (5, 2)
        rows_VD.sum()


def test_latest_names_the_highest_version_when_writers_overtake_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, rows = {"f": FeatureConfig(TableConfig(3, 2, name="t"))}, np.ones((3, 2), np.float32)
    set_latest = ps.export.set_latest

    def overtaken(root: Path, version: str) -> None:
        if version == "v000001":  # another writer publishes v000002 just before
            monkeypatch.setattr(ps.export, "set_latest", set_latest)
            write_export(tmp_path, features, {"t": rows}, step=2)
        set_latest(root, version)

    monkeypatch.setattr(ps.export, "set_latest", overtaken)
    write_export(tmp_path, features, {"t": rows}, step=1)
    assert open_export(tmp_path).version == "v000002"


def test_a_manifest_nested_without_end_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ExportError, match="cannot be read"):
        open_export(tmp_path)


@pytest.mark.parametrize("file", ["dense.arrow", "vocabularies/*.arrow"])
def test_damaged_arrow_files_are_errors_or_read_but_never_a_crash(
    tmp_path: Path, file: str
) -> None:
    column = categorical_column_with_vocabulary_list("f", [f"word{i}" for i in range(5)])
    spec = resolve({"f": FeatureConfig(TableConfig(5, 2, name="t"))})
    transforms = {"f": Transform.of(column)}
    with ExportWriter(tmp_path, spec, step=1, job="test", transforms=transforms) as writer:
        write_rows(writer.row_file("t"), 0, ROWS_VD)
        writer.add_dense({"a": ROWS_VD, "b": ROWS_VD[0]}, {"name": "two_tower"})
        path = next(writer.commit().glob(file))
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x7F]) + whole[place + 1 :])
        try:
            export = open_export(tmp_path)
            export.dense_variables()
            export.transforms["f"]({"f": ["word1", "x"]})
        except ExportError as e:
            assert path.name in str(e)  # noqa: PT017


def test_a_long_feature_name_with_a_vocabulary_can_be_exported(tmp_path: Path) -> None:
    name = "категория" * 10  # 6 bytes a letter when quoted
    spec = resolve({name: FeatureConfig(TableConfig(5, 2, name="t"))})
    transforms = {name: Transform.of(categorical_column_with_vocabulary_list(name, ["a"]))}
    with ExportWriter(tmp_path, spec, step=1, job="test", transforms=transforms) as writer:
        write_rows(writer.row_file("t"), 0, ROWS_VD)
        writer.commit()
    assert open_export(tmp_path, verify=True).transforms[name] == transforms[name]
