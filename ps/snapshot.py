"""Training snapshots: everything that training goes on from, as an immutable folder.

    ROOT/LATEST                                     name of the snapshot written last
    ROOT/step-000000123/manifest.json               step, seed, tables, features, optimizers, model
    ROOT/step-000000123/tables/<table>/rows.arrow   V rows in id order, as in an export
    ROOT/step-000000123/tables/<table>/slots/<slot>.arrow   the same for every optimizer slot
    ROOT/step-000000123/dense.arrow                 variables of the dense model, in its order
    ROOT/step-000000123/dense_slots/<slot>.arrow    their optimizer slots
    ROOT/step-000000123/vocabularies/               as in an export

This module knows files only: no Ray and no shard. Rows lie in id order, so that a snapshot fits any
number of shards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ps.columns import Transform
from ps.dense_variables import DenseValues, DenseVariable
from ps.errors import SnapshotError
from ps.export import ExportWriter
from ps.export_file import RowFile, fill_rows, map_rows, open_rows, read_rows, writing
from ps.folders import FolderWriter, Kind, Manifest, file_name, read_variables, set_latest
from ps.optimizers import Optimizer
from ps.ragged import F32
from ps.spec import EmbeddingSpec, FeatureSpec

SNAPSHOT = Kind("snapshot", SnapshotError, 1, re.compile(r"step-(\d{9,})"), "step-000000123")
DENSE_FILE = "dense.arrow"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SnapshotTable:
    """One table of an opened snapshot."""

    name: str
    vocabulary_size: int
    dim: int
    combiner: str
    """mean, sum, sqrtn, or "custom" for one that only the job knows."""
    optimizer: dict[str, Any]
    """Name and arguments."""
    row_file: RowFile
    slot_files: dict[str, RowFile]

    @property
    def rows(self) -> F32:
        """float32 [V, D], read-only, memory-mapped."""
        return _mapped(self.row_file)

    def slot(self, slot: str) -> F32:
        """float32 [V, D], read-only, memory-mapped."""
        return _mapped(self.slot_files[slot])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SnapshotDense:
    """The dense model of an opened snapshot."""

    model: dict[str, Any]
    """Name and parameters of its build function."""
    variables: tuple[DenseVariable, ...]
    """Trainable ones first, in the model's order."""
    optimizer: dict[str, Any] | None
    """Name and arguments; None if its slots are not known."""
    file: Path
    slot_files: dict[str, Path]

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
            trainable=_flat(named[v.name] for v in trainable),
            slots={
                slot: _flat(self._read(path, trainable).values())
                for slot, path in self.slot_files.items()
            },
            state=_flat(named[v.name] for v in self.variables if not v.trainable),
        )

    @staticmethod
    def _read(path: Path, wanted: Sequence[DenseVariable]) -> dict[str, F32]:
        found = read_variables(SNAPSHOT, path)
        seen = [(name, value.shape) for name, value in found.items()]
        if seen != [(v.name, v.shape) for v in wanted]:
            raise SnapshotError(f"'{path}' holds other variables than the manifest says")
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """An opened snapshot."""

    path: Path
    version: str
    step: int
    """Number of steps applied."""
    seed: int
    job: str
    created: str
    """UTC, ISO 8601."""
    tables: tuple[SnapshotTable, ...]
    features: tuple[FeatureSpec, ...]
    transforms: dict[str, Transform]
    """From raw values to ids, by the features that have one."""
    dense: SnapshotDense | None

    def table(self, name: str) -> SnapshotTable:
        """The table of that name."""
        return next(t for t in self.tables if t.name == name)


