"""A prepared folder appears whole or not at all, and nothing of the user's is deleted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ps.errors import DataError
from workers.prepare import PrepareReport, prepare_synthetic
from workers.prepare.output import OutputFolder, row_group_rows_for, schema_of
from workers.prepare.report import ColumnReport

COLUMNS = {"x": ColumnReport(type="int64", vocabulary_size=100, table="x")}


def write_dataset(
    out: Path, num_rows: int = 10, *, row_group_rows: int = 4, writes: int = 1
) -> None:
    with OutputFolder(out) as folder:
        writer = folder.split_writer("train", schema_of(COLUMNS), row_group_rows)
        for part in np.array_split(np.arange(num_rows), writes):
            writer.write({"x": part})
        folder.commit(report_for(out, num_rows))


def report_for(out: Path, num_rows: int) -> PrepareReport:
    return PrepareReport(
        name="demo", kind="test", out=out, seed=0, rows={"train": num_rows}, columns=COLUMNS
    )


def read_ids(out: Path) -> list[int]:
    ids: list[int] = pq.read_table(out / "train.parquet").column("x").to_pylist()
    return ids


def hidden_siblings(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path.name.startswith(".")]


def test_an_earlier_data_set_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "data"
    write_dataset(out, 10)
    write_dataset(out, 3)
    assert read_ids(out) == [0, 1, 2]
    assert hidden_siblings(out) == []


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    write_dataset(out, 3)
    assert read_ids(out) == [0, 1, 2]


def test_an_error_leaves_the_earlier_data_set_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "data"
    write_dataset(out, 10)

    def fail_half_way() -> None:
        with OutputFolder(out) as folder:
            folder.split_writer("train", schema_of(COLUMNS), 4).write({"x": np.arange(9)})
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert read_ids(out) == list(range(10))
    assert hidden_siblings(out) == []


def test_a_failed_rename_puts_the_earlier_data_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    write_dataset(out, 10)
    real_rename = os.rename

    def rename(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise OSError("disk is gone")
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="disk is gone"):
        write_dataset(out, 3)
    assert read_ids(out) == list(range(10))
    assert hidden_siblings(out) == []


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no dataset\.json written by prepare"):
        write_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text('{"title": "kaggle"}')
    with pytest.raises(DataError, match=r"holds no dataset\.json written by prepare"):
        write_dataset(tmp_path)
    assert (tmp_path / "photo.jpg").exists()


def test_a_foreign_file_in_a_data_set_folder_is_not_deleted(tmp_path: Path) -> None:
    out = tmp_path / "data"
    write_dataset(out)
    (out / "model.keras").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds 'model\.keras', which prepare did not write"):
        write_dataset(out)
    assert (out / "model.keras").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"x")
    with pytest.raises(DataError, match="it is a file, wanted a folder"):
        write_dataset(tmp_path / "data")


def test_a_folder_that_holds_the_source_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    with pytest.raises(DataError, match="it holds the source"):
        OutputFolder(tmp_path / "data", source=tmp_path / "data" / "train.parquet")


@pytest.mark.parametrize("writes", [1, 2, 7])
def test_row_groups_do_not_depend_on_the_size_of_the_writes(tmp_path: Path, writes: int) -> None:
    write_dataset(tmp_path / "data", 10, row_group_rows=4, writes=writes)
    meta = pq.ParquetFile(tmp_path / "data" / "train.parquet").metadata
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [4, 4, 2]
    assert read_ids(tmp_path / "data") == list(range(10))


def test_small_data_get_sixteen_row_groups_and_large_data_full_ones() -> None:
    assert row_group_rows_for(1000, None) == 62
    assert row_group_rows_for(3, None) == 1
    assert row_group_rows_for(10**9, None) == 65_536
    assert row_group_rows_for(10**9, 100) == 100


def test_a_row_group_of_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row_group_rows is 0, wanted 1 or more"):
        write_dataset(tmp_path / "data", row_group_rows=0)
    assert hidden_siblings(tmp_path / "data") == []


def test_dataset_json_says_what_the_report_says(tmp_path: Path) -> None:
    report = prepare_synthetic("criteo", tmp_path / "data", rows=200, total_vocabulary=520)
    body = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert body["format"] == "manta-dataset"
    assert body["source"]["kind"] == "synthetic-criteo"
    assert body["seed"] == 0
    assert body["rows"] == report.rows
    assert list(body["columns"]) == list(report.columns)
    assert {
        n: c["vocabulary_size"] for n, c in body["columns"].items() if c["vocabulary_size"]
    } == (report.vocabulary_sizes)
    assert str(tmp_path) not in json.dumps(body)


def test_lines_name_rows_sizes_and_only_counters_that_are_not_zero() -> None:
    columns = {f"C{i}": ColumnReport(type="int64", vocabulary_size=10, table="C") for i in range(4)}
    report = PrepareReport(
        name="demo",
        kind="test",
        out=Path("out"),
        seed=0,
        rows={"train": 12_345},
        columns=columns | COLUMNS,
        counters={"short_lines": 2, "bad_fields": 0},
        notes=("filled",),
        noise_floor={"test_auc": 0.75},
    )
    assert report.lines() == [
        "demo (test) -> out",
        "  train         12,345 rows",
        "  vocabulary sizes: C0..C3 10, x 100",
        "  short_lines: 2",
        "  planted test_auc: 0.7500",
        "  note: filled",
    ]
