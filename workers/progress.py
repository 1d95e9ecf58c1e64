"""How a run is shown: a live display in a terminal, plain lines elsewhere, JSON lines in a file."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ps.errors import JobError
from workers.jobplan import JobPlan
from workers.listener import Listener
from workers.recovery import Recovery
from workers.report import CAUSES, Cause, Progress, StepRecord

if TYPE_CHECKING:  # it needs Ray, which nothing here does
    from workers.job import TrainResult
    from workers.snapshots import SnapshotReport


class LiveDisplay(Listener):
    """A progress bar with the figures of the last report."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None

    def starting(self, plan: JobPlan) -> None:
        """See `Listener`."""
        self._console.print(_plan_line(plan))
        self._bar.start()
        self._task = self._bar.add_task(
            "starting", total=plan.last_step, completed=plan.first_step, figures=""
        )

    def progress(self, progress: Progress) -> None:
        """See `Listener`."""
        self._bar.update(
            self._task,
            completed=progress.step,
            description=f"epoch {progress.epoch}",
            figures=_figures(progress),
        )

    def resumed(self, step: int) -> None:
        """See `Listener`."""
        self._console.print(_resumed_line(step))

    def snapshot_failed(self, step: int, error: str) -> None:
        """See `Listener`."""
        self._console.print(_failed_line(step, error), style="yellow")

    def recovered(self, recovery: Recovery) -> None:
        """See `Listener`."""
        self._console.print(_recovery_line(recovery), style="yellow")

    def finished(self, result: TrainResult) -> None:
        """See `Listener`."""
        self.close()
        self._console.print(_result_table(result))

    def close(self) -> None:
        """Stop drawing."""
        self._bar.stop()


