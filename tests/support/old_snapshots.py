"""Snapshots in format 1, as Manta 0.1.0 wrote them: one file per array, rows in id order."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ps.dense_variables import DenseValues, DenseVariable, unflat
from ps.errors import SnapshotError
from ps.export_file import write_rows
from ps.folders import FolderWriter, set_latest
from ps.manifest import Kind, file_name
from ps.ragged import F32
from ps.spec import EmbeddingSpec
from tests.support.snapshots import VARIABLES, Contents

OLD = Kind("snapshot", SnapshotError, 1, re.compile(r"step-(\d{9,})"), "step-000000123")


class _OldWriter(FolderWriter):
    """The writer of format 1, without transforms."""

    def __init__(self, root: Path) -> None:
        super().__init__(OLD, root)

    def table(self, name: str, arrays: dict[str, F32]) -> dict[str, Any]:
        sealed = {}
        for slot, values in arrays.items():
            file = "rows" if slot == "rows" else f"slots/{file_name(slot)}"
            file = f"tables/{file_name(name)}/{file}.arrow"
            write_rows(self._allocate(file, *values.shape), 0, values)
            sealed[slot] = self._seal(file)
        rows = sealed.pop("rows")
        return {"rows": rows, "slots": [{"name": slot, **s} for slot, s in sealed.items()]}

    def dense(self, variables: tuple[DenseVariable, ...], values: DenseValues) -> dict[str, Any]:
        trainable = [v for v in variables if v.trainable]
        state = [v for v in variables if not v.trainable]
        named = unflat(trainable, values.trainable) | unflat(state, values.state)
        self._write_variables("dense.arrow", named)
        slots = []
        for slot, flat in values.slots.items():
            file = f"dense_slots/{slot}.arrow"
            (self._folder / file).parent.mkdir(exist_ok=True)
            self._write_variables(file, unflat(trainable, flat))
            slots.append({"name": slot, "file": file} | self._seal(file))
        return {
            "model": {"name": "mlp", "params": {"hidden": [8]}},
            "variables": [asdict(v) for v in variables],
            "optimizer": {"name": "Adam"},
            "slots": slots,
            **self._seal("dense.arrow"),
        }

    def publish(self, version: str, manifest: dict[str, Any]) -> None:
        self._publish(version, manifest)
        set_latest(self._root, version)


def write_old_snapshot(
    root: Path,
    spec: EmbeddingSpec,
    contents: Contents,
    *,
    step: int = 6,
    dense: DenseValues | None = None,
) -> Path:
    """A snapshot in format 1; returns its folder."""
    version = f"step-{step:09d}"
    with _OldWriter(root) as writer:
        tables = [
            {
                "name": t.name,
                "vocabulary_size": t.vocabulary_size,
                "dim": t.dim,
                "combiner": t.combiner,
                "optimizer": t.optimizer.describe(),
                **writer.table(t.name, contents[t.name]),
            }
            for t in spec.tables
        ]
        manifest = {
            "format_version": 1,
            "job": "test",
            "step": step,
            "seed": 3,
            "created": "2025-11-20T12:00:00+00:00",
            "tables": tables,
            "features": [asdict(feature) for feature in spec.features],
            "transforms": [],
            "dense": None if dense is None else writer.dense(VARIABLES, dense),
        }
        writer.publish(version, manifest)
    return root / version
