"""Snapshots: what is written is what is read, whole or not at all, and only where it fits."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ps.client import LocalTransport, ShardClient
from ps.config import FTRL, SGD, Adagrad, Adam, FeatureConfig, TableConfig
from ps.dense_variables import DenseValues, DenseVariable
from ps.errors import ConfigError, ExportError, SnapshotError, StorageError
from ps.export import open_export
from ps.export_file import RowFile, allocate, open_rows, read_rows, write_rows
from ps.partition import Layout, div_splits
from ps.ragged import F32, Ragged
from ps.shard import ShardSpec, ShardState
from ps.snapshot import Snapshot, export_snapshot, open_snapshot
from ps.spec import EmbeddingSpec, resolve
from ps.start import check_dense, check_tables, check_variables
from tests.support.jobs import every_optimizer_job, write_examples
from tests.support.reference import same_bits
from tests.support.shards import whole_table
from tests.support.snapshots import (
    OPTIMIZERS,
    SIZES,
    VARIABLES,
    dense_values,
    every_optimizer_spec,
    random_contents,
    state_from,
    write_snapshot,
)
from workers.batches import Batch
from workers.config import load_job
from workers.jobplan import plan_job
from workers.step import StepLoop, StepOptions

SPEC = every_optimizer_spec()
CONTENTS = random_contents(SPEC)
DENSE = dense_values("momenta", "velocities")


def write(root: Path, step: int = 6) -> Path:
    return write_snapshot(root, SPEC, CONTENTS, step=step, dense=DENSE)


def small_spec(**changes: Any) -> EmbeddingSpec:
    """One table `t` [4, 2] under FTRL, with changes."""
    table = {"vocabulary_size": 4, "dim": 2, "optimizer": FTRL(), "name": "t"} | changes
    return resolve({"f": FeatureConfig(TableConfig(**table))})


def small(root: Path) -> Snapshot:
    spec = small_spec()
    return open_snapshot(write_snapshot(root, spec, random_contents(spec), dense=DENSE))


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize(
    ("path", "value"),
    [("dense", 5), ("tables.0.rows.file", "\ud800"), ("features.0.max_sequence_length", -1)],
)
def test_a_damaged_manifest_is_a_snapshot_error(tmp_path: Path, path: str, value: object) -> None:
    file = small(tmp_path).path / "manifest.json"
    manifest = place = json.loads(file.read_text())
    *parents, key = path.split(".")
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[key] = value
    file.write_text(json.dumps(manifest))
    with pytest.raises(SnapshotError, match=r"manifest\.json"):
        open_snapshot(tmp_path)


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
        arrays = {"rows": found.rows} | {slot: found.slot(slot) for slot in found.slot_files}
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


def test_a_step_has_one_snapshot(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(SnapshotError, match=r"step-000000006': there is one already"):
        write(tmp_path)
    assert visible(tmp_path) == ["LATEST", "step-000000006"]


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
    from ps.config import CustomCombiner

    spec = small_spec(combiner=CustomCombiner("package.module:function", 3))
    snapshot = open_snapshot(write_snapshot(tmp_path, spec, random_contents(spec)))
    assert snapshot.table("t").combiner == "custom"
    with pytest.raises(ExportError, match="table 't': serving cannot run a custom combiner"):
        export_snapshot(snapshot, tmp_path / "export")


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_any_number_of_shards_takes_a_snapshot_up(tmp_path: Path, num_shards: int) -> None:
    snapshot = open_snapshot(write(tmp_path))
    states = [load(snapshot, k, num_shards) for k in range(num_shards)]
    for table in SPEC.tables:
        arrays = whole_table(states, table.name)
        assert all(map(same_bits, arrays, CONTENTS[table.name].values()))
    assert {state.version for state in states} == {6}
    dense = [state.dense() for state in states]
    assert same_bits(np.concatenate([d[0] for d in dense]), DENSE.trainable)
    for slot, values in DENSE.slots.items():
        assert same_bits(np.concatenate([d[1][slot] for d in dense]), values)


def load(snapshot: Snapshot, shard: int, num_shards: int) -> ShardState:
    """One shard of a job that starts from the snapshot."""
    spec = ShardSpec(
        shard_id=shard,
        num_shards=num_shards,
        num_workers=1,
        embedding=SPEC,
        dense_optimizer=Adam(),
    )
    assert snapshot.dense is not None
    values = snapshot.dense.values()
    span = slice(*div_splits(values.trainable.size, num_shards)[shard : shard + 2])
    slots = {name: slot[span] for name, slot in values.slots.items()}
    own = DenseValues(trainable=values.trainable[span], slots=slots, state=values.state)
    return state_from(snapshot, spec, own)


class Reader:
    """Five batches of one example with id 0."""

    def epoch(self, epoch: int, batch_size: int) -> Iterator[Batch]:
        for _ in range(5):
            bags = {"f": Ragged(np.zeros(1, np.int64), np.array([0, 1]))}
            one = np.ones(1, np.float32)
            yield Batch(bags, np.zeros((1, 0), np.float32), one, one)


class NoDense:
    """A dense model without variables, with gradient 1."""

    def train(self, batch: Batch, features: Any, dense: F32, state: F32, *_: Any) -> Any:
        grads = {"f": np.ones_like(features["f"])}
        return SimpleNamespace(
            loss=0.0, activation_grads=grads, device_grads={}, dense_grad=dense, state=state
        )


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_steps_versions_and_rates_go_on_from_the_snapshots_step(lookahead: int) -> None:
    seen: list[int] = []

    def rate(step: int) -> float:
        seen.append(step)
        return 0.0

    spec = small_spec(optimizer=SGD(rate))
    state = ShardState(
        ShardSpec(shard_id=0, num_shards=1, num_workers=1, embedding=spec, dense_optimizer=SGD())
    )
    empty = np.zeros(0, np.float32)
    state.set_dense(empty, empty, {}, 40)
    loop = StepLoop(
        spec,
        ShardClient(spec, Layout.of(spec, 1), LocalTransport([state]), 0),
        NoDense(),  # type: ignore[arg-type]
        Reader(),  # type: ignore[arg-type]
        StepOptions(batch_size=1, lookahead=lookahead, timeout_s=1.0),
        worker=0,
        first_step=40,
    )
    report = loop.run(9)
    assert (report.steps, loop.step, state.version) == (5, 45, 45)
    assert report.max_staleness == lookahead
    assert seen == [40, 41, 42, 43, 44]


def test_yaml_names_where_a_run_starts_and_what_it_leaves() -> None:
    config = Path(__file__).parents[2] / "configs" / "demo.yaml"
    job = load_job(config, ["output.snapshot=runs/new", "train.start_from=runs/old"])
    assert (job.output.snapshot, job.train.start_from) == (Path("runs/new"), Path("runs/old"))
    absolute = job.with_absolute_paths()
    assert absolute.output.snapshot == Path.cwd() / "runs" / "new"
    assert absolute.train.start_from == Path.cwd() / "runs" / "old"


def test_a_snapshot_root_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    job = every_optimizer_job(write_examples(tmp_path))
    (tmp_path / "file").write_text("")
    nowhere = replace(job, output=replace(job.output, snapshot=tmp_path / "file" / "snapshots"))
    with pytest.raises(SnapshotError, match=r"cannot write '.*snapshots': Not a directory"):
        plan_job(nowhere)


def write_failing_at(root: Path, patch: pytest.MonkeyPatch, call: str, k: int) -> str | None:
    """Write with the k-th `os.<call>` failing; returns the error's text, None if there was none."""
    real, counter = getattr(os, call), itertools.count(1)

    def fail(*args: Any, **options: Any) -> Any:
        if next(counter) == k:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **options)

    patch.setattr(os, call, fail)
    spec = small_spec()
    try:
        write_snapshot(root, spec, random_contents(spec), step=9, dense=DENSE)
    except StorageError as e:
        return str(e)
    finally:
        patch.undo()
    return None


