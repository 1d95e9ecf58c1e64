"""`RecoveryConfig`: what a job keeps so that it can go on after a failure, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Protocol

from ps.errors import ConfigError

Durability = Literal["none", "snapshot", "log"]

SCHEMES = ("s3", "gs")
"""Of object stores."""
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


class HasSnapshots(Protocol):
    """A job's output, as far as it matters here."""

    @property
    def snapshot(self) -> str | Path | None:
        """Root of the snapshots."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryConfig:
    """What is kept so that nothing is lost, and how long a failure is waited for.

    A job with a durability ends with the same bits whatever dies on the way.
    """

    durability: Durability = "none"
    """`none`: a job that loses a process fails. `snapshot`: it goes on; if a shard dies, from the
    last snapshot. `log`: every shard also logs what each step changes, and goes on from there."""
    snapshot_every: int = 1000
    """Steps between snapshots. With `train.lookahead`, no step reads rows from behind the last
    multiple of this: so it is one of the numbers that results depend on."""
    keep: int = 3
    """Complete snapshots that are kept; older ones are removed."""
    log: Path | None = None
    """Folder of the shards' logs, which every node sees; None for `log` in `output.snapshot`, if
    that is a folder."""
    retries: int = 5
    """Recoveries in a row without a step of progress, after which the job fails."""
    step_deadline_s: float = 300.0
    """Seconds that a step may take until a worker that does not come to its end is replaced."""
    orphan_timeout_s: float = 3600.0
    """Seconds after which shards without a driver end themselves."""

    def __post_init__(self) -> None:
        for name in ("snapshot_every", "keep", "retries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("step_deadline_s", "orphan_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.log is not None and _URI.match(str(self.log)):
            raise ConfigError(f"log must be a folder that every node sees, got '{self.log}'")
        if self.log is not None and self.durability == "snapshot":
            raise ConfigError("log is for durability log; durability is snapshot")
        for option in fields(self):
            changed = getattr(self, option.name) != option.default
            if changed and not self.durable:
                raise ConfigError(
                    f"{option.name} would have no effect: durability is none; set it to snapshot "
                    "or log"
                )

    @property
    def durable(self) -> bool:
        """Whether the job goes on after a failure."""
        return self.durability != "none"

    @property
    def boundary_every(self) -> int:
        """Steps between the versions that no later step reads behind; 0 for none."""
        return self.snapshot_every if self.durable else 0

    def log_folder(self, output: HasSnapshots) -> Path | None:
        """Where the shards' logs are; None for a job without logs.

        Raises:
            ConfigError: nobody said where.
        """
        if self.durability != "log" or self.log is not None:
            return self.log
        if not isinstance(output.snapshot, Path):
            raise ConfigError(
                "recovery.log: a log lies in a folder that every node sees, but output.snapshot is "
                f"'{output.snapshot}'; name a folder for it"
            )
        return output.snapshot / "log"


def check_recovery(recovery: RecoveryConfig, output: HasSnapshots) -> None:
    """Refuse a durability without the places that it needs.

    Raises:
        ConfigError: names the key and what is wanted.
    """
    if recovery.durable and output.snapshot is None:
        raise ConfigError(
            f"recovery.durability: {recovery.durability} needs output.snapshot, the root of the "
            "snapshots"
        )
    recovery.log_folder(output)


def location(key: str, value: str | Path | None) -> str | Path | None:
    """A folder as a `Path`, a folder of an object store as its URI.

    >>> location("snapshot", "runs/a"), location("snapshot", "s3://bucket/a")
    (PosixPath('runs/a'), 's3://bucket/a')

    Raises:
        ConfigError: it is neither.
    """
    if value is None:
        return None
    scheme = _URI.match(str(value))
    if scheme is None:
        return Path(value)
    wanted = f"{key}: wanted a folder, s3://bucket/folder or gs://bucket/folder, got '{value}'"
    if isinstance(value, Path):  # it has lost a slash
        raise ConfigError(f"{wanted} as a Path; give it as text")
    if scheme[1] not in SCHEMES or not value.startswith(f"{scheme[1]}://") or value[5:6] in "/":
        raise ConfigError(wanted)
    return value


def absolute(value: str | Path | None) -> str | Path | None:
    """The same place for a process with another working folder."""
    return value.absolute() if isinstance(value, Path) else value


def lies_in(place: str | Path, root: str | Path) -> bool:
    """Whether a place is the root, or lies below it."""
    if isinstance(place, Path) and isinstance(root, Path):
        return place.absolute().is_relative_to(root.absolute())
    inner, outer = (str(x).split("?")[0].rstrip("/") + "/" for x in (place, root))
    return inner.startswith(outer)
