"""Immutable folders of rows, written hidden and published whole: what exports and snapshots share.

    ROOT/LATEST                    name of the newest version
    ROOT/<version>/manifest.json   what is in it; names every file with its size and checksum
    ROOT/.<kind>-<random>/         a version that is being written

This module knows files and manifests; what a version holds is the affair of `ps.export` and
`ps.snapshot`. Writers on several hosts need ROOT on a file system that all of them see.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from ps.columns import Transform
from ps.errors import ConfigError, StorageError
from ps.export_file import RowFile, allocate, sha256, sync, write_text, writing
from ps.ragged import F32
from ps.spec import FeatureSpec

LATEST = "LATEST"
MANIFEST = "manifest.json"
VARIABLES_SCHEMA = pa.schema(
    [("name", pa.string()), ("shape", pa.list_(pa.int64())), ("values", pa.list_(pa.float32()))]
)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kind:
    """What the versions of a root are."""

    word: str
    error: type[StorageError]
    format_version: int
    version: re.Pattern[str]
    """Names of versions; group 1 is the number."""
    example: str

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What goes wrong with the files of a version becomes this kind's error."""
        try:
            yield
        except StorageError as e:
            if isinstance(e, self.error):
                raise
            raise self.error(str(e)) from e


def file_name(name: str) -> str:
    """A file name for any table or slot; unquoting gives the name back.

    >>> file_name("site/ads"), file_name("..")
    ('site%2Fads', '%2E.')
    """
    quoted = quote(name, safe="")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


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
        """Named float32 arrays, one record batch each."""
        path = self._folder / file
        with (
            self._kind.errors(),
            writing(path),
            pa.ipc.new_file(str(path), VARIABLES_SCHEMA) as out,
        ):
            for name, value in variables.items():
                if value.dtype != np.float32:
                    raise StorageError(f"dense '{name}': must be float32, got {value.dtype}")
                row = ([name], [list(value.shape)], [np.ravel(value)])
                columns = map(pa.array, row, VARIABLES_SCHEMA.types)
                out.write_batch(pa.record_batch(list(columns), schema=VARIABLES_SCHEMA))

    def _seal_transforms(self, transforms: Mapping[str, Transform]) -> list[dict[str, Any]]:
        """The manifest's entries of transforms; writes their vocabularies."""
        entries: list[dict[str, Any]] = []
        for feature, transform in transforms.items():
            keys, sealed = transform.vocabulary, None
            if keys is not None:
                file = f"vocabularies/{len(entries):06d}.arrow"  # a quoted name may be too long
                path = self._folder / file
                batch = pa.record_batch([keys], names=["key"])
                with self._kind.errors(), writing(path):
                    path.parent.mkdir(exist_ok=True)
                    with pa.ipc.new_file(str(path), batch.schema) as out:
                        out.write_batch(batch)
                sealed = self._seal(file)
            entries.append({"feature": feature, **transform.to_json(), "vocabulary": sealed})
        return entries

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


