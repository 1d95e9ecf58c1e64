"""One run of a job, disturbed by a plan or not: start the driver, strike, watch, start it again.

Everything real is behind `workers.chaos.cluster.Cluster`, and time is given, so that all of it is
tested without a process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ps.errors import JobError
from workers.chaos.cluster import Cluster, RunFolder
from workers.chaos.events import DriverEvents
from workers.chaos.plan import Fault, Moment, Planner, Strike
from workers.chaos.processes import Process
from workers.chaos.records import FaultRecord, RoundRecord
from workers.chaos.watch import Watch

POLL_S = 0.05
_SNAPSHOT_POLL_S = 0.01
_SNAPSHOT_PATIENCE_S = 30.0
_VICTIM_PATIENCE_S = 30.0
_FAULTS_WITHOUT_STEP = 3
"""Faults at one version, after which the next waits until a step is made."""
_FAILURES_WITHOUT_STEP = 3
"""The same for drivers that end by themselves, after which the run is given up."""
_SETTLED_S = 0.3
"""After a kill: what the last looks saw, and steps that were on their way, is no recovery."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long a run may take."""

    run_s: float
    per_fault_s: float = 0.0
    """More for every fault."""
    stall_s: float = float("inf")
    """Seconds without a new step, a fault or an end."""


class Listener(Protocol):
    """Who is told at once."""

    def struck(self, record: FaultRecord) -> None:
        """A fault is done."""

    def note(self, text: str) -> None:
        """Something else happened."""


class _GivenUpError(Exception):
    """The run will not end well; the message says why."""


@dataclass(slots=True)
class _Open:
    """A fault that the run has not recovered from yet."""

    record: FaultRecord
    settled_at_s: float
    version: int
    """The highest one seen until it was settled."""


