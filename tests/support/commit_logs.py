"""Entries of commit logs, and what a log says about them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ps.commit_log import CommitLog, LogEntry, LogReader, read_log
from ps.disk import Disk
from ps.errors import StorageError

IDENTITY = {"job": "f00", "shard": 1, "num_shards": 3, "dims": [4, 2]}
DEADLINE_S = 60


@cache
def entry(version: int, timeline: int = 0, most_rows: int = 3) -> LogEntry:
    """Any entry of that version; another timeline's has other values."""
    rng = np.random.default_rng([version, timeline])
    tables = []
    for width in (3, 8):
        count = int(rng.integers(most_rows + 1))
        rows = rng.integers(0, 1 << 40, count)
        tables.append((rows, rng.standard_normal((count, width), dtype=np.float32)))
    return LogEntry(
        version=version,
        fences=(version, timeline),
        tables=tuple(tables),
        dense=rng.standard_normal((2, 3), dtype=np.float32),
        state=rng.standard_normal(2, dtype=np.float32),
    )


def bits(of: LogEntry) -> tuple[Any, ...]:
    """An entry as something that can be compared; NaNs are equal if their bits are."""
    arrays = [array for table in of.tables for array in table] + [of.dense, of.state]
    return of.version, of.fences, [(a.dtype.str, a.shape, a.tobytes()) for a in arrays]


def same(seen: Sequence[LogEntry], wanted: Sequence[LogEntry]) -> bool:
    """Whether these are the same entries, bit for bit."""
    return [bits(e) for e in seen] == [bits(e) for e in wanted]


class Log:
    """A commit log, and what it has reported."""

    def __init__(
        self, folder: Path, disk: Disk | None = None, identity: Mapping[str, Any] = IDENTITY
    ) -> None:
        self.durable: list[tuple[int, ...]] = []
        self.errors: list[StorageError] = []
        self._heard = threading.Condition()
        self.log = CommitLog(folder, identity, self._on_durable, self._on_error, disk)

    def _on_durable(self, fences: tuple[int, ...]) -> None:
        with self._heard:
            assert not self.errors, "nothing is durable after an error"
            self.durable.append(fences)
            self._heard.notify_all()

    def _on_error(self, error: StorageError) -> None:
        with self._heard:
            self.errors.append(error)
            self._heard.notify_all()

    @property
    def durable_version(self) -> int:
        """Last version reported, -1 for none."""
        return self.durable[-1][0] if self.durable else -1

    def put(self, *entries: LogEntry) -> None:
        """Append entries as one group, and wait until they are durable or the log has failed."""
        with self.log._wake:  # the thread takes none of them before all are there
            for each in entries:
                self.log.append(each)
        with self._heard:
            last = entries[-1].version
            assert self._heard.wait_for(
                lambda: self.errors or self.durable_version >= last, DEADLINE_S
            )

    def close(self) -> None:
        """Close it, in time."""
        self.log.close()
        assert not self.log._thread.is_alive()
        assert len(self.errors) <= 1


def written(folder: Path, groups: Sequence[Sequence[int]], disk: Disk | None = None) -> None:
    """A log with a segment for each of some groups of versions."""
    log = Log(folder, disk)
    for versions in groups:
        log.log.begin(versions[0] - 1)
        log.put(*map(entry, versions))
    log.close()
    assert not log.errors


def read(folder: Path, disk: Disk | None = None, *, read_only: bool = False) -> LogReader:
    """`read_log` of these logs."""
    return read_log(folder, IDENTITY, disk, read_only=read_only)


def all_entries(reader: LogReader) -> list[LogEntry]:
    """Everything that can be replayed."""
    return [] if reader.first_version is None else list(reader.entries(reader.first_version))
