"""`manta export` and `manta import`: from training to TensorFlow's files, and back to training."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from ps.export import open_export
from ps.inputs import Bags, Dense
from ps.ragged import Ragged
from ps.snapshot import open_snapshot
from serving.lookup import LookupService
from tests.e2e.conftest import Manta

pytestmark = pytest.mark.e2e

tpu = tf.tpu.experimental.embedding
BAGS = [[0, 3], [], [5, 5, 7]]


@pytest.fixture(scope="module")
def trained(manta: Manta, configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `snapshot`, `export`, `checkpoint` and `model` of one trained job."""
    folder = tmp_path_factory.mktemp("trained")
    _done(manta("prepare", "synthetic", "movielens", "runs/demo/data", "--rows", "6000",
                "--users", "1000", "--items", "500", cwd=folder))  # fmt: skip
    _done(manta("train", configs / "demo.yaml", "--set", "train.epochs=1",
                "--set", "output.snapshot=snapshot", cwd=folder))  # fmt: skip
    written = _done(manta("export", "snapshot", "--export", "export", "--checkpoint", "checkpoint",
                          "--saved-model", "model", "--input", "user=dense",
                          cwd=folder))  # fmt: skip
    assert [line.split(":")[0] for line in written.splitlines()] == [
        "export",
        "checkpoint",
        "SavedModel",
    ]
    return folder


def test_stock_tensorflow_restores_the_checkpoint(trained: Path) -> None:
    snapshot = open_snapshot(trained / "snapshot")
    tables = {
        t.name: tpu.TableConfig(t.vocabulary_size, t.dim, combiner=t.combiner, name=t.name)
        for t in snapshot.tables
    }
    features = {f.name: tpu.FeatureConfig(tables[f.table]) for f in snapshot.features}
    embedding = tpu.TPUEmbeddingForServing(features, optimizer=None)
    embedding.build()
    prefix = tf.train.latest_checkpoint(str(trained / "checkpoint"))
    tf.train.Checkpoint(embedding=embedding).restore(prefix).assert_existing_objects_matched()
    found = embedding.embedding_lookup({"genres": tf.ragged.constant(BAGS, dtype=tf.int64)})
    service = LookupService(open_export(trained / "export"))
    wanted = service.lookup({"genres": Ragged.from_lists(BAGS)})["genres"]
    np.testing.assert_allclose(found["genres"].numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(wanted).max() > 0


def test_the_saved_model_predicts_what_training_would(trained: Path) -> None:
    export = open_export(trained / "export")
    serve = tf.saved_model.load(str(trained / "model")).signatures["serving_default"]
    ids = {"user": [1, 2, 3], "item": [4, 5, 6], "user_bias": [1, 2, 3], "item_bias": [4, 5, 6]}
    arguments = {"user": tf.constant(ids["user"], tf.int64)}
    for name in ("item", "user_bias", "item_bias"):
        arguments[name] = tf.constant(ids[name], tf.int64)
        arguments[f"{name}_row_splits"] = tf.constant([0, 1, 2, 3], tf.int64)
    arguments["genres"] = tf.constant([i for bag in BAGS for i in bag], tf.int64)
    arguments["genres_row_splits"] = tf.constant([0, 2, 2, 5], tf.int64)
    found = serve(**arguments)["predictions"].numpy()
    inputs = {name: Dense(np.array(values)) for name, values in ids.items()}
    rows = LookupService(export).lookup({**inputs, "genres": Bags(Ragged.from_lists(BAGS))})
    mean = export.dense_variables()["mean"]
    wanted = (rows["user"] * (rows["item"] + rows["genres"])).sum(axis=1) + mean
    wanted += rows["user_bias"][:, 0] + rows["item_bias"][:, 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_comes_back_bit_for_bit_and_trains_on(
    trained: Path, manta: Manta, configs: Path
) -> None:
    demo = configs / "demo.yaml"
    _done(manta("import", "checkpoint", demo, "--snapshot", "again", "--export", "again-export",
                "--step", "5", cwd=trained))  # fmt: skip
    first, again = open_snapshot(trained / "snapshot"), open_snapshot(trained / "again")
    served = open_export(trained / "again-export")
    for table in first.tables:
        copy = again.table(table.name)
        np.testing.assert_array_equal(copy.rows, table.rows)
        np.testing.assert_array_equal(served.tables[table.name].rows_VD, table.rows)
        assert copy.slot_names == table.slot_names
        for slot in table.slot_names:
            np.testing.assert_array_equal(copy.slot(slot), table.slot(slot))
    assert first.dense is not None
    assert again.dense is not None
    assert again.dense.model == first.dense.model
    np.testing.assert_array_equal(again.dense.values().trainable, first.dense.values().trainable)
    _done(manta("train", demo, "--set", "train.epochs=1", "--set", "train.start_from=again",
                "--set", "output.snapshot=more", cwd=trained))  # fmt: skip
    assert open_snapshot(trained / "more").step == 5 + first.step


def test_a_damaged_snapshot_is_not_exported(
    trained: Path, manta_here: Manta, tmp_path: Path
) -> None:
    copy = tmp_path / "snapshot"
    shutil.copytree(trained / "snapshot", copy)
    (rows,) = copy.glob("step-*/users.0-of-*.arrow")
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    rows.write_bytes(content)
    run = manta_here("export", copy, "--export", tmp_path / "export")
    assert run.returncode == 1
    assert re.fullmatch(r"error: .*users\.0-of-.*\.arrow' is damaged: xxh3 .*\n", run.stderr)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("export", "snapshot"), "say what to write: --export, --checkpoint or --saved-model"),
        (("export", "export", "--checkpoint", "x"), "need a snapshot, not 'export'"),
        (("export", "nothing", "--saved-model", "x"), "export '.*nothing': no such folder"),
        (("export", "snapshot", "--export", "x", "--input", "user=dense"), "give --saved-model"),
        (("export", "snapshot", "--export", "x", "--model", "a:b"), "--model is about the dense"),
        (("export", "snapshot", "--checkpoint", "x", "--model", "a:b", "--no-model"), "no-model"),
        (("export", "snapshot", "--saved-model", "model"), "the folder exists already"),
        (("export", "snapshot", "--saved-model", "x", "--input", "nobody=dense"), "'nobody'"),
        (("import", "checkpoint", "DEMO"), "say what to write: --export or --snapshot"),
        (("import", "nothing", "DEMO", "--export", "x"), "checkpoint"),
        (("import", "checkpoint", "DEMO", "--export", "x", "--attribute", "other"), "other"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(
    trained: Path, manta_here: Manta, configs: Path, arguments: tuple[str, ...], reason: str
) -> None:
    before = set(trained.iterdir())
    named = [str(configs / "demo.yaml") if a == "DEMO" else a for a in arguments]
    run = manta_here(*named, cwd=trained)
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.startswith("error: ")
    assert re.search(reason, run.stderr), run.stderr
    assert set(trained.iterdir()) == before


def _done(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 0, run.stderr
    return run.stdout
