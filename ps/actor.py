"""`ShardServer`: the Ray shell of a shard. It forwards and decides nothing.

Steps do not pass through Ray: workers speak to the shard's `ShardLoop`, which also runs what Ray
asks for, between their messages.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from ps.commit_log import CommitLog
from ps.cut import Cut
from ps.cut_writer import WrittenCut, write_cut
from ps.disk import Disk
from ps.errors import JobError, StorageError
from ps.export_file import RowFile
from ps.faults import FaultyDisk
from ps.log_reader import read_log
from ps.messages import ShardStats
from ps.partition import Layout
from ps.ragged import F32
from ps.shard import ShardSpec, ShardState
from ps.shard_files import load_rows, write_pieces
from ps.snapshot import load_shard, open_snapshot
from ps.storage import Storage
from ps.table_parts import PartTarget
from ps.warm import warm_up
from ps.wire.server import Endpoint, ServerOptions, ShardLoop

NODE_ADDRESS = ""
"""`ServerOptions.host` for the address by which Ray knows the shard's node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """How long a shard lives without the driver that started it."""

    job: str = ""
    """Fingerprint of the job: another driver takes the shard over if its job has the same."""
    orphan_s: float = 0.0
    """Seconds without any driver after which the shard ends itself; 0: Ray ends it with its
    driver."""
    faults: bool = False
    """Whether `inject` works: for `manta chaos`."""


