"""Reads a commit log back: which versions it can replay, and their entries one by one.

A process that was killed, or a machine that stopped, leaves a torn tail behind the last entries
that were made durable; `read_log` cuts it off. Anything else that is wrong is damage, and an error
as soon as it is in the way of what is asked for.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ps.disk import Disk
from ps.errors import StorageError
from ps.log_format import (
    Bytes,
    EntryHeader,
    check_identity,
    decode_entry,
    encode_identity,
    find_entries,
    is_whole,
    read_entry_header,
    read_segment_header,
)
from ps.messages import LogEntry

LOCK_WAIT_S = 10.0
"""How long a process that is just being killed may take to let go of its log."""
_NAME = re.compile(r"(\d{12,})\.log")
_LOCK_FILE = "lock"
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14 and later
_POPULATED_BYTES = 1 << 26


class Segment:
    """One file of a log, mapped, and where its entries are."""

    def __init__(self, path: Path, *, read_ahead: bool = True) -> None:
        """Map a file and read its header.

        Args:
            path: the file.
            read_ahead: read all of it now.

        Raises:
            StorageError: it cannot be read, or has no header that this version of Manta knows.
        """
        self.path = path
        self._data = _map(path, read_ahead=read_ahead)
        self.base, self.identity, self._first = read_segment_header(self._data, str(path))
        """Its entries follow version `base`."""
        self._entries: list[tuple[int, EntryHeader]] = []
        self._num_checked = 0
        self.size_bytes = self._first
        """Where the entries end that were found so far."""
        self.problem: str | None = None
        """What ends the entries before the file does."""

    @property
    def end_version(self) -> int:
        """Of the last entry found."""
        return self.base + len(self._entries)

    def end_of(self, version: int) -> int:
        """Offset behind the entry of a version that was found, or behind the header."""
        if version == self.base:
            return self._first
        offset, header = self._entries[version - self.base - 1]
        return offset + header.size_bytes

    def find(self, *, check: bool) -> None:
        """Find the entries, to the end of the file or the first that is bad.

        Args:
            check: checksums too, not only headers; `entry` does so otherwise.
        """
        while self.size_bytes < self._data.size:
            header = read_entry_header(self._data, self.size_bytes)
            if header is None or (check and not is_whole(self._data, self.size_bytes, header)):
                self.problem = f"'{self.path}', byte {self.size_bytes}: the entry of version "
                self.problem += f"{self.end_version + 1} is damaged"
                return
            if header.version != self.end_version + 1:
                self.problem = f"'{self.path}', byte {self.size_bytes}: an entry of version "
                self.problem += f"{header.version} where {self.end_version + 1} is next"
                return
            self._entries.append((self.size_bytes, header))
            self.size_bytes += header.size_bytes
            if check:
                self._num_checked += 1

    def problem_is_torn_tail(self) -> bool:
        """Whether a crash may have left what `find` stumbled on: nobody was told it is durable."""
        later = find_entries(self._data, self.size_bytes)
        return not any(header.synced > self.end_version for header in later)

    def entry(self, version: int) -> LogEntry:
        """An entry that was found.

        Raises:
            StorageError: its checksum is wrong.
        """
        index = version - self.base - 1
        offset, header = self._entries[index]
        if index >= self._num_checked and not is_whole(self._data, offset, header):
            raise StorageError(
                f"'{self.path}', byte {offset}: the entry of version {version} is damaged"
            )
        return decode_entry(self._data, offset, header)


class LogReader:
    """The versions that a log can replay."""

    def __init__(self, folder: Path, segments: list[Segment]) -> None:
        """Take segments by ascending version, their entries found."""
        self._folder = folder
        self._segments = segments
        self.first_version: int | None = None
        """Oldest version that can be brought to `end_version`; None if the log is empty."""
        self.end_version = -1
        """Newest version that can be made; -1 if the log is empty."""
        if segments:
            self.end_version = segments[-1].end_version
            self.first_version = segments[-1].base
            for older, newer in reversed(list(pairwise(segments))):
                if older.end_version < newer.base:
                    break
                self.first_version = older.base

    def entries(self, after: int, upto: int | None = None) -> Iterator[LogEntry]:
        """Entries of versions after + 1 to `upto`, in order; without `upto`, to the last.

        Their arrays lie in the files' memory; writing to them does not change the log. When a
        `CommitLog` cuts it at a version, nobody may touch those of later versions any more.

        Raises:
            StorageError: an entry in the range is missing or damaged; the latter maybe only when
                it is reached.
        """
        last = self.end_version if upto is None else upto
        if last <= after:
            return iter(())
        return self._entries(after, last, self._check_range(after, last))

    def _check_range(self, after: int, last: int) -> int:
        """Index of the first segment needed."""
        first = max((i for i, s in enumerate(self._segments) if s.base <= after), default=None)
        if first is None or last > self.end_version:
            have = f"{self.first_version} to {self.end_version}" if self._segments else "none"
            raise StorageError(
                f"commit log '{self._folder}' cannot replay versions {after} to {last}; it has "
                f"{have}"
            )
        for older, newer in pairwise(self._segments[first:]):
            if older.end_version < min(newer.base, last):
                raise StorageError(
                    f"commit log '{self._folder}' cannot replay versions {after} to {last}: "
                    f"{older.end_version + 1} to {newer.base} are missing"
                    + (f"; {older.problem}" if older.problem else "")
                )
            if newer.base >= last:
                break
        return first

    def _entries(self, after: int, last: int, first: int) -> Iterator[LogEntry]:
        ends = [segment.base for segment in self._segments[first + 1 :]] + [self.end_version]
        version = after + 1
        for segment, end in zip(self._segments[first:], ends, strict=True):
            while version <= min(end, last):
                yield segment.entry(version)
                version += 1


def read_log(
    folder: Path, identity: Mapping[str, Any], disk: Disk | None = None, *, read_only: bool = False
) -> LogReader:
    """See what a log has; cut off a torn tail. What is left is durable.

    Args:
        folder: of one shard's log; there may be none.
        identity: as given to `CommitLog`.
        disk: by which the tail is cut.
        read_only: leave the files as they are; a process may be writing them.

    Raises:
        StorageError: it cannot be read, it is of another job or shard, another process writes it,
            or something that was durable is damaged.
    """
    disk = disk or Disk()
    with _errors(folder, "read"):
        if not folder.is_dir():
            return LogReader(folder, [])
        if not read_only:
            os.close(lock_log(folder))
        segments = _open_segments(folder, encode_identity(identity))
        if segments and not read_only:
            # The process that wrote it may have ended before it synced its last entries.
            disk.truncate(segments[-1].path, segments[-1].size_bytes)
            disk.sync_folder(folder)
    return LogReader(folder, segments)


def segment_paths(folder: Path) -> list[Path]:
    """Files of a log's segments, by ascending version."""
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def segment_name(version: int) -> str:
    """File name of the segment whose entries follow a version."""
    return f"{version:012d}.log"