class PlainLines(Listener):
    """One line per report, for logs and `ray job submit`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def starting(self, plan: JobPlan) -> None:
        """See `Listener`."""
        self._print(_plan_line(plan))

    def progress(self, progress: Progress) -> None:
        """See `Listener`."""
        self._print(f"step {progress.step} epoch {progress.epoch} {_figures(progress)}")

    def resumed(self, step: int) -> None:
        """See `Listener`."""
        self._print(_resumed_line(step))

    def snapshot(self, report: SnapshotReport) -> None:
        """See `Listener`."""
        size, rate = report.size_bytes / 2**20, report.size_bytes / 2**20 / report.seconds
        self._print(f"snapshot of step {report.step}: {size:.1f} MiB, {rate:.0f} MiB/s")

    def snapshot_failed(self, step: int, error: str) -> None:
        """See `Listener`."""
        self._print(_failed_line(step, error))

    def recovered(self, recovery: Recovery) -> None:
        """See `Listener`."""
        self._print(_recovery_line(recovery))

    def finished(self, result: TrainResult) -> None:
        """See `Listener`."""
        for name, value in _result_rows(result):
            self._print(f"{name}: {value}")

    def close(self) -> None:
        """Nothing to stop."""

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class MetricsFile(Listener):
    """One JSON object per event; the last one has `"event"` "finished" or "failed".

    A job that can go on where it ended adds to the file; any other writes it anew.

    Reports that kept their steps give one "step" object per step and worker before their own.
    """

    def __init__(self, path: Path) -> None:
        """Name the file; it is opened when the job starts."""
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        if error is None:
            self._file.close()
            return
        with contextlib.suppress(OSError, JobError):  # they must not hide the first error
            self._write("failed", error=f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):
            self._file.close()

    def starting(self, plan: JobPlan) -> None:
        """See `Listener`.

        Raises:
            JobError: the file cannot be written.
        """
        goes_on = plan.job.recovery.durability != "none"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a" if goes_on else "w", encoding="utf-8")
        except OSError as e:
            raise self._failed(e) from None
        self._write(
            "starting",
            job=plan.job.name,
            train_rows=plan.train_rows,
            steps=plan.total_steps,
            shards=plan.job.cluster.shards,
            workers=plan.job.cluster.workers,
        )

    def progress(self, progress: Progress) -> None:
        """See `Listener`.

        Raises:
            JobError: the file cannot be written.
        """
        steps = [
            (record.step, worker, record)
            for worker, report in enumerate(progress.reports)
            for record in report.records
        ]
        lines = [
            _line("step", worker=worker, **_step_fields(record))
            for _, worker, record in sorted(steps, key=lambda step: step[:2])
        ]
        self._append("".join(lines) + _line("progress", **_progress_fields(progress)))

    def resumed(self, step: int) -> None:
        """See `Listener`; raises as `progress`."""
        self._write("resumed", step=step)

    def snapshot(self, report: SnapshotReport) -> None:
        """See `Listener`; raises as `progress`."""
        self._write("snapshot", **asdict(report))

    def snapshot_failed(self, step: int, error: str) -> None:
        """See `Listener`; raises as `progress`."""
        self._write("snapshot_failed", step=step, error=error)

    def recovered(self, recovery: Recovery) -> None:
        """See `Listener`; raises as `progress`."""
        self._write("recovered", **asdict(recovery))

    def finished(self, result: TrainResult) -> None:
        """See `Listener`.

        Raises:
            JobError: the file cannot be written.
        """
        self._write(
            "finished",
            steps=result.steps,
            examples=result.examples,
            train_s=result.train_s,
            metrics=result.metrics,
            export=None if result.export is None else str(result.export),
            snapshot=None if result.snapshot is None else str(result.snapshot),
            resumed_step=result.resumed_step,
            recoveries=len(result.recoveries),
            duplicates_dropped=sum(shard.duplicates_dropped for shard in result.shards),
        )

    def _write(self, event: str, **values: Any) -> None:
        self._append(_line(event, **values))

    def _append(self, lines: str) -> None:
        assert self._file is not None, "a job starts before it reports"
        try:
            self._file.write(lines)
            self._file.flush()
        except OSError as e:
            raise self._failed(e) from None

    def _failed(self, error: OSError) -> JobError:
        return JobError(f"metrics file {self._path}: {error.strerror}")


def _line(event: str, **values: Any) -> str:
    # A loss that is NaN becomes null, which JSON has.
    return orjson.dumps({"event": event, **values}).decode() + "\n"


def _progress_fields(progress: Progress) -> dict[str, Any]:
    """All but what the others sum up."""
    names = [field.name for field in fields(Progress) if field.name not in ("reports", "stats")]
    return {name: getattr(progress, name) for name in names}


def _step_fields(record: StepRecord) -> dict[str, Any]:
    traffic = record.traffic
    return {
        "step": record.step,
        "examples": record.examples,
        "loss": record.loss,
        "ids": record.ids,
        "rows": record.rows,
        "staleness": record.staleness,
        "total_s": record.total_s,
        "seconds": dict(zip(CAUSES, record.seconds, strict=True)),
        "shard_wait_s": traffic.wait_s,
        "shard_rows": traffic.rows,
        "shard_sent_bytes": traffic.sent_bytes,
        "shard_received_bytes": traffic.received_bytes,
    }


def _plan_line(plan: JobPlan) -> str:
    cluster, train = plan.job.cluster, plan.job.train
    return (
        f"{plan.job.name}: {plan.train_rows:,} examples, {plan.total_steps:,} steps of "
        f"{train.batch_size:,}, {cluster.shards} shards, {cluster.workers} workers, "
        f"lookahead {train.lookahead}"
    )


_SHOWN: tuple[Cause, ...] = ("input", "pull", "barrier", "dense")


def _figures(p: Progress) -> str:
    rows = " + ".join(f"{rate / 1000:.0f}k" for rate in p.shard_rows_per_s)
    time = " ".join(f"{cause} {p.time[cause]:.0%}" for cause in _SHOWN)
    return (
        f"loss {p.loss:.4f} | {p.examples_per_s:,.0f} examples/s | {time} | "
        f"staleness {p.staleness} | {rows} rows/s"
    )


def _resumed_line(step: int) -> str:
    return f"going on at step {step:,}, where an earlier run ended"


def _failed_line(step: int, error: str) -> str:
    return f"no snapshot of step {step}: {error}"


def _recovery_line(r: Recovery) -> str:
    return (
        f"recovered at step {r.step:,} in {r.total_s:.1f} s ({r.action.replace('_', ' ')} from "
        f"step {r.restored_step:,}, {r.steps_replayed:,} steps again; restart {r.restart_s:.1f} s, "
        f"restore {r.restore_s + r.log_s:.1f} s, replay {r.replay_s:.1f} s): {r.cause}"
    )


def _result_rows(result: TrainResult) -> list[tuple[str, str]]:
    memory = sum(s.size_bytes for s in result.shards)
    rows = sum(s.num_rows for s in result.shards)
    lines = [
        ("steps", f"{result.steps:,}"),
        ("examples", f"{result.examples:,}"),
        ("training time", f"{result.train_s:.1f} s"),
        ("examples/s", f"{result.examples / result.train_s:,.0f}"),
        ("tables", f"{rows:,} rows, {memory / 2**20:.1f} MiB with slots"),
    ]
    if result.recoveries:
        slowest = max(recovery.total_s for recovery in result.recoveries)
        lines.append(("recoveries", f"{len(result.recoveries)}, the longest {slowest:.1f} s"))
    lines += [(f"test {name}", f"{value:.4f}") for name, value in result.metrics.items()]
    if result.export is not None:
        lines.append(("export", str(result.export)))
    if result.snapshot is not None:
        lines.append(("snapshot", str(result.snapshot)))
    return lines


def _result_table(result: TrainResult) -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _result_rows(result):
        table.add_row(name, value)
    return table
