"""The export format: an immutable folder of rows that serving memory-maps.

    ROOT/LATEST                         name of the version to serve
    ROOT/v000001/manifest.json          tables, features, sizes, checksums, training step
    ROOT/v000001/tables/<table>.arrow   one column `row`, V rows in id order
    ROOT/v000001/vocabularies/          of features with raw values, one column `key`
    ROOT/v000001/dense.arrow            variables of the dense model, one record batch each

This module knows files only: no Ray, no optimizer state, no lookup. Writers on several hosts need
ROOT on a file system that all of them see.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from ps.columns import Transform
from ps.config import COMBINERS, Combiner
from ps.errors import ExportError
from ps.export_file import RowFile, map_rows, write_rows, writing
from ps.folders import FolderWriter, set_latest
from ps.manifest import MANIFEST, Kind, Manifest, read_variables
from ps.ragged import F32
from ps.spec import FeatureSpec
from ps.storage import Storage

__all__ = ["Export", "ExportTable", "ExportWriter", "RowFile", "open_export", "write_rows"]

VERSION_NAME = re.compile(r"v(\d{6,})")
EXPORT = Kind("export", ExportError, 1, VERSION_NAME, "v000001")
DENSE_FILE = "dense.arrow"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportTable:
    """One table of an opened export."""

    name: str
    vocabulary_size: int
    dim: int
    combiner: Combiner
    file: str
    """Path inside the version folder."""
    size_bytes: int
    sha256: str
    rows_VD: F32
    """float32 [V, D], read-only, memory-mapped."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Export:
    """An opened version; its arrays stay valid when the folder is deleted."""

    path: Path
    version: str
    step: int
    """Training step of the rows."""
    job: str
    created: str
    """UTC, ISO 8601."""
    tables: dict[str, ExportTable]
    features: dict[str, FeatureSpec]
    transforms: dict[str, Transform]
    """From raw values to ids, by the features that have one."""
    dense_model: dict[str, Any] | None
    """How to build the dense model again, as training describes it; or None."""
    dense_file: Path | None

    def dense_variables(self) -> dict[str, F32]:
        """The dense model's variables by name; empty without a dense model.

        Raises:
            ExportError: the file is damaged.
        """
        if self.dense_file is None:
            return {}
        with EXPORT.errors():
            folder = Storage.at(self.dense_file.parent)
            return read_variables(folder.read(self.dense_file.name), str(self.dense_file))


