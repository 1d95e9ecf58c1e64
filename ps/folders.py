"""Immutable folders, written hidden and published whole: how exports are made.

    ROOT/<version>/manifest.json   what is in it; names every file with its size and checksum
    ROOT/.<kind>-<random>/         a version that is being written

What a version holds is the affair of `ps.export`; `ps.manifest` reads it. What snapshots write in
the same form, dense variables and transforms, is here too. Writers on several hosts need ROOT on a
file system that all of them see.
"""

from __future__ import annotations

import errno
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from ps.columns import Transform
from ps.errors import StorageError
from ps.export_file import RowFile, allocate, sha256, sync, write_text, writing
from ps.manifest import LATEST, MANIFEST, VARIABLES_SCHEMA, Kind, file_name
from ps.ragged import F32

__all__ = [
    "LATEST",
    "MANIFEST",
    "FolderWriter",
    "Kind",
    "file_name",
    "set_latest",
    "transform_entries",
    "write_variables",
]


class FolderWriter:
    """Builds one version in a hidden folder and publishes it whole, or not at all.

    Use as a context manager. A killed process leaves its hidden folder behind; it never becomes a
    version and can be deleted.
    """

    def __init__(self, kind: Kind, root: Path) -> None:
        self._kind = kind
        self._root = Path(root).absolute()  # shards have other working folders
        self._folder = self._root / f".{kind.word}-{uuid.uuid4().hex}"
        self._row_files: dict[str, RowFile] = {}

    def __enter__(self) -> Self:
        with self._kind.errors(), writing(self._root):
            self._folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)  # gone already after a commit

    def _allocate(self, file: str, num_rows: int, dim: int) -> RowFile:
        """A file of float32 rows, zero on first use."""
        if file not in self._row_files:
            path = self._folder / file
            with self._kind.errors(), writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._row_files[file] = allocate(path, num_rows, dim)
        return self._row_files[file]

    def _write_variables(self, file: str, variables: Mapping[str, F32]) -> None:
        path = self._folder / file
        with self._kind.errors(), writing(path):
            write_variables(str(path), variables)

    def _seal_transforms(self, transforms: Mapping[str, Transform]) -> list[dict[str, Any]]:
        """The manifest's entries of transforms; writes their vocabularies."""

        def write(name: str, keys: pa.RecordBatch) -> dict[str, Any]:
            file = f"vocabularies/{name}.arrow"
            path = self._folder / file
            with self._kind.errors(), writing(path):
                path.parent.mkdir(exist_ok=True)
                with pa.ipc.new_file(str(path), keys.schema) as out:
                    out.write_batch(keys)
            return self._seal(file)

        return transform_entries(transforms, write)

    def _seal(self, file: str) -> dict[str, Any]:
        """Make a file durable; its entry in the manifest."""
        path = self._folder / file
        sync(path)
        return {"file": file, "size_bytes": path.stat().st_size, "sha256": sha256(path)}

    def _publish(self, version: str, manifest: Mapping[str, Any]) -> None:
        """Rename the folder to `version`; `FileExistsError` if the name is taken."""
        text = json.dumps({**manifest, "version": version}, indent=2)
        write_text(self._folder / MANIFEST, text + "\n")
        for folder in (self._folder, *(p for p in self._folder.rglob("*") if p.is_dir())):
            sync(folder)
        target = self._root / version
        try:
            self._folder.rename(target)
        except OSError as e:
            if e.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise FileExistsError(errno.EEXIST, "there is one already", str(target)) from e
            raise
        sync(self._root)


def set_latest(root: Path, version: str) -> None:
    """Point LATEST at a version, atomically."""
    temporary = root / f".{LATEST}-{uuid.uuid4().hex}"
    try:
        write_text(temporary, version + "\n")
        temporary.replace(root / LATEST)
    finally:
        temporary.unlink(missing_ok=True)
    sync(root)


def write_variables(target: Any, variables: Mapping[str, F32]) -> None:
    """Write named float32 arrays as an Arrow file, one record batch each.

    Args:
        target: path or binary file.
        variables: by name.

    Raises:
        StorageError: an array is not float32.
    """
    with pa.ipc.new_file(target, VARIABLES_SCHEMA) as out:
        for name, value in variables.items():
            if value.dtype != np.float32:
                raise StorageError(f"dense '{name}': must be float32, got {value.dtype}")
            row = ([name], [list(value.shape)], [np.ravel(value)])
            columns = map(pa.array, row, VARIABLES_SCHEMA.types)
            out.write_batch(pa.record_batch(list(columns), schema=VARIABLES_SCHEMA))


def transform_entries(
    transforms: Mapping[str, Transform], write: Callable[[str, pa.RecordBatch], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The manifest's entries of transforms.

    Args:
        transforms: by feature.
        write: `write(name, keys)` stores a vocabulary, one column `key`, and returns its entry.
    """
    entries: list[dict[str, Any]] = []
    for feature, transform in transforms.items():
        keys, sealed = transform.vocabulary, None
        if keys is not None:
            batch = pa.record_batch([keys], names=["key"])
            sealed = write(f"{len(entries):06d}", batch)  # a quoted name may be too long
        entries.append({"feature": feature, **transform.to_json(), "vocabulary": sealed})
    return entries
