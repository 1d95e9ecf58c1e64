"""`LocalStorage`: a `Storage` in a folder of this machine, or of a file system that it mounts."""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from ps.disk import Disk
from ps.storage import Sink, Source, Storage, system_errors

_SINK_BYTES = 4 << 20
_HASH_BYTES = 256 << 10


class LocalStorage(Storage):
    """Files below a folder; see `Storage`."""

    is_local = True

    def __init__(self, root: Path, disk: Disk) -> None:
        super().__init__(str(root), str(root))
        self._root = root
        self._disk = disk

    def below(self, folder: str) -> Storage:
        """See `Storage.below`."""
        return LocalStorage(self._path(folder), self._disk)

    def name(self, path: str) -> str:
        """See `Storage.name`."""
        return str(self._path(path))

    @contextmanager
    def writer(self, path: str) -> Iterator[Sink]:
        """See `Storage.writer`."""
        target = self._path(path)
        sink = _FileSink(self._disk, target)
        try:
            with system_errors("write", str(target)):
                self._disk.make_folder(target.parent)
            yield sink
            with system_errors("write", str(target)):
                sink.finish()
                self._sync_folders(target.parent)
        except BaseException:
            sink.discard()
            raise

    def replace(self, path: str, data: bytes) -> None:
        """See `Storage.replace`."""
        target = self._path(path)
        temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
        sink = _FileSink(self._disk, temporary)
        with system_errors("write", str(target)):
            try:
                self._disk.make_folder(target.parent)
                sink.write(data)
                sink.finish()
                self._disk.rename(temporary, target)
            except BaseException:
                sink.discard()
                raise
            self._sync_folders(target.parent)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        target = self._path(path)
        with system_errors("read", str(target)):
            return target.read_bytes()

    def open(self, path: str) -> pa.NativeFile:
        """See `Storage.open`."""
        target = self._path(path)
        with system_errors("read", str(target)):
            return pa.OSFile(str(target))

    @contextmanager
    def stream(self, path: str) -> Iterator[Source]:
        """See `Storage.stream`."""
        target = str(self._path(path))
        with ExitStack() as opened:
            with system_errors("read", target):
                file = opened.enter_context(open(target, "rb", buffering=0))
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            yield Source(file, target)

    def names(self, folder: str = "") -> list[str]:
        """See `Storage.names`."""
        target = self._path(folder)
        with system_errors("list", str(target)), suppress(FileNotFoundError):
            return sorted(os.listdir(target))
        return []

    def exists(self, path: str) -> bool:
        """See `Storage.exists`."""
        target = self._path(path)
        with system_errors("look at", str(target)), suppress(FileNotFoundError, NotADirectoryError):
            target.stat()
            return True
        return False

    def size(self, path: str) -> int:
        """See `Storage.size`."""
        target = self._path(path)
        with system_errors("look at", str(target)):
            return target.stat().st_size

    def remove(self, path: str) -> None:
        """See `Storage.remove`."""
        target = self._path(path)
        with system_errors("remove", str(target)):
            self._disk.remove(target)

    def remove_folder(self, path: str) -> None:
        """See `Storage.remove_folder`."""
        target = self._path(path)
        with system_errors("remove", str(target)):
            self._disk.remove_folder(target)

    def _path(self, path: str) -> Path:
        return self._root / self._relative(path)

    def _sync_folders(self, folder: Path) -> None:
        """Up to the root: another process may have made a folder and not be done with it."""
        self._disk.sync_folder(folder)
        while folder != self._root:
            folder = folder.parent
            self._disk.sync_folder(folder)


class _FileSink(Sink):
    """Collects bytes in page-aligned memory and writes them past the page cache (O_DIRECT).

    That takes a sixth of the processor time of buffered writing, and leaves the page cache to
    others. What fits the memory as a whole is written buffered.
    """

    def __init__(self, disk: Disk, path: Path) -> None:
        super().__init__()
        self._disk = disk
        self._path = path
        self._pages = mmap.mmap(-1, _SINK_BYTES)
        self._bytes = np.frombuffer(self._pages, dtype=np.uint8)
        self._used = 0
        self._fd: int | None = None
        self._is_made = False

    def _put(self, data: memoryview) -> None:
        given = np.frombuffer(data, dtype=np.uint8)
        with system_errors("write", str(self._path)):
            while given.size:
                # NumPy copies and xxhash hashes without the interpreter's lock; the shard needs it.
                count = min(given.size, _SINK_BYTES - self._used, _HASH_BYTES)
                place = self._bytes[self._used : self._used + count]
                place[:] = given[:count]
                self._checksum.add(place.data)
                given = given[count:]
                self._used += count
                if self._used == _SINK_BYTES:
                    self._send(direct=True)

    def _send(self, *, direct: bool) -> None:
        if self._fd is None:
            self._fd = self._disk.create(self._path, direct=direct)
            self._is_made = True
        self._disk.write(self._fd, self._bytes[: self._used].data)
        self._used = 0

    def finish(self) -> None:
        """Write what is left and make the file durable, but not its name."""
        if self._used or self._fd is None:
            self._send(direct=False)
        fd, self._fd = self._fd, None
        assert fd is not None
        try:
            self._disk.sync(fd)
        finally:
            self._disk.close(fd)

    def discard(self) -> None:
        """Close and remove the file if it was made, as far as the system lets us."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with suppress(OSError):
                self._disk.close(fd)
        if self._is_made:
            with suppress(OSError):
                self._disk.remove(self._path)
