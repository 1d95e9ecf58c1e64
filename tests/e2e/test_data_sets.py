"""Whole data sets through prepare, train and serve: figures that are promised in the README."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Manta

pytestmark = pytest.mark.e2e


def last_event(folder: Path, job: str) -> dict[str, dict[str, float]]:
    lines = (folder / f"runs/{job}/metrics.jsonl").read_text().splitlines()
    event: dict[str, dict[str, float]] = json.loads(lines[-1])
    return event


def test_movielens_100k_split_u1_reaches_the_published_error(
    manta: Manta, configs: Path, real_data: Path, tmp_path: Path
) -> None:
    """GRALS 0.945, sRGCNN 0.929, GC-MC 0.910 (van den Berg et al., 2017, table 4)."""
    prepared = manta("prepare", "movielens", real_data / "ml-100k", "data/ml-100k",
                     "--split", "u1", cwd=tmp_path)  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    trained = manta("train", configs / "movielens.yaml", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    event = last_event(tmp_path, "movielens")
    assert event["metrics"]["rmse"] <= 0.90
    assert float(event["train_s"]) < 120  # type: ignore[arg-type]
    checked = manta("serve", "runs/movielens/export", "--port", "0", "--check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "rated: float32 [1, 16]" in checked.stdout


def test_the_real_criteo_head_goes_through_prepare_train_and_serve(
    manta: Manta, configs: Path, real_data: Path, tmp_path: Path
) -> None:
    prepared = manta("prepare", "criteo", real_data / "criteo/train-head.txt", "data/criteo",
                     cwd=tmp_path)  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    assert re.search(r"short_lines: 498\b", prepared.stdout), prepared.stdout
    assert re.search(r"empty_fields: 4,?855\b", prepared.stdout), prepared.stdout
    train_and_serve_criteo(manta, configs, tmp_path)


def test_irregular_criteo_lines_go_through_prepare_train_and_serve(
    manta: Manta, configs: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for row in range(1000):
        integers = [str(v) if v else "" for v in rng.integers(0, 20, 13)]
        categories = [f"{v:08x}" if v % 7 else "" for v in rng.integers(0, 50, 26)]
        fields = [str(row % 2), *integers, *categories]
        lines.append("\t".join(fields[: 40 - row % 3] if row % 5 == 0 else fields))
    (tmp_path / "raw.txt").write_text("\n".join(lines))
    prepared = manta("prepare", "criteo", "raw.txt", "data/criteo", cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    short = sum(line.count("\t") < 39 for line in lines)
    empty = sum(line.split("\t").count("") for line in lines)
    assert re.search(rf"short_lines: {short}\b", prepared.stdout), prepared.stdout
    assert re.search(rf"empty_fields: {empty:,}", prepared.stdout), prepared.stdout
    train_and_serve_criteo(manta, configs, tmp_path)


def train_and_serve_criteo(manta: Manta, configs: Path, folder: Path) -> None:
    trained = manta("train", configs / "criteo.yaml", "--set", "train.batch_size=64",
                    "--set", "train.epochs=2", cwd=folder)  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    metrics = last_event(folder, "criteo")["metrics"]
    assert 0.0 < metrics["auc"] < 1.0
    assert 0.0 < metrics["log_loss"] < 2.0
    checked = manta("serve", "runs/criteo/export", "--port", "0", "--check", cwd=folder)
    assert checked.returncode == 0, checked.stderr
    assert "C26: float32 [1, 16]" in checked.stdout


def test_dlrm_learns_the_planted_signal(manta: Manta, configs: Path, tmp_path: Path) -> None:
    prepared = manta("prepare", "synthetic", "criteo", "data/criteo", "--rows", "120000",
                     "--vocabulary", "26000", "--equal-tables", cwd=tmp_path)  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    trained = manta("train", configs / "criteo.yaml", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    floor = json.loads((tmp_path / "data/criteo/dataset.json").read_text())["noise_floor"]
    found = last_event(tmp_path, "criteo")["metrics"]["auc"]
    assert 0.5 + 0.6 * (floor["test_auc"] - 0.5) < found < floor["test_auc"] + 0.01
