"""Whole jobs: training while snapshots are written, and shards that are killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import ray

from benchmarks.dlrm.case import BATCH, Case, Setting, job
from ps.cluster import NAMESPACE
from workers.config import JobConfig
from workers.job import train
from workers.listener import Listener
from workers.recovery import Recovery
from workers.recovery_config import Durability, RecoveryConfig
from workers.report import Progress
from workers.snapshots import SnapshotReport

REPORT_EVERY = 20


def durable_job(
    case: Case, folder: Path, durability: Durability, epochs: int, every: int
) -> JobConfig:
    """The DLRM of `benchmarks.dlrm` with 2 shards and 1 worker, and what it must not lose."""
    made = job(case, Setting())
    recovery = RecoveryConfig()
    if durability != "none":
        recovery = RecoveryConfig(durability=durability, snapshot_every=every, keep=1)
    return replace(
        made,
        name=f"dlrm-{durability}",
        train=replace(made.train, epochs=epochs, report_every=REPORT_EVERY),
        output=replace(made.output, snapshot=folder / durability),
        recovery=recovery,
    )


@dataclass(frozen=True)
class Window:
    """A snapshot that was written while the job went on."""

    size_bytes: int
    seconds: float
    during: float
    """Steps per second while it was written,"""
    beside: float
    """and in spans as long before and after."""


class Watched(Listener):
    """Notes when steps were made and snapshots were complete; may kill a shard once."""

    def __init__(self, kill: str | None = None, after: int = 0) -> None:
        self.steps: list[tuple[float, int]] = []
        self.snapshots: list[tuple[float, SnapshotReport]] = []
        self.recoveries: list[tuple[float, Recovery]] = []
        self.killed_at = 0.0
        self._kill = kill
        self._after = after

    def progress(self, progress: Progress) -> None:
        """Note it, and kill if it is time: between snapshots."""
        self.steps.append((time.monotonic(), progress.step))
        if self._kill is not None and progress.step >= self._after:
            actor, self._kill = ray.get_actor(self._kill, NAMESPACE), None
            pid = ray.get(actor.process_id.remote())
            self.killed_at = time.monotonic()
            os.kill(pid, signal.SIGKILL)

    def snapshot(self, report: SnapshotReport) -> None:
        """Note it."""
        self.snapshots.append((time.monotonic(), report))

    def recovered(self, recovery: Recovery) -> None:
        """Note it."""
        self.recoveries.append((time.monotonic(), recovery))

    def windows(self, skipped: int = 1) -> list[Window]:
        """The snapshots after the first ones, but the last, which is written after training."""
        found = []
        for end, report in self.snapshots[skipped:-1]:
            start, span = end - report.seconds, report.seconds
            beside = [self._rate(start - 1.2 * span, start), self._rate(end, end + span)]
            found.append(Window(report.size_bytes, span, self._rate(start, end), sum(beside) / 2))
        return found

    def _rate(self, start: float, end: float) -> float:
        return (self._step_at(end) - self._step_at(start)) / (end - start)

    def _step_at(self, moment: float) -> float:
        before = [(t, s) for t, s in self.steps if t <= moment][-1]
        after = next(((t, s) for t, s in self.steps if t > moment), None)
        if after is None:
            return before[1]
        return before[1] + (after[1] - before[1]) * (moment - before[0]) / (after[0] - before[0])

    def median_rate(self, skipped: int = 20) -> float:
        """Examples per second, median over the reports."""
        seen = self.steps[skipped:]
        rates = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(seen)]
        return median(rates) * BATCH


def snapshot_cost(
    case: Case, folder: Path, durability: Durability, epochs: int, every: int
) -> Watched:
    """A job that goes on while its snapshots are written."""
    watched = Watched()
    train(durable_job(case, folder, durability, epochs, every), [watched])
    return watched


@dataclass(frozen=True)
class Killed:
    """One kill of a shard."""

    durability: Durability
    detect_s: float
    """From the signal until the driver began to act."""
    recovery: Recovery

    @property
    def total_s(self) -> float:
        """From the signal until a step was made that had not been made before."""
        return self.detect_s + self.recovery.total_s


def kill_a_shard(
    case: Case, folder: Path, durability: Durability, epochs: int, every: int, after: int
) -> Killed:
    """Kill one of two shards after so many steps."""
    made = durable_job(case, folder, durability, epochs, every)
    watched = Watched(f"{made.name}-shard-1", after)
    train(made, [watched])
    ((recovered_at, recovery),) = watched.recoveries
    return Killed(durability, recovered_at - recovery.total_s - watched.killed_at, recovery)


def ray_detection_s(rounds: int) -> Sequence[float]:
    """Seconds from SIGKILL of an actor until a call that it was busy with fails."""

    class Busy:
        def pid(self) -> int:
            return os.getpid()

        def work(self) -> None:
            time.sleep(3600)

    seconds = []
    for _ in range(rounds):
        actor = ray.remote(Busy).options(num_cpus=0, max_concurrency=2).remote()
        pid = ray.get(actor.pid.remote())
        call = actor.work.remote()
        time.sleep(0.5)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        try:
            ray.get(call)
        except ray.exceptions.RayActorError:
            seconds.append(time.monotonic() - began)
    return seconds
