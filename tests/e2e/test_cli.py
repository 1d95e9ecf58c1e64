"""From raw data to an answered lookup through the command line, and back against TensorFlow."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ps.export import open_export
from ps.ragged import Ragged
from serving.client import LookupClient
from tests.e2e.conftest import Manta

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def demo(manta: Manta, configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo's data were made and its job was run for one epoch."""
    folder = tmp_path_factory.mktemp("demo")
    prepared = manta("prepare", "synthetic", "movielens", "runs/demo/data", "--rows", "20000",
                     "--users", "1000", "--items", "500", cwd=folder)  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    trained = manta("train", configs / "demo.yaml", "--set", "train.epochs=3", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    (folder / "train.txt").write_text(trained.stdout)
    return folder


@pytest.fixture(scope="module")
def server(demo: Path) -> Iterator[str]:
    """A server of the demo's export, started by the command and stopped by SIGINT."""
    with subprocess.Popen(
        [sys.executable, "-m", "manta", "serve", "runs/demo/export", "--port", "0"],
        cwd=demo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"at (http://127\.0\.0\.1:\d+)", line)
        if found is None:
            process.kill()
            pytest.fail(f"no address in {line!r}; {process.communicate()[1]}")
        yield found[1]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors


def test_training_prints_plain_lines_when_not_in_a_terminal(demo: Path) -> None:
    text = (demo / "train.txt").read_text()
    assert "\x1b" not in text
    assert re.search(r"^step 50 epoch 3 loss \d\.\d+ .* examples/s .* staleness 0", text, re.M)
    assert re.search(r"^test rmse: \d\.\d+$", text, re.M)


def test_training_writes_a_metrics_file_and_beats_the_mean(demo: Path) -> None:
    lines = (demo / "runs/demo/metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    floor = json.loads((demo / "runs/demo/data/dataset.json").read_text())["noise_floor"]
    assert events[-1]["event"] == "finished"
    assert floor["test_rmse"] < events[-1]["metrics"]["rmse"] < floor["test_rmse_of_mean"] - 0.03


def test_http_answers_equal_stock_tensorflow(demo: Path, server: str) -> None:
    import tensorflow as tf

    embedding = tf.tpu.experimental.embedding
    export = open_export(demo / "runs/demo/export", verify=True)
    genres = [[3, 1, 3], [], [0], [18, 2]]
    with LookupClient(server) as client:
        got = client.lookup({"user": [0, 999, 5, 5], "genres": Ragged.from_lists(genres)})
    table = embedding.TableConfig(19, 16, combiner="mean", name="genres")
    users = embedding.TableConfig(1000, 16, name="users")
    wanted = embedding.serving_embedding_lookup(
        {
            "user": tf.constant([0, 999, 5, 5]),
            "genres": tf.RaggedTensor.from_row_splits(
                np.concatenate(genres).astype(np.int64), [0, 3, 3, 4, 6]
            ).to_sparse(),
        },
        None,
        {
            table: tf.Variable(export.tables["genres"].rows_VD),
            users: tf.Variable(export.tables["users"].rows_VD),
        },
        {"user": embedding.FeatureConfig(users), "genres": embedding.FeatureConfig(table)},
    )
    for name in ("user", "genres"):
        np.testing.assert_allclose(got[name], wanted[name].numpy(), rtol=1e-5, atol=1e-6)


def test_lookup_from_the_shell_prints_json(manta: Manta, demo: Path, server: str) -> None:
    run = manta("lookup", "user=1,2", "genres=[[0,3],[]]", "--url", server)
    assert run.returncode == 0, run.stderr
    outputs = json.loads(run.stdout)
    export = open_export(demo / "runs/demo/export")
    np.testing.assert_array_equal(
        np.float32(outputs["user"]), export.tables["users"].rows_VD[[1, 2]]
    )
    assert outputs["genres"][1] == [0.0] * 16


@pytest.mark.parametrize(
    ("args", "status", "reason"),
    [
        (["user=1000"], 422, r"feature 'user': id 1000 is not in \[0, 1000\) of table 'users'"),
        (["usr=1"], 422, "unknown feature 'usr'; did you mean 'user'"),
        (["user=1.5"], 422, "must be an integer"),
    ],
)
def test_a_refused_lookup_is_one_line_and_a_bad_exit(
    manta: Manta, server: str, args: list[str], status: int, reason: str
) -> None:
    run = manta("lookup", *args, "--url", server)
    assert run.returncode == 1
    assert re.fullmatch(rf"error: {status} .*{reason}.*\n", run.stderr), run.stderr


def test_a_lookup_without_a_server_is_one_line(manta: Manta) -> None:
    run = manta("lookup", "user=1", "--url", "http://127.0.0.1:9")
    assert run.returncode == 1
    assert re.fullmatch(r"error: no answer from http://127\.0\.0\.1:9.*\n", run.stderr)


def test_the_public_face_imports_lightly_and_completely() -> None:
    script = (
        "import sys, manta\n"
        "assert not {'ray', 'tensorflow', 'numba', 'pyarrow'} & set(sys.modules)\n"
        "manta.LookupClient, manta.Ragged\n"
        "assert not {'ray', 'tensorflow', 'numba', 'pyarrow'} & set(sys.modules)\n"
        "tf_names = [n for n, m in manta._MODULE_OF.items() if m.startswith('serving.tf')]\n"
        "[getattr(manta, name) for name in manta.__all__ if name not in tf_names]\n"
        "import workers.job; assert manta.train is workers.job.train\n"
        "assert 'tensorflow' not in sys.modules\n"
        "assert manta.EmbeddingForServing and [getattr(manta, name) for name in tf_names]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
