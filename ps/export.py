"""The export format: an immutable folder of rows that serving memory-maps.

    ROOT/LATEST                         name of the version to serve
    ROOT/v000001/manifest.json          tables, features, sizes, checksums, training step
    ROOT/v000001/tables/<table>.arrow   one column `row`, V rows in id order
    ROOT/v000001/dense.arrow            variables of the dense model, one record batch each

This module knows files only: no Ray, no optimizer state, no lookup. Writers on several hosts need
ROOT on a file system that all of them see.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from ps.config import COMBINERS, Combiner
from ps.errors import ExportError
from ps.export_file import (
    RowFile,
    allocate,
    map_rows,
    sha256,
    sync,
    write_rows,
    write_text,
    writing_export,
)
from ps.ragged import F32
from ps.spec import EmbeddingSpec, FeatureSpec

__all__ = ["Export", "ExportTable", "ExportWriter", "RowFile", "open_export", "write_rows"]

FORMAT_VERSION = 1
LATEST = "LATEST"
MANIFEST = "manifest.json"
DENSE_FILE = "dense.arrow"
VERSION_NAME = re.compile(r"v(\d{6,})")
DENSE_SCHEMA = pa.schema(
    [("name", pa.string()), ("shape", pa.list_(pa.int64())), ("values", pa.list_(pa.float32()))]
)
T = TypeVar("T")


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
    dense_model: dict[str, Any] | None
    """Name and parameters of the dense model, or None."""
    dense_file: Path | None

    def dense_variables(self) -> dict[str, F32]:
        """The dense model's variables by name; empty without a dense model.

        Raises:
            ExportError: the file is damaged.
        """
        path = self.dense_file
        if path is None:
            return {}
        variables: dict[str, F32] = {}
        try:
            with pa.OSFile(str(path)) as source:
                for row in pa.ipc.open_file(source).read_all().to_batches():
                    name, shape = row["name"][0].as_py(), row["shape"][0].as_py()
                    variables[name] = row["values"][0].values.to_numpy().reshape(shape)
        except (OSError, KeyError, ValueError) as e:
            raise ExportError(f"'{path}' does not hold dense variables: {e}") from e
        return variables


class ExportWriter:
    """Builds one version in a hidden folder and publishes it whole, or not at all.

    Use as a context manager. Rows that nobody writes are zero. A killed process leaves its hidden
    folder `.export-*` behind; it never becomes a version and can be deleted.

    >>> with ExportWriter(root, spec, step=12, job="ads") as writer:  # doctest: +SKIP
    ...     write_rows(writer.row_file("users"), 0, rows)
    ...     writer.commit()
    """

    def __init__(self, root: Path, spec: EmbeddingSpec, *, step: int, job: str) -> None:
        self._root = Path(root).absolute()  # shards have other working folders
        self._spec = spec
        self._step = step
        self._job = job
        self._folder = self._root / f".export-{uuid.uuid4().hex}"
        self._row_files: dict[str, RowFile] = {}
        self._model: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        with writing_export(self._root):
            (self._folder / "tables").mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)  # gone already after a commit

    def row_file(self, table: str) -> RowFile:
        """The file of a table, allocated and zero on first use.

        Raises:
            ExportError: the job has no such table, or the disk refuses.
        """
        if table not in self._row_files:
            known = {spec.name: spec for spec in self._spec.tables}
            if table not in known:
                raise ExportError(f"export: no table '{table}', only {sorted(known)}")
            spec, path = known[table], self._folder / table_file(table)
            with writing_export(path):
                self._row_files[table] = allocate(path, spec.vocabulary_size, spec.dim)
        return self._row_files[table]

    def add_dense(self, variables: Mapping[str, F32], model: Mapping[str, Any]) -> None:
        """Store the variables of the dense model.

        Args:
            variables: float32 arrays by name.
            model: how to rebuild it, as JSON values: its name and parameters.

        Raises:
            ExportError: an array is not float32, or the disk refuses.
        """
        path = self._folder / DENSE_FILE
        with writing_export(path), pa.ipc.new_file(str(path), DENSE_SCHEMA) as out:
            for name, value in variables.items():
                if value.dtype != np.float32:
                    raise ExportError(f"dense '{name}': must be float32, got {value.dtype}")
                row = ([name], [list(value.shape)], [np.ravel(value)])
                columns = map(pa.array, row, DENSE_SCHEMA.types)
                out.write_batch(pa.record_batch(list(columns), schema=DENSE_SCHEMA))
        self._model = dict(model)

    def commit(self) -> Path:
        """Make everything durable, publish it as the next version and point LATEST at it.

        Call it when all `write_rows` have returned.

        Returns:
            The version folder.

        Raises:
            ExportError: a table was never opened with `row_file`, or the disk refuses.
        """
        missing = [spec.name for spec in self._spec.tables if spec.name not in self._row_files]
        if missing:
            raise ExportError(f"export in '{self._root}': no rows were written for {missing}")
        with writing_export(self._root):
            manifest = self._manifest()
            while True:
                version = next_version(self._root)
                manifest["version"] = version
                write_text(self._folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
                sync(self._folder / "tables")
                sync(self._folder)
                try:
                    self._folder.rename(self._root / version)
                    break
                except OSError as e:
                    if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise  # else another writer took this number: try the next one
            sync(self._root)
            _publish(self._root, version)
        return self._root / version

    def _manifest(self) -> dict[str, Any]:
        tables = [
            {"name": t.name, "vocabulary_size": t.vocabulary_size, "dim": t.dim}
            | {"combiner": t.combiner, **self._seal(table_file(t.name))}
            for t in self._spec.tables
        ]
        dense = None if self._model is None else self._seal(DENSE_FILE) | {"model": self._model}
        return {
            "format_version": FORMAT_VERSION,
            "version": "",
            "job": self._job,
            "step": self._step,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "tables": tables,
            "features": [asdict(feature) for feature in self._spec.features],
            "dense": dense,
        }

    def _seal(self, file: str) -> dict[str, Any]:
        path = self._folder / file
        sync(path)
        return {"file": file, "size_bytes": path.stat().st_size, "sha256": sha256(path)}


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
    folder = _version_folder(Path(path).absolute())
    where = f"'{folder / MANIFEST}'"
    manifest = _read_manifest(folder)
    tables: dict[str, ExportTable] = {}
    for entry in _field(manifest, "tables", list, where):
        table = _open_table(folder, entry, where, verify)
        tables[table.name] = table
    features: dict[str, FeatureSpec] = {}
    for entry in _field(manifest, "features", list, where):
        feature = _feature(entry, where)
        if feature.table not in tables:
            raise ExportError(f"{where}: feature '{feature.name}': no table '{feature.table}'")
        features[feature.name] = feature
    dense, version = manifest.get("dense"), _field(manifest, "version", str, where)
    if not VERSION_NAME.fullmatch(version):
        raise ExportError(f"{where}: 'version' must look like v000001, got {version!r:.80}")
    return Export(
        path=folder,
        version=version,
        step=_field(manifest, "step", int, where),
        job=_field(manifest, "job", str, where),
        created=_field(manifest, "created", str, where),
        tables=tables,
        features=features,
        dense_model=None if dense is None else _field(dense, "model", dict, where),
        dense_file=None if dense is None else _check_file(folder, dense, where, verify),
    )


def next_version(root: Path) -> str:
    """The name after the highest version in `root`."""
    numbers = [int(m[1]) for p in root.iterdir() if (m := VERSION_NAME.fullmatch(p.name))]
    return f"v{max(numbers, default=0) + 1:06d}"


def _publish(root: Path, version: str) -> None:
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


def set_latest(root: Path, version: str) -> None:
    """Point LATEST at a version, atomically."""
    temporary = root / f".{LATEST}-{uuid.uuid4().hex}"
    try:
        write_text(temporary, version + "\n")
        temporary.replace(root / LATEST)
    finally:
        temporary.unlink(missing_ok=True)
    sync(root)


def _version_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ExportError(f"export '{path}': no such folder")
    if (path / MANIFEST).is_file():
        return path
    try:
        version = (path / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise ExportError(f"'{path}' is no export: it has neither {LATEST} nor {MANIFEST}") from e
    if not VERSION_NAME.fullmatch(version):
        raise ExportError(f"'{path / LATEST}' must hold a name like v000001, got {version[:40]!r}")
    if not (path / version / MANIFEST).is_file():
        raise ExportError(f"'{path / LATEST}' names {version}, which has no {MANIFEST}")
    return path / version


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise ExportError(f"'{path}' cannot be read: {e}") from e
    found = _field(manifest, "format_version", int, f"'{path}'")
    if found > FORMAT_VERSION:
        raise ExportError(
            f"'{path}': format_version {found} is newer than this Manta knows ({FORMAT_VERSION}); "
            "install a newer manta-ps"
        )
    if found != FORMAT_VERSION:
        raise ExportError(f"'{path}': format_version must be {FORMAT_VERSION}, got {found}")
    return cast("dict[str, Any]", manifest)


def _open_table(folder: Path, entry: Any, where: str, verify: bool) -> ExportTable:
    path = _check_file(folder, entry, where, verify)
    num_rows, dim = _field(entry, "vocabulary_size", int, where), _field(entry, "dim", int, where)
    if num_rows < 1 or not 1 <= dim < 2**31:
        raise ExportError(
            f"{where}: a table must be from [1, 1] to [*, 2³¹ - 1], got [{num_rows}, {dim}]"
        )
    combiner = _field(entry, "combiner", str, where)
    if combiner not in COMBINERS:
        raise ExportError(f"{where}: `combiner` must be one of {COMBINERS}, got '{combiner}'")
    return ExportTable(
        name=_field(entry, "name", str, where),
        vocabulary_size=num_rows,
        dim=dim,
        combiner=combiner,
        file=entry["file"],
        size_bytes=entry["size_bytes"],
        sha256=entry["sha256"],
        rows_VD=map_rows(path, num_rows, dim),
    )


def _feature(entry: Any, where: str) -> FeatureSpec:
    name = _field(entry, "name", str, where)
    shape = entry.get("output_shape")
    return FeatureSpec(
        name=name,
        table=_field(entry, "table", str, where),
        max_sequence_length=_field(entry, "max_sequence_length", int, where),
        validate_weights_and_indices=_field(entry, "validate_weights_and_indices", bool, where),
        output_shape=None if shape is None else tuple(_field(entry, "output_shape", list, where)),
    )


def _check_file(folder: Path, entry: Any, where: str, verify: bool) -> Path:
    file, size = _field(entry, "file", str, where), _field(entry, "size_bytes", int, where)
    checksum = _field(entry, "sha256", str, where)
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\0" in file:
        raise ExportError(f"{where}: file {file!r} is outside the version folder")
    path = folder / file
    try:
        found = path.stat().st_size
        if found != size:
            raise ExportError(f"'{path}': {found} bytes, but the manifest says {size}")
        if verify and (seen := sha256(path)) != checksum:
            raise ExportError(f"'{path}' is damaged: sha256 {seen}, the manifest says {checksum}")
    except OSError as e:
        raise ExportError(f"'{path}' cannot be read: {e.strerror or e}") from e
    return path


def _field(entry: Any, key: str, kind: type[T], where: str) -> T:
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind:
        raise ExportError(f"{where}: '{key}' must be of type {kind.__name__}, got {value!r:.80}")
    return value
