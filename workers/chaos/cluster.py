"""What the harness needs of a cluster: an interface, so that it is tested without Ray.

`workers.chaos.ray_nodes.RayCluster` is the real one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from workers.chaos.plan import Victim
from workers.chaos.processes import Process


@dataclass(frozen=True, slots=True)
class ShardView:
    """A shard's counters, as it told them last."""

    process: str
    """Another text for every process that was this shard."""
    version: int
    duplicates_dropped: int
    cut_version: int | None
    """The version at which a cut is armed or being written."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where one run leaves what it makes."""

    path: Path

    @property
    def snapshots(self) -> Path:
        """Root of its snapshots."""
        return self.path / "snapshots"

    @property
    def metrics(self) -> Path:
        """Its metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """Root of its commit logs."""
        return self.path / "log"

    @property
    def output(self) -> Path:
        """What its drivers print."""
        return self.path / "driver.out"

    @property
    def errors(self) -> Path:
        """What its drivers print to stderr."""
        return self.path / "driver.err"


class Cluster(Protocol):
    """Machines, and one job on them."""

    def start_driver(self, folder: RunFolder) -> None:
        """Submit the job: a new driver process; there must be no other."""

    def driver_exit(self) -> int | None:
        """The exit code of the driver, None while it runs."""

    def driver_errors(self) -> str:
        """The end of what the last driver printed to stderr."""

    def shards(self) -> list[ShardView | None]:
        """The newest counters of every shard; None for one that is not at work. Does not wait."""

    def find(self, victim: Victim) -> Process | None:
        """The living process of a shard, a worker or the driver. None for now. Does not wait."""

    def kill(self, processes: list[Process]) -> None:
        """SIGKILL all of them, and wait until they are gone."""

    def suspend(self, process: Process) -> None:
        """SIGSTOP, and wait until it stands."""

    def resume(self, process: Process) -> None:
        """SIGCONT; nothing for a process that is gone."""

    def inject(self, shard: int, kind: str, amount: float) -> bool:
        """See `ps.actor.ShardServer.inject`; False if the shard is not there."""

    def replace_node(self, index: int) -> None:
        """SIGKILL a node with everything on it; then a new one of its kind comes up."""

    def stop_job(self) -> list[str]:
        """End the driver and all actors of the job; names those that a good end had left."""
