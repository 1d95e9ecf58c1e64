"""A run that starts from a snapshot goes on as if it had never stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ps.config import FTRL, Adagrad, Adam
from ps.errors import ConfigError, IdRangeError, SnapshotError
from ps.snapshot import Snapshot, open_snapshot
from tests.support.jobs import every_optimizer_job, write_examples
from tests.support.models import build_mlp
from tests.support.runs import bits, take_snapshot, train_steps
from workers.config import JobConfig
from workers.job import Run, TrainResult, running, train
from workers.jobplan import plan_job
from workers.model import ModelInputs

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_session")]


def write_parts(folder: Path) -> tuple[Path, Path, Path]:
    """Six batches of 2 x 60 rows, and the same batches in two files of three."""
    table = pq.read_table(write_examples(folder, rows=720))
    thirds = [table.slice(start, 180) for start in range(0, 720, 180)]
    paths = (folder / "six.parquet", folder / "first.parquet", folder / "second.parquet")
    for path, order in zip(paths, ((0, 1, 2, 3), (0, 2), (1, 3)), strict=True):
        # One row group: the order of row groups is drawn anew for every file.
        pq.write_table(pa.concat_tables([thirds[k] for k in order]).combine_chunks(), path)
    return paths


def job_on(data: Path, snapshot: Path, *, start: Path | None = None, shards: int = 2) -> JobConfig:
    job = every_optimizer_job(data, shards=shards)
    return replace(
        job,
        data=replace(job.data, train=data, test=None, shuffle_rows=0),
        train=replace(job.train, epochs=1, start_from=start),
        output=replace(job.output, snapshot=snapshot),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return write_parts(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def half(
    files: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory, ray_session: None
) -> TrainResult:
    """Three steps and a snapshot."""
    return train(job_on(files[1], tmp_path_factory.mktemp("half"), shards=3))


def test_three_steps_a_snapshot_and_three_more_end_with_the_bits_of_six(
    files: tuple[Path, Path, Path], half: TrainResult, tmp_path: Path
) -> None:
    whole = train(job_on(files[0], tmp_path / "whole"))
    assert half.snapshot is not None
    assert whole.snapshot is not None
    # The root's LATEST names the snapshot; another number of shards takes it up.
    plan = plan_job(job_on(files[2], tmp_path / "rest", start=half.snapshot.parent, shards=2))
    with running(plan.job) as run:
        assert_holds(run, open_snapshot(half.snapshot, verify=True))
        train_steps(run, plan, [])
        folder = take_snapshot(run, plan)
    assert folder is not None
    assert folder.name == whole.snapshot.name == "step-000000006"
    ended, wanted = (open_snapshot(p, verify=True) for p in (folder, whole.snapshot))
    assert (ended.step, ended.seed, ended.job) == (6, 11, "every-optimizer")
    assert bits(ended) == bits(wanted)
    assert bits(ended) != bits(open_snapshot(half.snapshot))


def assert_holds(run: Run, snapshot: Snapshot) -> None:
    """The shards hold what the snapshot does."""
    for table in snapshot.tables:
        state = run.shards.read_table(table.name, 3)
        np.testing.assert_array_equal(table.rows, state.rows)
        assert state.slots.keys() == set(table.slot_names)
        for slot, values in state.slots.items():
            np.testing.assert_array_equal(table.slot(slot), values)
    assert snapshot.dense is not None
    dense, slots, state_values = run.shards.read_dense(3)
    values = snapshot.dense.values()
    np.testing.assert_array_equal(values.trainable, dense)
    np.testing.assert_array_equal(values.state, state_values)
    assert values.slots.keys() == slots.keys()
    for slot, slot_values in slots.items():
        np.testing.assert_array_equal(values.slots[slot], slot_values)


def test_tensorflow_restores_what_was_trained(half: TrainResult, tmp_path: Path) -> None:
    import tensorflow as tf

    from serving.tf.checkpoint import write_checkpoint

    assert half.snapshot is not None
    snapshot = open_snapshot(half.snapshot)
    inputs = ModelInputs(
        activations={"user": (8,), "items": (8,), "genre": (4,), "recent": (4, 8),
                     "recent_bag": (8,), "user_again": (3,)},
        num_dense=1,
        seed=0,
    )  # fmt: skip
    prefix = write_checkpoint(snapshot, tmp_path, model=build_mlp(inputs))
    stock = tf.tpu.experimental.embedding
    optimizers = {"users": stock.Adam(), "items": stock.Adagrad(), "genres": stock.FTRL(),
                  "recents": stock.AdagradMomentum(), "plain": stock.SGD()}  # fmt: skip
    tables = {
        t.name: stock.TableConfig(
            t.vocabulary_size, t.dim, optimizer=optimizers[t.name], combiner="sum", name=t.name
        )
        for t in snapshot.tables
    }
    embedding = stock.TPUEmbeddingForServing(
        {name: stock.FeatureConfig(table) for name, table in tables.items()}, None
    )
    embedding.build()
    model = build_mlp(inputs)
    status = tf.train.Checkpoint(model=model, embedding=embedding).restore(prefix)
    status.assert_consumed()
    found = embedding({name: tf.range(t.vocabulary_size) for name, t in tables.items()})
    for table in snapshot.tables:
        np.testing.assert_array_equal(found[table.name], table.rows)
    assert snapshot.dense is not None
    trained = [v.numpy().reshape(-1) for v in (*model.trainable_variables, model.running)]
    values = snapshot.dense.values()
    wanted = np.concatenate([values.trainable, values.state])
    np.testing.assert_array_equal(np.concatenate(trained), wanted)


def test_a_snapshot_that_does_not_fit_is_refused_before_anything_starts(
    files: tuple[Path, Path, Path], half: TrainResult, tmp_path: Path
) -> None:
    job = job_on(files[2], tmp_path / "out", start=half.snapshot)
    users, ftrl = job.tables["users"], FTRL(0.05, multiply_linear_by_learning_rate=True)
    for table, entry, message in [
        ("users", replace(users, vocabulary_size=301), r"is \[300, 8\], the job has \[301, 8\]"),
        ("users", replace(users, optimizer=Adagrad()), "optimizer Adam, the job has Adagrad"),
        ("genres", replace(job.tables["genres"], optimizer=ftrl), "multiply_linear.*=False"),
    ]:
        bad = replace(job, tables={**job.tables, table: entry})
        with pytest.raises(ConfigError, match=rf"train\.start_from: .*table '{table}'.*{message}"):
            plan_job(bad)
    fewer = {name: f for name, f in job.features.items() if name != "genre"}
    tables = {name: t for name, t in job.tables.items() if name != "genres"}
    with pytest.raises(ConfigError, match="has table 'genres', which the job has not"):
        plan_job(replace(job, features=fewer, tables=tables))
    more = {**job.features, "again": replace(job.features["user"], table="new", column="user")}
    with pytest.raises(ConfigError, match=r"has no table 'new'; it has \['genres'"):
        plan_job(replace(job, features=more, tables={**job.tables, "new": users}))
    with pytest.raises(SnapshotError, match="no such folder"):
        plan_job(replace(job, train=replace(job.train, start_from=tmp_path / "nowhere")))
    other_rate = replace(job, tables={**job.tables, "users": replace(users, optimizer=Adam(0.5))})
    assert plan_job(other_rate).last_step == 6


def test_another_dense_optimizer_is_refused_before_anything_is_loaded(
    files: tuple[Path, Path, Path], half: TrainResult, tmp_path: Path
) -> None:
    job = job_on(files[2], tmp_path / "out", start=half.snapshot, shards=1)
    one_worker = replace(job.cluster, workers=1)
    train_config = replace(job.train, dense_optimizer=FTRL())
    other = replace(job, train=train_config, cluster=one_worker)
    with pytest.raises(
        ConfigError, match=r"train\.start_from: .* has optimizer Adam, the job has F"
    ):
        train(other)
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_last_step_that_is_there_already_is_found_before_training(
    files: tuple[Path, Path, Path], half: TrainResult
) -> None:
    assert half.snapshot is not None
    with pytest.raises(ConfigError, match=r"output\.snapshot: there is '.*step-000000003' already"):
        plan_job(job_on(files[1], half.snapshot.parent))


def test_test_data_with_a_bad_id_does_not_lose_the_training(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    job = job_on(files[1], tmp_path / "snapshots")
    table = pq.read_table(files[1]).slice(0, 1)
    place = table.schema.get_field_index("user")
    bad = pa.array([10**6]).cast(table.schema.field("user").type)
    pq.write_table(table.set_column(place, "user", bad), tmp_path / "test.parquet")
    with pytest.raises(IdRangeError, match="1000000 is not in"):
        train(replace(job, data=replace(job.data, test=tmp_path / "test.parquet")))
    assert open_snapshot(tmp_path / "snapshots").step == 3
