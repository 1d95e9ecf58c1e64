"""One version of a snapshot or export root, found and named: its manifest as it stands, its files.

For what looks at versions without trusting them (`ps.verify`) and for what describes them
(`ps.contents`). Local folders and object stores alike; nothing is checked beyond what finding it
needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ps.errors import StorageError
from ps.export import EXPORT
from ps.manifest import LATEST, MANIFEST, Kind, read_latest
from ps.snapshot_root import SNAPSHOT
from ps.storage import Storage

KINDS = (SNAPSHOT, EXPORT)
_EXAMPLES = " or ".join(kind.example for kind in KINDS)


class BrokenVersionError(StorageError):
    """What is there is a snapshot or an export, but not a whole one; `check` says what is wrong."""

    def __init__(
        self, kind: str, location: str, version: str, check: str, where: str, message: str
    ) -> None:
        super().__init__(kind, location, version, check, where, message)
        self.kind = kind
        """Word of its `Kind`; "" if what is there does not say."""
        self.location = location
        self.version = version
        self.check = check
        self.where = where
        self.message = message

    def __str__(self) -> str:
        return f"'{self.location}': {self.where} {self.message}"


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file as a manifest lists it; what is None is missing or no such thing there."""

    file: str
    """Path inside the version folder."""
    size_bytes: int | None
    checksum: str | None
    """`sha256:` or `xxh3:` and hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class VersionFiles:
    """A version of a root, found."""

    storage: Storage
    """At the version's folder."""
    kind: Kind
    version: str
    """As its folder is named, or its manifest if the folder was given."""
    manifest: dict[str, Any]
    versions: tuple[str, ...]
    """Names of all complete versions in the root, oldest first; empty if a folder was given."""

    @property
    def location(self) -> str:
        """Where the version is, for people."""
        return self.storage.location

    def size_bytes(self) -> int:
        """Bytes of all files that the manifest lists, and of itself."""
        listed = sum(f.size_bytes or 0 for f in listed_files(self.manifest))
        return listed + self.storage.size(MANIFEST)


def listed_files(entry: Any) -> list[ListedFile]:
    """The files that a manifest, or a part of one, lists, in its order."""
    found: list[ListedFile] = []
    for listed in _entries(entry):
        file = listed["file"]
        size, checksum = listed.get("size_bytes"), listed.get("checksum")
        if isinstance(listed.get("sha256"), str):
            checksum = f"sha256:{listed['sha256']}"
        found.append(
            ListedFile(
                file,
                size if type(size) is int else None,
                checksum if isinstance(checksum, str) else None,
            )
        )
    return found


def find_version(location: str | Path) -> VersionFiles:
    """Find a version: the one that the LATEST of a root names, or the one whose folder is given.

    Args:
        location: local path, or `s3://…`, `gs://…`.

    Raises:
        BrokenVersionError: LATEST names no complete version, or the manifest is no manifest.
        StorageError: there is neither a snapshot nor an export, or it cannot be read.
    """
    root = Storage.at(location)
    if root.exists(MANIFEST):
        manifest = _manifest(root, None, "")
        version = manifest.get("version")
        for kind in KINDS:
            if isinstance(version, str) and kind.version.fullmatch(version):
                return VersionFiles(root, kind, version, manifest, ())
        message = f"must have a 'version' that looks like {_EXAMPLES}, got {version!r:.80}"
        raise BrokenVersionError("", root.location, "", "manifest", MANIFEST, message)
    if not root.exists(LATEST):
        whole = [name for kind in KINDS for name in _versions(root, kind)]
        raise StorageError(
            f"'{root.location}' is no snapshot and no export: it has neither {LATEST} nor "
            f"{MANIFEST}{f'; it has {whole[-1]}, give that folder' if whole else ''}"
        )
    name = read_latest(root)
    for kind in KINDS:
        if kind.version.fullmatch(name):
            break
    else:
        message = f"must hold a name like {_EXAMPLES}, got {name[:40]!r}"
        raise BrokenVersionError("", root.location, "", "latest", LATEST, message)
    if not root.exists(f"{name}/{MANIFEST}"):
        message = f"names {name}, which has no {MANIFEST}"
        raise BrokenVersionError(kind.word, root.location, name, "latest", LATEST, message)
    folder = root.below(name)
    return VersionFiles(folder, kind, name, _manifest(folder, kind, name), _versions(root, kind))


def _versions(root: Storage, kind: Kind) -> tuple[str, ...]:
    numbers = {name: m[1] for name in root.names() if (m := kind.version.fullmatch(name))}
    whole = [name for name in numbers if root.exists(f"{name}/{MANIFEST}")]
    return tuple(sorted(whole, key=lambda name: int(numbers[name])))


def _manifest(folder: Storage, kind: Kind | None, version: str) -> dict[str, Any]:
    message = "is no JSON object"
    try:
        manifest = json.loads(folder.read(MANIFEST))
        if isinstance(manifest, dict):
            return manifest
    except (ValueError, RecursionError) as e:
        if isinstance(e, StorageError):
            raise
        message = f"is no JSON: {e}"
    word = "" if kind is None else kind.word
    raise BrokenVersionError(word, folder.location, version, "manifest", MANIFEST, message)


def _entries(entry: Any) -> Iterator[dict[str, Any]]:
    """Every object with a `file`, wherever it stands, in order."""
    stack = [entry]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if isinstance(value.get("file"), str):
                yield value
            stack.extend(reversed(value.values()))
        elif isinstance(value, list):
            stack.extend(reversed(value))
