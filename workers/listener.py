"""`Listener`: who is told how a run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.jobplan import JobPlan
from workers.recovery import Recovery
from workers.report import Progress

if TYPE_CHECKING:  # they need Ray, which listeners do not
    from workers.job import TrainResult
    from workers.snapshots import SnapshotReport


class Listener:
    """Override what you want to hear."""

    def starting(self, plan: JobPlan) -> None:
        """The input is readable and the cluster is being started."""

    def resumed(self, step: int) -> None:
        """The run goes on where an earlier one ended, at that step."""

    def progress(self, progress: Progress) -> None:
        """A number of steps is done."""

    def snapshot(self, report: SnapshotReport) -> None:
        """A snapshot is complete."""

    def snapshot_failed(self, step: int, error: str) -> None:
        """A snapshot could not be written, or was left out; training goes on."""

    def recovered(self, recovery: Recovery) -> None:
        """Something had died, and the job is past the step that it had made before."""

    def finished(self, result: TrainResult) -> None:
        """All done."""