@pytest.mark.parametrize("call", ["fsync", "pwrite", "open", "posix_fallocate"])
def test_a_disk_that_fails_at_any_call_leaves_the_old_or_the_new_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    small(tmp_path)
    for k in range(1, 100):
        error = write_failing_at(tmp_path, monkeypatch, call, k)
        names = visible(tmp_path)
        assert not [name for name in names if name.startswith(".")]
        assert open_snapshot(tmp_path, verify=True).step in (6, 9)
        if error is None:
            assert open_snapshot(tmp_path).step == 9
            break
        assert "No space left on device" in error
        if "step-000000009" in names:  # renamed, but not the newest: only LATEST failed
            (tmp_path / "step-000000009").rename(tmp_path / f"step-{k:012d}")
    assert k > 2


@pytest.mark.parametrize("file", ["tables/t/rows.arrow", "tables/t/slots/linears.arrow",
                                  "dense.arrow", "dense_slots/momenta.arrow"])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    path = small(tmp_path).path / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotError, match=rf"{path.name}' is damaged: sha256"):
        open_snapshot(tmp_path, verify=True)
    os.truncate(path, len(data) - 1)
    with pytest.raises(SnapshotError, match=rf"{path.name}': {len(data) - 1} bytes, but the man"):
        open_snapshot(tmp_path)
    path.unlink()
    with pytest.raises(SnapshotError, match=rf"{path.name}' cannot be read: No such file"):
        open_snapshot(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2 is newer than this Manta knows"),
        ({"version": "v000001"}, "'version' must look like step-000000123"),
        ({"step": None}, "'step' must be of type int"),
        ({"seed": "3"}, "'seed' must be of type int"),
        ({"tables": [{}]}, "'vocabulary_size' must be of type int"),
        ({"tables": []}, "no table 't'"),
        ({"dense": {"model": {}}}, "'variables' must be of type list"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = small(tmp_path).path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(SnapshotError, match=message) as e:
        open_snapshot(tmp_path)
    assert "\n" not in str(e.value)


def test_what_is_no_snapshot_says_so(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"snapshot '.*nowhere': no such folder"):
        open_snapshot(tmp_path / "nowhere")
    with pytest.raises(SnapshotError, match="is no snapshot: it has neither LATEST"):
        open_snapshot(tmp_path)
    export_snapshot(small(tmp_path / "s"), tmp_path / "export")
    with pytest.raises(SnapshotError, match="must hold a name like step-000000123, got 'v000001'"):
        open_snapshot(tmp_path / "export")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary_size": 5}, r"table 't' is \[4, 2\], the job has \[5, 2\]"),
        ({"dim": 3}, r"table 't' is \[4, 2\], the job has \[4, 3\]"),
        ({"optimizer": Adagrad()}, "table 't' has optimizer FTRL, the job has Adagrad"),
        (
            {"optimizer": FTRL(multiply_linear_by_learning_rate=True)},
            "slots are those of FTRL with multiply_linear_by_learning_rate=False, the job has True",
        ),
        ({"name": "u"}, r"has no table 'u'; it has \['t'\]"),
    ],
)
def test_a_snapshot_of_other_tables_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    snapshot = small(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_tables(snapshot, small_spec(**changes))


def test_a_table_that_the_job_lacks_is_refused(tmp_path: Path) -> None:
    snapshot = open_snapshot(write(tmp_path))
    fewer = replace(SPEC, tables=SPEC.tables[:2])
    with pytest.raises(ConfigError, match=r"has table '.*', which the job has not"):
        check_tables(snapshot, fewer)


def test_numbers_of_an_optimizer_and_initial_values_may_change(tmp_path: Path) -> None:
    from ps.initializers import Constant

    spec = small_spec(optimizer=FTRL(0.7, beta=0.3, clipvalue=2.0), initializer=Constant(3.0))
    check_tables(small(tmp_path), spec)


def test_a_missing_slot_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path).path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tables"][0]["slots"].pop()
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        ConfigError, match=r"has slots \['accumulators'\], the job wants \['accumulators', 'lin"
    ):
        check_tables(open_snapshot(tmp_path), small_spec())


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (VARIABLES[:2], "has 3 variables, the one given has 2"),
        (
            (*VARIABLES[:2], replace(VARIABLES[2], shape=(4,))),
            r"variable 'mean' \[3\] \(not trainable\), the model given has 'mean' \[4\]",
        ),
        ((replace(VARIABLES[0], name="weights"), *VARIABLES[1:]), "'kernel' .*'weights'"),
        ((*VARIABLES[:2], replace(VARIABLES[2], trainable=True)), r"'mean' \[3\]$"),
    ],
)
def test_another_dense_model_is_refused(
    tmp_path: Path, variables: tuple[DenseVariable, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_dense(small(tmp_path), variables, Adam())


def test_keras_numbers_of_layers_may_differ_and_dense_optimizers_may_not(tmp_path: Path) -> None:
    snapshot = small(tmp_path)
    assert snapshot.dense is not None
    numbered = (replace(VARIABLES[0], name="kernel_17"), *VARIABLES[1:])
    check_variables(snapshot, snapshot.dense, numbered)
    check_dense(snapshot, VARIABLES, Adam(0.5))
    with pytest.raises(ConfigError, match="the dense model has optimizer Adam, the job has FTRL"):
        check_dense(snapshot, VARIABLES, FTRL())


def test_without_a_dense_model_any_job_fits(tmp_path: Path) -> None:
    spec = small_spec()
    snapshot = open_snapshot(write_snapshot(tmp_path, spec, random_contents(spec)))
    assert snapshot.dense is None
    check_dense(snapshot, VARIABLES, FTRL())


def test_dense_values_without_slots_are_kept_without_an_optimizer(tmp_path: Path) -> None:
    spec = small_spec()
    write_snapshot(tmp_path, spec, random_contents(spec), dense=dense_values())
    snapshot = open_snapshot(tmp_path)
    assert snapshot.dense is not None
    assert snapshot.dense.optimizer is None
    assert snapshot.dense.values().slots == {}
    check_dense(snapshot, VARIABLES, FTRL())


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


def test_an_export_can_leave_out_the_dense_model(tmp_path: Path) -> None:
    export = open_export(export_snapshot(small(tmp_path / "s"), tmp_path / "e", dense=False))
    assert export.dense_model is None
    assert export.dense_variables() == {}
