"""The whole of it: an undisturbed run, then disturbed rounds until enough was killed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ps.errors import StorageError
from workers.chaos.cluster import Cluster, RunFolder
from workers.chaos.compare import Comparison
from workers.chaos.harness import JobRun, Limits, Listener, check_ended
from workers.chaos.plan import KILLS, Kind, Planner, Targets
from workers.chaos.records import ChaosRecord, RoundRecord

MIN_DEADLINE_S = 300.0
_PER_FAULT_S = 60.0
_REFERENCES = 10.0
"""Undisturbed runs that a disturbed one may last, besides what every fault costs."""
_STALL_S = 300.0
_IDLE_ROUNDS = 3
NO_DEADLINE_S = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """What is wanted."""

    job: str
    durability: str
    targets: Targets
    kills: int = 20
    seed: int = 0
    kinds: tuple[Kind, ...]
    mean_gap_s: float = 5.0
    deadline_s: float | None = None
    """For each run; None for one that follows from the undisturbed run and the faults."""
    step_deadline_s: float | None = None
    snapshot_every: int = 0

    def planner(self, round: int) -> Planner:
        """The faults of a round."""
        return Planner(
            self.targets, self.kinds, self.mean_gap_s, self.step_deadline_s, (self.seed, round)
        )

    def limits(self, reference_s: float) -> Limits:
        """Of a disturbed round."""
        if self.deadline_s is not None:
            return Limits(run_s=self.deadline_s, stall_s=self.deadline_s)
        return Limits(
            run_s=MIN_DEADLINE_S + _REFERENCES * reference_s,
            per_fault_s=_PER_FAULT_S,
            stall_s=_STALL_S + reference_s,
        )


Compare = Callable[[Path, Path], Comparison]
"""Of the snapshot roots of the undisturbed and a disturbed run."""


def run_chaos(
    plan: ChaosPlan,
    cluster: Cluster,
    folder: Path,
    listener: Listener,
    compare: Compare,
    *,
    keep: bool = False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> ChaosRecord:
    """Run the job undisturbed and then, round after round, disturbed; stop at the first bad round.

    Args:
        plan: what is wanted.
        cluster: where the job runs.
        folder: where the runs leave what they make.
        listener: who is told while it goes on.
        compare: compares the last snapshots of two runs.
        keep: whether the folder of a round stays when it is compared.
        clock: seconds that never go back.
        sleep: waits.

    Raises:
        JobError: the undisturbed run fails.
    """

    def job_run(round: int, limits: Limits, planner: Planner | None, kills: int) -> JobRun:
        outputs = RunFolder(folder / (f"round-{round}" if round else "undisturbed"))
        outputs.path.mkdir(parents=True)
        return JobRun(
            cluster=cluster,
            folder=outputs,
            limits=limits,
            listener=listener,
            round=round,
            planner=planner,
            kills=kills,
            snapshot_every=plan.snapshot_every,
            clock=clock,
            sleep=sleep,
        )

    undisturbed = job_run(0, Limits(run_s=plan.deadline_s or NO_DEADLINE_S), None, 0)
    reference = undisturbed.run()
    check_ended(reference)
    listener.note(f"undisturbed: {reference.steps} steps in {reference.seconds:.1f} s")
    record = ChaosRecord(
        job=plan.job,
        durability=plan.durability,
        seed=plan.seed,
        kills_wanted=plan.kills,
        counts_kills=bool(KILLS & set(plan.kinds)),
        reference=reference,
    )
    idle = 0
    while record.counted < plan.kills:
        number = len(record.rounds) + 1
        left = plan.kills - record.counted
        disturbed = job_run(number, plan.limits(reference.seconds), plan.planner(number), left)
        result = disturbed.run()
        record.rounds.append(result)
        idle = 0 if result.faults else idle + 1
        if result.failure is None:
            result.comparison = _compared(compare, undisturbed.folder, disturbed.folder, result)
        if result.failure is None and idle == _IDLE_ROUNDS:
            result.failure = (
                f"{idle} rounds ended before the first fault: the job takes "
                f"{reference.seconds:.0f} s; give it more epochs, or a smaller --mean-gap"
            )
        listener.note(f"round {number}: {_said(result)}")
        if not keep:
            shutil.rmtree(disturbed.folder.path, ignore_errors=True)
        if not result.identical:
            break
    return record


def _compared(
    compare: Compare, reference: RunFolder, disturbed: RunFolder, result: RoundRecord
) -> Comparison | None:
    """The comparison; None, with the reason in `result`, if the disturbed run left no snapshot."""
    try:
        return compare(reference.snapshots, disturbed.snapshots)
    except StorageError as e:
        result.failure = f"the last snapshot cannot be compared: {e}"
        return None


def _said(result: RoundRecord) -> str:
    if result.comparison is None or result.failure is not None:
        return f"failed: {result.failure}"
    return f"{len(result.faults)} faults in {result.seconds:.1f} s; bit-identical: " + str(
        result.comparison
    )
