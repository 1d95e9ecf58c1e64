"""The manifest of a version of an export or a snapshot: read it, and check the files it names.

    ROOT/LATEST                    name of the newest version
    ROOT/<version>/manifest.json   what is in it; names every file with its size and checksum

Reads through `ps.storage`, so ROOT may be a local folder or an object store's. What a version holds
is the affair of `ps.export` and `ps.snapshot`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import quote

import pyarrow as pa
import xxhash

from ps.columns import Transform
from ps.errors import ConfigError, StorageError
from ps.ragged import F32
from ps.spec import FeatureSpec
from ps.storage import Storage

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

LATEST = "LATEST"
MANIFEST = "manifest.json"
VARIABLES_SCHEMA = pa.schema(
    [("name", pa.string()), ("shape", pa.list_(pa.int64())), ("values", pa.list_(pa.float32()))]
)
_CHUNK_BYTES = 4 << 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kind:
    """What the versions of a root are."""

    word: str
    error: type[StorageError]
    format_version: int
    """Of what is written now."""
    version: re.Pattern[str]
    """Names of versions; group 1 is the number."""
    example: str
    oldest_format: int = 1
    """That can be read."""

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What goes wrong with the files of a version becomes this kind's error."""
        try:
            yield
        except StorageError as e:
            if isinstance(e, self.error):
                raise
            raise self.error(str(e)) from e


@dataclass(frozen=True, slots=True)
class SealedFile:
    """A file as the manifest names it."""

    file: str
    """Path inside the version folder."""
    size_bytes: int
    checksum: str
    """`sha256:` or `xxh3:` and the digest in hexadecimal; xxh3 is XXH3 with 128 bits."""


def file_name(name: str) -> str:
    """A file name for any table or slot; unquoting gives the name back.

    >>> file_name("site/ads"), file_name("..")
    ('site%2Fads', '%2E.')
    """
    quoted = quote(name, safe="")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


def parent(location: str) -> str:
    """The location of the folder around `location`.

    >>> parent("s3://bucket/runs/step-000000006?region=eu")
    's3://bucket/runs?region=eu'
    """
    place, query = _parted(location)
    return f"{place.rstrip('/').rpartition('/')[0] or '/'}{query}"


def name_of(location: str) -> str:
    """The last part of a location.

    >>> name_of("s3://bucket/runs/step-000000006?region=eu")
    'step-000000006'
    """
    return _parted(location)[0].rstrip("/").rpartition("/")[2]


def _parted(location: str) -> tuple[str, str]:
    place, mark, query = location.partition("?") if "://" in location else (location, "", "")
    return place, mark + query


def read_checked(storage: Storage, sealed: SealedFile) -> bytes:
    """All of a small file, whose checksum is right.

    Raises:
        StorageError: it is damaged or gone.
    """
    data = storage.read(sealed.file)
    digest = Digest(sealed.checksum)
    digest.add(data)
    digest.check(storage.name(sealed.file))
    return data


def check_file(storage: Storage, sealed: SealedFile, *, verify: bool) -> None:
    """See that a file has its size, and with `verify` its checksum.

    Raises:
        StorageError: it has not, or is not there; names it.
    """
    found, name = storage.size(sealed.file), storage.name(sealed.file)
    if found != sealed.size_bytes:
        raise StorageError(f"'{name}': {found} bytes, but the manifest says {sealed.size_bytes}")
    if not verify:
        return
    digest, buffer = Digest(sealed.checksum), bytearray(_CHUNK_BYTES)
    with storage.stream(sealed.file) as source:
        while count := source.fill(buffer):
            digest.add(memoryview(buffer)[:count])
    digest.check(name)


class Digest:
    """The checksum of bytes that pass by, to be compared with one that a manifest has."""

    def __init__(self, wanted: str) -> None:
        """Wait for bytes with this checksum, `sha256:…` or `xxh3:…`."""
        self._wanted = wanted
        self._hash = hashlib.sha256() if wanted.startswith("sha256:") else xxhash.xxh3_128()

    def add(self, data: ReadableBuffer) -> None:
        """The bytes that follow."""
        self._hash.update(data)

    def check(self, name: str) -> None:
        """See that these were the right bytes.

        Raises:
            StorageError: they were not; says so of the file `name`.
        """
        kind, _, wanted = self._wanted.partition(":")
        if (seen := self._hash.hexdigest()) != wanted:
            raise StorageError(f"'{name}' is damaged: {kind} {seen}, the manifest says {wanted}")