WITH_DRIVER = Lifetime()
"""A shard ends with its driver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPlace:
    """Where a shard keeps its commit log, and what it must be the log of."""

    folder: Path
    identity: dict[str, Any]


class ShardServer:
    """Ray actor around one shard.

    A new process has no rows; it answers pulls and pushes with `ShardNotReadyError` until
    `set_dense` marks it ready, which only the driver does that starts or restores a job.
    """

    def __init__(
        self, spec: ShardSpec, options: ServerOptions, lifetime: Lifetime = WITH_DRIVER
    ) -> None:
        warm_up(spec)
        format = options.format
        format.widened(format.narrowed(np.zeros((1, 1), dtype=np.float32)))
        if options.host == NODE_ADDRESS:
            options = replace(options, host=ray.util.get_node_ip_address())
        self._lifetime = lifetime
        self._options = options
        self._disk: Disk = Disk()
        self._log: CommitLog | None = None
        self._failure: StorageError | None = None
        self._cut: asyncio.Future[Cut] | None = None
        self._state = ShardState(spec)
        self._loop = ShardLoop(
            self._state, options, on_orphaned=_end_process, orphan_s=lifetime.orphan_s
        )

    async def endpoint(self) -> Endpoint:
        """Where workers reach the shard."""
        return self._loop.endpoint

    async def identity(self) -> tuple[Lifetime, ServerOptions, bool]:
        """What a driver that takes the shard over must know, and whether another one has it."""
        return self._lifetime, self._options, self._loop.observed

    async def process_id(self) -> int:
        """Of the shard's process."""
        return os.getpid()

    async def load_tables(self, location: str) -> float:
        """Take this shard's rows and slots of every table from a snapshot; returns seconds."""
        started, state = time.monotonic(), self._state
        snapshot = open_snapshot(location)
        layout = Layout.of(state.spec.embedding, state.spec.num_shards)

        def pieces() -> Iterator[None]:
            for table in state.spec.embedding.tables:
                placement = layout.placements[table.name]
                found = load_shard(snapshot, table.name, placement, state.spec.shard_id)
                yield from load_rows(state, table.name, found)

        await self._stream(pieces())
        return time.monotonic() - started

    async def set_dense(
        self,
        dense: F32,
        state: F32,
        slots: dict[str, F32],
        version: int,
    ) -> None:
        """See `ShardState.set_dense`."""
        entries = log_position(self._state.spec, version)
        await self._call(
            lambda: self._state.set_dense(dense, state, slots, version, entries_applied=entries)
        )

    async def log_end(self, place: LogPlace) -> int | None:
        """The last version in the log of the shard's folder, None without a log; cuts a torn end.

        Raises:
            StorageError: it is damaged, or not of this job.
        """
        if not place.folder.exists():
            return None
        log = await asyncio.to_thread(read_log, place.folder, place.identity)
        return None if log.first_version is None else log.end_version

    async def start_log(self, place: LogPlace, upto: int | None = None) -> int:
        """Replay what the log has behind the shard's version, and log from then on.

        Args:
            place: folder of the log; made if it is not there.
            upto: last version to replay; None for all there are. What lies behind is cut off.

        Returns:
            The number of versions that were replayed.

        Raises:
            StorageError: the log is damaged, not of this job, or cannot be written.
        """
        state, replayed = self._state, 0
        if place.folder.exists():
            log = await asyncio.to_thread(read_log, place.folder, place.identity)

            def pieces() -> Iterator[None]:
                nonlocal replayed
                for entry in log.entries(state.entries_applied, upto):
                    state.apply_entry(entry)
                    replayed += 1
                    yield

            if log.first_version is not None and log.end_version > state.entries_applied:
                await self._stream(pieces())
        self._log = CommitLog(
            place.folder, place.identity, self._on_durable, self._on_log_error, self._disk
        )
        self._log.begin(state.entries_applied)
        log_entry = self._log.append

        def attach() -> None:
            state.on_version = log_entry
            state.mark_durable(state.fences())

        await self._call(attach)
        return replayed

    async def truncate_log(self, version: int) -> None:
        """Forget what lies before a version, which a snapshot has."""
        if self._log is not None:
            self._log.truncate(log_position(self._state.spec, version))

    async def arm_cut(self, version: int) -> None:
        """Cut the state when `version` is made; see `ShardState.arm_cut`, and then `write_cut`."""
        loop = asyncio.get_running_loop()
        self._cut = cut_made = loop.create_future()

        def begin(cut: Cut) -> None:
            if self._log is not None:
                self._log.begin(cut.entries_applied)
            loop.call_soon_threadsafe(_settle, cut_made, cut)

        await self._call(lambda: self._state.arm_cut(version, begin))

    async def write_cut(self, target: PartTarget) -> WrittenCut:
        """Wait for the cut that is armed, and write it.

        Raises:
            JobError: none is armed, or it was called off.
            StorageError: the storage refuses.
        """
        if self._cut is None:
            raise JobError(f"shard {self._state.spec.shard_id}: no cut is armed")
        cut = await self._cut
        storage = Storage.at(target.location, self._disk)
        embedding, written = self._state.spec.embedding, Future[WrittenCut]()

        def write() -> None:
            try:
                written.set_result(write_cut(cut, embedding, target, storage, self._loop.call))
            except BaseException as e:  # who waits is to know
                written.set_exception(e)

        threading.Thread(target=write, name="snapshot", daemon=True).start()
        return await asyncio.wrap_future(written)

    async def disarm(self) -> None:
        """Call off a cut that is armed or being written."""
        await self._call(self._state.disarm)
        if self._cut is not None and not self._cut.done():
            self._cut.set_exception(JobError("the snapshot was called off"))
            self._cut.exception()  # seen: nobody may be waiting
        self._cut = None

    async def stats(self) -> ShardStats:
        """See `ShardState.stats`.

        Raises:
            StorageError: the commit log cannot be written any more.
        """
        if self._failure is not None:
            raise self._failure
        stats: ShardStats = await self._call(self._state.stats)
        return stats

    async def read(self, version: int, table: str) -> list[tuple[int, F32, dict[str, F32]]]:
        """(first id, rows, slots) of every slab of a table: for tests and small tables."""
        found: list[tuple[int, F32, dict[str, F32]]] = []

        def pieces() -> Iterator[None]:
            for slab, rows, slots in self._state.slabs(table):
                self._state.check_version(version)
                copies = {name: slot.copy() for name, slot in slots.items()}
                found.append((slab.first_id, rows.copy(), copies))
                yield

        await self._stream(pieces())
        return found

    async def read_dense(self, version: int) -> tuple[F32, dict[str, F32], F32]:
        """See `ShardState.dense`; the shard must be at `version`."""

        def read() -> tuple[F32, dict[str, F32], F32]:
            self._state.check_version(version)
            dense, slots, state = self._state.dense()
            return dense.copy(), {n: slot.copy() for n, slot in slots.items()}, state.copy()

        found: tuple[F32, dict[str, F32], F32] = await self._call(read)
        return found

    async def write_table(
        self, version: int, table: str, rows: RowFile, slots: dict[str, RowFile]
    ) -> int:
        """Write this shard's rows of a table, and the named slots; returns the number of rows.

        The shard must be at `version`, and stay there.
        """
        counts: list[int] = []
        await self._stream(
            map(counts.append, write_pieces(self._state, version, table, rows, slots))
        )
        return sum(counts)

    async def inject(self, kind: str, amount: float) -> None:
        """Make something go wrong, if the job was started for that: `manta chaos`.

        Args:
            kind: "cut" ends all connections of workers; "delay" lets the shard stand still for
                `amount` seconds; "disk" lets one file operation of a snapshot fail, the
                `amount`-th from now.
            amount: see `kind`.
        """
        if not self._lifetime.faults:
            raise JobError("faults are injected by `manta chaos` only")
        if kind == "cut":
            await self._call(self._loop.cut_connections)
        elif kind == "delay":
            await self._call(lambda: self._loop.delay(amount))
        elif kind == "disk":
            self._disk = FaultyDisk.at(int(amount))
        else:
            raise JobError(f"no fault '{kind}'; there are cut, delay and disk")

    def _on_durable(self, fences: tuple[int, ...]) -> None:
        self._loop.call(lambda: self._state.mark_durable(fences))

    def _on_log_error(self, error: StorageError) -> None:
        self._failure = error

    async def _call(self, function: Any) -> Any:
        return await asyncio.wrap_future(self._loop.call(function))

    async def _stream(self, pieces: Iterator[object]) -> None:
        await asyncio.wrap_future(self._loop.stream(pieces))


def log_position(spec: ShardSpec, version: int) -> int:
    """How many entries a shard's log has had when every worker's steps below `version` are in.

    In async mode each push is an entry of its own.
    """
    return version if spec.mode == "sync" else version * spec.num_workers


def _settle(future: asyncio.Future[Cut], cut: Cut) -> None:
    if not future.done():
        future.set_result(cut)


def _end_process() -> None:
    os._exit(1)
