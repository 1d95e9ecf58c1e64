"""`FaultyDisk`: a `Disk` on which chosen operations fail, for tests and for `manta chaos`."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ps.disk import Disk

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a method of `Disk` that is about to be made."""

    number: int
    """How many there were on this disk, this one included."""
    name: str
    """Of the method; `write` for `write_all` too."""
    path: Path
    """What it changes; a rename's target."""


Chooser = Callable[[Operation], bool]


class FaultyDisk(Disk):
    """Counts operations and fails those that are chosen, before they change anything.

    A failing `write` may write a part of its bytes first, and a failing `close` closes all the
    same. Safe in any thread.

    >>> disk = FaultyDisk.at(1, errno.EACCES)
    >>> disk.remove(Path("nothing"))
    Traceback (most recent call last):
    PermissionError: [Errno 13] Permission denied: 'nothing'
    >>> disk.remove(Path("nothing"))
    >>> disk.count
    2
    """

    def __init__(
        self, fails: Chooser | None = None, error: int = errno.ENOSPC, *, torn: float = 0.0
    ) -> None:
        """Start with no operations counted.

        Args:
            fails: says which operations fail; None for none. It is called under a lock.
            error: `errno` of their errors.
            torn: part of its bytes, in [0, 1], that a failing `write` leaves in the file.
        """
        self._fails = fails
        self._error = error
        self._torn = torn
        self._next: list[tuple[str | None, int]] = []
        self._lock = threading.Lock()
        self._paths: dict[int, Path] = {}
        self.counts: Counter[str] = Counter()
        """Operations so far, failed ones too, by name."""
        self.failed = 0
        """Operations that failed."""

    @classmethod
    def at(cls, number: int, error: int = errno.ENOSPC, *, torn: float = 0.0) -> Self:
        """Only the operation of that number, from 1, fails."""
        return cls(lambda operation: operation.number == number, error, torn=torn)

    @classmethod
    def since(cls, number: int, error: int = errno.ENOSPC, *, torn: float = 0.0) -> Self:
        """The operation of that number, from 1, and all later ones fail."""
        return cls(lambda operation: operation.number >= number, error, torn=torn)

    @property
    def count(self) -> int:
        """Operations so far, failed ones too."""
        with self._lock:
            return self.counts.total()

    def fail_next(self, name: str | None = None, error: int = errno.ENOSPC) -> None:
        """Let the next operation of that name (None: of any) fail, once; calls add up."""
        with self._lock:
            self._next.append((name, error))

    def make_folder(self, path: Path) -> None:
        """See `Disk`; counted also if the folder is there."""
        self._pass("make_folder", path)
        super().make_folder(path)

    def create(self, path: Path, *, direct: bool = False) -> int:
        """See `Disk`."""
        self._pass("create", path)
        return self._opened(super().create(path, direct=direct), path)

    def append_to(self, path: Path) -> int:
        """See `Disk`."""
        self._pass("append_to", path)
        return self._opened(super().append_to(path), path)

    def write_all(self, fd: int, pieces: Sequence[ReadableBuffer]) -> None:
        """See `Disk`; `write` comes through here too."""
        try:
            self._pass("write", self._path(fd))
        except OSError:
            data = b"".join(memoryview(piece).tobytes() for piece in pieces)
            super().write_all(fd, (data[: int(len(data) * self._torn)],))
            raise
        super().write_all(fd, pieces)

    def sync(self, fd: int) -> None:
        """See `Disk`."""
        self._pass("sync", self._path(fd))
        super().sync(fd)

    def close(self, fd: int) -> None:
        """See `Disk`."""
        with self._lock:
            path = self._paths.pop(fd, Path())
        super().close(fd)
        self._pass("close", path)

    def rename(self, source: Path, target: Path) -> None:
        """See `Disk`."""
        self._pass("rename", target)
        super().rename(source, target)

    def sync_folder(self, path: Path) -> None:
        """See `Disk`."""
        self._pass("sync_folder", path)
        super().sync_folder(path)

    def remove(self, path: Path) -> None:
        """See `Disk`."""
        self._pass("remove", path)
        super().remove(path)

    def remove_folder(self, path: Path) -> None:
        """See `Disk`."""
        self._pass("remove_folder", path)
        super().remove_folder(path)

    def truncate(self, path: Path, size: int) -> None:
        """See `Disk`."""
        self._pass("truncate", path)
        super().truncate(path, size)

    def _opened(self, fd: int, path: Path) -> int:
        with self._lock:
            self._paths[fd] = path
        return fd

    def _path(self, fd: int) -> Path:
        with self._lock:
            return self._paths.get(fd, Path())

    def _pass(self, name: str, path: Path) -> None:
        """Count an operation.

        Raises:
            OSError: it is one that fails.
        """
        with self._lock:
            self.counts[name] += 1
            error = self._error_of(Operation(self.counts.total(), name, path))
            if error is None:
                return
            self.failed += 1
        raise OSError(error, os.strerror(error), str(path))

    def _error_of(self, operation: Operation) -> int | None:
        for waiting in self._next:
            if waiting[0] in (None, operation.name):
                self._next.remove(waiting)
                return waiting[1]
        if self._fails is not None and self._fails(operation):
            return self._error
        return None
