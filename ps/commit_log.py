"""`CommitLog`: what every version of a shard changed, made durable behind the shard's back.

A thread of its own takes everything that has been appended, writes it, syncs once for all of it
(group commit), and reports the last entry's fences. A version is durable when it is reported, not
before. After the first error nothing more is written or reported.

What a crash may leave, and why it is no mixture: a segment gets its name when its header is
durable, and its first entry when its name is; a segment is begun when the one before it is durable
to its end; segments that are cut away go newest first, each durably, before anything is written in
their place. See `ps.log_format` for the bytes, `ps.log_reader` for reading them.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ps.disk import Disk
from ps.errors import StorageError
from ps.log_format import (
    DamagedHeaderError,
    check_identity,
    encode_entry,
    encode_identity,
    entry_bytes,
    segment_header,
)
from ps.log_reader import (
    LogReader,
    Segment,
    lock_log,
    read_log,
    segment_name,
    segment_paths,
    version_of,
)
from ps.messages import LogEntry

__all__ = ["CommitLog", "LogEntry", "LogReader", "read_log"]


@dataclass(frozen=True, slots=True)
class _Begin:
    version: int


@dataclass(frozen=True, slots=True)
class _Truncate:
    version: int


_Work = LogEntry | _Begin | _Truncate


class CommitLog:
    """One shard's log.

    `begin` and `append` are for one thread at a time, the others for any; only `close` waits for
    the disk. The folder is this process's alone from the first `begin` until `close`.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        on_durable: Callable[[tuple[int, ...]], None],
        on_error: Callable[[StorageError], None],
        disk: Disk | None = None,
    ) -> None:
        """Start the thread; nothing is written before `begin`.

        Args:
            folder: of this shard's log alone; made if it is not there.
            identity: whose log it is, as JSON values; a log with another one is refused.
            on_durable: called with the fences of the last entry that is durable, in the thread.
            on_error: called once when the log can go no further, in the thread; what was not
                reported as durable by then never will be, and what is appended later is dropped.
            disk: what writes.
        """
        self._writer = _Writer(folder, identity, disk or Disk())
        self._on_durable = on_durable
        self._on_error = on_error
        self._queue: deque[_Work] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._last: int | None = None
        self._queued_bytes = 0
        name = f"log-{folder.name}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        """Bytes of the entries that are not durable yet; they are in memory until then."""
        return self._queued_bytes

    def begin(self, version: int) -> None:
        """Start a segment: entries of version + 1, … follow, and what the log has of them goes.

        Where the log does not reach up to `version`, all of it goes: it leads nowhere any more.
        """
        self._last = version
        self._put(_Begin(version))

    def append(self, entry: LogEntry) -> None:
        """Write an entry as soon as possible. Nobody may change its arrays any more."""
        assert self._last is not None, "begin() comes first"
        assert entry.version == self._last + 1, (entry.version, self._last)
        self._last = entry.version
        self._put(entry)

    def truncate(self, version: int) -> None:
        """Forget what only states before `version` need: segments wholly at or below it go."""
        self._put(_Truncate(version))

    def close(self, timeout_s: float = 30.0) -> None:
        """Make durable what has been appended, and stop.

        A disk that does not answer is waited for no longer than `timeout_s`.
        """
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _put(self, work: _Work) -> None:
        with self._wake:
            if self._closed:
                return
            self._queue.append(work)
            if isinstance(work, LogEntry):
                self._queued_bytes += entry_bytes(work)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._do(self._take()):
                pass
            self._writer.stop()
        except OSError as e:
            self._fail(StorageError(f"cannot write '{self._writer.at}': {e.strerror or e}"), e)
        except StorageError as e:
            self._fail(e, e)
        except BaseException as e:  # whoever waits for the disk must hear of a bug, too
            what = f"{type(e).__name__}: {e}"
            self._fail(StorageError(f"the log writer of '{self._writer.at}' stopped: {what}"), e)

    def _take(self) -> list[_Work]:
        """Everything that waits to be done; nothing when the log is closed."""
        with self._wake:
            while not (self._queue or self._closed):
                self._wake.wait()
            group = list(self._queue)
            self._queue.clear()
            return group

    def _do(self, group: list[_Work]) -> bool:
        """Do it; False if there is nothing. Nobody else keeps it, so that memory is free after."""
        entries: list[LogEntry] = []
        for work in group:
            if isinstance(work, LogEntry):
                entries.append(work)
                continue
            self._write(entries)
            entries = []
            if isinstance(work, _Begin):
                self._writer.begin(work.version)
            else:
                self._writer.truncate(work.version)
        self._write(entries)
        return bool(group)

    def _write(self, entries: list[LogEntry]) -> None:
        if not entries:
            return
        self._writer.write(entries)
        with self._wake:
            self._queued_bytes -= sum(map(entry_bytes, entries))
        self._on_durable(entries[-1].fences)

    def _fail(self, error: StorageError, cause: BaseException) -> None:
        error.__cause__ = cause if cause is not error else error.__cause__
        with self._wake:
            self._closed = True
            self._queue.clear()
            self._queued_bytes = 0
        self._writer.abandon()
        self._on_error(error)


class _Writer:
    """The files of a log, in its thread. Any error is the end of it."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], disk: Disk) -> None:
        self._folder = folder
        self._identity = encode_identity(identity)
        self._disk = disk
        self._lock: int | None = None
        self._fd: int | None = None
        self._bases: list[int] = []
        """First versions of the segments."""
        self._synced = -1
        """Last version that is durable."""
        self.at = folder
        """What is being changed."""

    def write(self, entries: list[LogEntry]) -> None:
        """Write entries and wait until they are on the disk."""
        assert self._fd is not None
        # One call for all: each time that this thread lets others run, it has to wait for them.
        pieces = [piece for e in entries for piece in encode_entry(e, self._synced)]
        self._disk.write_all(self._fd, pieces)
        self._disk.sync(self._fd)
        self._synced = entries[-1].version

    def begin(self, version: int) -> None:
        """See `CommitLog`; what was written is durable."""
        goes_on = self._fd is not None and version == self._synced
        if goes_on and self._bases[-1] == version:
            return
        self._close()
        if not goes_on:
            self._cut(version)
        name = segment_name(version)
        new, self.at = self._folder / f"{name}.new", self._folder / name
        self._fd = self._disk.create(new)
        self._disk.write(self._fd, segment_header(self._identity, version))
        self._disk.sync(self._fd)
        self._disk.rename(new, self.at)
        self._disk.sync_folder(self._folder)
        self._bases = [*(base for base in self._bases if base != version), version]
        self._synced = version

    def truncate(self, version: int) -> None:
        """See `CommitLog`."""
        while len(self._bases) > 1 and self._bases[1] <= version:
            path, current = self._folder / segment_name(self._bases.pop(0)), self.at
            self.at = path
            self._disk.remove(path)
            self.at = current

    def stop(self) -> None:
        """Give files back."""
        self._close()
        self._unlock()

    def abandon(self) -> None:
        """Give files back after an error, come what may."""
        with suppress(BaseException):  # there was an error before, and that is the one to tell
            self._close()
        self._unlock()

    def _close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._disk.close(fd)

    def _unlock(self) -> None:
        if self._lock is not None:
            lock, self._lock = self._lock, None
            os.close(lock)

    def _cut(self, version: int) -> None:
        """Leave nothing behind a version, and nothing that does not lead up to it."""
        self.at = self._folder
        self._disk.make_folder(self._folder)
        if self._lock is None:
            self._lock = lock_log(self._folder)
        for left in self._folder.glob("*.new"):
            self._disk.remove(left)
        kept = segment_paths(self._folder)
        for path in kept:
            self._check_owner(path)
        while kept and version_of(kept[-1]) > version:
            self._remove(kept.pop())
        if kept and version_of(kept[-1]) < version:
            size = self._size_at(kept[-1], version)
            if size is not None:
                self.at = kept[-1]
                self._disk.truncate(kept[-1], size)
            else:
                while kept:
                    self._remove(kept.pop())
        self._bases = [version_of(path) for path in kept]

    def _remove(self, path: Path) -> None:
        """Remove a segment before any older one, so that no crash leaves a gap."""
        self.at = path
        self._disk.remove(path)
        self._disk.sync_folder(self._folder)

    def _check_owner(self, path: Path) -> None:
        segment = self._open(path)
        if segment is not None:
            check_identity(segment.identity, self._identity, str(path))

    def _size_at(self, path: Path, version: int) -> int | None:
        """Size of a segment that ends with a version; None if it does not get there."""
        segment = self._open(path)
        if segment is None:
            return None
        segment.find(check=False)
        return segment.end_of(version) if version <= segment.end_version else None

    @staticmethod
    def _open(path: Path) -> Segment | None:
        try:
            return Segment(path, read_ahead=False)
        except DamagedHeaderError:  # what it led to is there without it: no use to anybody
            return None
