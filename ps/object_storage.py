"""`ObjectStorage`: a `Storage` in a bucket of S3, of what speaks like it, or of GCS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

import pyarrow as pa
from pyarrow import fs

from ps.errors import StorageError
from ps.storage import Sink, Source, Storage, system_errors
from ps.store_location import StoreLocation

_UNSENT_BYTES = 64 << 20
_STREAM_BYTES = 8 << 20


class ObjectStorage(Storage):
    """Objects whose keys start with a folder; see `Storage`."""

    is_local = False

    def __init__(self, store: StoreLocation, system: fs.FileSystem) -> None:
        super().__init__(store.location, store.uri)
        self._store = store
        self._system = system

    @classmethod
    def connect(cls, store: StoreLocation) -> Self:
        """The storage at a location.

        Raises:
            ConfigError: this pyarrow is built without the store, or refuses an option.
            StorageError: S3 does not say in which region the bucket is.
        """
        with system_errors("reach", store.name("")):
            return cls(store, store.connect())

    def below(self, folder: str) -> Storage:
        """See `Storage.below`."""
        return ObjectStorage(self._store.below(str(self._relative(folder))), self._system)

    def name(self, path: str) -> str:
        """See `Storage.name`."""
        return self._store.name(str(self._relative(path)))

    @contextmanager
    def writer(self, path: str) -> Iterator[Sink]:
        """See `Storage.writer`."""
        key, name = self._key(path), self.name(path)
        with system_errors("write", name):
            stream = self._system.open_output_stream(key)
        try:
            yield _ObjectSink(stream, name)
            with system_errors("write", name):
                stream.close()
        except BaseException:
            # Arrow can only complete an upload, not give it up: it is removed afterwards.
            with suppress(OSError, pa.ArrowException):
                stream.close()
            with suppress(OSError, pa.ArrowException):
                self._system.delete_file(key)
            raise

    def replace(self, path: str, data: bytes) -> None:
        """See `Storage.replace`."""
        with (
            system_errors("write", self.name(path)),
            self._system.open_output_stream(self._key(path)) as stream,
        ):
            stream.write(data)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        with system_errors("read", self.name(path)), self.open(path) as file:
            data: bytes = file.read()
            return data

    def open(self, path: str) -> pa.NativeFile:
        """See `Storage.open`."""
        with system_errors("read", self.name(path)):
            return self._system.open_input_file(self._key(path))

    @contextmanager
    def stream(self, path: str) -> Iterator[Source]:
        """See `Storage.stream`."""
        name = self.name(path)
        with system_errors("read", name):
            file = self._system.open_input_stream(self._key(path), buffer_size=_STREAM_BYTES)
        with file:
            yield Source(file, name)

    def names(self, folder: str = "") -> list[str]:
        """See `Storage.names`."""
        chosen = fs.FileSelector(self._key(folder), allow_not_found=True)
        with system_errors("list", self.name(folder)):
            return sorted(info.base_name for info in self._system.get_file_info(chosen))

    def exists(self, path: str) -> bool:
        """See `Storage.exists`."""
        return bool(self._info(path).type != fs.FileType.NotFound)

    def size(self, path: str) -> int:
        """See `Storage.size`."""
        info = self._info(path)
        if info.type != fs.FileType.File:
            raise StorageError(f"cannot look at '{self.name(path)}': there is no such file")
        return int(info.size)

    def remove(self, path: str) -> None:
        """See `Storage.remove`."""
        with system_errors("remove", self.name(path)), suppress(FileNotFoundError):
            self._system.delete_file(self._key(path))

    def remove_folder(self, path: str) -> None:
        """See `Storage.remove_folder`."""
        with system_errors("remove", self.name(path)), suppress(FileNotFoundError):
            self._system.delete_dir(self._key(path))

    def _info(self, path: str) -> fs.FileInfo:
        with system_errors("look at", self.name(path)):
            return self._system.get_file_info(self._key(path))

    def _key(self, path: str) -> str:
        return self._store.key(str(self._relative(path)))


class _ObjectSink(Sink):
    def __init__(self, stream: pa.NativeFile, name: str) -> None:
        super().__init__()
        self._stream = stream
        self._name = name
        self._unsent = 0

    def _put(self, data: memoryview) -> None:
        self._checksum.add(data)
        with system_errors("write", self._name):
            self._stream.write(data)
            self._unsent += data.nbytes
            if self._unsent >= _UNSENT_BYTES:  # Arrow uploads in the background, without a bound
                self._stream.flush()
                self._unsent = 0
