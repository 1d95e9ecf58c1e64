"""What a run publishes is at the node's metrics port for Prometheus, on Ray as we start it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from ps.messages import ShardStats
from workers.prometheus import Prometheus
from workers.report import CAUSES, Progress, ShardTraffic, StepRecord, StepReport

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_session")]

JOB = "scraped-job"


def progress() -> Progress:
    plan: Any = SimpleNamespace(
        first_step=0, steps_per_epoch=4, job=SimpleNamespace(train=SimpleNamespace(batch_size=10))
    )
    seconds = tuple({"pull": 0.003, "dense": 0.004}.get(cause, 0.0) for cause in CAUSES)
    traffic = ShardTraffic((0.001, 0.002), (8, 12), (100, 300), (200, 600))
    steps = [StepRecord(step, 10, 0.25, 40, 20, step, seconds, traffic) for step in range(3)]
    before = [ShardStats(s, 0, 0, 0, 0, 1000, 4096) for s in range(2)]
    after = [ShardStats(s, 3, 24 + s, 36, 0, 1000, 4096) for s in range(2)]
    return Progress.of(plan, 3, [StepReport.of(steps)], 1.0, before, after)


def scraped() -> dict[tuple[str, ...], float]:
    """Our series of the node's endpoint: (name without `ray_manta_`, values of our labels…)."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = httpx.get(url, timeout=30, trust_env=False).raise_for_status().text
    ours = ("worker", "shard", "cause", "direction", "le")
    return {
        (
            sample.name.removeprefix("ray_manta_"),
            *(sample.labels[label] for label in ours if label in sample.labels),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("job_name") == JOB
    }


PUBLISHED = {
    ("steps_total", "0"): 3,
    ("examples_total", "0"): 30,
    ("wait_seconds_total", "0", "pull"): 0.009,
    ("wait_seconds_total", "0", "dense"): 0.012,
    ("shard_wait_seconds_total", "1"): 0.006,
    ("bytes_total", "1", "sent"): 900,
    ("bytes_total", "0", "received"): 600,
    ("rows_pulled_total", "1"): 25,
    ("rows_pushed_total", "1"): 36,
    ("step_seconds_bucket", "0", "0.005"): 0,
    ("step_seconds_bucket", "0", "0.01"): 3,
    ("step_seconds_count", "0"): 3,
    ("staleness_bucket", "0", "0.5"): 1,  # rows of the step's own version
    ("staleness_bucket", "0", "1.0"): 2,
    ("loss",): 0.25,
    ("unique_ratio",): 0.5,
    ("step",): 3,
    ("table_rows", "0"): 1000,
    ("shard_bytes", "0"): 4096,
}


def test_a_scrape_of_the_node_finds_what_a_run_published() -> None:
    often = {"env_vars": {"RAY_metrics_report_interval_ms": "1000"}}  # not every 10 s
    publisher = ray.remote(Prometheus).options(num_cpus=0, runtime_env=often).remote(JOB)
    try:
        ray.get(publisher.progress.remote(progress()), timeout=60)
        deadline = time.monotonic() + 60
        while not PUBLISHED.keys() <= (seen := scraped()).keys() and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        ray.kill(publisher)
    assert {series: seen.get(series) for series in PUBLISHED} == pytest.approx(PUBLISHED)
