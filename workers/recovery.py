"""What to do when something of a job has died, and how often. Pure: no Ray, no clock.

Dead workers are replaced ("replace_worker"): shards keep the history that a new one needs. Dead
shards are replaced too where there is a commit log, and take their state from snapshot and log
("replay"). Otherwise all shards go back to the last snapshot ("rollback"), and so they do, to the
last version that all logs have, if shards and workers died together or a mending failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from ps.errors import JobError
from ps.messages import ShardStats
from workers.recovery_config import Durability

Action = Literal["replace_worker", "replay", "rollback", "resume"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that a job can recover from."""

    cause: str
    """One line for people."""
    shards: frozenset[int] = frozenset()
    """Whose state is lost."""
    workers: frozenset[int] = frozenset()
    start_over: bool = False
    """Whether nothing less than going back to what is on disk will do."""

    def plus(self, other: Failure) -> Failure:
        """Both at once: the second one came while the first was being mended."""
        cause = self.cause if other.cause in self.cause else f"{self.cause}; then {other.cause}"
        return Failure(
            cause,
            self.shards | other.shards,
            self.workers | other.workers,
            start_over=True,
        )

    def action(self, durability: Durability) -> Action:
        """What mends it."""
        if self.start_over or (self.shards and (self.workers or durability == "snapshot")):
            return "rollback"
        return "replay" if self.shards else "replace_worker"


@dataclass(slots=True)
class Budget:
    """Bounds recoveries in a row that no step of progress lies between."""

    retries: int
    _spent: int = 0
    _version: int = -1
    _causes: list[str] = field(default_factory=list)

    def spend(self, failure: Failure, version: int) -> None:
        """Count a recovery, when the job had made so many steps.

        Raises:
            JobError: there were too many; names the causes.
        """
        if version > self._version:
            self._version, self._spent = version, 0
            self._causes.clear()
        self._spent += 1
        self._causes.append(failure.cause)
        if self._spent > self.retries:
            causes = " | ".join(dict.fromkeys(self._causes))
            raise JobError(
                f"gave up after {self.retries} recoveries without a step of progress at step "
                f"{version}: {causes}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """A recovery that is done: the job has made a step that it had not made before."""

    cause: str
    action: Action
    step: int
    """Steps that the job had made before."""
    restored_step: int
    """Where it went on from."""
    steps_replayed: int
    """Versions that were made again: from logs, or by computing them anew."""
    restart_s: float = 0.0
    """Until new processes were there."""
    restore_s: float = 0.0
    """Until they had what snapshots hold."""
    log_s: float = 0.0
    """Until they had what logs hold."""
    replay_s: float = 0.0
    """From then until the step that the job had made before."""
    total_s: float = 0.0
    """From the moment that it was noticed."""

    def finished(self, replay_s: float, total_s: float) -> Self:
        """With the last times."""
        return replace(self, replay_s=replay_s, total_s=total_s)


def laggards(stats: Sequence[ShardStats], num_workers: int) -> frozenset[int]:
    """The worker actors that no step is made without: those with a rank that is behind the most.

    Args:
        stats: of every shard.
        num_workers: worker actors; rank r runs on worker r mod `num_workers`.
    """
    pushed = [min(column) for column in zip(*(s.expected for s in stats), strict=True)]
    return frozenset(r % num_workers for r, step in enumerate(pushed) if step == min(pushed))


def first_steps(stats: Sequence[ShardStats]) -> list[int]:
    """The step that each rank goes on with: the first that is not in the state of every shard.

    Shards may have its push, and drop it when it comes again; but should they die before they have
    applied it, the new worker has it to send.
    """
    return [min(column) for column in zip(*(s.fences for s in stats), strict=True)]
