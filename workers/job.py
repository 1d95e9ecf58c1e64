"""The training driver: start the actors, run the steps, evaluate, export, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray

from ps.cluster import actor_options, free_resources, ray_cluster
from ps.dense_variables import DenseValues
from ps.errors import JobError, MantaError
from ps.export import ExportWriter
from ps.group import ShardGroup
from ps.messages import ShardStats
from ps.shard import ShardSpec
from ps.snapshot import Snapshot, SnapshotWriter, open_snapshot
from ps.start import check_dense
from workers.config import JobConfig
from workers.jobplan import JobPlan, about, plan_job, start_snapshot
from workers.metrics import evaluate
from workers.prometheus import Prometheus
from workers.report import Progress
from workers.worker import TrainWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a finished run did."""

    steps: int
    examples: int
    train_s: float
    metrics: dict[str, float]
    """Metrics on the test data; empty without any."""
    shards: tuple[ShardStats, ...]
    export: Path | None
    """The version folder that was written."""
    snapshot: Path | None = None
    """The snapshot that was written."""


class Listener(Protocol):
    """Who is told how a run goes on."""

    def starting(self, plan: JobPlan) -> None:
        """The input is readable and the cluster is being started."""
        ...

    def progress(self, progress: Progress) -> None:
        """A number of steps is done."""
        ...

    def finished(self, result: TrainResult) -> None:
        """All done."""
        ...