class Manifest:
    """The manifest of a published version; every getter raises the kind's error."""

    def __init__(self, kind: Kind, path: Path, *, verify: bool) -> None:
        """Open a version folder, or the one that the LATEST of a root names.

        Args:
            kind: what is expected there.
            path: the folder.
            verify: `file` compares checksums too.
        """
        self._kind = kind
        self._verify = verify
        self.folder = _version_folder(kind, Path(path).absolute())
        self.where = f"'{self.folder / MANIFEST}'"
        self.values = self._read()
        self.version = self.field(self.values, "version", str)
        if not kind.version.fullmatch(self.version):
            raise kind.error(
                f"{self.where}: 'version' must look like {kind.example}, got {self.version!r:.80}"
            )

    def field(self, entry: Any, key: str, kind: type[T]) -> T:
        """`entry[key]`, which must be of exactly this type."""
        value = entry.get(key) if isinstance(entry, dict) else None
        if type(value) is not kind:
            raise self._kind.error(
                f"{self.where}: '{key}' must be of type {kind.__name__}, got {value!r:.80}"
            )
        return value

    def shape(self, entry: Any) -> tuple[int, int]:
        """[V, D] of a table's entry."""
        num_rows, dim = self.field(entry, "vocabulary_size", int), self.field(entry, "dim", int)
        if num_rows < 1 or not 1 <= dim < 2**31:
            raise self._kind.error(
                f"{self.where}: a table must be from [1, 1] to [*, 2³¹ - 1], "
                f"got [{num_rows}, {dim}]"
            )
        return num_rows, dim

    def file(self, entry: Any) -> Path:
        """The path of a file's entry, which is there and whole."""
        file, size = self.field(entry, "file", str), self.field(entry, "size_bytes", int)
        checksum, error = self.field(entry, "sha256", str), self._kind.error
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\0" in file:
            raise error(f"{self.where}: file {file!r} is outside the version folder")
        path = self.folder / file
        try:
            found = path.stat().st_size
            if found != size:
                raise error(f"'{path}': {found} bytes, but the manifest says {size}")
            if self._verify and (seen := sha256(path)) != checksum:
                raise error(f"'{path}' is damaged: sha256 {seen}, the manifest says {checksum}")
        except OSError as e:
            raise error(f"'{path}' cannot be read: {e.strerror or e}") from e
        except UnicodeEncodeError as e:
            raise error(f"{self.where}: file {file!r} is no name: {e}") from e
        return path

    def features(self, tables: Mapping[str, Any]) -> dict[str, FeatureSpec]:
        """The features, each of which looks up one of the tables."""
        features: dict[str, FeatureSpec] = {}
        for entry in self.field(self.values, "features", list):
            feature = self._feature(entry)
            if feature.table not in tables:
                raise self._kind.error(
                    f"{self.where}: feature '{feature.name}': no table '{feature.table}'"
                )
            features[feature.name] = feature
        return features

    def transforms(self, features: Mapping[str, FeatureSpec]) -> dict[str, Transform]:
        """The transforms by feature; none in a manifest of before there were any."""
        found: dict[str, Transform] = {}
        if "transforms" not in self.values:
            return found
        for entry in self.field(self.values, "transforms", list):
            feature = self.field(entry, "feature", str)
            if feature not in features:
                raise self._kind.error(f"{self.where}: a transform of no feature, '{feature}'")
            sealed, keys = entry.get("vocabulary"), None
            if sealed is not None:
                keys = self._vocabulary(self.file(sealed))
            document = {k: v for k, v in entry.items() if k not in ("feature", "vocabulary")}
            try:
                found[feature] = Transform.from_json(document, keys)
            except ConfigError as e:
                raise self._kind.error(f"{self.where}: feature '{feature}': {e}") from e
            if found[feature].sequence != (features[feature].max_sequence_length > 0):
                raise self._kind.error(
                    f"{self.where}: feature '{feature}': its transform and its max_sequence_length "
                    "do not agree on whether it is a sequence"
                )
        return found

    def _vocabulary(self, path: Path) -> pa.Array:
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
                table.validate(full=True)  # bad offsets would crash the process
                return table["key"].combine_chunks()
        except (OSError, KeyError, pa.ArrowException) as e:
            raise self._kind.error(f"'{path}' does not hold a vocabulary: {e}") from e

    def _feature(self, entry: Any) -> FeatureSpec:
        name, table = self.field(entry, "name", str), self.field(entry, "table", str)
        shape, width = entry.get("output_shape"), entry.get("tensor_core_width")
        length = self.field(entry, "max_sequence_length", int)
        if not 0 <= length < 2**31:
            raise self._kind.error(
                f"{self.where}: feature '{name}': max_sequence_length must be in [0, 2³¹), "
                f"got {length}"
            )
        return FeatureSpec(
            name=name,
            table=table,
            max_sequence_length=length,
            validate_weights_and_indices=self.field(entry, "validate_weights_and_indices", bool),
            output_shape=None if shape is None else tuple(self.field(entry, "output_shape", list)),
            tensor_core_width=None
            if width is None
            else self.field(entry, "tensor_core_width", int),
        )

    def _read(self) -> dict[str, Any]:
        path, newest = self.folder / MANIFEST, self._kind.format_version
        try:
            manifest = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as e:
            raise self._kind.error(f"'{path}' cannot be read: {e}") from e
        found = self.field(manifest, "format_version", int)
        if found > newest:
            raise self._kind.error(
                f"'{path}': format_version {found} is newer than this Manta knows ({newest}); "
                "install a newer manta-ps"
            )
        if found != newest:
            raise self._kind.error(f"'{path}': format_version must be {newest}, got {found}")
        return cast("dict[str, Any]", manifest)


def read_variables(kind: Kind, path: Path) -> dict[str, F32]:
    """Named float32 arrays, in the order in which they were written."""
    variables: dict[str, F32] = {}
    try:
        with pa.OSFile(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
            if table.schema != VARIABLES_SCHEMA:
                raise ValueError(f"its columns are {table.schema.names}")
            table.validate(full=True)  # bad offsets would crash the process
            for row in table.to_batches():
                name, shape = row["name"][0].as_py(), row["shape"][0].as_py()
                variables[name] = row["values"][0].values.to_numpy().reshape(shape)
    except (OSError, LookupError, AttributeError, TypeError, ValueError, pa.ArrowException) as e:
        raise kind.error(f"'{path}' does not hold dense variables: {e}") from e
    return variables


def holds(kind: Kind, path: Path) -> bool:
    """Whether `path` is a version of this kind, or a root whose LATEST names one."""
    try:
        if (path / MANIFEST).is_file():
            name = json.loads((path / MANIFEST).read_bytes())["version"]
        else:
            name = (path / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(name, str) and kind.version.fullmatch(name) is not None


def _version_folder(kind: Kind, path: Path) -> Path:
    if not path.is_dir():
        raise kind.error(f"{kind.word} '{path}': no such folder")
    if (path / MANIFEST).is_file():
        return path
    latest = path / LATEST
    try:
        version = latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise kind.error(
            f"'{path}' is no {kind.word}: it has neither {LATEST} nor {MANIFEST}"
        ) from e
    if not kind.version.fullmatch(version):
        raise kind.error(f"'{latest}' must hold a name like {kind.example}, got {version[:40]!r}")
    if not (path / version / MANIFEST).is_file():
        raise kind.error(f"'{latest}' names {version}, which has no {MANIFEST}")
    return path / version
