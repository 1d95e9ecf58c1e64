"""A run's figures as Prometheus metrics, through Ray: the agent of the driver's node exports them.

The driver publishes once per progress report. It has all workers' and shards' figures by then, no
step waits for it, and what it published last is sent when it leaves; an actor that is killed takes
up to ten seconds of metrics with it.
"""

from __future__ import annotations

import logging
from typing import Any

from ps.messages import ShardStats
from workers.jobplan import JobPlan
from workers.listener import Listener
from workers.report import CAUSES, Progress, StepReport

_log = logging.getLogger(__name__)

# Not `job`: Prometheus gives that label to whatever it scrapes, and would rename ours.
_JOB = "job_name"
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "manta_steps_total": ("Steps", ("worker",)),
    "manta_examples_total": ("Examples trained on", ("worker",)),
    "manta_wait_seconds_total": ("Where a worker's time went", ("worker", "cause")),
    "manta_rows_pulled_total": ("Rows that a shard gave to workers", ("shard",)),
    "manta_rows_pushed_total": ("Row gradients that a shard got", ("shard",)),
    "manta_bytes_total": ("Between workers and a shard, seen from workers", ("shard", "direction")),
    "manta_shard_wait_seconds_total": ("Time of workers waiting for a shard", ("shard",)),
}
_GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "manta_step": ("Steps behind the tables", ()),
    "manta_loss": ("Mean loss since the last report", ()),
    "manta_unique_ratio": ("Distinct rows pulled per id looked up", ()),
    "manta_table_rows": ("Rows of all tables on a shard", ("shard",)),
    "manta_shard_bytes": ("Memory of a shard's rows and slots", ("shard",)),
}
# Ray's agent puts a whole bucket at its middle; the first must start above 0.
_HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], list[float]]] = {
    "manta_step_seconds": (
        "Time of a worker's step",
        ("worker",),
        [m * 10.0**e for e in range(-4, 2) for m in (1, 2, 5)],
    ),
    "manta_staleness": (
        "Steps between a step and the rows it read",
        ("worker",),
        [0.5, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128],
    ),
}


class Prometheus(Listener):
    """A `Listener` that counts into Ray's metrics; whatever goes wrong there, the run goes on."""

    def __init__(self, job_name: str, kinds: Any = None) -> None:
        """Name the job. `kinds` has Counter, Gauge, Histogram; `ray.util.metrics` if None."""
        self._job_name = job_name
        self._kinds = kinds
        self._metrics: dict[str, Any] = {}
        self._pulled_pushed: dict[int, tuple[int, int]] = {}
        self._off = False

    def starting(self, plan: JobPlan) -> None:
        """See `Listener`; Ray may not be there yet."""

    def progress(self, progress: Progress) -> None:
        """See `Listener`."""
        if self._off:
            return
        try:
            self._publish(progress)
        except Exception as e:
            self._off = True
            _log.warning("job %s has no more Prometheus metrics: %r", self._job_name, e)

    def finished(self, result: Any) -> None:
        """See `Listener`; Ray may be gone already."""

    def _publish(self, progress: Progress) -> None:
        if not self._metrics:
            self._metrics = self._make()
        for worker, report in enumerate(progress.reports):
            self._worker(str(worker), report)
        for stats in progress.stats:
            self._shard(stats)
        self._set("manta_step", progress.step)
        self._set("manta_loss", progress.loss)
        self._set("manta_unique_ratio", progress.unique_ratio)

    def _worker(self, worker: str, report: StepReport) -> None:
        self._count("manta_steps_total", report.steps, worker=worker)
        self._count("manta_examples_total", report.examples, worker=worker)
        for cause, seconds in zip(CAUSES, report.seconds, strict=True):
            self._count("manta_wait_seconds_total", seconds, worker=worker, cause=cause)
        for seconds in report.step_times_s:
            self._observe("manta_step_seconds", seconds, worker=worker)
        for staleness, steps in enumerate(report.staleness):
            for _ in range(steps):
                self._observe("manta_staleness", staleness, worker=worker)
        traffic = report.traffic
        for name, by_shard, tags in (
            ("manta_shard_wait_seconds_total", traffic.wait_s, {}),
            ("manta_bytes_total", traffic.sent_bytes, {"direction": "sent"}),
            ("manta_bytes_total", traffic.received_bytes, {"direction": "received"}),
        ):
            for shard, value in enumerate(by_shard):
                self._count(name, value, shard=str(shard), **tags)

    def _shard(self, stats: ShardStats) -> None:
        shard = str(stats.shard_id)
        pulled, pushed = self._pulled_pushed.get(stats.shard_id, (0, 0))
        self._pulled_pushed[stats.shard_id] = stats.rows_pulled, stats.rows_pushed
        self._count("manta_rows_pulled_total", stats.rows_pulled - pulled, shard=shard)
        self._count("manta_rows_pushed_total", stats.rows_pushed - pushed, shard=shard)
        self._set("manta_table_rows", stats.num_rows, shard=shard)
        self._set("manta_shard_bytes", stats.size_bytes, shard=shard)

    def _make(self) -> dict[str, Any]:
        kinds = self._kinds
        if kinds is None:
            from ray.util import metrics as kinds  # type: ignore[no-redef]
        job = {_JOB: self._job_name}
        made: dict[str, Any] = {}
        for name, (text, tags) in _COUNTERS.items():
            made[name] = kinds.Counter(name, text, (_JOB, *tags))
        for name, (text, tags) in _GAUGES.items():
            made[name] = kinds.Gauge(name, text, (_JOB, *tags))
        for name, (text, tags, boundaries) in _HISTOGRAMS.items():
            made[name] = kinds.Histogram(name, text, boundaries, (_JOB, *tags))
        for metric in made.values():
            metric.set_default_tags(job)
        return made

    def _count(self, name: str, value: float, **tags: str) -> None:
        if value > 0:  # Ray refuses to add nothing
            self._metrics[name].inc(value, tags)

    def _set(self, name: str, value: float, **tags: str) -> None:
        self._metrics[name].set(value, tags)

    def _observe(self, name: str, value: float, **tags: str) -> None:
        self._metrics[name].observe(value, tags)
