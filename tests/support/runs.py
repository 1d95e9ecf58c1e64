"""Runs driven step by step, snapshots compared bit for bit, and things that go wrong on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from ps.snapshot import Snapshot, open_snapshot
from workers.jobplan import JobPlan
from workers.listener import Listener
from workers.recovery import Recovery
from workers.report import Progress
from workers.run import Run
from workers.snapshots import SnapshotReport
from workers.supervisor import Supervisor


def train_steps(run: Run, plan: JobPlan, listeners: Sequence[Any] = ()) -> None:
    """All steps of a run that is started."""
    Supervisor(run, plan, listeners).train()


def take_snapshot(run: Run, plan: JobPlan) -> Path:
    """The snapshot of a run that has made its steps."""
    snapshot = Supervisor(run, plan, ()).snapshot(plan.last_step)
    assert snapshot is not None
    return Path(snapshot.location)


def bits(snapshot: Snapshot | str | Path) -> dict[str, bytes]:
    """Every array of a snapshot, and its fences."""
    if not isinstance(snapshot, Snapshot):
        snapshot = open_snapshot(snapshot, verify=True)
    out = {}
    for table in snapshot.tables:
        out[table.name] = table.rows.tobytes()
        out |= {f"{table.name}/{slot}": table.slot(slot).tobytes() for slot in table.slot_names}
    assert snapshot.dense is not None
    dense = snapshot.dense.values()
    out |= {f"dense/{name}": values.tobytes() for name, values in dense.slots.items()}
    fences = repr(snapshot.fences).encode()
    return out | {
        "dense": dense.trainable.tobytes(), "state": dense.state.tobytes(), "fences": fences
    }  # fmt: skip


def actor_pid(name: str) -> int:
    """Of a living actor of a job, such as `job-shard-0`."""
    pid: int = ray.get(ray.get_actor(name, "manta").process_id.remote(), timeout=60)
    return pid


class AtStep(Listener):
    """Does something once, when so many steps are reported; remembers what was recovered."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self._step = step
        self._act: Callable[[], None] | None = act
        self.recoveries: list[Recovery] = []
        self.failed_snapshots: list[str] = []
        self.steps: list[int] = []

    def progress(self, progress: Progress) -> None:
        self.steps.append(progress.step)
        self._at(progress.step)

    def recovered(self, recovery: Recovery) -> None:
        self.recoveries.append(recovery)

    def snapshot_failed(self, step: int, error: str) -> None:
        self.failed_snapshots.append(error)

    def _at(self, step: int) -> None:
        if self._act is not None and step >= self._step:
            act, self._act = self._act, None
            act()


class AtSnapshot(AtStep):
    """The same once the snapshot of that step is complete."""

    def progress(self, progress: Progress) -> None:
        self.steps.append(progress.step)

    def snapshot(self, report: SnapshotReport) -> None:
        self._at(report.step)


def kill(*names: str, with_signal: int = signal.SIGKILL) -> Callable[[], None]:
    """Sends a signal to actors' processes when it is called."""

    def act() -> None:
        for pid in [actor_pid(name) for name in names]:
            os.kill(pid, with_signal)

    return act


def evaluated(run: Run, plan: JobPlan) -> dict[str, float]:
    """The metrics of a run that has made its steps."""
    return Supervisor(run, plan, ()).evaluate()
