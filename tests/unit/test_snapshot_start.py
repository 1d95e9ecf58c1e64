"""What starts from a snapshot: shards of any number, jobs that fit it, steps that go on from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ps.client import LocalTransport, ShardClient
from ps.config import FTRL, SGD, Adagrad, Adam
from ps.dense_variables import DenseValues, DenseVariable
from ps.errors import ConfigError, SnapshotError
from ps.partition import Layout, div_splits
from ps.ragged import F32, Ragged
from ps.shard import ShardSpec, ShardState
from ps.snapshot import Snapshot, open_snapshot
from ps.start import check_dense, check_tables, check_variables
from tests.support.jobs import every_optimizer_job, write_examples
from tests.support.old_snapshots import write_old_snapshot
from tests.support.reference import same_bits
from tests.support.shards import whole_table
from tests.support.snapshots import (
    VARIABLES,
    dense_values,
    every_optimizer_spec,
    random_contents,
    small,
    small_spec,
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


@pytest.mark.parametrize("written_by", [1, 3, "format 1"])
@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_any_number_of_shards_takes_a_snapshot_up(
    tmp_path: Path, written_by: int | str, num_shards: int
) -> None:
    if isinstance(written_by, int):
        write_snapshot(tmp_path, SPEC, CONTENTS, dense=DENSE, num_shards=written_by)
    else:
        write_old_snapshot(tmp_path, SPEC, CONTENTS, dense=DENSE)
    snapshot = open_snapshot(tmp_path)
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

    def steps_per_epoch(self, batch_size: int) -> int:
        return 5

    def epoch(self, epoch: int, batch_size: int, first_batch: int = 0) -> Iterator[Batch]:
        for _ in range(first_batch, 5):
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
    snapshot = open_snapshot(write_snapshot(tmp_path, SPEC, CONTENTS))
    fewer = replace(SPEC, tables=SPEC.tables[:2])
    with pytest.raises(ConfigError, match=r"has table '.*', which the job has not"):
        check_tables(snapshot, fewer)


def test_numbers_of_an_optimizer_and_initial_values_may_change(tmp_path: Path) -> None:
    from ps.initializers import Constant

    spec = small_spec(optimizer=FTRL(0.7, beta=0.3, clipvalue=2.0), initializer=Constant(3.0))
    check_tables(small(tmp_path), spec)


def test_a_missing_slot_is_refused(tmp_path: Path) -> None:
    path = Path(small(tmp_path).location) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tables"][0]["slots"] = ["accumulators"]
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
