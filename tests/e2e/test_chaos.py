"""`manta chaos` through the command line: a few random kills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Manta

pytestmark = [pytest.mark.e2e, pytest.mark.faults]


@pytest.fixture(scope="module")
def folder(manta: Manta, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chaos")
    prepared = manta("prepare", "synthetic", "movielens", "runs/demo/data", "--rows", "20000",
                     "--users", "1000", "--items", "500", cwd=made)  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    return made


def test_random_kills_change_no_bit(manta: Manta, configs: Path, folder: Path) -> None:
    settings = {
        "recovery.durability": "log",
        "recovery.snapshot_every": 100,
        "train.epochs": 50,
        "train.lookahead": 1,
        "cluster.workers": 1,
        "tables.users.optimizer.learning_rate": 0.01,
    }
    overrides = [x for key, value in settings.items() for x in ("--set", f"{key}={value}")]
    run = manta(
        "chaos", configs / "demo.yaml", "--kills", "3", "--seed", "5", "--mean-gap", "1.5",
        "--kinds", "shard,worker,driver,cut", "--json", *overrides, cwd=folder,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["good"]
    assert report["kills"] >= 3
    assert report["durability"] == "log"
    assert all(r["identical"] for r in report["rounds"])
