"""What the driver says in its metrics file: read while it is written, and put down to faults.

The file is JSON lines. A driver that resumes appends to it; a line may be half there when it is
read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from workers.chaos.plan import KILLS, Kind, Role

SPLIT = ("restart_s", "restore_s", "log_s", "replay_s")
"""The parts of a recovery, after it was noticed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """One `recovered` or `resumed` event."""

    seen_at_s: float
    """When it was read, on the harness's clock."""
    cause: str
    action: str
    """replay, rollback, replace_worker; resume for a new driver that went on."""
    step: int
    """That the job had made before."""
    steps_replayed: int
    total_s: float = 0.0
    """From the moment that the driver noticed; 0 for resume, of which nobody notices the begin."""
    split: tuple[float, ...] = ()
    """Seconds, in the order of `SPLIT`; () for resume."""

    @property
    def began_at_s(self) -> float:
        """When the driver noticed, about."""
        return self.seen_at_s - self.total_s

    @classmethod
    def recovered(cls, event: dict[str, Any], now: float) -> Recovery:
        """From the event as it was read; what is missing is 0."""
        return cls(
            seen_at_s=now,
            cause=str(event.get("cause") or ""),
            action=str(event.get("action") or ""),
            step=int(_number(event, "step")),
            steps_replayed=int(_number(event, "steps_replayed")),
            total_s=_number(event, "total_s"),
            split=tuple(_number(event, part) for part in SPLIT),
        )

    @classmethod
    def resumed(cls, event: dict[str, Any], now: float, reached: int) -> Recovery:
        """The same of a new driver, when the job had made `reached` steps."""
        return cls(
            seen_at_s=now,
            cause="a new driver",
            action="resume",
            step=reached,
            steps_replayed=max(0, reached - int(_number(event, "step"))),
        )


@dataclass(slots=True)
class DriverEvents:
    """The metrics file of one run, read as far as it has been written."""

    path: Path
    recoveries: list[Recovery] = field(default_factory=list)
    total_steps: int | None = None
    duplicates_dropped: int | None = None
    """By the shards that were there at the end; None before."""
    snapshots: int = 0
    failed_snapshots: int = 0
    _offset: int = 0

    def read(self, now: float, reached: int = 0) -> None:
        """Take in the whole lines that are new; a file that is shorter now is read anew.

        Args:
            now: seconds, on the harness's clock.
            reached: the highest version that there was.
        """
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:
                    self._offset = 0
                if size == self._offset:
                    return
                file.seek(self._offset)
                data = file.read()
        except OSError:  # not written yet
            return
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            try:
                event = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue  # a driver was killed within a line, and the next one appended to it
            if isinstance(event, dict):
                self._take(event, now, reached)

    def _take(self, event: dict[str, Any], now: float, reached: int) -> None:
        name = event.get("event")
        if name == "recovered":
            self.recoveries.append(Recovery.recovered(event, now))
        elif name == "resumed":
            self.recoveries.append(Recovery.resumed(event, now, reached))
        elif name == "starting" and event.get("steps") is not None:
            self.total_steps = int(_number(event, "steps"))
        elif name == "snapshot":
            self.snapshots += 1
        elif name == "snapshot_failed":
            self.failed_snapshots += 1
        elif name == "finished" and event.get("duplicates_dropped") is not None:
            self.duplicates_dropped = int(_number(event, "duplicates_dropped"))


def _number(event: dict[str, Any], key: str) -> float:
    value = event.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


@dataclass(frozen=True, slots=True)
class Struck:
    """A strike, as far as recoveries are concerned."""

    at_s: float
    kind: Kind
    role: Role


_ROLES: dict[str, Role] = {"replay": "shard", "rollback": "shard", "replace_worker": "worker"}
_WRONG_ROLE_S = 2.0
"""How much further off in time a strike is taken for that fits a recovery worse."""
_MILD_S = 5.0
"""The same for strikes that need not end a process."""
_SLACK_S = 60.0
"""A process that stands still is noticed late."""


def match(strikes: Sequence[Struck], recoveries: Iterable[Recovery]) -> list[Recovery | None]:
    """The recovery of each strike, None where no event is about it.

    A recovery belongs to the strikes of the moment that is nearest to its begin, and of these to
    those whose victim fits its action; one event may be about two strikes at once. That a driver
    resumed belongs to the last one that was killed before.
    """
    found: list[Recovery | None] = [None] * len(strikes)
    for recovery in recoveries:
        costs = {
            i: _distance_s(strike, recovery)
            for i, strike in enumerate(strikes)
            if strike.at_s <= recovery.seen_at_s
            and (recovery.action == "resume") == (strike.kind == "driver")
        }
        if not costs:
            continue
        best = min(costs, key=lambda i: costs[i])
        if costs[best] > _SLACK_S and recovery.action != "resume":
            continue
        for i in costs:
            together = strikes[i].at_s == strikes[best].at_s
            if i == best or (together and found[i] is None):
                found[i] = recovery
    return found


def _distance_s(strike: Struck, recovery: Recovery) -> float:
    distance = abs(strike.at_s - recovery.began_at_s)
    wanted = _ROLES.get(recovery.action)
    if wanted is not None and strike.role != wanted and strike.kind != "node":
        distance += _WRONG_ROLE_S
    if strike.kind not in KILLS:
        distance += _MILD_S
    return distance