class ExportTableSpec(Protocol):
    """What an export says of a table."""

    @property
    def name(self) -> str: ...
    @property
    def vocabulary_size(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def combiner(self) -> object: ...


class ExportSpec(Protocol):
    """What an export says of its tables and features: an `EmbeddingSpec` or a `Snapshot`."""

    @property
    def tables(self) -> Sequence[ExportTableSpec]: ...
    @property
    def features(self) -> Sequence[FeatureSpec]: ...


class ExportWriter(FolderWriter):
    """Builds one version in a hidden folder and publishes it whole, or not at all.

    Use as a context manager. Rows that nobody writes are zero. A killed process leaves its hidden
    folder `.export-*` behind; it never becomes a version and can be deleted.

    >>> with ExportWriter(root, spec, step=12, job="ads") as writer:  # doctest: +SKIP
    ...     write_rows(writer.row_file("users"), 0, rows)
    ...     writer.commit()
    """

    def __init__(
        self,
        root: Path,
        spec: ExportSpec,
        *,
        step: int,
        job: str,
        transforms: Mapping[str, Transform] | None = None,
    ) -> None:
        """Name what will be exported; `with` makes the hidden folder.

        Raises:
            ExportError: a table has a combiner that serving cannot run.
        """
        super().__init__(EXPORT, root)
        for table in spec.tables:
            if table.combiner not in COMBINERS:
                raise ExportError(
                    f"export: table '{table.name}': serving cannot run a custom combiner, "
                    f"only {COMBINERS}"
                )
        self._spec = spec
        self._step = step
        self._job = job
        self._transforms = dict(transforms or {})
        self._model: dict[str, Any] | None = None

    def row_file(self, table: str) -> RowFile:
        """The file of a table, allocated and zero on first use.

        Raises:
            ExportError: the job has no such table, or the disk refuses.
        """
        known = {spec.name: spec for spec in self._spec.tables}
        if table not in known:
            raise ExportError(f"export: no table '{table}', only {sorted(known)}")
        spec = known[table]
        return self._allocate(table_file(table), spec.vocabulary_size, spec.dim)

    def slot_files(self, table: str) -> dict[str, RowFile]:
        """No files: an export has no slots."""
        return {}

    def add_dense(self, variables: Mapping[str, F32], model: Mapping[str, Any]) -> None:
        """Store the variables of the dense model.

        Args:
            variables: float32 arrays by name.
            model: how to rebuild it, as JSON values: its name and parameters.

        Raises:
            ExportError: an array is not float32, or the disk refuses.
        """
        self._write_variables(DENSE_FILE, variables)
        self._model = dict(model)

    def commit(self) -> Path:
        """Make everything durable, publish it as the next version and point LATEST at it.

        Call it when all `write_rows` have returned.

        Returns:
            The version folder.

        Raises:
            ExportError: a table was never opened with `row_file`, or the disk refuses.
        """
        names = [spec.name for spec in self._spec.tables]
        missing = [name for name in names if table_file(name) not in self._row_files]
        if missing:
            raise ExportError(f"export in '{self._root}': no rows were written for {missing}")
        with EXPORT.errors(), writing(self._root):
            manifest = self._manifest()
            while True:
                version = next_version(self._root)
                try:
                    self._publish(version, manifest)
                    break
                except FileExistsError:
                    continue  # another writer took this number: try the next one
            _point_latest(self._root, version)
        return self._root / version

    def _manifest(self) -> dict[str, Any]:
        tables = [
            {"name": t.name, "vocabulary_size": t.vocabulary_size, "dim": t.dim}
            | {"combiner": t.combiner, **self._seal(table_file(t.name))}
            for t in self._spec.tables
        ]
        dense = None if self._model is None else self._seal(DENSE_FILE) | {"model": self._model}
        return {
            "format_version": EXPORT.format_version,
            "version": "",
            "job": self._job,
            "step": self._step,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "tables": tables,
            "features": [asdict(feature) for feature in self._spec.features],
            "transforms": self._seal_transforms(self._transforms),
            "dense": dense,
        }


def table_file(table: str) -> str:
    """File of a table inside a version folder; unquoting its stem gives the name back.

    >>> table_file("site/ads")
    'tables/site%2Fads.arrow'
    """
    return f"tables/{quote(table, safe='')}.arrow"


def open_export(path: Path, *, verify: bool = False) -> Export:
    """Open an export for reading; its tables are memory-mapped, not read.

    Args:
        path: an export root, whose LATEST is followed, or a version folder.
        verify: also compare checksums, which reads every byte.

    Raises:
        ExportError: missing, truncated, damaged, or written by a newer Manta.
    """
    manifest = Manifest(EXPORT, path, verify=verify)
    values = manifest.values
    entries = [_open_table(manifest, e) for e in manifest.field(values, "tables", list)]
    tables = {table.name: table for table in entries}
    features, dense = manifest.features(tables), values.get("dense")
    return Export(
        path=manifest.path(),
        version=manifest.version,
        step=manifest.field(values, "step", int),
        job=manifest.field(values, "job", str),
        created=manifest.field(values, "created", str),
        tables=tables,
        features=features,
        transforms=manifest.transforms(features),
        dense_model=None if dense is None else manifest.field(dense, "model", dict),
        dense_file=None if dense is None else manifest.path(manifest.file(dense).file),
    )


def next_version(root: Path) -> str:
    """The name after the highest version in `root`."""
    numbers = [int(m[1]) for p in root.iterdir() if (m := VERSION_NAME.fullmatch(p.name))]
    return f"v{max(numbers, default=0) + 1:06d}"


def _point_latest(root: Path, version: str) -> None:
    """Point LATEST at `version`, or at a higher one that another writer publishes meanwhile.

    Without a lock: who moved LATEST looks again, so whoever looks last leaves the highest version.
    """
    while True:
        set_latest(root, version)
        names = [path.parent.name for path in root.glob(f"v*/{MANIFEST}")]
        newest = max(int(m[1]) for name in names if (m := VERSION_NAME.fullmatch(name)))
        if newest <= int(version[1:]):
            return
        version = f"v{newest:06d}"


def _open_table(manifest: Manifest, entry: Any) -> ExportTable:
    sealed, (num_rows, dim) = manifest.file(entry), manifest.shape(entry)
    combiner = manifest.field(entry, "combiner", str)
    if combiner not in COMBINERS:
        raise ExportError(
            f"{manifest.where}: `combiner` must be one of {COMBINERS}, got '{combiner}'"
        )
    with EXPORT.errors():
        rows_VD = map_rows(manifest.path(sealed.file), num_rows, dim)
    return ExportTable(
        name=manifest.field(entry, "name", str),
        vocabulary_size=num_rows,
        dim=dim,
        combiner=combiner,
        file=sealed.file,
        size_bytes=sealed.size_bytes,
        sha256=sealed.checksum.removeprefix("sha256:"),
        rows_VD=rows_VD,
    )
