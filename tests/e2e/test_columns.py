"""Raw strings from Parquet to HTTP and to a SavedModel, through the command line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
import yaml

from ps.export import open_export
from serving.lookup import LookupService, Raw
from tests.e2e.conftest import Manta

pytestmark = pytest.mark.e2e

GENRES = ["action", "comedy", "drama"]
COLUMNS = [
    {
        "categorical_column": {
            "name": "categorical_column_with_vocabulary_list",
            "key": "genre",
            "vocabulary_list": GENRES,
        },
        "dimension": 8,
    },
    {
        "categorical_column": {
            "name": "categorical_column_with_hash_bucket",
            "key": "city",
            "hash_bucket_size": 20,
        },
        "dimension": 8,
        "combiner": "sum",
        "learning_rate_fn": {"name": "LinearDecay", "initial": 0.2, "final": 0.1, "steps": 9},
    },
]


@pytest.fixture(scope="module")
def export(manta: Manta, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a job that learned what people in each city think of genres."""
    folder, rng = tmp_path_factory.mktemp("columns"), np.random.default_rng(0)
    city, genre = rng.integers(0, 9, 4000), rng.integers(0, 3, 4000)
    liked = (city % 3 == genre).astype(np.float32)
    raw = {
        "city": [f"Stadt {c}ü" for c in city],
        "genre": [[GENRES[g], "unknown"] for g in genre],
        "liked": liked,
    }
    pq.write_table(pa.table(raw), folder / "examples.parquet", row_group_size=500)
    job = {
        "name": "taste",
        "data": {"train": "examples.parquet", "test": "examples.parquet", "label": "liked"},
        "columns": COLUMNS,
        "model": {"build": "dlrm", "params": {"top": [16]}},
        "train": {
            "epochs": 2,
            "batch_size": 200,
            "loss": "bce",
            "optimizer": {"name": "Adagrad", "learning_rate": 0.2},
            "dense_optimizer": {"name": "Adam", "learning_rate": 0.02},
        },
        "output": {"export": "export"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    trained = manta("train", "job.yaml", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    found = re.search(r"test auc: (\d\.\d+)", trained.stdout)
    assert found is not None, trained.stdout
    assert float(found[1]) > 0.9, "the planted taste is learned from raw strings"
    return folder / "export"


def test_the_server_answers_raw_strings(manta: Manta, export: Path) -> None:
    served = manta("serve", export, "--port", "0", "--check", "--verify")
    assert served.returncode == 0, served.stderr
    assert "action" in served.stdout
    assert re.search(r"genre: float32 \[1, 8\]", served.stdout), served.stdout


def test_a_saved_model_takes_the_same_strings(manta: Manta, export: Path) -> None:
    folder = export.parent / "saved"
    written = manta("export", export, "--saved-model", folder, "--no-model")
    assert written.returncode == 0, written.stderr
    serve = tf.saved_model.load(str(folder)).signatures["serving_default"]
    found = serve(
        genre=tf.constant(["drama", "action", "unknown"]),
        genre_row_splits=tf.constant([0, 2, 3], tf.int64),
        city=tf.constant(["Stadt 1ü", "nowhere"]),
        city_row_splits=tf.constant([0, 1, 2], tf.int64),
    )
    wanted = LookupService(open_export(export)).lookup(
        {
            "genre": Raw([["drama", "action"], ["unknown"]]),
            "city": Raw(["Stadt 1ü", "nowhere"]),
        }
    )
    for name, rows in wanted.items():
        np.testing.assert_allclose(found[name].numpy(), rows, rtol=1e-5, atol=1e-6)
    assert not wanted["genre"][1].any()
    assert wanted["city"].any(axis=1).all()
