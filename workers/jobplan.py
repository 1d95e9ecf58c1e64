"""What a job will do, and what would make it fail, found out before anything is started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ps.errors import ConfigError, JobError
from ps.export import EXPORT
from ps.export_file import check_writable
from ps.snapshot import (
    SNAPSHOT,
    Snapshot,
    complete_snapshots,
    open_snapshot,
    snapshot_location,
    snapshot_name,
)
from ps.start import check_tables
from ps.storage import Storage
from workers.batches import ExampleReader
from workers.config import JobConfig
from workers.raw_inputs import column_inputs
from workers.recovery_config import lies_in


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """What is about to run."""

    job: JobConfig
    """Starts from the snapshot that LATEST named when the plan was made."""
    train_rows: int
    test_rows: int
    steps_per_epoch: int
    first_step: int = 0
    """Steps that the snapshot it starts from has behind it: its input begins with this step."""
    resume_step: int = 0
    """Steps behind the shards when they start: `first_step`, or more where an earlier run of the
    same job has made some of them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "resume_step", max(self.first_step, self.resume_step))

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.job.train.epochs

    @property
    def last_step(self) -> int:
        """Steps behind the tables when the run is done."""
        return self.first_step + self.total_steps


def plan_job(job: JobConfig) -> JobPlan:
    """Open the input and count the steps; starts nothing.

    Raises:
        DataError: the data cannot be read, lacks a column, or is too small for one batch.
        ConfigError: the snapshot to start from does not fit, or an output cannot be kept.
        SnapshotError: the snapshot to start from cannot be read.
    """
    columns = column_inputs(job.column_configs())
    reader = ExampleReader(
        job.data.train,
        job.data,
        job.features,
        columns,
        num_workers=job.num_ranks,
        seed=job.seed,
    )
    steps = reader.steps_per_epoch(job.worker_batch_size)
    if steps == 0:
        raise JobError(
            f"data set {job.data.train}: {reader.num_rows} rows do not fill one batch of "
            f"{job.train.batch_size}"
        )
    test_rows = 0
    if job.data.test is not None:
        test_rows = ExampleReader(job.data.test, job.data, job.features, columns).num_rows
    with EXPORT.errors():
        _check_output("export", job.output.export)
    with SNAPSHOT.errors():
        _check_output("snapshot", job.output.snapshot)
    _check_start(job)
    snapshot = start_snapshot(job)
    if snapshot is not None:
        job = replace(job, train=replace(job.train, start_from=snapshot.uri))
    plan = JobPlan(
        job=job,
        train_rows=reader.num_rows,
        test_rows=test_rows,
        steps_per_epoch=steps,
        first_step=0 if snapshot is None else snapshot.step,
    )
    _check_snapshots(plan)
    return plan


def bunch_ends(plan: JobPlan) -> list[int]:
    """Where workers stop for a report or a snapshot; ascending, the last is `plan.last_step`.

    They are multiples of `train.report_every` and `recovery.snapshot_every`, whatever step the run
    began with: so it has the same ones when it is resumed.
    """
    every = [plan.job.train.report_every, plan.job.recovery.boundary_every]
    span = range(plan.first_step + 1, plan.last_step)
    ends = {end for n in every if n for end in span[-span.start % n :: n]}
    return [*sorted(ends), plan.last_step]


def cursor(plan: JobPlan) -> dict[str, Any]:
    """What, with the number of steps behind it, says which examples a run has had. JSON values."""
    job = plan.job
    return {
        "first_step": plan.first_step,
        "ranks": job.num_ranks,
        "batch_size": job.train.batch_size,
        "seed": job.seed,
        "steps_per_epoch": plan.steps_per_epoch,
        "train_rows": plan.train_rows,
    }


