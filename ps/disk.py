"""`Disk`: the operations by which snapshots and commit logs change local files.

Everything that a crash or a full disk can interrupt passes through here, one method per operation,
so that tests can fail or "crash" each of them in turn (`ps.faults`, tests/support/crash_disk.py).
Errors are the system's own `OSError`s; callers know what they were doing and say so.

What survives a machine's crash: bytes of a file after `sync` of it, and its name (and the absence
of a removed one) after `sync_folder` of its folder. `make_folder` and `truncate` are rare and see
to it themselves.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

DIRECT_ALIGNMENT = 4096
"""Memory addresses and sizes of pieces for a file opened with `direct` should be multiples of it;
one that is not makes the rest of that file go through the page cache."""
_MOST_PIECES = 512


class Disk:
    """Local files, as the operating system has them. Stateless, and so safe in any thread."""

    def make_folder(self, path: Path) -> None:
        """Make a folder and its parents, durably; fine if it is there."""
        _make_folder(path)

    def create(self, path: Path, *, direct: bool = False) -> int:
        """A new, empty file for writing; one of that name loses its contents.

        Args:
            path: where.
            direct: past the page cache (O_DIRECT), if the file system can.

        Returns:
            File descriptor.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        if direct:
            try:
                return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
        return os.open(path, flags, 0o666)

    def append_to(self, path: Path) -> int:
        """A file descriptor that writes behind what the file has; an empty one if there is none."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, fd: int, data: ReadableBuffer) -> None:
        """Write all of a contiguous buffer. After an error any part of it may be in the file."""
        self.write_all(fd, (data,))

    def write_all(self, fd: int, pieces: Sequence[ReadableBuffer]) -> None:
        """`write` of contiguous buffers, one behind the other, as one operation."""
        views = [memoryview(piece) for piece in pieces]
        left = [view.cast("B") for view in views if view.nbytes]
        while left:
            try:
                count = os.writev(fd, left[:_MOST_PIECES])
            except OSError as e:
                if e.errno != errno.EINVAL or not _stop_direct(fd):
                    raise
                continue
            done = 0
            while done < len(left) and count >= len(left[done]):
                count -= len(left[done])
                done += 1
            del left[:done]
            if count:
                left[0] = left[0][count:]

    def sync(self, fd: int) -> None:
        """Wait until everything written is on the disk."""
        os.fdatasync(fd)

    def close(self, fd: int) -> None:
        """Give a file descriptor back; even when it fails, it is gone."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name, in the place of any that has it."""
        os.replace(source, target)

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are on the disk as they are now."""
        _sync_folder(path)

    def remove(self, path: Path) -> None:
        """Remove a file; fine if it is gone."""
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """Remove a folder and all that is in it; fine if it is gone."""
        with suppress(FileNotFoundError):
            shutil.rmtree(path)

    def truncate(self, path: Path, size: int) -> None:
        """Cut a file to `size` bytes, durably."""
        fd = os.open(path, os.O_WRONLY)
        try:
            os.ftruncate(fd, size)
            os.fsync(fd)
        finally:
            os.close(fd)


def _make_folder(path: Path) -> None:
    if path.is_dir():
        return
    if path.parent != path:
        _make_folder(path.parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _stop_direct(fd: int) -> bool:
    """Send the rest of a file through the page cache; False if it goes there already."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    if not flags & direct:
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~direct)
    return True
