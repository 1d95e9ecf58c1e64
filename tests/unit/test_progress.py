"""What a run shows and leaves behind: lines, the metrics file, Prometheus metrics."""

from __future__ import annotations

import io
import json
import logging
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ps.errors import JobError
from ps.messages import ShardStats
from workers.progress import MetricsFile, PlainLines
from workers.prometheus import Prometheus
from workers.recovery_config import RecoveryConfig
from workers.report import CAUSES, Progress, ShardTraffic, StepRecord, StepReport

PLAN: Any = SimpleNamespace(
    job=SimpleNamespace(
        name="demo",
        cluster=SimpleNamespace(shards=2, workers=2),
        train=SimpleNamespace(batch_size=20),
        recovery=RecoveryConfig(),
    ),
    train_rows=80,
    total_steps=4,
    steps_per_epoch=4,
    first_step=0,
)
SECONDS = dict.fromkeys(CAUSES, 0.0) | {"input": 0.25, "pull": 0.5, "dense": 3.25}
STATS = tuple(ShardStats(s, 2, 80 + s, 60, 0, 1000, 4096) for s in range(2))


def record(step: int, loss: float = 0.5) -> StepRecord:
    traffic = ShardTraffic((0.25, 0.5), (8, 12), (100, 300), (200, 600))
    return StepRecord(step, 10, loss, 40, 20, step, tuple(SECONDS.values()), traffic)


def progress(*, keep: bool = False, loss: float = 0.5) -> Progress:
    steps = [record(0, loss), record(1, loss)]
    before = [ShardStats(s, 0, 0, 0, 0, 1000, 4096) for s in range(2)]
    reports = [StepReport.of(steps, keep=keep) for _ in range(2)]
    return Progress.of(PLAN, 2, reports, 2.0, before, STATS)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_names_the_main_causes_of_time() -> None:
    out = io.StringIO()
    PlainLines(Console(file=out)).progress(progress())
    assert out.getvalue() == (
        "step 2 epoch 1 loss 0.5000 | 20 examples/s | input 6% pull 12% barrier 0% dense 81% | "
        "staleness 1 | 0k + 0k rows/s\n"
    )


def test_progress_events_keep_their_fields_and_gain_parts(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "new" / "metrics.jsonl") as metrics:
        metrics.starting(PLAN)
        metrics.progress(progress(loss=float("nan")))
    start, event = lines(tmp_path / "new" / "metrics.jsonl")
    assert start["event"] == "starting"
    assert event["event"] == "progress"
    known = {"step", "epoch", "examples", "loss", "examples_per_s", "staleness", "unique_ratio"}
    assert known | {"pull_wait", "dense", "shard_rows_per_s"} <= event.keys()
    assert event["loss"] is None
    assert event["time"] == {cause: s / 4.0 for cause, s in SECONDS.items()}
    assert event["staleness_counts"] == [2, 2]
    assert event["sent_bytes_per_step"] == 800.0
    assert event["shard_bytes_per_s"] == [600.0, 1800.0]
    assert not {"reports", "stats"} & event.keys()


def test_kept_steps_are_written_in_order_before_their_report(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.starting(PLAN)
        metrics.progress(progress(keep=True))
    events = lines(tmp_path / "metrics.jsonl")
    assert [e["event"] for e in events] == ["starting", *["step"] * 4, "progress"]
    steps = events[1:5]
    assert [(e["step"], e["worker"]) for e in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert steps[0]["seconds"] == SECONDS
    assert steps[0]["total_s"] == 4.0
    assert steps[0]["shard_received_bytes"] == [200, 600]


def test_an_unwritable_metrics_file_is_a_job_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match=r"metrics file .*: File exists"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl").starting(PLAN)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_a_job_error_and_hides_no_other() -> None:
    with (
        pytest.raises(JobError, match="metrics file /dev/full: No space left on device"),
        MetricsFile(Path("/dev/full")) as metrics,
    ):
        metrics.starting(PLAN)


class Kinds:
    """Stands for `ray.util.metrics`: every kind of metric writes down what it is told."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], list[float]] = defaultdict(list)

    def Counter(self, name: str, text: str, tags: tuple[str, ...]) -> Any:
        def inc(value: float, given: dict[str, str]) -> None:
            assert value > 0, "Ray refuses it"
            self._add(name, tags, value, given)

        return SimpleNamespace(inc=inc, set_default_tags=self._defaults)

    def Gauge(self, name: str, text: str, tags: tuple[str, ...]) -> Any:
        return SimpleNamespace(
            set=lambda value, given: self._add(name, tags, value, given),
            set_default_tags=self._defaults,
        )

    def Histogram(self, name: str, text: str, bounds: list[float], tags: tuple[str, ...]) -> Any:
        assert bounds == sorted(bounds)
        assert bounds[0] > 0, "Ray refuses it"
        return SimpleNamespace(
            observe=lambda value, given: self._add(name, tags, value, given),
            set_default_tags=self._defaults,
        )

    def _defaults(self, tags: dict[str, str]) -> None:
        assert tags == {"job_name": "demo"}

    def _add(self, name: str, tags: tuple[str, ...], value: float, given: dict[str, str]) -> None:
        assert tuple(given) == tags[1:], "every tag of a series, no other"
        self.values[name, *given.values()].append(value)


def test_prometheus_gets_every_figure_once_with_its_tags() -> None:
    kinds = Kinds()
    prometheus = Prometheus("demo", kinds)
    prometheus.starting(PLAN)
    prometheus.progress(progress())
    prometheus.progress(progress())
    got = {series: sum(values) for series, values in kinds.values.items()}
    assert got["manta_steps_total", "1"] == 4
    assert got["manta_examples_total", "0"] == 40
    assert got["manta_wait_seconds_total", "0", "dense"] == 13.0
    assert ("manta_wait_seconds_total", "0", "barrier") not in got
    assert got["manta_shard_wait_seconds_total", "1"] == 4.0, "of both workers"
    assert got["manta_bytes_total", "1", "received"] == 4800
    assert got["manta_rows_pulled_total", "1"] == 81, "shards count since they started"
    assert kinds.values["manta_step_seconds", "0"] == [4.0] * 4
    assert sorted(kinds.values["manta_staleness", "0"]) == [0, 0, 1, 1]
    assert kinds.values["manta_loss",] == [0.5, 0.5]
    assert kinds.values["manta_shard_bytes", "0"] == [4096, 4096]


def test_prometheus_never_stops_a_run_and_complains_once(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __getattr__(self, kind: str) -> Any:
            raise RuntimeError("no metrics here")

    prometheus = Prometheus("demo", Broken())
    with caplog.at_level(logging.WARNING):
        prometheus.progress(progress())
        prometheus.progress(progress())
    assert [r.getMessage() for r in caplog.records] == [
        "job demo has no more Prometheus metrics: RuntimeError('no metrics here')"
    ]
