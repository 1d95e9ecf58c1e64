"""`Storage`: the files below one root, in a local folder or in an object store (S3, GCS).

What snapshots need and no more: write a file once and know its checksum, replace a small file
atomically, read, list, remove. Every error of the system becomes a `StorageError` that names the
file and the reason in one line. This module knows nothing of what is in the files.

Locations: `/a/b`, `file:///a/b`, `s3://bucket/x?region=…`, `gs://bucket/x`. S3 takes its
credentials from the environment (`AWS_ACCESS_KEY_ID` and the like), from the machine's role, or
from `s3://key:secret@bucket/x`, both percent-quoted; they are left out of all messages.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import xxhash

from ps.disk import Disk
from ps.errors import StorageError
from ps.store_location import StoreLocation, is_uri, local_path

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

CHECKSUM_KIND = "xxh3:"


class Checksum:
    """XXH3-128 of the bytes that pass by."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def add(self, data: ReadableBuffer) -> None:
        """The bytes that follow."""
        self._hash.update(data)

    def __str__(self) -> str:
        """As manifests have it: `xxh3:` and 32 hexadecimal digits."""
        return CHECKSUM_KIND + self._hash.hexdigest()


class Sink(ABC):
    """A file that is being written, from front to back; see `Storage.writer`.

    `pyarrow.ipc.new_file` takes it for a file and hands it big buffers without a copy.
    """

    closed = False

    def __init__(self) -> None:
        self.size = 0
        """Bytes written."""
        self._checksum = Checksum()

    @property
    def checksum(self) -> str:
        """Of the bytes written: `xxh3:` and 32 hexadecimal digits."""
        return str(self._checksum)

    def write(self, data: ReadableBuffer) -> int:
        """Write all of a contiguous buffer, which may be changed afterwards; returns its bytes.

        Raises:
            StorageError: the system refuses.
        """
        view = memoryview(data)
        if view.nbytes:  # a view with a zero in its shape cannot be cast
            self._put(view.cast("B"))
            self.size += view.nbytes
        return view.nbytes

    @abstractmethod
    def _put(self, data: memoryview) -> None:
        """Write these bytes and add them to the checksum."""


class Source:
    """A file that is being read, from front to back; see `Storage.stream`."""

    def __init__(self, file: Any, name: str) -> None:
        self._file = file
        self._name = name

    def fill(self, out: WriteableBuffer) -> int:
        """Read into a contiguous buffer; returns its bytes, or fewer at the end of the file.

        Raises:
            StorageError: the system refuses.
        """
        left = memoryview(out).cast("B")
        with system_errors("read", self._name):
            while left and (count := self._file.readinto(left)):
                left = left[count:]
        return memoryview(out).nbytes - left.nbytes


class Storage(ABC):
    """Files below one root. Paths are relative to it, with `/` between folders.

    All methods raise `StorageError` with the file's name and the system's reason; may be used by
    several threads.
    """

    is_local: bool

    def __init__(self, location: str, uri: str) -> None:
        self.location = location
        """The root, for people: without credentials."""
        self.uri = uri
        """The root, for `Storage.at` in another process. May hold credentials: never print it."""

    @classmethod
    def at(cls, location: str | Path, disk: Disk | None = None) -> Storage:
        """The storage at a location; nothing is made there before something is written.

        Args:
            location: a folder, or the URI of one; see this module.
            disk: does the changes of local files.

        Raises:
            ConfigError: not a location: unknown scheme or option, no bucket.
            StorageError: S3 does not say in which region the bucket is.
        """
        if isinstance(location, str) and is_uri(location):
            path = local_path(location)
            if path is None:
                from ps.object_storage import ObjectStorage  # loads a library for each store

                return ObjectStorage.connect(StoreLocation.parse(location))
            location = path
        from ps.local_storage import LocalStorage

        return LocalStorage(Path(os.path.abspath(location)), disk or Disk())

    @abstractmethod
    def below(self, folder: str) -> Storage:
        """The storage whose root is a folder of this one."""

    @abstractmethod
    def name(self, path: str) -> str:
        """A file's location, for messages: without credentials and options."""

    @abstractmethod
    def writer(self, path: str) -> AbstractContextManager[Sink]:
        """Write a file, in the place of any of that name; makes its folder.

        The file is whole and durable at the end of the `with`. If the body raises, it is removed.
        """

    @abstractmethod
    def replace(self, path: str, data: bytes) -> None:
        """Write a small file atomically and durably: readers see the old contents or the new."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """All of a small file."""

    @abstractmethod
    def open(self, path: str) -> pa.NativeFile:
        """A file for reading at any place. Its own methods raise Arrow's errors."""

    @abstractmethod
    def stream(self, path: str) -> AbstractContextManager[Source]:
        """Read a big file from front to back."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders in a folder, sorted; none if there is no such folder."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether there is a file or folder of that name."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a file; fine if it is gone."""

    @abstractmethod
    def remove_folder(self, path: str) -> None:
        """Remove a folder and all that is in it; fine if it is gone."""

    def _relative(self, path: str) -> PurePosixPath:
        """The path, if it is one below the root: a damaged manifest may name anything."""
        relative = PurePosixPath(path)
        bad = relative.is_absolute() or ".." in relative.parts or "\0" in path
        if bad or any(map(_is_surrogate, path)):
            raise StorageError(f"{path!r:.80} is no path below '{self.location}'")
        return relative


@contextmanager
def system_errors(doing: str, name: str) -> Iterator[None]:
    """Turns the system's errors into a `StorageError` of one line."""
    try:
        yield
    except (OSError, pa.ArrowException) as e:
        number = e.errno if isinstance(e, OSError) else None
        reason = os.strerror(number) if number else " ".join(str(e).split())
        raise StorageError(f"cannot {doing} '{name}': {reason}") from e


def _is_surrogate(letter: str) -> bool:
    return "\ud800" <= letter <= "\udfff"
