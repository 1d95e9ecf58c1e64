"""A root folder of snapshots: their names, which are complete, and which are kept.

    ROOT/LATEST             name of the snapshot written last
    ROOT/step-000000123/    one snapshot; complete once it has a manifest.json

A folder without a manifest is what an attempt left behind, or is being written right now.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from ps.disk import Disk
from ps.errors import SnapshotError, StorageError
from ps.manifest import MANIFEST, Kind, read_latest
from ps.storage import Storage

SNAPSHOT = Kind(
    "snapshot", SnapshotError, 2, re.compile(r"step-(\d{9,})"), "step-000000123", oldest_format=1
)
_log = logging.getLogger(__name__)


def snapshot_name(step: int) -> str:
    """The folder of a step's snapshot.

    >>> snapshot_name(123)
    'step-000000123'
    """
    return f"step-{step:09d}"


def snapshot_location(root: str | Path, step: int) -> str:
    """Where a step's snapshot is, or would be, for `open_snapshot`."""
    return Storage.at(root).below(snapshot_name(step)).uri


def complete_snapshots(root: str | Path) -> list[int]:
    """Steps of which there is a whole snapshot, ascending; none if there is no such folder.

    Raises:
        SnapshotError: the folder cannot be read.
    """
    with SNAPSHOT.errors():
        storage = Storage.at(root)
        return [step for step, complete in _attempts(storage) if complete]


def retain(root: str | Path, keep: int, disk: Disk | None = None) -> list[int]:
    """Remove all snapshots but the newest, and what attempts at older steps left behind.

    The one that LATEST names stays, whatever its step. What cannot be removed is logged as a
    warning and stays: it costs disk space only.

    Args:
        root: of the snapshots.
        keep: how many stay, at least 1.
        disk: for tests.

    Returns:
        Steps of the snapshots that were removed.
    """
    assert keep >= 1, "somebody keeps a snapshot"
    removed: list[int] = []
    try:
        storage = Storage.at(root, disk)
        attempts = _attempts(storage)
        complete = [step for step, whole in attempts if whole]
        latest = read_latest(storage)
    except StorageError as e:
        _log.warning("old snapshots stay: %s", e)
        return removed
    if not complete:
        return removed
    kept = {*complete[-keep:], *(step for step in complete if snapshot_name(step) == latest)}
    for step, whole in attempts:
        if whole and step not in kept:
            if _remove_snapshot(storage, snapshot_name(step), disk or Disk()):
                removed.append(step)
        elif step < complete[-1]:
            _remove_leftovers(storage, snapshot_name(step), whole)
    return removed


def read_manifest(storage: Storage, folder: str) -> dict[str, Any] | None:
    """The manifest of a snapshot's folder as it stands; None if there is none.

    Raises:
        StorageError: it cannot be read, or is no manifest.
    """
    file = f"{folder}/{MANIFEST}"
    if not storage.exists(file):
        return None
    data, where = storage.read(file), f"'{storage.name(file)}'"
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise StorageError(f"{where} is no manifest: {e}") from e
    if not isinstance(manifest, dict):
        raise StorageError(f"{where} is no manifest")
    return manifest


def _files_of(manifest: Any) -> set[str]:
    """Every file that a manifest names, whatever its format, by its path in the folder."""
    if isinstance(manifest, list):
        return set().union(*map(_files_of, manifest))
    if not isinstance(manifest, dict):
        return set()
    file = manifest.get("file")
    own = {file} if isinstance(file, str) and file else set()
    return own.union(*map(_files_of, manifest.values()))


def names_of(manifest: Any) -> set[str]:
    """Names in a snapshot's folder that its manifest needs: files, and folders in format 1."""
    return {PurePosixPath(file).parts[0] for file in _files_of(manifest)}


def remove_name(storage: Storage, folder: str, name: str) -> bool:
    """Remove a file or folder in a snapshot's folder, or log why not; whether it is gone."""
    path = f"{folder}/{name}"
    is_folder = storage.is_local and Path(storage.name(path)).is_dir()
    return _tried(storage.remove_folder if is_folder else storage.remove, path)


def _tried(remove: Callable[[str], None], path: str) -> bool:
    try:
        remove(path)
    except StorageError as e:
        _log.warning("what nobody needs any more stays: %s", e)
        return False
    return True


def _attempts(storage: Storage) -> list[tuple[int, bool]]:
    """(step, whether it is complete) of every snapshot's folder, ascending."""
    steps = [int(m[1]) for name in storage.names() if (m := SNAPSHOT.version.fullmatch(name))]
    return [
        (step, storage.exists(f"{snapshot_name(step)}/{MANIFEST}")) for step in sorted(set(steps))
    ]


def _remove_snapshot(storage: Storage, folder: str, disk: Disk) -> bool:
    """Its manifest first, and durably: what is half removed is no snapshot."""
    if not _tried(storage.remove, f"{folder}/{MANIFEST}"):
        return False
    if storage.is_local:
        try:
            disk.sync_folder(Path(storage.name(folder)))
        except OSError as e:
            _log.warning("'%s' stays, without a manifest: %s", storage.name(folder), e)
            return True
    _tried(storage.remove_folder, folder)
    return True


def _remove_leftovers(storage: Storage, folder: str, complete: bool) -> None:
    """What an attempt left that is not the snapshot."""
    if not complete:
        _tried(storage.remove_folder, folder)
        return
    try:
        needed = {MANIFEST, *names_of(read_manifest(storage, folder))}
        left = [name for name in storage.names(folder) if name not in needed]
    except StorageError as e:
        _log.warning("what an attempt left stays: %s", e)
        return
    for name in left:
        remove_name(storage, folder, name)