def train(
    job: JobConfig,
    listeners: Sequence[Listener] = (),
    *,
    address: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainResult:
    """Run a job from the first step to the export.

    It runs on the Ray that is connected; else on the cluster at `address`, or on one started on
    this machine for the run (see `ps.cluster.ray_cluster`).

    Raises:
        MantaError: bad input or configuration, or an actor that died; the actors are stopped and
            nothing half-written stays behind.
    """
    plan = plan_job(job)
    listeners = [*listeners, Prometheus(job.name)]
    for listener in listeners:
        listener.starting(plan)
    with ray_cluster(address, job.num_cpus), running(plan.job) as run:
        started = clock()
        run.train(plan, listeners, clock)
        train_s = clock() - started
        snapshot = run.snapshot(plan.last_step)  # first: bad test data must not lose the training
        metrics = run.evaluate(plan)
        result = TrainResult(
            steps=plan.total_steps,
            examples=plan.total_steps * job.train.batch_size,
            train_s=train_s,
            metrics=metrics,
            shards=tuple(run.shards.stats()),
            export=run.export(plan.last_step),
            snapshot=snapshot,
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


class Run:
    """The actors of a running job."""

    def __init__(self, job: JobConfig) -> None:
        self.job = job = job.with_absolute_paths()
        self._start = start_snapshot(job)
        self.workers: list[Any] = []
        self.shards = ShardGroup(
            ShardSpec(
                shard_id=0,
                num_shards=job.cluster.shards,
                num_workers=job.cluster.workers,
                embedding=job.embedding_spec(),
                dense_optimizer=job.train.dense_optimizer,
                reduction=job.train.reduction,
                seed=job.seed,
                mode=job.train.mode,
                max_staleness=job.train.max_staleness or 0,
                combined=job.shard_combined,
                threads=job.cluster.threads_per_shard,
            ),
            job.cluster.shard_resources,
            job.name,
            job.train.wire_dtype,
            job.cluster.pin_shards,
        )

    def start(self) -> None:
        """Start workers, give the shards their first state, and connect both."""
        resources = self.job.cluster.worker_resources
        self.workers = [
            ray.remote(TrainWorker)
            .options(name=f"{self.job.name}-worker-{worker}", **actor_options(resources))
            .remote(self.job, worker)
            for worker in range(self.job.cluster.workers)
        ]
        timeout_s = self.job.cluster.start_timeout_s
        self.shards.wait_ready(timeout_s)
        setups = [worker.setup.remote() for worker in self.workers]
        dense, state = self._gather(setups, timeout_s, "set up", asking=resources)[0]
        first_step, values = 0, DenseValues(trainable=dense, slots={}, state=state)
        if self._start is not None:
            first_step, values = self._start.step, self._restore(self._start, values)
        layout = self.shards.set_dense(values, first_step)
        access = self.shards.access()
        connects = [w.connect.remote(access, layout, first_step) for w in self.workers]
        self._gather(connects, timeout_s, "connected")

    def _restore(self, snapshot: Snapshot, initial: DenseValues) -> DenseValues:
        """Let the shards load the tables; returns the dense values that the run starts with."""
        described = self._ask(self.workers[0].described.remote())
        open_snapshot(snapshot.path, verify=True)  # once, for it reads every byte
        with about("train.start_from"):
            check_dense(snapshot, described, self.job.train.dense_optimizer)
        self.shards.load_tables(snapshot)
        return initial if snapshot.dense is None else snapshot.dense.values()

    def train(
        self,
        plan: JobPlan,
        listeners: Sequence[Listener],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Run all steps; the next bunch is always queued before the last one is waited for."""
        every, step_timeout_s = self.job.train.report_every, self.job.cluster.step_timeout_s
        bunches = [min(every, plan.total_steps - s) for s in range(0, plan.total_steps, every)]
        stats, seen_at, done = self.shards.stats(), clock(), 0
        queued = self._run_steps(bunches[0])
        for i, steps in enumerate(bunches):
            current = queued
            if i + 1 < len(bunches):
                queued = self._run_steps(bunches[i + 1])
            reports = self._gather(current, steps * step_timeout_s, f"done {steps} steps")
            done += steps
            now, now_stats = clock(), self.shards.stats()
            progress = Progress.of(plan, done, reports, now - seen_at, stats, now_stats)
            stats, seen_at = now_stats, now
            for listener in listeners:
                listener.progress(progress)
        finishes = [worker.finish.remote() for worker in self.workers]
        self._gather(finishes, step_timeout_s, "sent their last gradients")

    def evaluate(self, plan: JobPlan) -> dict[str, float]:
        """Metrics on the test data after the last step, {} without any."""
        if self.job.data.test is None:
            return {}
        batches = plan.test_rows // self.job.train.batch_size + 2  # a worker's share, rounded up
        parts = self._gather(
            [worker.evaluate.remote(plan.last_step) for worker in self.workers],
            batches * self.job.cluster.step_timeout_s,
            "evaluated",
        )
        labels, predictions = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        train = self.job.train
        return evaluate(train.loss, labels, predictions, train.clip_predictions)

    def export(self, step: int) -> Path | None:
        """Write the tables and the dense model as a new export version."""
        root = self.job.output.export
        if root is None:
            return None
        dense, _, state = self.shards.read_dense(step)
        with ExportWriter(
            root,
            self.shards.embedding,
            step=step,
            job=self.job.name,
            transforms=self.job.transforms(),
        ) as writer:
            self.shards.write_tables(writer, step)
            named = self._ask(self.workers[0].variables.remote(dense, state))
            writer.add_dense(named, self._model())
            return writer.commit()

    def snapshot(self, step: int) -> Path | None:
        """Write everything that the shards hold as a snapshot."""
        root = self.job.output.snapshot
        if root is None:
            return None
        dense, slots, state = self.shards.read_dense(step)
        with SnapshotWriter(
            root,
            self.shards.embedding,
            step=step,
            seed=self.job.seed,
            job=self.job.name,
            transforms=self.job.transforms(),
        ) as writer:
            self.shards.write_tables(writer, step)
            writer.add_dense(
                self._ask(self.workers[0].described.remote()),
                DenseValues(trainable=dense, slots=slots, state=state),
                model=self._model(),
                optimizer=self.job.train.dense_optimizer,
            )
            return writer.commit()

    def _model(self) -> Any:
        return self._ask(self.workers[0].model.remote())

    def _ask(self, ref: Any) -> Any:
        return ray.get(ref, timeout=self.job.cluster.step_timeout_s)

    def stop(self) -> None:
        """Kill all actors."""
        for worker in self.workers:
            ray.kill(worker)
        self.shards.stop()

    def _run_steps(self, steps: int) -> list[Any]:
        return [worker.run.remote(steps) for worker in self.workers]

    def _gather(
        self,
        refs: Sequence[Any],
        timeout_s: float,
        what: str,
        asking: Mapping[str, float] | None = None,
    ) -> list[Any]:
        """All results; raises the first error at once, even while others are still waiting."""
        pending = list(refs)
        deadline = time.monotonic() + timeout_s
        while pending:
            ready, pending = ray.wait(
                pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic())
            )
            if not ready:
                hint = ""
                if asking is not None:
                    hint = f"; each asks for {asking}, the cluster has {free_resources()} free"
                raise JobError(
                    f"{len(pending)} of {len(refs)} workers had not {what} "
                    f"after {timeout_s:g} s{hint}"
                )
            ray.get(ready)
        results: list[Any] = ray.get(list(refs))
        return results


@contextmanager
def unwrapped() -> Iterator[None]:
    """Errors raised inside actors as they were raised there; a dead actor as a `JobError`."""
    try:
        yield
    except ray.exceptions.RayTaskError as e:
        cause: BaseException = e
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, MantaError):
            raise cause from None
        if isinstance(cause, ray.exceptions.RayError):
            raise JobError(_first_line(cause)) from None
        raise JobError(f"a worker failed: {type(cause).__name__}: {_first_line(cause)}") from e
    except ray.exceptions.RayError as e:
        raise JobError(_first_line(e)) from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # Of an actor that could not start, Ray gives the traceback: the last line says why.
    return f"{lines[0]} {lines[-1]}" if "creation task" in lines[0] else lines[0]