class Manifest:
    """The manifest of a published version; every getter raises the kind's error."""

    def __init__(self, kind: Kind, location: str | Path, *, verify: bool = False) -> None:
        """Open a version folder, or the one that the LATEST of a root names.

        Args:
            kind: what is expected there.
            location: of the folder.
            verify: `file` compares checksums too.
        """
        self._kind = kind
        self._verify = verify
        with kind.errors():
            self.storage = _version_folder(kind, Storage.at(location))
            self.where = f"'{self.storage.name(MANIFEST)}'"
            self.values = self._read()
        self.format_version = self.field(self.values, "format_version", int)
        self.version = self.field(self.values, "version", str)
        if not kind.version.fullmatch(self.version):
            raise kind.error(
                f"{self.where}: 'version' must look like {kind.example}, got {self.version!r:.80}"
            )

    def path(self, file: str = "") -> Path:
        """The local path of a file, or of the version folder."""
        if not self.storage.is_local:
            raise self._kind.error(
                f"{self._kind.word} '{self.storage.location}': it must lie in a local folder"
            )
        return Path(self.storage.location, file)

    def error(self, text: str) -> StorageError:
        """An error about the manifest itself."""
        return self._kind.error(f"{self.where}: {text}")

    def field(self, entry: Any, key: str, kind: type[T]) -> T:
        """`entry[key]`, which must be of exactly this type."""
        value = entry.get(key) if isinstance(entry, dict) else None
        if type(value) is not kind:
            raise self.error(f"'{key}' must be of type {kind.__name__}, got {value!r:.80}")
        return value

    def shape(self, entry: Any) -> tuple[int, int]:
        """[V, D] of a table's entry."""
        num_rows, dim = self.field(entry, "vocabulary_size", int), self.field(entry, "dim", int)
        if num_rows < 1 or not 1 <= dim < 2**31:
            raise self.error(
                f"a table must be from [1, 1] to [*, 2³¹ - 1], got [{num_rows}, {dim}]"
            )
        return num_rows, dim

    def sealed(self, entry: Any) -> SealedFile:
        """A file's entry, without a look at the file."""
        file, size = self.field(entry, "file", str), self.field(entry, "size_bytes", int)
        if self.format_version == 1:
            digest = f"sha256:{self.field(entry, 'sha256', str)}"
        else:
            digest = self.field(entry, "checksum", str)
            if not digest.startswith("xxh3:"):
                raise self.error(f"'checksum' must begin with xxh3:, got {digest!r:.80}")
        path = PurePosixPath(file)
        if not file or path.is_absolute() or ".." in path.parts or "\0" in file:
            raise self.error(f"file {file!r} is outside the version folder")
        try:
            file.encode()
        except UnicodeEncodeError as e:
            raise self.error(f"file {file!r} is no name: {e}") from e
        return SealedFile(file, size, digest)

    def file(self, entry: Any) -> SealedFile:
        """A file's entry; the file is there and whole."""
        sealed = self.sealed(entry)
        with self._kind.errors():
            check_file(self.storage, sealed, verify=self._verify)
        return sealed

    def features(self, tables: Mapping[str, Any]) -> dict[str, FeatureSpec]:
        """The features, each of which looks up one of the tables."""
        features: dict[str, FeatureSpec] = {}
        for entry in self.field(self.values, "features", list):
            feature = self._feature(entry)
            if feature.table not in tables:
                raise self.error(f"feature '{feature.name}': no table '{feature.table}'")
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
                raise self.error(f"a transform of no feature, '{feature}'")
            sealed, keys = entry.get("vocabulary"), None
            if sealed is not None:
                keys = self._vocabulary(self.file(sealed).file)
            document = {k: v for k, v in entry.items() if k not in ("feature", "vocabulary")}
            try:
                found[feature] = Transform.from_json(document, keys)
            except ConfigError as e:
                raise self.error(f"feature '{feature}': {e}") from e
            if found[feature].sequence != (features[feature].max_sequence_length > 0):
                raise self.error(
                    f"feature '{feature}': its transform and its max_sequence_length "
                    "do not agree on whether it is a sequence"
                )
        return found

    def _vocabulary(self, file: str) -> pa.Array:
        try:
            with self._kind.errors(), self.storage.open(file) as source:
                table = pa.ipc.open_file(source).read_all()
                table.validate(full=True)  # bad offsets would crash the process
                return table["key"].combine_chunks()
        except (OSError, KeyError, pa.ArrowException) as e:
            raise self._kind.error(
                f"'{self.storage.name(file)}' does not hold a vocabulary: {e}"
            ) from e

    def _feature(self, entry: Any) -> FeatureSpec:
        name, table = self.field(entry, "name", str), self.field(entry, "table", str)
        shape, width = entry.get("output_shape"), entry.get("tensor_core_width")
        length = self.field(entry, "max_sequence_length", int)
        if not 0 <= length < 2**31:
            raise self.error(
                f"feature '{name}': max_sequence_length must be in [0, 2³¹), got {length}"
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
        newest, oldest = self._kind.format_version, self._kind.oldest_format
        try:
            manifest = json.loads(self.storage.read(MANIFEST))
        except (ValueError, RecursionError) as e:
            if isinstance(e, StorageError):
                raise
            raise self._kind.error(f"{self.where} cannot be read: {e}") from e
        found = self.field(manifest, "format_version", int)
        if found > newest:
            raise self.error(
                f"format_version {found} is newer than this Manta knows ({newest}); "
                "install a newer manta-ps"
            )
        if found < oldest:
            known = str(newest) if oldest == newest else f"from {oldest} to {newest}"
            raise self.error(f"format_version must be {known}, got {found}")
        return cast("dict[str, Any]", manifest)


def read_variables(data: bytes, name: str) -> dict[str, F32]:
    """Named float32 arrays, in the order in which they were written, from a file's bytes.

    Raises:
        StorageError: these are other bytes.
    """
    variables: dict[str, F32] = {}
    try:
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        if table.schema != VARIABLES_SCHEMA:
            raise ValueError(f"its columns are {table.schema.names}")
        table.validate(full=True)  # bad offsets would crash the process
        for row in table.to_batches():
            key, shape = row["name"][0].as_py(), row["shape"][0].as_py()
            variables[key] = row["values"][0].values.to_numpy().reshape(shape)
    except (LookupError, AttributeError, TypeError, ValueError, OSError, pa.ArrowException) as e:
        raise StorageError(f"'{name}' does not hold dense variables: {e}") from e
    return variables


def holds(kind: Kind, location: str | Path) -> bool:
    """Whether `location` is a version of this kind, or a root whose LATEST names one."""
    try:
        storage = Storage.at(location)
        if storage.exists(MANIFEST):
            name = json.loads(storage.read(MANIFEST))["version"]
        else:
            name = storage.read(LATEST).decode().strip()
    except (ValueError, KeyError, TypeError):  # a StorageError is a ValueError
        return False
    return isinstance(name, str) and kind.version.fullmatch(name) is not None


def _version_folder(kind: Kind, root: Storage) -> Storage:
    if root.exists(MANIFEST):
        return root
    if root.is_local and not Path(root.location).is_dir():
        raise kind.error(f"{kind.word} '{root.location}': no such folder")
    if not root.exists(LATEST):
        raise kind.error(
            f"'{root.location}' is no {kind.word}: it has neither {LATEST} nor {MANIFEST}"
        )
    latest, version = f"'{root.name(LATEST)}'", read_latest(root)
    if not kind.version.fullmatch(version):
        raise kind.error(f"{latest} must hold a name like {kind.example}, got {version[:40]!r}")
    if not root.exists(f"{version}/{MANIFEST}"):
        raise kind.error(f"{latest} names {version}, which has no {MANIFEST}")
    return root.below(version)


def read_latest(root: Storage) -> str:
    """What the LATEST of a root says.

    Raises:
        StorageError: it is not there, or cannot be read.
    """
    return root.read(LATEST).decode(errors="replace").strip()
