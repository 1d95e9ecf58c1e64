"""What happened: faults, rounds and the whole, as `workers.chaos.report` shows them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from workers.chaos.compare import Comparison
from workers.chaos.events import Recovery, Struck, match
from workers.chaos.plan import Moment, Strike


@dataclass(slots=True, kw_only=True)
class FaultRecord:
    """One strike that was carried out."""

    number: int
    """From 1, in its round; strikes at one moment have the same."""
    round: int
    struck_at_s: float
    """On the harness's clock."""
    at_s: float
    """Since the round began."""
    strike: Strike
    moment: Moment
    version: int
    """The highest version that had been made."""
    recovered_after_s: float | None = None
    """Seconds until a version was made that had not been made before, or the run had ended well;
    None if neither came."""
    recovery: Recovery | None = None
    """What the driver said of it."""

    @property
    def noticed_after_s(self) -> float | None:
        """Seconds until the driver noticed, about; None if it did not say so."""
        if self.recovery is None or not self.recovery.split:
            return None
        return max(0.0, self.recovery.began_at_s - self.struck_at_s)


@dataclass(slots=True, kw_only=True)
class RoundRecord:
    """One run of the job."""

    round: int
    """From 1; 0 is the undisturbed run."""
    seconds: float = 0.0
    steps: int | None = None
    """Of the job, as its driver counted them."""
    faults: list[FaultRecord] = field(default_factory=list)
    missed: int = 0
    """Strikes whose victim was not there."""
    recoveries: list[Recovery] = field(default_factory=list)
    snapshots: int = 0
    failed_snapshots: int = 0
    duplicates_dropped: int = 0
    driver_starts: int = 0
    driver_failures: list[str] = field(default_factory=list)
    """The last words of drivers that ended by themselves, with an error."""
    left_behind: list[str] = field(default_factory=list)
    """Actors that a driver left that had ended well."""
    failure: str | None = None
    """Why the run did not end well."""
    comparison: Comparison | None = None

    @property
    def kills(self) -> int:
        """Processes and nodes that were killed."""
        return sum(fault.strike.kills for fault in self.faults)

    @property
    def steps_replayed(self) -> int:
        """Over all recoveries."""
        return sum(recovery.steps_replayed for recovery in self.recoveries)

    @property
    def identical(self) -> bool:
        """Whether it ended, with the bits of the undisturbed run."""
        return self.failure is None and self.comparison is not None and self.comparison.identical

    def put_down(self) -> None:
        """Put the driver's recoveries down to the faults."""
        struck = [
            Struck(fault.struck_at_s, fault.strike.kind, fault.strike.victim.role)
            for fault in self.faults
        ]
        for fault, recovery in zip(self.faults, match(struck, self.recoveries), strict=True):
            fault.recovery = recovery


@dataclass(frozen=True, slots=True)
class Spread:
    """A few seconds, summed up."""

    count: int
    median_s: float
    p90_s: float
    max_s: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Spread | None:
        """None of none.

        >>> Spread.of([1.0, 3.0, 2.0])
        Spread(count=3, median_s=2.0, p90_s=2.8, max_s=3.0)
        """
        values = np.array(list(seconds), dtype=np.float64)
        if not values.size:
            return None
        median, p90, most = (round(float(np.quantile(values, q)), 4) for q in (0.5, 0.9, 1.0))
        return cls(values.size, median, p90, most)


@dataclass(slots=True, kw_only=True)
class ChaosRecord:
    """All of it."""

    job: str
    durability: str
    seed: int
    kills_wanted: int
    counts_kills: bool
    """Whether `kills_wanted` counts ends of processes; all faults if no kind is one."""
    reference: RoundRecord
    rounds: list[RoundRecord] = field(default_factory=list)

    @property
    def faults(self) -> list[FaultRecord]:
        """Of all rounds."""
        return [fault for record in self.rounds for fault in record.faults]

    @property
    def kills(self) -> int:
        """Processes and nodes that were killed."""
        return sum(record.kills for record in self.rounds)

    @property
    def counted(self) -> int:
        """What is compared with `kills_wanted`."""
        return self.kills if self.counts_kills else len(self.faults)

    @property
    def good(self) -> bool:
        """Whether everything was done, and no bit differs."""
        enough = self.counted >= self.kills_wanted
        return enough and bool(self.rounds) and all(record.identical for record in self.rounds)

    def recovery_by_kind(self) -> dict[str, Spread]:
        """How long it took to go on, by kind of fault."""
        by_kind: dict[str, list[float]] = {}
        for fault in self.faults:
            if fault.recovered_after_s is not None:
                by_kind.setdefault(fault.strike.kind, []).append(fault.recovered_after_s)
        spreads = {kind: Spread.of(seconds) for kind, seconds in sorted(by_kind.items())}
        return {kind: spread for kind, spread in spreads.items() if spread is not None}
