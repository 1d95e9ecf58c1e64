"""What is in a snapshot or an export: `describe` it, count its numbers, look at single rows.

This module makes values; `ps.contents_text` makes them readable.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ps.columns import Transform
from ps.errors import InputError
from ps.export import EXPORT
from ps.manifest import Manifest, read_checked, read_variables
from ps.ragged import F32
from ps.snapshot import Snapshot, open_snapshot
from ps.spec import FeatureSpec
from ps.stored_rows import StoredRows
from ps.table_stats import ReadRows, TableStats, initial_slots, table_stats
from ps.version_files import VersionFiles, find_version, listed_files


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of a table."""

    table: str
    id: int
    values: F32
    """float32 [D]."""
    slots: dict[str, F32]
    """float32 [D] each."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values, see `number`; what is not finite as "nan", "inf", "-inf"."""
        slots = {name: _numbers(row_D) for name, row_D in self.slots.items()}
        return {"table": self.table, "id": self.id, "row": _numbers(self.values), "slots": slots}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TableContents:
    """One table."""

    name: str
    vocabulary_size: int
    dim: int
    combiner: str
    """mean, sum, sqrtn, or "custom"."""
    optimizer: dict[str, Any] | None
    """Name and arguments; None in an export."""
    slots: tuple[str, ...]
    size_bytes: int
    """Of all its files."""
    read: ReadRows

    def row(self, row_id: int) -> Row:
        """One row and its slots.

        Raises:
            InputError: there is no such row.
            StorageError: its file is damaged or gone.
        """
        if not 0 <= row_id < self.vocabulary_size:
            raise InputError(
                f"table '{self.name}': id {row_id} is outside [0, {self.vocabulary_size})"
            )

        def read(slot: str | None) -> F32:
            out_1D = np.empty((1, self.dim), dtype=np.float32)
            self.read(row_id, out_1D, slot)
            row_D: F32 = out_1D[0]
            return row_D

        return Row(self.name, row_id, read(None), {slot: read(slot) for slot in self.slots})

    def stats(self) -> TableStats:
        """Figures of its numbers; reads all of it, 16 MiB at a time.

        Raises:
            StorageError: a file is damaged or gone.
        """
        starts = initial_slots(self.optimizer or {}, self.slots)
        return table_stats(self.read, self.vocabulary_size, self.dim, starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseContents:
    """The dense model."""

    model: dict[str, Any]
    """Name and parameters of its build function."""
    shapes: dict[str, tuple[int, ...]]
    """Of the variables by name, in the model's order."""
    trainable: tuple[str, ...] | None
    """Names of those that are trained; None in an export, which does not say."""
    optimizer: dict[str, Any] | None
    slots: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contents:
    """What is in one version."""

    kind: str
    """snapshot or export."""
    location: str
    version: str
    format_version: int
    job: str
    step: int
    created: str
    """UTC, ISO 8601."""
    seed: int | None
    num_shards: int | None
    """That wrote it; None in an export."""
    fences: tuple[int, ...] | None
    """Per rank, the next step that the shards expect of it; None if they are not known."""
    cursor: dict[str, Any] | None
    """Where training is in its input."""
    tables: dict[str, TableContents]
    features: tuple[FeatureSpec, ...]
    transforms: dict[str, Transform]
    dense: DenseContents | None
    size_bytes: int
    """Of all files."""
    versions: tuple[str, ...]
    """All complete versions in the root, oldest first; empty if a version's folder was given."""

    def table(self, name: str) -> TableContents:
        """The table of that name.

        Raises:
            InputError: there is none.
        """
        if name not in self.tables:
            raise InputError(f"no table '{name}' here, only {', '.join(map(repr, self.tables))}")
        return self.tables[name]

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows, as JSON values."""
        return {
            "kind": self.kind,
            "location": self.location,
            "version": self.version,
            "format_version": self.format_version,
            "job": self.job,
            "step": self.step,
            "created": self.created,
            "seed": self.seed,
            "num_shards": self.num_shards,
            "fences": self.fences,
            "cursor": self.cursor,
            "size_bytes": self.size_bytes,
            "versions": self.versions,
            "tables": [_table_json(table) for table in self.tables.values()],
            "features": [asdict(feature) for feature in self.features],
            "transforms": {name: t.to_json() for name, t in self.transforms.items()},
            "dense": None if self.dense is None else asdict(self.dense),
        }


def describe(location: str | Path) -> Contents:
    """Open a snapshot or export and say what is in it; reads its manifest and no table.

    Args:
        location: a root, whose LATEST is followed, or a version folder; local, `s3://`, `gs://`.

    Raises:
        StorageError: there is none, or it is damaged, or written by a newer Manta.
    """
    files = find_version(location)
    if files.kind is EXPORT:
        return _export_contents(files)
    return _snapshot_contents(files)


def parse_row(text: str) -> tuple[str, int]:
    """Table and id of `TABLE:ID`; the table's name may have colons.

    Raises:
        InputError: it is something else.
    """
    table, colon, row_id = text.rpartition(":")
    if not colon or not table or not row_id.removeprefix("-").isdecimal():
        raise InputError(f"--row {text}: write TABLE:ID, for example users:17")
    return table, int(row_id)


def number(value: np.float32) -> str:
    """The fewest digits that give the float32 back.

    >>> number(np.float32(0.1)), number(np.float32(1e-30)), number(np.float32("nan"))
    ('0.1', '1e-30', 'nan')
    """
    return str(value)


def _numbers(row_D: F32) -> list[float | str]:
    return [float(number(x)) if np.isfinite(x) else number(x) for x in row_D]


def _snapshot_contents(files: VersionFiles) -> Contents:
    snapshot = open_snapshot(files.storage.uri)
    sizes = {table["name"]: _size(table) for table in files.manifest["tables"]}
    return _contents(
        files,
        job=snapshot.job,
        step=snapshot.step,
        created=snapshot.created,
        seed=snapshot.seed,
        num_shards=snapshot.num_shards,
        fences=snapshot.fences,
        cursor=snapshot.cursor,
        tables={
            table.name: TableContents(
                name=table.name,
                vocabulary_size=table.vocabulary_size,
                dim=table.dim,
                combiner=table.combiner,
                optimizer=table.optimizer,
                slots=tuple(table.slot_names),
                size_bytes=sizes.get(table.name, 0),
                read=table.read_rows,
            )
            for table in snapshot.tables
        },
        features=snapshot.features,
        transforms=snapshot.transforms,
        dense=_snapshot_dense(files, snapshot),
    )


def _snapshot_dense(files: VersionFiles, snapshot: Snapshot) -> DenseContents | None:
    dense = snapshot.dense
    if dense is None:
        return None
    return DenseContents(
        model=dense.model,
        shapes={v.name: v.shape for v in dense.variables},
        trainable=tuple(v.name for v in dense.variables if v.trainable),
        optimizer=dense.optimizer,
        slots=tuple(dense.slot_files),
        size_bytes=_size(files.manifest.get("dense")),
    )


def _export_contents(files: VersionFiles) -> Contents:
    manifest = Manifest(EXPORT, files.storage.uri)
    entries = manifest.field(manifest.values, "tables", list)
    tables = {table.name: table for table in (_export_table(manifest, e) for e in entries)}
    features = manifest.features(tables)
    return _contents(
        files,
        job=manifest.field(manifest.values, "job", str),
        step=manifest.field(manifest.values, "step", int),
        created=manifest.field(manifest.values, "created", str),
        seed=None,
        num_shards=None,
        fences=None,
        cursor=None,
        tables=tables,
        features=tuple(features.values()),
        transforms=manifest.transforms(features),
        dense=None if manifest.values.get("dense") is None else _export_dense(manifest),
    )


def _export_table(manifest: Manifest, entry: Any) -> TableContents:
    sealed, shape = manifest.file(entry), manifest.shape(entry)
    rows = StoredRows.open(manifest.storage, sealed.file, sealed.size_bytes, shape)

    def read(first_id: int, out_ND: F32, slot: str | None) -> None:
        assert slot is None, "an export has no slots"
        rows.read(first_id, out_ND)

    return TableContents(
        name=manifest.field(entry, "name", str),
        vocabulary_size=shape[0],
        dim=shape[1],
        combiner=manifest.field(entry, "combiner", str),
        optimizer=None,
        slots=(),
        size_bytes=sealed.size_bytes,
        read=read,
    )


def _export_dense(manifest: Manifest) -> DenseContents:
    entry = manifest.field(manifest.values, "dense", dict)
    sealed = manifest.file(entry)
    data = read_checked(manifest.storage, sealed)
    named = read_variables(data, manifest.storage.name(sealed.file))
    return DenseContents(
        model=manifest.field(entry, "model", dict),
        shapes={name: value.shape for name, value in named.items()},
        trainable=None,
        optimizer=None,
        slots=(),
        size_bytes=sealed.size_bytes,
    )


def _contents(files: VersionFiles, **more: Any) -> Contents:
    return Contents(
        kind=files.kind.word,
        location=files.location,
        version=files.version,
        format_version=files.manifest["format_version"],
        size_bytes=files.size_bytes(),
        versions=files.versions,
        **more,
    )


def _table_json(table: TableContents) -> dict[str, Any]:
    names = ("name", "vocabulary_size", "dim", "combiner", "optimizer", "slots", "size_bytes")
    return {name: getattr(table, name) for name in names}


def _size(entry: Any) -> int:
    return sum(file.size_bytes or 0 for file in listed_files(entry))
