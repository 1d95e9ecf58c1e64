"""Sound snapshots and exports, and what it takes to damage them; see tests/unit/test_verify.py."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from ps.columns import Transform, categorical_column_with_vocabulary_list
from ps.config import FTRL, SGD, Adam, FeatureConfig, TableConfig
from ps.dense_variables import DenseValues
from ps.snapshot import export_snapshot, open_snapshot
from ps.spec import resolve
from ps.verify import verify
from tests.support.old_snapshots import write_old_snapshot
from tests.support.snapshots import (
    Contents,
    dense_values,
    random_contents,
    write_snapshot,
)

KINDS = ("snapshot", "old", "export")
SHARDS = 3
SPEC = resolve(
    {
        "user": FeatureConfig(TableConfig(300, 8, optimizer=Adam(), combiner="sum", name="users")),
        "ad": FeatureConfig(TableConfig(97, 4, optimizer=FTRL(), combiner="sum", name="site/ads")),
        "plain": FeatureConfig(TableConfig(5, 2, optimizer=SGD(), combiner="sum", name="plain")),
    }
)
CONTENTS = random_contents(SPEC)
VOCABULARY = categorical_column_with_vocabulary_list("name", [f"u{k}" for k in range(300)])


def sound_dense() -> DenseValues:
    values = dense_values("momenta", "velocities")
    return replace(values, slots={name: np.abs(v) for name, v in values.slots.items()})


def write_version(kind: str, root: Path, contents: Contents = CONTENTS, **about: Any) -> Path:
    """A sound version of that kind, unless told otherwise; returns its folder."""
    about = {"dense": sound_dense()} | about
    if kind == "old":
        return write_old_snapshot(root, SPEC, contents, **about)
    about = {"fences": [6, 6], "cursor": {"ranks": 2}} | about
    transforms = {"user": Transform.of(VOCABULARY)}
    path = write_snapshot(root, SPEC, contents, num_shards=SHARDS, transforms=transforms, **about)
    if kind == "snapshot":
        return path
    return export_snapshot(open_snapshot(path), root / "exports")


def all_kinds(function: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("version", KINDS, indirect=True)(function)


def found(path: Path, **options: Any) -> list[str]:
    """Findings, each as one line."""
    result = verify(path, **options)
    assert result.ok == (not result.findings)
    return [str(finding) for finding in result.findings]


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def entries_of(value: Any) -> list[dict[str, Any]]:
    """Every object of a manifest that names a file."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict) and "file" in value else []
    return own + [entry for one in below for entry in entries_of(one)]


def files_of(folder: Path) -> list[Path]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return [folder / entry["file"] for entry in entries_of(manifest)]


def file_of(folder: Path, start: str) -> Path:
    """The first file whose path in the folder starts like this."""
    files = [f for f in files_of(folder) if str(f.relative_to(folder)).startswith(start)]
    assert files, start
    return files[0]


def seal(folder: Path, path: Path) -> None:
    """Let the manifest tell of a changed file what is true: a lie that no checksum shows."""

    def change(manifest: dict[str, Any]) -> None:
        data = path.read_bytes()
        (entry,) = (e for e in entries_of(manifest) if folder / e["file"] == path)
        entry["size_bytes"] = len(data)
        if "sha256" in entry:
            entry["sha256"] = hashlib.sha256(data).hexdigest()
        else:
            entry["checksum"] = f"xxh3:{xxhash.xxh3_128_hexdigest(data)}"

    edit(folder, change)


def table(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    return next(t for t in manifest["tables"] if t["name"] == name)


def copied(sound: Path, folder: Path) -> Path:
    """A copy of a version, to be damaged."""
    return Path(shutil.copytree(sound, folder / sound.name))
