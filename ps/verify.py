"""Whether a snapshot or export is sound: every file, every byte, and that all of it fits together.

What is wrong becomes a `Finding`, and the check goes on: one damaged file hides nothing of the
others. Memory does not grow with the tables. How files are read is the affair of `ps.verify_files`
and `ps.verify_tables`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ps.contents import describe
from ps.errors import StorageError
from ps.export import EXPORT, open_export
from ps.manifest import MANIFEST
from ps.snapshot_root import snapshot_name
from ps.verify_dense import check_dense
from ps.verify_tables import TableReport, check_tables
from ps.verify_version import Checked, Finding, counted
from ps.version_files import BrokenVersionError, VersionFiles, find_version


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` found."""

    kind: str
    """snapshot or export; "" if what is there does not say."""
    location: str
    version: str
    format_version: int | None
    step: int | None
    num_files: int
    size_bytes: int
    tables: tuple[TableReport, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """All of it, and `ok`."""
        return {"ok": self.ok, **asdict(self)}

    def lines(self) -> Iterator[str]:
        """For people: a line about the version, one per table, one per finding, and the verdict."""
        step = "" if self.step is None else f", step {self.step}"
        kind = self.kind or "version"
        files = counted(self.num_files, "file")
        yield f"{kind} {self.location}{step}: {files}, {self.size_bytes} bytes"
        for table in self.tables:
            yield table.line()
        for finding in self.findings:
            yield f"finding: {finding}"
        yield "ok" if self.ok else counted(len(self.findings), "finding")


def verify(location: str | Path, *, allow_non_finite: bool = False) -> Verification:
    """Check a version: manifest, sizes, checksums, shapes, ids, slots, values, fences.

    Args:
        location: a root, whose LATEST is followed, or a version folder; local, `s3://`, `gs://`.
        allow_non_finite: NaN and infinite values are counted, but are no finding.

    Raises:
        StorageError: there is no snapshot and no export, it cannot be read at all, or a newer
            Manta wrote it.
    """
    try:
        files = find_version(location)
    except BrokenVersionError as e:
        return Verification(
            kind=e.kind,
            location=e.location,
            version=e.version,
            format_version=None,
            step=None,
            num_files=0,
            size_bytes=0,
            tables=(),
            findings=(Finding(e.check, e.where, e.message),),
        )
    _refuse_newer(files)
    checked = Checked(files, allow_non_finite=allow_non_finite)
    checked.check_files()
    format_version = checked.field(files.manifest, "format_version", int, MANIFEST)
    if format_version is not None and format_version < files.kind.oldest_format:
        checked.add("manifest", MANIFEST, f"is of format {format_version}, which never was")
    tables = check_tables(checked)
    check_dense(checked)
    _check_step(checked)
    checked.check_other_files()
    if all(finding.check == "values" for finding in checked.findings):
        _check_opening(checked)
    step = files.manifest.get("step")
    return Verification(
        kind=files.kind.word,
        location=files.location,
        version=files.version,
        format_version=format_version,
        step=step if type(step) is int else None,
        num_files=len(checked.listed) + 1,
        size_bytes=files.size_bytes(),
        tables=tables,
        findings=tuple(checked.findings),
    )


def _refuse_newer(files: VersionFiles) -> None:
    found, newest = files.manifest.get("format_version"), files.kind.format_version
    if type(found) is int and found > newest:
        raise StorageError(
            f"'{files.location}': format_version {found} is newer than this Manta knows "
            f"({newest}); install a newer manta-ps"
        )


def _check_step(checked: Checked) -> None:
    """The step against the version's name and the fences."""
    manifest, version = checked.files.manifest, checked.files.version
    if manifest.get("version") != version:
        message = f"is of version {manifest.get('version')!r:.80}, but lies in {version}"
        checked.add("manifest", MANIFEST, message)
    step = checked.field(manifest, "step", int, MANIFEST)
    if checked.files.kind is EXPORT or step is None:
        return
    if snapshot_name(step) != version:
        checked.add("manifest", MANIFEST, f"is of step {step}, but lies in {version}")
    if manifest.get("fences") is not None:
        _check_fences(checked, step)


def _check_fences(checked: Checked, step: int) -> None:
    """Sync: the shards expect step `step` of every rank. Async: of the slowest one."""
    fences = checked.field(checked.files.manifest, "fences", list, MANIFEST)
    if fences is None:
        return
    cursor = checked.files.manifest.get("cursor")
    cursor = cursor if isinstance(cursor, dict) else {}
    ints = [fence for fence in fences if type(fence) is int]
    slowest, fastest = min(ints, default=step), max(ints, default=step)
    if cursor.get("mode") == "async":
        fastest = slowest
    if ints != fences or slowest != step or fastest != step:
        checked.add("fences", MANIFEST, f"are {fences!r:.80} at step {step}")
    ranks = cursor.get("ranks", len(fences))
    if ranks != len(fences):
        message = f"are those of {len(fences)} ranks, but the cursor is of {ranks!r:.20}"
        checked.add("fences", MANIFEST, message)


def _check_opening(checked: Checked) -> None:
    """What training and serving would refuse, should the checks before have missed it."""
    files = checked.files
    try:
        describe(files.storage.uri)
        if files.kind is EXPORT and files.storage.is_local:
            open_export(Path(files.location))
    except StorageError as e:
        checked.add("manifest", MANIFEST, str(e))
