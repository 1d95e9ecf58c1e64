"""Training snapshots: everything that training goes on from, as an immutable folder.

    ROOT/LATEST                                        name of the snapshot written last
    ROOT/step-000000123/manifest.json                  step, fences, tables, model, files
    ROOT/step-000000123/<table>.0-of-3.<attempt>.arrow its rows and slots on one shard
    ROOT/step-000000123/dense.<attempt>.arrow          variables of the dense model, in its order
    ROOT/step-000000123/dense.<slot>.<attempt>.arrow   one of their optimizer slots
    ROOT/step-000000123/vocabulary.000000.<attempt>.arrow   of a feature with raw values

ROOT is a local folder, `s3://…` or `gs://…`. This module opens and reads snapshots; it knows files
only: no Ray and no shard. `ps.snapshot_writer` writes them, `ps.snapshot_root` knows ROOT. What one
number of shards wrote, any other number can load. Format 1, in which nothing is written any more,
had one file per table and slot, with all rows in id order (`ps.snapshot_v1`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ps.columns import Transform
from ps.dense_variables import DenseValues, DenseVariable, flat
from ps.errors import ConfigError, SnapshotError, StorageError
from ps.export import ExportWriter
from ps.export_file import fill_rows
from ps.manifest import (
    Manifest,
    SealedFile,
    name_of,
    parent,
    read_checked,
    read_latest,
    read_variables,
)
from ps.partition import Placement
from ps.ragged import F32
from ps.snapshot_parts import PartFiles
from ps.snapshot_root import (
    SNAPSHOT,
    complete_snapshots,
    retain,
    snapshot_location,
    snapshot_name,
)
from ps.snapshot_v1 import WholeFiles
from ps.snapshot_writer import SnapshotWriter
from ps.spec import FeatureSpec
from ps.storage import Storage

__all__ = [
    "SNAPSHOT",
    "Snapshot",
    "SnapshotDense",
    "SnapshotTable",
    "SnapshotWriter",
    "complete_snapshots",
    "export_snapshot",
    "load_shard",
    "open_snapshot",
    "retain",
    "snapshot_location",
    "snapshot_name",
]
_MOST_NAMED = 5


class TableFiles(Protocol):
    """Where the rows and slots of a table are; travels to other processes."""

    @property
    def slot_names(self) -> tuple[str, ...]: ...

    def whole(self, slot: str | None) -> F32:
        """float32 [V, D], read-only: the rows, or a slot."""

    def read(self, first_id: int, out_ND: F32, slot: str | None) -> None:
        """Fill `out_ND` with rows first_id … first_id + N - 1."""

    def load(self, wanted: Placement, shard: int) -> Iterator[tuple[int, F32, dict[str, F32]]]:
        """See `load_shard`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SnapshotTable:
    """One table of an opened snapshot; it can be pickled."""

    name: str
    vocabulary_size: int
    dim: int
    combiner: str
    """mean, sum, sqrtn, or "custom" for one that only the job knows."""
    optimizer: dict[str, Any]
    """Name and arguments."""
    slot_names: tuple[str, ...]
    files: TableFiles

    @property
    def rows(self) -> F32:
        """float32 [V, D], read-only; all of it in memory, unless the format is 1.

        Raises:
            SnapshotError: a file is damaged.
        """
        with SNAPSHOT.errors():
            return self.files.whole(None)

    def slot(self, slot: str) -> F32:
        """Like `rows`."""
        assert slot in self.slot_names
        with SNAPSHOT.errors():
            return self.files.whole(slot)

    def read_rows(self, first_id: int, out_ND: F32, slot: str | None = None) -> None:
        """Fill `out_ND`, float32 [N, D], with rows first_id … first_id + N - 1.

        Reads what it needs, so that a process can go over a table larger than its memory.

        Args:
            first_id: id of `out_ND[0]`.
            out_ND: where to.
            slot: of that slot instead of the rows.

        Raises:
            SnapshotError: ids outside the table, another shape or dtype, or a file is damaged.
        """
        where = f"snapshot table '{self.name}'"
        if out_ND.dtype != np.float32 or out_ND.ndim != 2 or out_ND.shape[1] != self.dim:
            found = f"{out_ND.dtype} {list(out_ND.shape)}"
            raise SnapshotError(f"{where}: rows must be float32 [N, {self.dim}], got {found}")
        last = first_id + len(out_ND)
        if first_id < 0 or last > self.vocabulary_size:
            allowed = f"[0, {self.vocabulary_size})"
            raise SnapshotError(f"{where}: rows [{first_id}, {last}) are outside {allowed}")
        assert slot is None or slot in self.slot_names
        with SNAPSHOT.errors():
            self.files.read(first_id, out_ND, slot)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SnapshotDense:
    """The dense model of an opened snapshot."""

    model: dict[str, Any]
    """Name and parameters of its build function."""
    variables: tuple[DenseVariable, ...]
    """Trainable ones first, in the model's order."""
    optimizer: dict[str, Any] | None
    """Name and arguments; None if its slots are not known."""
    storage: Storage
    """The snapshot's folder."""
    file: SealedFile
    slot_files: dict[str, SealedFile]

    def named(self) -> dict[str, F32]:
        """The variables by name, in order.

        Raises:
            SnapshotError: the file is damaged.
        """
        return self._read(self.file, self.variables)

    def values(self) -> DenseValues:
        """The flat values.

        Raises:
            SnapshotError: a file is damaged.
        """
        named = self.named()
        trainable = [v for v in self.variables if v.trainable]
        return DenseValues(
            trainable=flat(named[v.name] for v in trainable),
            slots={
                slot: flat(self._read(file, trainable).values())
                for slot, file in self.slot_files.items()
            },
            state=flat(named[v.name] for v in self.variables if not v.trainable),
        )

    def _read(self, sealed: SealedFile, wanted: Sequence[DenseVariable]) -> dict[str, F32]:
        with SNAPSHOT.errors():
            where = self.storage.name(sealed.file)
            found = read_variables(read_checked(self.storage, sealed), where)
        seen = [(name, value.shape) for name, value in found.items()]
        if seen != [(v.name, v.shape) for v in wanted]:
            raise SnapshotError(f"'{where}' holds other variables than the manifest says")
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """An opened snapshot."""

    location: str
    """Of its own folder, for people: without credentials."""
    uri: str = field(repr=False)
    """The same for `open_snapshot` in another process; may hold credentials."""
    version: str
    format_version: int
    step: int
    """Number of steps applied."""
    seed: int
    job: str
    created: str
    """UTC, ISO 8601."""
    num_shards: int
    """That wrote it; 1 in format 1."""
    fences: tuple[int, ...] | None
    """Per rank, the next step that the shards expect of it; None if they are not known."""
    cursor: dict[str, Any] | None
    """Where the input goes on."""
    tables: tuple[SnapshotTable, ...]
    features: tuple[FeatureSpec, ...]
    transforms: dict[str, Transform]
    """From raw values to ids, by the features that have one."""
    dense: SnapshotDense | None

    def table(self, name: str) -> SnapshotTable:
        """The table of that name."""
        return next(t for t in self.tables if t.name == name)