@dataclass(slots=True, kw_only=True)
class JobRun:
    """One run of the job."""

    cluster: Cluster
    folder: RunFolder
    limits: Limits
    listener: Listener
    round: int = 0
    planner: Planner | None = None
    """None for no faults."""
    kills: int = 0
    """Kills that are still wanted; all strikes count if the planner has no kills."""
    snapshot_every: int = 0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _record: RoundRecord = field(init=False)
    _events: DriverEvents = field(init=False)
    _watch: Watch = field(init=False)
    _began_at_s: float = field(init=False, default=0.0)
    _open: list[_Open] = field(init=False, default_factory=list)
    _paused: list[tuple[float, Process]] = field(init=False, default_factory=list)
    _next: Fault | None = field(init=False, default=None)
    _last_at_s: float | None = field(init=False, default=None)
    """When the last fault was; None before the first step was made."""
    _due_at_s: float | None = field(init=False, default=None)
    _stuck: tuple[int, int] = field(init=False, default=(-1, 0))
    """A version, and the number of faults since it was made."""
    _submit_at_s: float | None = field(init=False, default=None)
    """When a driver that was killed is submitted again."""
    _failed_at: list[int] = field(init=False, default_factory=list)
    """Versions at which drivers ended by themselves."""

    def run(self) -> RoundRecord:
        """From the first submission to the driver's good end, or until it is given up."""
        self._record = record = RoundRecord(round=self.round)
        self._events = DriverEvents(self.folder.metrics)
        self._watch = Watch(self.snapshot_every)
        self._began_at_s = self._watch.advanced_at_s = self.clock()
        finished = False
        try:
            self._start_driver()
            while not (finished := self._observe()):
                self._check_limits()
                self._disturb()
                waits = self._next is not None and self._next.moment == "snapshot"
                self.sleep(_SNAPSHOT_POLL_S if waits else POLL_S)
        except _GivenUpError as e:
            record.failure = str(e)
        finally:
            for _, process in self._paused:
                self.cluster.resume(process)
            left = self.cluster.stop_job()
        record.left_behind = left if finished else []
        self._sum_up(finished)
        return record

    def _sum_up(self, finished: bool) -> None:
        now, record = self.clock(), self._record
        self._events.read(now, self._watch.reached)
        if finished:
            for fault in self._open:
                fault.record.recovered_after_s = now - fault.record.struck_at_s
        record.seconds = now - self._began_at_s
        record.steps = self._events.total_steps
        record.recoveries = self._events.recoveries
        record.snapshots = self._events.snapshots
        record.failed_snapshots = self._events.failed_snapshots
        at_end = self._events.duplicates_dropped if finished else None
        record.duplicates_dropped = self._watch.duplicates_dropped(at_end)
        record.put_down()

    def _start_driver(self) -> None:
        self.cluster.start_driver(self.folder)
        self._record.driver_starts += 1
        self._submit_at_s = None

    def _observe(self) -> bool:
        """Look at everything; True when the driver has ended well."""
        now = self.clock()
        self._events.read(now, self._watch.reached)
        self._watch.see(self.cluster.shards(), now)
        self._close_recovered(now)
        for due in [entry for entry in self._paused if entry[0] <= now]:
            self._paused.remove(due)
            self.cluster.resume(due[1])
        code = self.cluster.driver_exit()
        if code == 0:
            return True
        if code is not None:
            if self._submit_at_s is None:
                self._driver_failed(code)
            if self._submit_at_s is None or now >= self._submit_at_s:
                self._start_driver()
        return False

    def _driver_failed(self, code: int) -> None:
        """The driver ended by itself; raises if another one would too."""
        said = self.cluster.driver_errors() or f"exit code {code}"
        self._failed_at.append(self._watch.reached)
        if not self._record.faults:
            raise _GivenUpError(f"the driver failed, undisturbed:\n{said}")
        self._record.driver_failures.append(said)
        self.listener.note(f"the driver ended by itself and is submitted again:\n{said}")
        if self._failed_at.count(self._watch.reached) >= _FAILURES_WITHOUT_STEP:
            raise _GivenUpError(
                f"the driver failed {_FAILURES_WITHOUT_STEP} times at version "
                f"{self._watch.reached}:\n{said}"
            )

    def _close_recovered(self, now: float) -> None:
        watch = self._watch
        for fault in list(self._open):
            if now < fault.settled_at_s:
                fault.version = max(fault.version, watch.reached)
            elif watch.version is not None and watch.version > fault.version:
                fault.record.recovered_after_s = now - fault.record.struck_at_s
                self._open.remove(fault)

    def _check_limits(self) -> None:
        now, limits = self.clock(), self.limits
        allowed = limits.run_s + limits.per_fault_s * len(self._record.faults)
        last = max(self._watch.advanced_at_s, self._last_at_s or 0.0, *(a for a, _ in self._paused))
        if now - self._began_at_s > allowed:
            why = f"it had not ended after {allowed:.0f} s"
        elif now - last > limits.stall_s:
            why = f"no step was made for {limits.stall_s:.0f} s"
        else:
            return
        at = f"version {self._watch.reached} of {self._events.total_steps or 'an unknown number'}"
        raise _GivenUpError(f"{why} (at {at})\n{self.cluster.driver_errors()}".rstrip())

    def _disturb(self) -> None:
        """Carry out the next fault, if it is time for it."""
        if self.planner is None or self.kills <= 0 or not self._watch.stepped:
            return
        now = self.clock()
        if self._last_at_s is None:
            self._last_at_s = now
        if self._next is None:
            self._next = self.planner.next(self.kills)
        fault = self._next
        found = self._find(fault)  # early: a moment may be short
        moment = self._moment(fault, now - self._last_at_s)
        if moment is None:
            return
        if self._due_at_s is None:
            self._due_at_s = now
        if None in found and now - self._due_at_s < _VICTIM_PATIENCE_S:
            return
        self._strike(fault, moment, found)
        self._next = self._due_at_s = None
        self._last_at_s = self.clock()
        version, faults = self._stuck
        reached = self._watch.reached
        self._stuck = (reached, faults + 1 if version == reached else 1)

    def _moment(self, fault: Fault, since_s: float) -> Moment | None:
        """At which moment the fault would come now; None if it is not yet time for it."""
        if since_s < fault.wait_s:
            return None
        if fault.moment == "recovery":
            return "recovery"
        if self._stuck[0] == self._watch.reached and self._stuck[1] >= _FAULTS_WITHOUT_STEP:
            return None
        if fault.moment == "snapshot" and not self._watch.cutting:
            return "random" if since_s > fault.wait_s + _SNAPSHOT_PATIENCE_S else None
        return fault.moment

    def _find(self, fault: Fault) -> list[Process | bool | None]:
        """Per strike: the victim's process, True if none is needed, None if there is none."""
        return [
            self.cluster.find(strike.victim)
            if strike.kind in ("shard", "worker", "driver", "pause")
            else True
            for strike in fault.strikes
        ]

    def _strike(self, fault: Fault, moment: Moment, found: list[Process | bool | None]) -> None:
        at_s = self.clock()
        doomed = [
            process
            for strike, process in zip(fault.strikes, found, strict=True)
            if strike.kills and isinstance(process, Process)
        ]
        if doomed:
            self.cluster.kill(doomed)
        number = 1 + max((fault.number for fault in self._record.faults), default=0)
        for strike, process in zip(fault.strikes, found, strict=True):
            if process is None or not self._carry_out(strike, process, at_s):
                self._record.missed += 1
                continue
            record = FaultRecord(
                number=number,
                round=self.round,
                struck_at_s=at_s,
                at_s=at_s - self._began_at_s,
                strike=strike,
                moment=moment,
                version=self._watch.reached,
            )
            self._record.faults.append(record)
            self._open.append(_Open(record, at_s + _settled_after(strike), record.version))
            counts = strike.kills or (self.planner is not None and not self.planner.kills)
            self.kills -= counts
            self.listener.struck(record)

    def _carry_out(self, strike: Strike, process: Process | bool, now: float) -> bool:
        """What is left to do of a strike whose processes are dead already; False if it fails."""
        if strike.kind == "node":
            self.cluster.replace_node(strike.victim.index)
        elif strike.kind == "driver":
            self._submit_at_s = now + strike.amount
        elif strike.kind == "pause":
            assert isinstance(process, Process)
            self.cluster.suspend(process)
            self._paused.append((now + strike.amount, process))
        elif not strike.kills:
            return self.cluster.inject(strike.victim.index, strike.kind, strike.amount)
        return True


def _settled_after(strike: Strike) -> float:
    if strike.kind in ("delay", "pause"):
        return strike.amount
    return _SETTLED_S if strike.kills else 0.0


def check_ended(record: RoundRecord) -> None:
    """Raise if a run did not end well.

    Raises:
        JobError: with what its driver said.
    """
    if record.failure is not None:
        raise JobError(f"the undisturbed run did not end well: {record.failure}")