def check_cursor(found: Mapping[str, Any], plan: JobPlan) -> None:
    """See that a run can go on at `plan.resume_step`, which a snapshot with this cursor is at.

    Raises:
        ConfigError: it would show other examples than the run would have; names what differs.
    """
    wanted = cursor(plan)
    for key, name in _CURSOR_NAMES.items():
        if found.get(key) != wanted[key]:
            raise ConfigError(
                f"{name}: the snapshot of step {plan.resume_step} is of a run with "
                f"{found.get(key)}, this one has {wanted[key]}; go on with the same, or give the "
                "job another name and output.snapshot to start a new one"
            )
    ranks, behind = found.get("ranks"), plan.resume_step - plan.first_step
    if ranks == wanted["ranks"]:
        return
    if plan.job.train.mode == "async" or behind % plan.steps_per_epoch:
        # Each rank reads a part of its own. In the middle of an epoch other parts would show some
        # of its examples again and others never; async shards know their place rank by rank.
        raise ConfigError(
            f"train.ranks: the snapshot of step {plan.resume_step} is of a run with {ranks} ranks, "
            f"this one has {wanted['ranks']}, and each reads its own part of an epoch; set "
            f"train.ranks to {ranks}: the number of workers may still be another"
        )


_CURSOR_NAMES = {
    "first_step": "train.start_from",
    "batch_size": "train.batch_size",
    "seed": "seed",
    "train_rows": "data.train",
    "steps_per_epoch": "data.train",
}


def _check_snapshots(plan: JobPlan) -> None:
    """See that this run's snapshots have a place that is not another run's."""
    job, root = plan.job, plan.job.output.snapshot
    if root is None:
        return
    steps = complete_snapshots(root)
    taken = Storage.at(root).below(snapshot_name(plan.last_step)).location
    if not job.recovery.durable:
        if plan.last_step in steps:
            raise ConfigError(f"output.snapshot: there is '{taken}' already, of another run")
        return
    for step in steps:
        other = open_snapshot(snapshot_location(root, step))
        if other.job != job.name:
            # Not only in the way of a snapshot of the same step: older ones are removed.
            raise ConfigError(
                f"output.snapshot: '{other.location}' is of job '{other.job}', but recovery.keep "
                f"is about all snapshots there; give job '{job.name}' a root of its own"
            )
        if step == plan.last_step and other.cursor is None:
            raise ConfigError(
                f"output.snapshot: there is '{taken}' already, of a run that cannot be resumed"
            )


def _check_start(job: JobConfig) -> None:
    """See that what the run starts from will be the same when its driver is started again."""
    start, root = job.train.start_from, job.output.snapshot
    if not job.recovery.durable or start is None or root is None:
        return
    if lies_in(start, root):
        # LATEST would then be a snapshot of this very run: where its input began could not be
        # known any more.
        raise ConfigError(
            f"train.start_from: '{start}' lies in output.snapshot, from which a job with a "
            "durability goes on by itself; leave it out, or give output.snapshot another root"
        )


def _check_output(key: str, root: str | Path | None) -> None:
    """Find out now, not after the training, that an output cannot be kept.

    Under `ray job submit --working-dir`, the working folder is a copy that Ray deletes. Object
    stores are not tried.
    """
    if not isinstance(root, Path):
        return
    if not root.is_absolute() and "_ray_pkg_" in str(Path.cwd()):
        raise ConfigError(
            f"output.{key}: '{root}' would lie in Ray's copy of the working folder, which goes "
            "with the job; give an absolute path that all nodes see"
        )
    check_writable(root)


def start_snapshot(job: JobConfig) -> Snapshot | None:
    """The snapshot that a job starts from, which has its tables; None without one."""
    if job.train.start_from is None:
        return None
    snapshot = open_snapshot(job.train.start_from)
    with about("train.start_from"):
        check_tables(snapshot, job.embedding_spec())
    return snapshot


@contextmanager
def about(name: str) -> Iterator[None]:
    """Configuration errors with the key that they are about."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(f"{name}: {e}") from None