def open_snapshot(location: str | Path, *, verify: bool = False) -> Snapshot:
    """Open a snapshot for reading; looks at the size of every file, and at no row.

    Args:
        location: a snapshot's folder, or a root, whose LATEST is followed: a path, `s3://…` or
            `gs://…`.
        verify: also compare checksums, which reads every byte.

    Raises:
        SnapshotError: missing, truncated, damaged, or written by a newer Manta. Names the file,
            and other snapshots that are there.
    """
    try:
        return _open(Manifest(SNAPSHOT, location, verify=verify))
    except SnapshotError as e:
        if others := _others(location):
            raise SnapshotError(f"{e}{others}") from e
        raise


def load_shard(
    snapshot: Snapshot, table: str, placement: Placement, shard: int
) -> Iterator[tuple[int, F32, dict[str, F32]]]:
    """Go over a table's rows that a shard owns, whatever number of shards wrote them.

    Checksums are compared on the way: the rows count when the iterator has come to its end.

    Args:
        snapshot: from `open_snapshot`.
        table: its name.
        placement: of the table's rows now.
        shard: whose rows are wanted.

    Yields:
        (first local row under `placement`, rows float32 [N, D], the same of every slot by name);
        all rows once.

    Raises:
        SnapshotError: a file is damaged; names it.
    """
    with SNAPSHOT.errors():
        yield from snapshot.table(table).files.load(placement, shard)


