"""`Snapshots`: the driver's part of a snapshot, while training goes on.

All shards agree to cut at a version that none has reached; each writes its parts when it gets
there; the manifest is written when all parts are durable. Nothing here waits for a shard: what
comes back is handed in as it comes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ps.cut_writer import WrittenCut
from ps.dense_variables import DenseValues
from ps.snapshot import Snapshot, open_snapshot, snapshot_location
from ps.snapshot_root import retain
from ps.snapshot_writer import SnapshotWriter
from workers.jobplan import JobPlan, cursor
from workers.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotReport:
    """A snapshot that is complete."""

    step: int
    location: str
    size_bytes: int
    seconds: float
    """From the cut until it counts."""


Post = Callable[[str, Any, Any], None]
"""Hands an event to the supervisor: what, about which, and its result or error."""


class Snapshots:
    """At most one snapshot at a time."""

    def __init__(self, run: Run, plan: JobPlan, post: Post) -> None:
        """`post` may be called by other threads."""
        self._run = run
        self._plan = plan
        self._post = post
        self._writer: SnapshotWriter | None = None
        self._parts: dict[int, WrittenCut] = {}
        self._commit: threading.Thread | None = None
        self.step: int | None = None
        """Of the snapshot under way, None without one."""

    def begin(self, step: int) -> None:
        """Let all shards cut at a version that none is beyond; returns when all have agreed."""
        job, run = self._run.job, self._run
        assert self.step is None, "one at a time"
        assert job.output.snapshot is not None, "snapshots have a place"
        run.shards.arm_cut(step)
        self.step, self._parts = step, {}
        self._writer = writer = SnapshotWriter(
            job.output.snapshot,
            run.shards.embedding,
            step=step,
            seed=job.seed,
            job=job.name,
            num_shards=run.shards.spec.num_shards,
            transforms=job.transforms(),
            fences=[step] * run.shards.spec.num_workers,
            cursor=cursor(self._plan),
        )
        for shard, handle in enumerate(run.shards.handles):
            future = handle.write_cut.remote(writer.target(shard)).future()
            future.add_done_callback(self._poster(writer, shard))

    def _poster(self, attempt: object, shard: int) -> Callable[[Any], None]:
        return lambda future: self._post("part", (attempt, shard), future)

    def is_under_way(self, attempt: object) -> bool:
        """Whether a part is of the snapshot under way, not of one that was called off."""
        return attempt is self._writer

    def add_part(self, shard: int, part: WrittenCut) -> None:
        """One shard is done; after the last one the snapshot is completed by a thread.

        It posts ("snapshot", step, `SnapshotReport` or the error).
        """
        assert part.version == self.step, "shards cut where they were told"
        self._parts[shard] = part
        if len(self._parts) == self._run.shards.spec.num_shards:
            self._commit = threading.Thread(target=self._complete, name="snapshot", daemon=True)
            self._commit.start()

    def committed(self, report: SnapshotReport) -> Snapshot:
        """The snapshot is complete: shards may forget their logs before it."""
        root = self._run.job.output.snapshot
        assert root is not None, "snapshots have a place"
        snapshot = open_snapshot(snapshot_location(root, report.step))
        self._run.committed(snapshot)
        self._run.shards.truncate_logs(report.step)
        self._forget()
        return snapshot

    def failed(self) -> None:
        """It could not be completed."""
        self._forget()

    def call_off(self, *, shards_too: bool) -> None:
        """Give up the snapshot under way, if there is one; a manifest being written is awaited."""
        if self._commit is not None:
            self._commit.join()
            return  # complete or failed: that is posted
        if self._writer is None:
            return
        if shards_too:
            self._run.shards.disarm()
        self._writer.abandon()
        self._forget()

    def _forget(self) -> None:
        self.step = self._writer = self._commit = None
        self._parts = {}

    def _complete(self) -> None:
        writer, step = self._writer, self.step
        assert writer is not None
        assert step is not None
        result: SnapshotReport | BaseException
        try:
            result = self._written(writer, step)
        except BaseException as e:  # it is the supervisor's affair, whatever it is
            result = e
        self._post("snapshot", step, result)

    def _written(self, writer: SnapshotWriter, step: int) -> SnapshotReport:
        began = time.monotonic()
        run, parts = self._run, [self._parts[k] for k in sorted(self._parts)]
        for part in parts:
            writer.add_parts(part.parts)
        writer.add_dense(
            run.variables,
            _joined(parts),
            model=run.model,
            optimizer=run.job.train.dense_optimizer,
        )
        location = writer.commit()
        seconds = max(part.seconds for part in parts) + time.monotonic() - began
        if run.recovery.durable:
            assert run.job.output.snapshot is not None
            retain(run.job.output.snapshot, run.recovery.keep)
        size = sum(part.size_bytes for cut in parts for part in cut.parts)
        return SnapshotReport(step=step, location=location, size_bytes=size, seconds=seconds)


def _joined(parts: list[WrittenCut]) -> DenseValues:
    slots: Mapping[str, Any] = parts[0].dense_slots
    return DenseValues(
        trainable=np.concatenate([part.dense for part in parts]),
        slots={name: np.concatenate([p.dense_slots[name] for p in parts]) for name in slots},
        state=np.concatenate([part.state for part in parts]),
    )


def as_path(location: str) -> Path | str:
    """A local folder as a path, anything else as it is."""
    return location if "://" in location else Path(location)
