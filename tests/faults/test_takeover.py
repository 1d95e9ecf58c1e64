"""A driver that is killed and started again finds its shards alive, and goes on where they are."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from ps.errors import JobError
from ps.snapshot import complete_snapshots
from workers.config import load_job
from workers.job import train
from workers.prepare import prepare_synthetic
from workers.progress import MetricsFile

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("ray_session")]

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


def events(metrics: Path, kind: str) -> list[dict[str, Any]]:
    if not metrics.exists():
        return []
    lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_driver_started_again_takes_over_the_shards(tmp_path: Path) -> None:
    prepare_synthetic("movielens", tmp_path / "data", rows=20_000, num_users=1000, num_items=500)
    metrics = tmp_path / "metrics.jsonl"
    settings = {
        "data.train": tmp_path / "data/train.parquet",
        "data.test": "null",
        "train.epochs": 250,
        "train.report_every": 20,
        "output.export": "null",
        "output.metrics": metrics,
        "output.snapshot": tmp_path / "snapshots",
        "recovery.durability": "snapshot",
        "recovery.snapshot_every": 100_000,  # so that there is nothing else to go on from
        "cluster.workers": 1,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-m", "manta", "train", str(CONFIG), "--address", address, "--quiet",
         *(x for setting in overrides for x in ("--set", setting))]
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not [e for e in events(metrics, "progress") if e["step"] >= 100]:
        assert driver.poll() is None, "the driver ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job = load_job(CONFIG, overrides)
    with pytest.raises(JobError, match="being driven already"):
        train(job)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    with MetricsFile(metrics) as file:
        result = train(job, [file])
    assert result.resumed_step >= 100
    assert events(metrics, "resumed") == [{"event": "resumed", "step": result.resumed_step}]
    assert result.steps == max(e["step"] for e in events(metrics, "progress"))
    assert complete_snapshots(tmp_path / "snapshots") == [result.steps]
