"""`Supervisor`: runs a job's steps, notices what dies or hangs, mends it, and goes on.

One thread takes events from a queue: a worker is through with a bunch of steps, a shard's
connection has ended, a part of a snapshot is written, counters have come. Workers are told to run
up to absolute steps, so that a new one can be told the same.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from ps.errors import (
    JobAborted,
    JobError,
    ProtocolError,
    ReplayGapError,
    ShardLostError,
    ShardNotReadyError,
    SnapshotError,
    StorageError,
)
from ps.messages import ShardStats
from ps.snapshot import Snapshot
from workers.bunches import Bunch, Bunches
from workers.jobplan import JobPlan, bunch_ends
from workers.listener import Listener
from workers.recovery import Budget, Failure, Recovery
from workers.remote import plain_error
from workers.report import Progress
from workers.run import Restored, Run
from workers.snapshots import SnapshotReport, Snapshots
from workers.vitals import FailedError, Vitals

T = TypeVar("T")

_LOOK_S = 1.0
"""Between two looks at the shards' counters."""
_LOOK_SOON_S = 0.02
"""The same, while a recovery waits for its first new step."""
_RECOVERABLE = (JobAborted, ProtocolError, ReplayGapError, ShardLostError, ShardNotReadyError)


@dataclass(slots=True)
class _Recovering:
    """A mending whose first new step is awaited."""

    report: Recovery
    noticed: float
    mended: float