def version_of(path: Path) -> int:
    """The version in the name of a segment."""
    return int(path.stem)


def lock_log(folder: Path) -> int:
    """Wait until no other process writes a log, and be the one that may.

    Returns:
        File descriptor; closing it, or the end of the process, gives the lock back.

    Raises:
        OSError: the file system refuses.
        StorageError: another process has it for too long.
    """
    fd = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise StorageError(
                    f"commit log '{folder}' is being written by another process"
                ) from None
            time.sleep(0.01)
        except OSError:
            os.close(fd)
            raise
        else:
            return fd


def _open_segments(folder: Path, identity: bytes) -> list[Segment]:
    segments = []
    for path in segment_paths(folder):
        segment = Segment(path)
        check_identity(segment.identity, identity, str(path))
        if segment.base != version_of(path):
            raise StorageError(f"'{path}' is segment {segment.base} under another name")
        segments.append(segment)
    for segment in segments[:-1]:
        segment.find(check=False)
    if segments:
        segments[-1].find(check=True)
        problem = segments[-1].problem
        if problem is not None and not segments[-1].problem_is_torn_tail():
            raise StorageError(f"{problem}, and durable ones follow it")
    return segments


def _map(path: Path, *, read_ahead: bool) -> Bytes:
    """A file's bytes, in memory of this process that is filled when it is read."""
    with _errors(path, "read"), open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if not size:
            return np.zeros(0, dtype=np.uint8)
        # Arrays that may be written are what compiled kernels expect; the file stays as it is.
        mapped = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_COPY)
        if read_ahead:
            _read_ahead(mapped, size)
        return np.frombuffer(mapped, dtype=np.uint8)


def _read_ahead(mapped: mmap.mmap, size: int) -> None:
    """Read a mapped file at once, where the system can: errors are errors then, not signals."""
    for start in range(0, size, _POPULATED_BYTES):
        try:
            mapped.madvise(_POPULATE_READ, start, min(_POPULATED_BYTES, size - start))
        except OSError as e:
            if e.errno in (errno.EINVAL, errno.ENOSYS):  # an older system
                return
            raise


@contextmanager
def _errors(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise StorageError(f"commit log: cannot {verb} '{path}': {e.strerror or e}") from e