def export_snapshot(snapshot: Snapshot, root: Path, *, dense: bool = True) -> Path:
    """Make a serving export of a snapshot, with its dense model if `dense`; holds no table.

    Returns:
        The new version's folder.

    Raises:
        ExportError: a table has a custom combiner, or the disk refuses.
        SnapshotError: the snapshot is damaged.
    """
    with ExportWriter(
        root,
        snapshot,
        step=snapshot.step,
        job=snapshot.job,
        transforms=snapshot.transforms,
    ) as writer:
        for table in snapshot.tables:
            fill_rows(writer.row_file(table.name), table.read_rows)
        if dense and snapshot.dense is not None:
            writer.add_dense(snapshot.dense.named(), snapshot.dense.model)
        return writer.commit()


def _open(manifest: Manifest) -> Snapshot:
    values, one_file = manifest.values, manifest.format_version == 1
    num_shards = 1 if one_file else manifest.field(values, "num_shards", int)
    if num_shards < 1:
        raise manifest.error(f"'num_shards' must be at least 1, got {num_shards}")
    with SNAPSHOT.errors():
        entries = manifest.field(values, "tables", list)
        tables = [_open_table(manifest, entry, num_shards) for entry in entries]
    features = manifest.features({table.name: table for table in tables})
    fences, cursor = values.get("fences"), values.get("cursor")
    return Snapshot(
        location=manifest.storage.location,
        uri=manifest.storage.uri,
        version=manifest.version,
        format_version=manifest.format_version,
        step=manifest.field(values, "step", int),
        seed=manifest.field(values, "seed", int),
        job=manifest.field(values, "job", str),
        created=manifest.field(values, "created", str),
        num_shards=num_shards,
        fences=None if fences is None else _ints(manifest, "fences"),
        cursor=None if cursor is None else manifest.field(values, "cursor", dict),
        tables=tuple(tables),
        features=tuple(features.values()),
        transforms=manifest.transforms(features),
        dense=None if values.get("dense") is None else _open_dense(manifest),
    )


def _open_table(manifest: Manifest, entry: Any, num_shards: int) -> SnapshotTable:
    shape = manifest.shape(entry)
    optimizer = manifest.field(entry, "optimizer", dict)
    manifest.field(optimizer, "name", str)
    files: TableFiles
    if manifest.format_version == 1:
        files = WholeFiles.open(manifest, entry, shape)
    else:
        files = PartFiles.open(manifest, entry, shape, num_shards)
    return SnapshotTable(
        name=manifest.field(entry, "name", str),
        vocabulary_size=shape[0],
        dim=shape[1],
        combiner=manifest.field(entry, "combiner", str),
        optimizer=optimizer,
        slot_names=files.slot_names,
        files=files,
    )


def _open_dense(manifest: Manifest) -> SnapshotDense:
    entry = manifest.field(manifest.values, "dense", dict)
    optimizer = entry.get("optimizer")
    if optimizer is not None:
        manifest.field(manifest.field(entry, "optimizer", dict), "name", str)
    return SnapshotDense(
        model=manifest.field(entry, "model", dict),
        variables=tuple(
            DenseVariable(
                name=manifest.field(v, "name", str),
                shape=tuple(manifest.field(v, "shape", list)),
                trainable=manifest.field(v, "trainable", bool),
            )
            for v in manifest.field(entry, "variables", list)
        ),
        optimizer=optimizer,
        storage=manifest.storage,
        file=manifest.file(entry),
        slot_files={
            manifest.field(slot, "name", str): manifest.file(slot)
            for slot in manifest.field(entry, "slots", list)
        },
    )


def _ints(manifest: Manifest, key: str) -> tuple[int, ...]:
    numbers = manifest.field(manifest.values, key, list)
    if any(type(number) is not int for number in numbers):
        raise manifest.error(f"'{key}' must hold ints, got {numbers!r:.80}")
    return tuple(numbers)


def _others(location: str | Path) -> str:
    """What else could be opened instead of what is at `location`, as the end of a message."""
    with suppress(StorageError, ConfigError):
        root, bad = Storage.at(location), ""
        if steps := complete_snapshots(root.uri):
            with suppress(StorageError):
                bad = read_latest(root)
        elif SNAPSHOT.version.fullmatch(bad := name_of(root.location)):
            root = Storage.at(parent(root.uri))
            steps = complete_snapshots(root.uri)
        steps = [step for step in steps if snapshot_name(step) != bad][-_MOST_NAMED:]
        if steps:
            folder = root.below(snapshot_name(steps[-1])).location
            return (
                f"; '{root.location}' has other snapshots, of steps {', '.join(map(str, steps))}: "
                f"give the folder of one, '{folder}'"
            )
    return ""
