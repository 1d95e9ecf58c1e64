"""`train`: a job from its first step, or from where an earlier run of it ended, to its export."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ps.cluster import ray_cluster
from ps.messages import ShardStats
from workers.config import JobConfig
from workers.jobplan import JobPlan, plan_job
from workers.listener import Listener
from workers.prometheus import Prometheus
from workers.recovery import Recovery
from workers.remote import unwrapped
from workers.report import Progress
from workers.resume import resumed
from workers.run import Run
from workers.snapshots import as_path
from workers.supervisor import Supervisor


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a finished run did."""

    steps: int
    """Of the whole job; `resumed_step` of them lay behind it when this run began."""
    examples: int
    train_s: float
    metrics: dict[str, float]
    """Metrics on the test data; empty without any."""
    shards: tuple[ShardStats, ...]
    export: Path | None
    """The version folder that was written."""
    snapshot: Path | str | None = None
    """The snapshot that was written; text where it is no local folder."""
    resumed_step: int = 0
    recoveries: tuple[Recovery, ...] = ()


def train(
    job: JobConfig,
    listeners: Sequence[Listener] = (),
    *,
    address: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainResult:
    """Run a job to the export: from the first step, or from where an earlier run of it ended.

    It runs on the Ray that is connected; else on the cluster at `address`, or on one started on
    this machine for the run (see `ps.cluster.ray_cluster`).

    With `recovery.durability` the run goes on from the job's newest snapshot, or takes over the
    shards of a driver that was killed; and what dies while it runs is replaced. What comes out has
    the same bits in sync mode.

    Raises:
        MantaError: bad input or configuration, or an actor that died and cannot be replaced; the
            actors are stopped and nothing half-written counts as written.
    """
    plan = resumed(plan_job(job))
    told = _Recoveries()
    listeners = [*listeners, Prometheus(job.name), told]
    for listener in listeners:
        listener.starting(plan)
    with ray_cluster(address, job.num_cpus), running(plan.job) as run:
        if run.resumed_step > plan.first_step:
            for listener in listeners:
                listener.resumed(run.resumed_step)
        with unwrapped():
            supervisor = Supervisor(run, plan, listeners, clock)
            started = clock()
            supervisor.train()
            train_s = clock() - started
            # First the snapshot: bad test data must not lose the training.
            snapshot = supervisor.snapshot(plan.last_step)
            metrics = supervisor.evaluate()
            export = supervisor.supervised(lambda: run.export(plan.last_step))
            shards = tuple(supervisor.supervised(run.shards.stats))
        result = TrainResult(
            steps=plan.total_steps,
            examples=plan.total_steps * job.train.batch_size,
            train_s=train_s,
            metrics=metrics,
            shards=shards,
            export=export,
            snapshot=None if snapshot is None else as_path(snapshot.location),
            resumed_step=run.resumed_step,
            recoveries=tuple(told.recoveries),
        )
    for listener in listeners:
        listener.finished(result)
    return result


@contextmanager
def running(job: JobConfig) -> Iterator[Run]:
    """The actors of a job, started; they are stopped at the end of the `with`."""
    run = Run(job)
    try:
        with unwrapped():
            run.start()
            yield run
    finally:
        run.stop()


class _Recoveries(Listener):
    def __init__(self) -> None:
        self.recoveries: list[Recovery] = []

    def recovered(self, recovery: Recovery) -> None:
        self.recoveries.append(recovery)


__all__ = ["JobPlan", "Progress", "Run", "TrainResult", "plan_job", "running", "train"]