class SnapshotWriter(FolderWriter):
    """Builds one snapshot in a hidden folder and publishes it whole, or not at all.

    Use as a context manager, like `ps.export.ExportWriter`.
    """

    def __init__(
        self,
        root: Path,
        spec: EmbeddingSpec,
        *,
        step: int,
        seed: int,
        job: str,
        transforms: Mapping[str, Transform] | None = None,
    ) -> None:
        super().__init__(SNAPSHOT, root)
        self._spec = spec
        self._step = step
        self._seed = seed
        self._job = job
        self._transforms = dict(transforms or {})
        self._dense: dict[str, Any] | None = None

    def row_file(self, table: str) -> RowFile:
        """The file of a table's rows, allocated and zero on first use.

        Raises:
            SnapshotError: the disk refuses.
        """
        return self._table_file(table, _rows_file(table))

    def slot_files(self, table: str) -> dict[str, RowFile]:
        """The files of a table's slots by name, allocated and zero on first use.

        Raises:
            SnapshotError: the disk refuses.
        """
        names = self._spec.table(table).optimizer.slot_names
        return {name: self._table_file(table, _slot_file(table, name)) for name in names}

    def add_dense(
        self,
        variables: Sequence[DenseVariable],
        values: DenseValues,
        *,
        model: Mapping[str, Any],
        optimizer: Optimizer | None,
    ) -> None:
        """Store the dense model.

        Args:
            variables: what the flat values are, trainable ones first.
            values: the flat values.
            model: how to rebuild the model, as JSON values: its name and parameters.
            optimizer: whose slots `values` has, None without any.

        Raises:
            SnapshotError: the disk refuses.
        """
        trainable = [v for v in variables if v.trainable]
        state = [v for v in variables if not v.trainable]
        named = _unflat(trainable, values.trainable) | _unflat(state, values.state)
        self._write_variables(DENSE_FILE, named)
        slots = [{"name": name, "file": _dense_slot_file(name)} for name in values.slots]
        for slot in slots:
            with SNAPSHOT.errors(), writing(self._folder):
                (self._folder / slot["file"]).parent.mkdir(exist_ok=True)
            self._write_variables(slot["file"], _unflat(trainable, values.slots[slot["name"]]))
        self._dense = {
            "model": dict(model),
            "variables": [asdict(v) for v in variables],
            "optimizer": None if optimizer is None else optimizer.describe(),
            "slots": slots,
        }

    def commit(self) -> Path:
        """Make everything durable, publish it and point LATEST at it.

        Returns:
            The snapshot's folder.

        Raises:
            SnapshotError: there is a snapshot of this step already, or the disk refuses.
        """
        for table in self._spec.tables:
            assert _rows_file(table.name) in self._row_files, "somebody wrote every table"
        version = snapshot_name(self._step)
        with SNAPSHOT.errors(), writing(self._root / version):
            self._publish(version, self._manifest())
            set_latest(self._root, version)
        return self._root / version

    def _table_file(self, table: str, file: str) -> RowFile:
        spec = self._spec.table(table)
        return self._allocate(file, spec.vocabulary_size, spec.dim)

    def _manifest(self) -> dict[str, Any]:
        tables = [
            {
                "name": t.name,
                "vocabulary_size": t.vocabulary_size,
                "dim": t.dim,
                "combiner": t.combiner if isinstance(t.combiner, str) else "custom",
                "optimizer": t.optimizer.describe(),
                "rows": self._seal(_rows_file(t.name)),
                "slots": [
                    {"name": name, **self._seal(_slot_file(t.name, name))}
                    for name in t.optimizer.slot_names
                ],
            }
            for t in self._spec.tables
        ]
        dense = self._dense
        if dense is not None:
            slots = [slot | self._seal(slot["file"]) for slot in dense["slots"]]
            dense = {**dense, **self._seal(DENSE_FILE), "slots": slots}
        return {
            "format_version": SNAPSHOT.format_version,
            "version": "",
            "job": self._job,
            "step": self._step,
            "seed": self._seed,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "tables": tables,
            "features": [asdict(feature) for feature in self._spec.features],
            "transforms": self._seal_transforms(self._transforms),
            "dense": dense,
        }


def snapshot_name(step: int) -> str:
    """The folder of a step's snapshot.

    >>> snapshot_name(123)
    'step-000000123'
    """
    return f"step-{step:09d}"


def open_snapshot(path: Path, *, verify: bool = False) -> Snapshot:
    """Open a snapshot for reading; its tables are memory-mapped when they are looked at.

    Args:
        path: a snapshot's folder, or a root, whose LATEST is followed.
        verify: also compare checksums, which reads every byte.

    Raises:
        SnapshotError: missing, truncated, damaged, or written by a newer Manta.
    """
    manifest = Manifest(SNAPSHOT, path, verify=verify)
    values = manifest.values
    with SNAPSHOT.errors():
        tables = [_open_table(manifest, e) for e in manifest.field(values, "tables", list)]
    features = manifest.features({table.name: table for table in tables})
    dense = values.get("dense")
    return Snapshot(
        path=manifest.folder,
        version=manifest.version,
        step=manifest.field(values, "step", int),
        seed=manifest.field(values, "seed", int),
        job=manifest.field(values, "job", str),
        created=manifest.field(values, "created", str),
        tables=tuple(tables),
        features=tuple(features.values()),
        transforms=manifest.transforms(features),
        dense=None if dense is None else _open_dense(manifest),
    )


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
            fill_rows(writer.row_file(table.name), partial(read_rows, table.row_file))
        if dense and snapshot.dense is not None:
            writer.add_dense(snapshot.dense.named(), snapshot.dense.model)
        return writer.commit()


def _open_table(manifest: Manifest, entry: Any) -> SnapshotTable:
    num_rows, dim = manifest.shape(entry)
    rows = manifest.file(manifest.field(entry, "rows", dict))
    slots = manifest.field(entry, "slots", list)
    optimizer = manifest.field(entry, "optimizer", dict)
    manifest.field(optimizer, "name", str)
    return SnapshotTable(
        name=manifest.field(entry, "name", str),
        vocabulary_size=num_rows,
        dim=dim,
        combiner=manifest.field(entry, "combiner", str),
        optimizer=optimizer,
        row_file=open_rows(rows, num_rows, dim),
        slot_files={
            manifest.field(slot, "name", str): open_rows(manifest.file(slot), num_rows, dim)
            for slot in slots
        },
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
        file=manifest.file(entry),
        slot_files={
            manifest.field(slot, "name", str): manifest.file(slot)
            for slot in manifest.field(entry, "slots", list)
        },
    )


def _mapped(file: RowFile) -> F32:
    with SNAPSHOT.errors():
        return map_rows(Path(file.path), file.num_rows, file.dim)


def _rows_file(table: str) -> str:
    return f"tables/{file_name(table)}/rows.arrow"


def _slot_file(table: str, slot: str) -> str:
    return f"tables/{file_name(table)}/slots/{file_name(slot)}.arrow"


def _dense_slot_file(slot: str) -> str:
    return f"dense_slots/{file_name(slot)}.arrow"


def _flat(arrays: Any) -> F32:
    return np.concatenate([np.zeros(0, np.float32), *(np.ravel(a) for a in arrays)])


def _unflat(variables: Sequence[DenseVariable], flat: F32) -> dict[str, F32]:
    sizes = [int(np.prod(v.shape)) for v in variables]
    assert sum(sizes) == flat.size, "the flat values are those of the variables"
    parts = np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
    return {v.name: p.reshape(v.shape) for v, p in zip(variables, parts, strict=True)}
