"""What a job will do, and what would make it fail, found out before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ps.errors import ConfigError, JobError
from ps.export import EXPORT
from ps.export_file import check_writable
from ps.snapshot import SNAPSHOT, Snapshot, open_snapshot, snapshot_name
from ps.start import check_tables
from workers.batches import ExampleReader
from workers.config import JobConfig
from workers.raw_inputs import column_inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """What is about to run."""

    job: JobConfig
    """Starts from the snapshot that LATEST named when the plan was made."""
    train_rows: int
    test_rows: int
    steps_per_epoch: int
    first_step: int = 0
    """Steps that the snapshot it starts from has behind it."""

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
        num_workers=job.cluster.workers,
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
    snapshot = start_snapshot(job)
    if snapshot is not None:
        job = replace(job, train=replace(job.train, start_from=snapshot.path))
    plan = JobPlan(
        job=job,
        train_rows=reader.num_rows,
        test_rows=test_rows,
        steps_per_epoch=steps,
        first_step=0 if snapshot is None else snapshot.step,
    )
    root = job.output.snapshot
    if root is not None and (taken := root / snapshot_name(plan.last_step)).exists():
        raise ConfigError(f"output.snapshot: there is '{taken}' already, of another run")
    return plan


def _check_output(key: str, root: Path | None) -> None:
    """Find out now, not after the training, that an output cannot be kept.

    Under `ray job submit --working-dir`, the working folder is a copy that Ray deletes.
    """
    if root is None:
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
