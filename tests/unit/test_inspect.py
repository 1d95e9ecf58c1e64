"""`manta inspect`: what a snapshot or export holds, its figures and its rows, as it was written."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from ps.commands import app
from ps.config import FTRL, SGD, Adagrad, Adam, FeatureConfig, TableConfig
from ps.contents import Contents, describe, parse_row
from ps.contents_text import print_contents, print_row, print_stats, size_text
from ps.errors import InputError, StorageError
from ps.ragged import F32
from ps.snapshot import export_snapshot, open_snapshot
from ps.spec import resolve
from ps.table_stats import ArrayStats, ImpossibleValues, initial_slots, table_stats
from tests.support.old_snapshots import write_old_snapshot
from tests.support.reference import same_bits
from tests.support.snapshots import (
    OPTIMIZERS,
    SIZES,
    VARIABLES,
    dense_values,
    every_optimizer_spec,
    random_contents,
    write_snapshot,
)

SPEC = every_optimizer_spec()
CONTENTS = random_contents(SPEC)
DENSE = dense_values("momenta", "velocities")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    for step in (3, 6):
        about = {"fences": [step] * 2, "cursor": {"ranks": 2, "first_step": 0}}
        write_snapshot(
            root / "snapshots", SPEC, CONTENTS, step=step, dense=DENSE, num_shards=3, **about
        )
    write_old_snapshot(root / "old", SPEC, CONTENTS, dense=DENSE)
    export_snapshot(open_snapshot(root / "snapshots"), root / "exports")
    return root


def pieces(values: F32, *cuts: int) -> list[F32]:
    return np.split(values, cuts)


def stats_of(values: F32, *cuts: int) -> ArrayStats:
    stats = ArrayStats()
    for piece in pieces(values, *cuts):
        stats.add(piece)
    return stats


@pytest.mark.parametrize("cuts", [(), (1, 7, 30_000)])
def test_figures_are_those_of_numpy(cuts: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(3, 2, (40_000, 4)).astype(np.float32)
    values[[5, 39_999]] = 0.0
    values[7] = -0.0
    stats = stats_of(values, *cuts)
    exact = values.astype(np.float64)
    assert (stats.values, stats.zero_rows, stats.nan, stats.inf) == (160_000, 3, 0, 0)
    assert (stats.min, stats.max) == (values.min(), values.max())
    assert stats.mean == pytest.approx(exact.mean(), rel=1e-12)
    assert stats.std == pytest.approx(exact.std(), rel=1e-12)
    assert stats.mean_norm == pytest.approx(np.linalg.norm(exact, axis=1).mean(), rel=1e-12)


def test_a_constant_has_no_deviation_and_huge_values_do_not_overflow() -> None:
    assert stats_of(np.full((1000, 3), 0.1, np.float32), 17).std == 0.0
    huge = stats_of(np.full((10, 3), -3e38, np.float32), 4)
    assert huge.mean == pytest.approx(-3e38)
    assert huge.mean_norm == pytest.approx(3e38 * 3**0.5)


def test_values_that_are_not_finite_are_counted_and_left_out_of_the_rest() -> None:
    values = np.ones((6, 2), dtype=np.float32)
    values[1, 0], values[2], values[4, 1] = np.nan, (np.inf, -np.inf), 5.0
    stats = stats_of(values)
    assert (stats.nan, stats.inf, stats.zero_rows) == (1, 2, 0)
    assert (stats.min, stats.max, stats.mean) == (1.0, 5.0, pytest.approx(13 / 9))
    assert stats.mean_norm == pytest.approx((3 * 2**0.5 + 26**0.5) / 4)
    nothing = stats_of(np.full((2, 2), np.nan, np.float32))
    figures = (nothing.min, nothing.max, nothing.mean, nothing.std, nothing.mean_norm)
    assert figures == (None,) * 5
    assert nothing.nan == 4


@pytest.mark.parametrize("place", [0, 20_000, 39_999])
def test_the_first_impossible_value_is_named(place: int) -> None:
    values = np.ones((40_000, 5), dtype=np.float32)
    values[place, 3] = np.nan
    values[place:, 4] = -np.inf
    seen = ImpossibleValues(may_be_negative=False)
    for start, piece in zip((0, 30_000), pieces(values, 30_000), strict=True):
        seen.add(100 + start, piece)
    assert (seen.nan, seen.inf, seen.negative) == (1, 40_000 - place, 40_000 - place)
    assert (seen.first_non_finite, seen.first_negative) == (100 + place, 100 + place)


def test_zero_of_either_sign_is_not_negative() -> None:
    seen = ImpossibleValues(may_be_negative=False)
    seen.add(0, np.array([[0.0, -0.0]], np.float32))
    assert (seen.negative, seen.first_negative) == (0, None)


@pytest.mark.parametrize(
    ("optimizer", "starts"),
    [(Adagrad(initial_accumulator_value=0.3), (0.3,)), (Adam(), (0.0, 0.0)), (FTRL(), (0.1, 0.0))],
)
def test_rows_whose_slots_are_as_at_first_were_never_touched(
    optimizer: Any, starts: tuple[float, ...]
) -> None:
    names = optimizer.slot_names
    arrays: dict[str | None, F32] = {None: np.ones((9, 2), np.float32)}
    for name, start in zip(names, starts, strict=True):
        arrays[name] = np.full((9, 2), start, np.float32)
    arrays[names[0]][2, 1] += 1  # touched in its first slot
    arrays[names[-1]][5, 0] += 1  # in its last one
    arrays[None][7] = 0  # rows tell nothing

    def read(first_id: int, out_ND: F32, slot: str | None) -> None:
        out_ND[:] = arrays[slot][first_id : first_id + len(out_ND)]

    stats = table_stats(read, 9, 2, initial_slots(optimizer.describe(), names))
    assert stats.untouched_rows == 7
    assert (stats.rows.zero_rows, [*stats.slots]) == (1, [*names])


def test_without_slots_or_with_unknown_starts_nobody_knows_which_rows_were_touched() -> None:
    def read(first_id: int, out_ND: F32, slot: str | None) -> None:
        out_ND[:] = 0

    assert table_stats(read, 3, 1, initial_slots(SGD().describe(), ())).untouched_rows is None
    unknown = initial_slots({"name": "CustomOptimizer", "slot_initializers": ["f"]}, ("a",))
    assert unknown == {"a": None}
    assert table_stats(read, 3, 1, unknown).untouched_rows is None
    known = initial_slots({"name": "CustomOptimizer", "slot_initializers": [0.0]}, ("a",))
    assert table_stats(read, 3, 1, known).untouched_rows == 3


def test_a_table_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ps.table_stats.CHUNK_BYTES", 64)
    values = np.random.default_rng(1).normal(size=(11, 3)).astype(np.float32)
    sizes = []

    def read(first_id: int, out_ND: F32, slot: str | None) -> None:
        sizes.append(len(out_ND))
        out_ND[:] = values[first_id : first_id + len(out_ND)]

    stats = table_stats(read, 11, 3, {})
    assert sizes == [5, 5, 1]
    assert stats.rows.mean == pytest.approx(values.mean(dtype=np.float64))


@pytest.mark.parametrize(
    ("folder", "format_version", "shards", "fences", "versions"),
    [
        ("snapshots", 2, 3, (6, 6), ("step-000000003", "step-000000006")),
        ("old", 1, 1, None, ("step-000000006",)),
    ],
)
def test_a_snapshot_is_described(
    root: Path, folder: str, format_version: int, shards: int, fences: Any, versions: Any
) -> None:
    contents = describe(root / folder)
    assert (contents.kind, contents.version) == ("snapshot", "step-000000006")
    assert (contents.job, contents.step, contents.seed) == ("test", 6, 3)
    assert (contents.format_version, contents.num_shards) == (format_version, shards)
    assert (contents.fences, contents.versions) == (fences, versions)
    assert contents.cursor == (None if fences is None else {"ranks": 2, "first_step": 0})
    assert contents.features == SPEC.features
    for name, table in contents.tables.items():
        assert (table.vocabulary_size, table.dim) == SIZES[name]
        assert table.optimizer == OPTIMIZERS[name].describe()
        assert table.slots == OPTIMIZERS[name].slot_names
        assert table.size_bytes >= 4 * np.prod(SIZES[name]) * (1 + len(table.slots))
    dense = contents.dense
    assert dense is not None
    assert dense.model == {"name": "mlp", "params": {"hidden": [8]}}
    assert dense.shapes == {v.name: v.shape for v in VARIABLES}
    assert dense.trainable == ("kernel", "scale")
    assert dense.slots == ("momenta", "velocities")
    on_disk = sum(f.stat().st_size for f in Path(contents.location).rglob("*") if f.is_file())
    assert contents.size_bytes == on_disk


def test_an_export_is_described(root: Path) -> None:
    contents = describe(root / "exports")
    assert (contents.kind, contents.version) == ("export", "v000001")
    assert (contents.seed, contents.num_shards, contents.fences) == (None, None, None)
    assert {t.name: (t.vocabulary_size, t.dim) for t in contents.tables.values()} == SIZES
    assert contents.dense is not None
    assert contents.dense.shapes == {v.name: v.shape for v in VARIABLES}
    assert contents.dense.trainable is None
    on_disk = sum(f.stat().st_size for f in Path(contents.location).rglob("*") if f.is_file())
    assert contents.size_bytes == on_disk


@pytest.mark.parametrize("folder", ["snapshots/step-000000003", "exports/v000001"])
def test_one_version_can_be_named(root: Path, folder: str) -> None:
    contents = describe(root / folder)
    assert contents.location == str(root / folder)
    assert contents.versions == ()


@pytest.mark.parametrize("kind", ["snapshots", "old", "exports"])
def test_a_row_has_the_bits_that_were_written(root: Path, kind: str) -> None:
    contents = describe(root / kind)
    for name, arrays in CONTENTS.items():
        for row_id in {0, SIZES[name][0] - 1, SIZES[name][0] // 3}:
            row = contents.table(name).row(row_id)
            assert same_bits(row.values, arrays["rows"][row_id])
            slots = [*row.slots] if kind == "exports" else [*arrays][1:]
            assert [*row.slots] == ([] if kind == "exports" else slots)
            assert all(same_bits(row.slots[s], arrays[s][row_id]) for s in slots)
            printed = [np.float32(x) for x in row.to_json()["row"]]
            assert same_bits(np.array(printed), arrays["rows"][row_id])


def test_figures_of_a_snapshot_are_those_of_its_arrays(root: Path) -> None:
    contents = describe(root / "snapshots")
    stats = contents.table("users").stats()
    for name, figures in {"rows": stats.rows, **stats.slots}.items():
        exact = CONTENTS["users"][name].astype(np.float64)
        assert (figures.min, figures.max) == (exact.min(), exact.max())
        assert figures.mean == pytest.approx(exact.mean())
    assert stats.untouched_rows == 0


def test_what_is_not_there_is_named(root: Path) -> None:
    contents = describe(root / "snapshots")
    with pytest.raises(InputError, match=r"no table 'user' here, only 'a.b c', 'one.row/'"):
        contents.table("user")
    for row_id in (-1, 300):
        with pytest.raises(InputError, match=rf"table 'users': id {row_id} is outside \[0, 300\)"):
            contents.table("users").row(row_id)
    with pytest.raises(StorageError, match="neither LATEST nor manifest"):
        describe(root)


@pytest.mark.parametrize("text", ["users", "users:", ":3", "users:x", "users:1.5"])
def test_a_row_is_asked_for_by_table_and_id(text: str) -> None:
    with pytest.raises(InputError, match="write TABLE:ID"):
        parse_row(text)
    assert parse_row("a:b:7") == ("a:b", 7)


def shown(width: int, contents: Contents) -> str:
    text = io.StringIO()
    out = Console(file=text, width=width, markup=False, highlight=False)
    print_contents(out, contents)
    print_stats(out, contents.table("users"), contents.table("users").stats())
    print_row(out, contents.table("users").row(7))
    return text.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_is_cut_whatever_the_width(root: Path, width: int) -> None:
    contents = describe(root / "snapshots")
    text = shown(width, contents)
    assert "…" not in text
    squeezed = "".join(text.split())
    wanted = [*SIZES, "f_users", "kernel", "accumulators, linears", "step-000000003"]
    if width == 200:
        assert all("".join(word.split()) in squeezed for word in wanted)
    for value in contents.table("users").row(7).values:
        assert str(value) in squeezed


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, args)], catch_exceptions=False)


def test_the_command_prints_one_json_document(root: Path) -> None:
    result = run(root / "snapshots", "--json", "--stats", "--row", "users:7", "--row", "plain:0")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["kind"] == "snapshot"
    assert [t["name"] for t in document["tables"]] == [t.name for t in SPEC.tables]
    assert [(row["table"], row["id"]) for row in document["rows"]] == [("users", 7), ("plain", 0)]
    assert [*document["stats"]["users"]["slots"]] == ["momenta", "velocities"]
    values = np.array(document["rows"][0]["slots"]["momenta"], np.float32)
    assert same_bits(values, CONTENTS["users"]["momenta"][7])


@pytest.mark.parametrize("folder", ["snapshots", "old", "exports"])
def test_the_command_prints_what_the_library_says(root: Path, folder: str) -> None:
    result = run(root / folder, "--stats", "--row", "one.row/:0")
    assert result.exit_code == 0
    contents = describe(root / folder)
    text = result.stdout
    assert text.startswith(f"{contents.kind} {contents.location}\n")
    lines = [line.split() for line in text.splitlines()]
    for table in contents.tables.values():
        words = [*table.name.split(), str(table.vocabulary_size), str(table.dim), "sum"]
        assert words in [line[: len(words)] for line in lines]
    assert ["mean", "[3]", "12", "B", "-" if folder == "exports" else "no"] in lines
    assert ("ranks:      2, fences 6, 6\n" in text) == (folder == "snapshots")
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\x1b" not in text


def test_of_many_versions_some_are_named(tmp_path: Path) -> None:
    spec = resolve({"f": FeatureConfig(TableConfig(2, 1, name="t"))})
    for step in range(20):
        write_snapshot(tmp_path, spec, random_contents(spec), step=step)
    (line,) = (line for line in run(tmp_path).stdout.splitlines() if "others" in line)
    assert "step-000000004, … 9 more …, step-000000014" in line


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1 B"), (1 << 40, "1.0 TiB"), (5000 << 40, "5000.0 TiB")]
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert size_text(size) == text


def test_a_file_that_is_gone_is_an_error(root: Path, tmp_path: Path) -> None:
    export = Path(shutil.copytree(root / "exports" / "v000001", tmp_path / "v000001"))
    contents = describe(export)
    path = export / "tables" / "users.arrow"
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(StorageError, match=r"users\.arrow' ends within its rows"):
        contents.table("users").row(299)
    path.unlink()
    with pytest.raises(StorageError, match=r"users\.arrow"):
        contents.table("users").row(0)
    with pytest.raises(StorageError, match=r"users\.arrow"):
        describe(export)


def test_a_row_alone_is_printed_alone(root: Path) -> None:
    result = run(root / "exports", "--row", "users:7")
    assert result.exit_code == 0
    title, values = result.stdout.splitlines()
    assert title == "table 'users', row 7"
    assert same_bits(np.array(values.split()[1:], np.float32), CONTENTS["users"]["rows"][7])
