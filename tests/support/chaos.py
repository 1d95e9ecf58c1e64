"""A made-up cluster for the harness of `manta chaos`, in made-up time."""

from __future__ import annotations

from dataclasses import dataclass, field

import orjson

from workers.chaos.cluster import RunFolder, ShardView
from workers.chaos.plan import Victim
from workers.chaos.processes import Process
from workers.chaos.records import FaultRecord

START_S, RESTART_S, STEPS, EVERY = 2.0, 1.0, 300, 20


@dataclass
class FakeCluster:
    """Two shards, two workers and a driver; a step takes 0.1 s while nobody is dead or stopped.

    A dead actor comes back `RESTART_S` after its end, if there is a driver; a dead shard takes the
    run back to the last multiple of `EVERY`.
    """

    now: float = 0.0
    version: float = 0.0
    up: dict[Victim, Process] = field(default_factory=dict)
    back_at: dict[Victim, float] = field(default_factory=dict)
    stopped: set[Process] = field(default_factory=set)
    injected: list[tuple[int, str, float]] = field(default_factory=list)
    replaced_nodes: list[int] = field(default_factory=list)
    folder: RunFolder | None = None
    starts: int = 0
    stops: int = 0
    exit: int | None = None
    steps: int = STEPS
    fails: list[float] = field(default_factory=list)
    """Versions at which the driver ends by itself, each one once."""
    speed: float = 10.0
    dropped: int = 0
    pids: int = 1
    highest: int = 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        if self.exit is not None:
            return
        for victim, at in list(self.back_at.items()):
            if at <= self.now:
                del self.back_at[victim]
                self.up[victim] = self._new()
                if victim.role == "shard" and self.version:
                    self._event("recovered", action="rollback", steps_replayed=3, total_s=RESTART_S)
        if not self.back_at and not self.stopped:
            self.version = min(self.version + self.speed * seconds, self.steps)
            self.highest = max(self.highest, int(self.version))
        if self.fails and self.version >= self.fails[0]:
            self.version = self.fails.pop(0)
            self.exit = 1
        elif self.version == self.steps:
            self.exit = 0
            self._event("finished", duplicates_dropped=self.dropped)

    def _new(self) -> Process:
        self.pids += 1
        return Process(self.pids, 0)

    def _event(self, event: str, **values: object) -> None:
        assert self.folder is not None
        with self.folder.metrics.open("ab") as file:
            file.write(orjson.dumps({"event": event, **values}) + b"\n")

    def start_driver(self, folder: RunFolder) -> None:
        assert self.exit is not None or self.starts == self.stops, "one driver at a time"
        self.starts += 1
        self.folder, self.exit = folder, None
        self.up[Victim("driver")] = self._new()
        for role in ("shard", "worker"):
            for k in range(2):
                if Victim(role, k) not in self.up:
                    self.back_at[Victim(role, k)] = self.now + START_S
        self._event("starting", steps=self.steps)

    def driver_exit(self) -> int | None:
        return self.exit

    def driver_errors(self) -> str:
        return "error: it hurts" if self.exit else ""

    def shards(self) -> list[ShardView | None]:
        version = int(self.version)
        return [
            ShardView(str(p.pid), version, self.dropped if k == 0 else 0, None)
            if (p := self.up.get(Victim("shard", k))) is not None
            else None
            for k in range(2)
        ]

    def find(self, victim: Victim) -> Process | None:
        if victim.role == "driver" and self.exit is not None:
            return None
        return self.up.get(victim)

    def kill(self, processes: list[Process]) -> None:
        for victim, process in list(self.up.items()):
            if process in processes:
                self.stopped.discard(process)
                del self.up[victim]
                if victim.role == "driver":
                    self.exit = -9
                    continue
                self.back_at[victim] = self.now + RESTART_S
                if victim.role == "shard":
                    self.version = self.version // EVERY * EVERY

    def suspend(self, process: Process) -> None:
        self.stopped.add(process)

    def resume(self, process: Process) -> None:
        self.stopped.discard(process)

    def inject(self, shard: int, kind: str, amount: float) -> bool:
        self.injected.append((shard, kind, amount))
        self.dropped += kind == "cut"
        return Victim("shard", shard) in self.up

    def replace_node(self, index: int) -> None:
        self.replaced_nodes.append(index)

    def stop_job(self) -> list[str]:
        self.stops = self.starts
        left = [str(p.pid) for p in self.stopped]
        self.up.clear()
        self.back_at.clear()
        self.version = self.highest = 0
        self.exit = 0 if self.exit is None else self.exit
        return left


@dataclass
class Heard:
    struck_: list[FaultRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def struck(self, record: FaultRecord) -> None:
        self.struck_.append(record)

    def note(self, text: str) -> None:
        self.notes.append(text)