class Supervisor:
    """The driver's loop over one run."""

    def __init__(
        self,
        run: Run,
        plan: JobPlan,
        listeners: Sequence[Listener],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The run must be started."""
        self._run = run
        self._plan = plan
        self._listeners = listeners
        self._clock = clock
        self._recovery = run.recovery
        self._durable = self._recovery.durability != "none"
        self._events: queue.SimpleQueue[tuple[str, Any, Any]] = queue.SimpleQueue()
        self._snapshots = Snapshots(run, plan, self._post)
        self._snapshot_failures = 0
        self._budget = Budget(self._recovery.retries)
        self._vitals = Vitals(run, self._post, clock)
        self._reported_stats, self._reported_at = list(self._vitals.stats), clock()
        self._version = self._vitals.newest_version
        self._bunches = Bunches(run, bunch_ends(plan), self._version, self._post)
        self._recovering: _Recovering | None = None
        self._stepping = False
        """Whether steps are to be made: only then is it a failure that none is."""

    def train(self) -> None:
        """Run all steps that are left; all pushes have been applied when it returns.

        Raises:
            MantaError: what cannot be mended, or not within the bounds.
        """
        with self._vitals.watching(self._durable):
            self.supervised(self._all_steps)

    def snapshot(self, step: int) -> Snapshot | None:
        """Write the state after the last step, if the job has a place for snapshots."""
        root, base = self._run.job.output.snapshot, self._run.base
        if root is None:
            return None
        if self._run.owns_base and base is not None and base.step == step:
            return base
        with self._vitals.watching(self._durable):
            return self.supervised(lambda: self._last_snapshot(step))

    def evaluate(self) -> dict[str, float]:
        """Metrics on the test data after the last step, {} without any."""
        run, plan = self._run, self._plan
        if run.job.data.test is None:
            return {}
        with self._vitals.watching(self._durable):
            parts = self.supervised(
                lambda: self._results(
                    [worker.evaluate.remote(plan.last_step) for worker in run.workers],
                    run.evaluation_timeout_s(plan),
                    "evaluated",
                )
            )
        return run.metrics(parts)

    def supervised(self, call: Callable[[], T]) -> T:
        """The result of a call that is made again after each recovery.

        Raises:
            MantaError: what cannot be mended, or not within the bounds.
        """
        while True:
            try:
                return call()
            except BaseException as e:
                failure = self._failure_of(e)
                if failure is None:
                    raise plain_error(e) from None
                self._recover(failure)

    def _results(self, refs: Sequence[Any], timeout_s: float, what: str) -> list[Any]:
        """What all workers answer; while they are waited for, nothing else goes unnoticed.

        The first error is raised at once: others may wait for what will never come.
        """
        futures = [ref.future() for ref in refs]
        for future in futures:
            future.add_done_callback(lambda _: self._post("answer", None, None))
        deadline = self._clock() + timeout_s
        while left := [f for f in futures if not f.done()]:
            if self._clock() > deadline:
                raise JobError(
                    f"{len(left)} of {len(refs)} workers had not {what} after {timeout_s:g} s"
                )
            self._on_event()
            for future in futures:
                if future.done():
                    future.result()
        return [future.result() for future in futures]

    def _finish(self) -> None:
        """Wait until the shards have every push: only then is the last version made."""
        refs = [worker.finish.remote() for worker in self._run.workers]
        self._results(refs, self._run.job.cluster.step_timeout_s, "sent their last gradients")

    # Steps

    def _all_steps(self) -> None:
        self._stepping = True
        self._vitals.moved()
        try:
            while self._queue_bunches() or not self._bunches.done:
                self._on_event()
            self._finish()
        finally:
            self._stepping = False
        while self._recovering is not None:
            self._look()
            self._on_event()

    def _last_snapshot(self, step: int) -> Snapshot:
        self._all_steps()  # after a recovery some may be missing again
        while True:
            while self._snapshots.step is not None:
                self._on_event()
            base = self._run.base
            if base is not None and self._run.owns_base and base.step == step:
                return base
            self._snapshots.begin(step)

    def _queue_bunches(self) -> bool:
        """Tell the workers of the next steps; False if they know of all."""
        while not self._bunches.full and self._cut_here():
            self._bunches.queue()
        return not self._bunches.at_end

    def _cut_here(self) -> bool:
        """Have a snapshot cut where the queued steps end, if one is due; False to wait first."""
        step, base = self._bunches.queued_to, self._run.base
        every = self._recovery.snapshot_every
        due = self._durable and step > self._plan.first_step and step % every == 0
        if not due or (base is not None and base.step >= step):
            return True
        if self._run.job.train.mode == "async":
            if not self._bunches.done:
                return False
            self._finish()  # every push is in, so that all shards have the same
        if self._snapshots.step == step:
            return True
        if self._snapshots.step is not None:
            before = self._snapshots.step
            self._tell("snapshot_failed", step, f"that of step {before} is still being written")
            return True
        self._snapshots.begin(step)
        return True

    def _report(self, bunch: Bunch) -> None:
        reports = bunch.reports
        now, stats = self._clock(), self._run.shards.stats()
        self._note(stats)
        if not sum(report.steps for report in reports):
            return
        done = bunch.end - self._plan.first_step
        elapsed_s, before = now - self._reported_at, self._reported_stats
        progress = Progress.of(self._plan, done, reports, elapsed_s, before, stats)
        self._reported_stats, self._reported_at = stats, now
        self._tell("progress", progress)

    # Events

    def _post(self, kind: str, key: Any, value: Any) -> None:
        self._events.put((kind, key, value))

    def _on_event(self) -> None:
        """Wait for an event, at most until the counters are to be looked at, and act on it."""
        if self._vitals.due_s <= 0:
            self._look()
        try:
            kind, key, value = self._events.get(timeout=max(0.001, self._vitals.due_s))
        except queue.Empty:
            return
        if kind == "steps":
            worker, end, call = key
            for bunch in self._bunches.take(worker, end, call, value):
                self._report(bunch)
        elif kind == "lost":
            if self._vitals.is_watched(key):
                raise FailedError(Failure(f"shard {value} died", shards=frozenset([value])))
        elif kind == "part":
            attempt, shard = key
            if self._snapshots.is_under_way(attempt):
                self._on_part(shard, value)
        elif kind == "snapshot":
            self._on_snapshot(key, value)
        elif kind == "stats" and (stats := self._vitals.answered(key, value)) is not None:
            self._note(stats)

    def _on_part(self, shard: int, future: Any) -> None:
        step = self._snapshots.step
        assert step is not None, "it is under way"
        try:
            part = future.result()
        except ray.exceptions.RayActorError:
            return  # the shard's death is an event of its own
        except ray.exceptions.RayTaskError as e:
            self._snapshots.call_off(shards_too=True)
            self._on_failed_snapshot(step, plain_error(e))
            return
        self._snapshots.add_part(shard, part)

    def _on_snapshot(self, step: int, result: SnapshotReport | BaseException) -> None:
        if isinstance(result, SnapshotReport):
            self._snapshot_failures = 0
            self._snapshots.committed(result)
            self._tell("snapshot", result)
            return
        self._snapshots.failed()
        self._on_failed_snapshot(step, result)

    def _on_failed_snapshot(self, step: int, error: BaseException) -> None:
        """Training goes on, the snapshot before is as good as it was; but not for ever."""
        self._snapshot_failures += 1
        if not isinstance(error, StorageError) or not self._durable:
            raise error
        if self._snapshot_failures > self._recovery.retries:
            raise SnapshotError(
                f"{self._snapshot_failures} snapshots in a row could not be written: {error}"
            ) from error
        self._tell("snapshot_failed", step, str(error))

    def _look(self) -> None:
        """Have the shards' counters asked for, and see that steps are made."""
        soon = self._recovering is not None
        self._vitals.look(_LOOK_SOON_S if soon else _LOOK_S)
        deadline_s = self._recovery.step_deadline_s
        if self._durable and self._stepping and self._vitals.still_s > deadline_s:
            raise FailedError(self._vitals.stuck(deadline_s))

    def _note(self, stats: list[ShardStats]) -> None:
        self._vitals.note(stats)
        recovering, now = self._recovering, self._clock()
        if recovering is not None and self._vitals.oldest_version >= min(
            recovering.report.step + 1, self._plan.last_step
        ):
            self._recovering = None
            self._tell(
                "recovered",
                recovering.report.finished(now - recovering.mended, now - recovering.noticed),
            )
        self._version = max(self._version, self._vitals.newest_version)

    # Recovery

    def _failure_of(self, error: BaseException) -> Failure | None:
        """What an error says about the job's actors; None if nothing can be mended."""
        if not self._durable:
            return None
        if isinstance(error, FailedError):
            return error.failure
        plain = plain_error(error)
        if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.GetTimeoutError):
            shards, workers = self._run.unanswering()
            return Failure(str(plain), shards, workers, start_over=not (shards or workers))
        if isinstance(plain, _RECOVERABLE):
            shards, workers = self._run.unanswering()
            return Failure(str(plain), shards, workers, start_over=True)
        return None

    def _recover(self, failure: Failure) -> None:
        noticed, step = self._clock(), self._version
        if self._recovering is not None:  # what was being mended is broken again
            noticed, step = self._recovering.noticed, self._recovering.report.step
            failure = Failure(
                f"{self._recovering.report.cause}; then {failure.cause}",
                failure.shards, failure.workers, failure.start_over,
            )  # fmt: skip
            self._recovering = None
        while True:
            self._budget.spend(failure, self._version)
            try:
                restored = self._mend(failure)
                break
            except BaseException as e:
                again = self._failure_of(e)
                if again is None:
                    raise plain_error(e) from None
                failure = failure.plus(again)
        now = self._clock()
        action = failure.action(self._recovery.durability)
        replayed = restored.replayed
        if action == "rollback":
            replayed += max(0, step - restored.step)
        report = Recovery(
            cause=failure.cause,
            action=action,
            step=step,
            restored_step=restored.step,
            steps_replayed=replayed,
            restart_s=restored.restart_s,
            restore_s=restored.restore_s,
            log_s=restored.log_s,
        )
        self._recovering = _Recovering(report, noticed, now)
        self._vitals.moved()
        self._note(self._vitals.stats)

    def _mend(self, failure: Failure) -> Restored:
        action = failure.action(self._recovery.durability)
        if action == "rollback":
            return self._roll_back(failure)
        if action == "replay":
            self._snapshots.call_off(shards_too=False)
            restored = self._run.replace_shards(sorted(failure.shards))
            self._vitals.watch()
            self._run.shards.disarm()  # the others may have a cut that will not be completed
        else:
            restart_s = self._run.replace_workers(failure.workers)
            restored = Restored(step=self._vitals.oldest_version, restart_s=restart_s)
            self._bunches.again(failure.workers)
        self._note(self._run.shards.stats())
        return restored

    def _roll_back(self, failure: Failure) -> Restored:
        self._vitals.end_watch()
        self._snapshots.call_off(shards_too=False)
        restored = self._run.start_over(failure.workers, failure.cause)
        self._bunches.start_over(restored.step)
        self._vitals.note(self._run.shards.stats())
        self._vitals.watch()
        return restored

    def _tell(self, what: str, *values: Any) -> None:
        for listener in self._listeners:
            tell = getattr(listener, what, None)  # it may have no more than it wants to hear
            if tell is not None:
                tell(*values)
