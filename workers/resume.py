"""Where an interrupted job goes on: the newest snapshot that it left behind."""

from __future__ import annotations

from dataclasses import replace

from ps.errors import ConfigError
from ps.snapshot import Snapshot, complete_snapshots, open_snapshot, snapshot_location
from ps.start import check_tables
from workers.config import JobConfig
from workers.jobplan import JobPlan, about, check_cursor


def own_snapshot(job: JobConfig) -> Snapshot | None:
    """The newest complete snapshot that a run of this very job has written, None without any.

    Only jobs with `recovery.durability` go on from their own snapshots.

    Raises:
        ConfigError: it does not have the job's tables.
        SnapshotError: it is damaged.
    """
    root = job.output.snapshot
    if root is None or not job.recovery.durable:
        return None
    for step in reversed(complete_snapshots(root)):
        snapshot = open_snapshot(snapshot_location(root, step))
        if snapshot.job == job.name and snapshot.cursor is not None:
            with about("output.snapshot"):
                check_tables(snapshot, job.embedding_spec())
            return snapshot
    return None


def resumed(plan: JobPlan) -> JobPlan:
    """The plan of a job that may have been begun: it goes on from its newest snapshot.

    Raises:
        ConfigError: the snapshot is of a run with another input, or of more steps.
    """
    snapshot = own_snapshot(plan.job)
    if snapshot is None:
        return plan
    if snapshot.step > plan.last_step:
        raise ConfigError(
            f"output.snapshot: '{snapshot.location}' has {snapshot.step} steps behind it, more "
            f"than the {plan.last_step} of this job; give the job another name and output.snapshot "
            "to start a new one"
        )
    plan = replace(plan, resume_step=snapshot.step)
    check_cursor(snapshot.cursor or {}, plan)
    return plan
