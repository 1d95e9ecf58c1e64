"""`CrashDisk`: a `Disk` on which the machine "crashes", and what the crash may leave behind.

It works on a real folder and keeps, beside it, a model of what is durable: a file's bytes after
`sync`, names after `sync_folder`. From operation `crash_at` on, every operation raises `Crash`.
`variants` then makes folders as the crash may have left them:

    for number in itertools.count(1):
        disk = CrashDisk(folder, crash_at=number)
        try:
            work(folder, disk)
        except Crash:
            pass
        for left in disk.variants(tmp_path / "left"):
            check(left)      # the folder is removed when the next one is asked for
        if not disk.crashed:
            break            # the work has fewer operations

A thread that meets a Crash must not swallow it silently; if it hands it on in another form, ask
`disk.crashed`. What is not durable may be there, or not, or in part: bytes as a prefix, a prefix
with garbage or zeros behind it, or with a hole, for pages reach a disk in any order.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from ps.disk import Disk

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


T = TypeVar("T")


class Crash(BaseException):
    """The machine is off. Not an Exception, so that no `except Exception` goes on after it."""


@dataclass(eq=False)
class _File:
    """Bytes of a file, whatever its name."""

    durable: bytes = b""
    now: bytearray = field(default_factory=bytearray)
    emptied: bool = False
    """By `create`, since the last sync."""

    def sync(self) -> None:
        self.durable, self.emptied = bytes(self.now), False


_Node = _File | None
"""None: a folder."""
_Names = dict[PurePosixPath, _Node]


@dataclass
class _Change:
    """Of the names in a folder."""

    folders: tuple[PurePosixPath, ...]
    removed: Sequence[PurePosixPath] = ()
    added: _Names = field(default_factory=dict)

    def apply(self, names: _Names) -> None:
        for path in self.removed:
            names.pop(path, None)
        names.update(self.added)


class CrashDisk(Disk):
    """See the module. Operations happen one at a time, from any thread; syncing costs nothing."""

    def __init__(self, folder: Path, crash_at: int | None = None, *, seed: int = 0) -> None:
        """Take what is in `folder` for durable.

        Args:
            folder: all operations are below it; it exists.
            crash_at: number of the first operation that does not come back, from 1. A write, a
                rename or the like may have happened all the same.
            seed: of the variants.
        """
        self.folder = Path(os.path.abspath(folder))
        self.crash_at = crash_at
        self.count = 0
        """Operations so far."""
        self.crashed = False
        self.synced = 0
        """How often a file was synced."""
        self._seed = seed
        self._lock = threading.RLock()
        self._durable: _Names = {}
        for path in sorted(self.folder.rglob("*")):
            data = None if path.is_dir() else path.read_bytes()
            self._durable[self._name(path)] = data if data is None else _File(data, bytearray(data))
        self._now = dict(self._durable)
        self._pending: list[_Change] = []
        self._open: dict[int, _File] = {}

    def make_folder(self, path: Path) -> None:
        with self._lock:
            self._step(_nothing)
            path.mkdir(parents=True, exist_ok=True)
            name = self._name(path)
            for folder in list(reversed([name, *name.parents]))[1:]:
                if folder not in self._now:
                    self._change(_Change((folder.parent,), added={folder: None}))
                    self._sync_names(folder.parent)

    def create(self, path: Path, *, direct: bool = False) -> int:
        with self._lock:
            name = self._name(path)

            def change() -> _File:
                node = self._now.get(name)
                if isinstance(node, _File):
                    node.now, node.emptied = bytearray(), True
                    return node
                return self._new_file(name)

            node = self._step(change)
            return self._opened(super().create(path, direct=direct), node)

    def append_to(self, path: Path) -> int:
        with self._lock:
            name = self._name(path)
            node = self._step(lambda: self._now.get(name) or self._new_file(name))
            assert node is not None
            return self._opened(super().append_to(path), node)

    def write_all(self, fd: int, pieces: Sequence[ReadableBuffer]) -> None:
        with self._lock:
            self._check()
            data = b"".join(memoryview(piece).tobytes() for piece in pieces)
            self._step(lambda: self._open[fd].now.extend(data))
            super().write_all(fd, pieces)

    def sync(self, fd: int) -> None:
        with self._lock:
            self._step(_nothing)
            self._open[fd].sync()
            self.synced += 1

    def close(self, fd: int) -> None:
        with self._lock:
            self._step(_nothing)
            del self._open[fd]
            super().close(fd)

    def rename(self, source: Path, target: Path) -> None:
        with self._lock:
            old, new = self._name(source), self._name(target)

            def change() -> None:
                moved = [p for p in self._now if p == old or old in p.parents]
                added = {new / p.relative_to(old): self._now[p] for p in moved}
                self._change(_Change((old.parent, new.parent), moved, added))

            self._step(change)
            super().rename(source, target)

    def sync_folder(self, path: Path) -> None:
        with self._lock:
            self._step(_nothing)
            self._sync_names(self._name(path))

    def remove(self, path: Path) -> None:
        with self._lock:
            name = self._name(path)
            self._step(lambda: self._remove(name))
            super().remove(path)

    def remove_folder(self, path: Path) -> None:
        with self._lock:
            name = self._name(path)

            def change() -> None:
                inside = [p for p in self._now if p == name or name in p.parents]
                for each in sorted(inside, reverse=True):
                    self._remove(each)

            self._step(change)
            super().remove_folder(path)

    def truncate(self, path: Path, size: int) -> None:
        with self._lock:
            self._step(_nothing)
            os.truncate(path, size)
            node = self._now[self._name(path)]
            assert isinstance(node, _File)
            node.now = node.now[:size] + bytes(max(0, size - len(node.now)))
            node.sync()

    def variants(self, scratch: Path, count: int = 8) -> Iterator[Path]:
        """Folders as a crash at this moment may leave them, all different, the same every time.

        The first is as a killed process leaves it: everything done. The second has only what is
        durable. Each is removed when the next one is asked for.

        Args:
            scratch: folder to make them in.
            count: at most so many.
        """
        seen = set()
        for number in range(count):
            with self._lock:
                left = self._variant(number)
            key = frozenset(left.items())
            if key in seen:
                continue
            seen.add(key)
            folder = scratch / f"crash-{self.crash_at}-{number}"
            _write_folder(folder, left)
            try:
                yield folder
            finally:
                shutil.rmtree(folder)

    def _variant(self, number: int) -> dict[PurePosixPath, bytes | None]:
        """Files (and folders, None) by name."""
        rng = random.Random(f"{self._seed} {self.crash_at} {number}")
        names = dict(self._durable)
        for change in self._pending:
            if number in (0, 2, 3, 4) or (number > 4 and rng.random() < 0.5):
                change.apply(names)
        contents: dict[int, bytes] = {}
        for node in names.values():
            if node is not None and id(node) not in contents:
                contents[id(node)] = _contents(node, number, rng)
        return {
            name: None if node is None else contents[id(node)]
            for name, node in names.items()
            if all(names.get(folder, self) is None for folder in list(name.parents)[:-1])
        }

    def _step(self, change: Callable[[], T]) -> T:
        """Count an operation and note its change, which a crash may leave done or not done."""
        self._check()
        self.count += 1
        result = change()
        if self.count == self.crash_at:
            self.crashed = True
            for fd in self._open:
                os.close(fd)
            raise Crash(f"at operation {self.count}")
        return result

    def _check(self) -> None:
        if self.crashed:
            raise Crash(f"at operation {self.crash_at}")

    def _change(self, change: _Change) -> None:
        change.apply(self._now)
        self._pending.append(change)

    def _sync_names(self, folder: PurePosixPath) -> None:
        left = []
        gone: set[PurePosixPath] = set()
        for change in self._pending:
            if folder in change.folders:
                change.apply(self._durable)
                gone.update(change.removed)
            else:
                left.append(change)
        # What was to happen inside of a folder that is durably gone can happen no more.
        self._pending = [c for c in left if not any(f in gone for f in c.folders)]

    def _new_file(self, name: PurePosixPath) -> _File:
        node = _File()
        self._change(_Change((name.parent,), added={name: node}))
        return node

    def _remove(self, name: PurePosixPath) -> None:
        if name in self._now:
            self._change(_Change((name.parent,), removed=[name]))

    def _opened(self, fd: int, node: _File) -> int:
        self._open[fd] = node
        return fd

    def _name(self, path: Path) -> PurePosixPath:
        whole = Path(os.path.abspath(path))
        return PurePosixPath(whole.relative_to(self.folder).as_posix())


def _nothing() -> None:
    """An operation that changes nothing before it has come back."""


def _contents(node: _File, number: int, rng: random.Random) -> bytes:
    """Bytes of a file after the crash."""
    now, durable = bytes(node.now), node.durable
    if now == durable or number == 0:
        return now
    if number == 1:
        return durable
    if node.emptied and rng.random() < 0.5:
        return durable
    start = 0 if node.emptied else len(durable)
    cut = start + rng.randrange(len(now) - start + 1)
    match number if number <= 4 else rng.randrange(7):
        case 2:
            return now[:cut]
        case 3:
            return now[:start] + bytes(len(now) - start)
        case 4:
            return now[:start]
        case 5:
            return now[:cut] + rng.randbytes(rng.randrange(len(now) - cut + 1))
        case 6:
            end = rng.randrange(cut, len(now) + 1)
            return now[:cut] + bytes(end - cut) + now[end:]
    return now


def _write_folder(folder: Path, left: dict[PurePosixPath, bytes | None]) -> None:
    folder.mkdir(parents=True)
    for name, data in sorted(left.items()):
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
