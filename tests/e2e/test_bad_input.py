"""Bad input to `manta train` and `manta serve`: one line, a bad exit, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ps.config import FeatureConfig, TableConfig
from ps.export import ExportWriter, write_rows
from ps.spec import resolve
from tests.e2e.conftest import Manta
from tests.support.jobs import write_examples

pytestmark = pytest.mark.e2e

JOB = """
name: bad
data: {train: examples.parquet, label: label, dense: [x]}
tables: {users: {vocabulary_size: 300, dim: 4}}
features: {user: {table: users}}
model: {build: dlrm}
train: {batch_size: 64}
output: {export: out/export, metrics: out/metrics.jsonl}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_examples(tmp_path, rows=200)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def with_column(name: str, values: pa.Array) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        table = pq.read_table(folder / "examples.parquet")
        place = table.schema.names.index(name)
        pq.write_table(table.set_column(place, name, values), folder / "examples.parquet")

    return change


def without_column(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        table = pq.read_table(folder / "examples.parquet").drop_columns([name])
        pq.write_table(table, folder / "examples.parquet")

    return change


def emptied(folder: Path) -> None:
    table = pq.read_table(folder / "examples.parquet")
    pq.write_table(table.slice(0, 0), folder / "examples.parquet")


def removed(folder: Path) -> None:
    (folder / "examples.parquet").unlink()


def garbled(folder: Path) -> None:
    (folder / "examples.parquet").write_bytes(b"PAR1 but not really")


def unchanged(folder: Path) -> None:
    pass


IDS = np.arange(200) % 300
CASES = {
    "unknown key": (
        unchanged,
        ["--set", "train.epocs=2"],
        r"train\.epocs: unknown key; did you mean 'epochs'\?",
    ),
    "wrong type": (
        unchanged,
        ["--set", "tables.users.dim=wide"],
        r"tables\.users\.dim: wanted a whole number, got 'wide'",
    ),
    "bad value": (
        unchanged,
        ["--set", "tables.users.dim=0"],
        r"tables\.users: .*`dim` must be an int >= 1, got 0",
    ),
    "unknown table": (
        unchanged,
        ["--set", "features.user.table=user"],
        r"features\.user\.table: no table 'user'; known: users",
    ),
    "missing column": (without_column("user"), [], r"has no column 'user'; it has items, .*"),
    "text ids": (
        with_column("user", pa.array(["a"] * 200)),
        [],
        r"column 'user' of feature 'user' is string, wanted integers or lists of integers",
    ),
    "text label": (
        with_column("label", pa.array(["a"] * 200)),
        [],
        r"column 'label' is string, wanted a number",
    ),
    "null label": (
        with_column("label", pa.array([None] + [1.0] * 199)),
        [],
        r"column 'label' has 1 nulls, wanted numbers only",
    ),
    "NaN label": (
        with_column("label", pa.array([float("nan")] + [1.0] * 199)),
        [],
        r"column 'label' holds nan, wanted finite float32 numbers",
    ),
    "id too large": (
        with_column("user", pa.array(np.where(IDS == 77, 300, IDS))),
        [],
        r"feature 'user': id 300 is not in \[0, 300\) of table 'users'",
    ),
    "negative id": (
        with_column("user", pa.array(np.where(IDS == 77, -1, IDS))),
        [],
        r"feature 'user': id -1 is not in \[0, 300\) of table 'users'",
    ),
    "no rows": (emptied, [], r"data set examples\.parquet has no rows"),
    "too few rows": (
        unchanged,
        ["--set", "train.batch_size=512"],
        r"200 rows do not fill one batch of 512",
    ),
    "no file": (removed, [], r"data set examples\.parquet: no such file or folder"),
    "not Parquet": (garbled, [], r"data set examples\.parquet: not readable as Parquet: .*"),
    "no model": (
        unchanged,
        ["--set", "model.build=dlmr"],
        r"model\.build: no model 'dlmr'; known: dlrm, two_tower.*",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_training_on_bad_input_is_one_line_and_leaves_nothing(
    manta: Manta, folder: Path, case: str
) -> None:
    change, arguments, reason = CASES[case]
    change(folder)
    run = manta("train", "job.yaml", *arguments, cwd=folder)
    assert run.returncode == 1, run.stdout + run.stderr
    assert re.search(rf"^error: .*{reason}", run.stderr.splitlines()[-1]), run.stderr
    assert "Traceback" not in run.stderr
    assert not (folder / "out" / "export").exists()
    if (folder / "out").exists():  # the error came up in a worker: the log of the run says so
        last = (folder / "out" / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["event"] == "failed"


def test_an_unknown_config_file_is_one_line(manta_here: Manta, tmp_path: Path) -> None:
    run = manta_here("train", tmp_path / "none.yaml")
    assert run.returncode == 1
    assert re.fullmatch(r"error: config .*none\.yaml: No such file or directory\n", run.stderr)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    spec = resolve({"user": FeatureConfig(TableConfig(50, 4, name="users"))})
    with ExportWriter(tmp_path / "export", spec, step=1, job="bad") as writer:
        write_rows(writer.row_file("users"), 0, np.ones((50, 4), np.float32))
        writer.commit()
    return tmp_path / "export"


def test_serving_a_missing_export_is_one_line(manta_here: Manta, tmp_path: Path) -> None:
    run = manta_here("serve", tmp_path / "nothing", "--check")
    assert run.returncode == 1
    assert re.fullmatch(r"error: export '.*nothing': no such folder\n", run.stderr)


def test_serving_a_truncated_export_is_one_line(manta_here: Manta, export: Path) -> None:
    with (export / "v000001/tables/users.arrow").open("r+b") as file:
        file.truncate(900)
    run = manta_here("serve", export, "--check")
    assert run.returncode == 1
    assert re.fullmatch(
        r"error: '.*users\.arrow': 900 bytes, but the manifest says \d+\n", run.stderr
    )


def test_serving_a_damaged_export_is_refused_when_verified(manta_here: Manta, export: Path) -> None:
    rows = export / "v000001/tables/users.arrow"
    data = bytearray(rows.read_bytes())
    data[600] ^= 1
    rows.write_bytes(data)
    run = manta_here("serve", export, "--check", "--verify")
    assert run.returncode == 1
    assert re.fullmatch(r"error: '.*users\.arrow' is damaged: sha256 .*\n", run.stderr)


def test_serving_an_export_without_its_manifest_is_one_line(
    manta_here: Manta, export: Path
) -> None:
    shutil.rmtree(export / "v000001")
    run = manta_here("serve", export, "--check")
    assert run.returncode == 1
    assert re.fullmatch(
        r"error: '.*LATEST' names v000001, which has no manifest\.json\n", run.stderr
    )


def test_preparing_into_a_place_that_refuses_is_one_line(manta_here: Manta) -> None:
    done = manta_here("prepare", "synthetic", "movielens", "/dev/null/data", "--rows", "10")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_port_that_does_not_exist_is_refused(manta_here: Manta, export: Path) -> None:
    done = manta_here("serve", export, "--port", "70000")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
