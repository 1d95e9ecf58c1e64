"""The state of one verification: what was found, and which files nobody has read yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from ps.table_stats import ImpossibleValues
from ps.verify_files import Damage, checksum_damage, file_damage
from ps.version_files import ListedFile, VersionFiles, listed_files

T = TypeVar("T")


def counted(number: int, thing: str) -> str:
    """A number of things, in words.

    >>> counted(1, "file"), counted(2, "file")
    ('1 file', '2 files')
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    check: str
    """Which check: latest, manifest, file, checksum, rows, slots, values, dense, fences."""
    where: str
    """File in the version folder, or table and array."""
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.message}"


class Checked:
    """A version under verification."""

    def __init__(self, files: VersionFiles, *, allow_non_finite: bool) -> None:
        self.files = files
        self.listed = listed_files(files.manifest)
        self.findings: list[Finding] = []
        self._allow_non_finite = allow_non_finite
        self._unread: dict[str, ListedFile] = {}

    def add(self, check: str, where: str, message: str) -> None:
        """Note that something is wrong."""
        self.findings.append(Finding(check, where, message))

    def add_damage(self, file: str, damage: Damage | None) -> None:
        """Note what is wrong with a file, if anything is."""
        if damage is not None:
            self.add(damage.check, file, damage.message)

    def add_values(self, where: str, values: ImpossibleValues, what: str = "row") -> None:
        """Note values that training never leaves; `what` they are numbered by."""
        if values.non_finite and not self._allow_non_finite:
            first = f"the first in {what} {values.first_non_finite}"
            self.add("values", where, f"{values.nan} NaN and {values.inf} infinite, {first}")
        if values.negative:
            first = f"the first in {what} {values.first_negative}"
            self.add("values", where, f"{values.negative} below 0, which cannot be, {first}")

    def check_files(self) -> None:
        """See that every file is there, and has its size."""
        names: set[str] = set()
        for listed in self.listed:
            if listed.file in names:
                self.add("manifest", listed.file, "is listed twice")
                continue
            names.add(listed.file)
            damage = file_damage(self.files.storage, listed)
            self.add_damage(listed.file, damage)
            if damage is None:
                self._unread[listed.file] = listed

    def take(self, entry: Any) -> ListedFile | None:
        """The file of an entry, for its caller to read, with its checksum; None if it is damaged.

        What nobody takes, `check_other_files` reads.
        """
        file = entry.get("file") if isinstance(entry, dict) else None
        return self._unread.pop(file, None) if isinstance(file, str) else None

    def take_whole(self, entry: Any) -> ListedFile | None:
        """`take`, after its checksum was found right: for files that are small."""
        listed = self.take(entry)
        if listed is None:
            return None
        damage = checksum_damage(self.files.storage, listed)
        self.add_damage(listed.file, damage)
        return listed if damage is None else None

    def check_other_files(self) -> None:
        """Compare the checksums of files that nobody took."""
        for listed in [*self._unread.values()]:
            self.take_whole({"file": listed.file})

    def field(self, entry: Any, key: str, kind: type[T], where: str) -> T | None:
        """`entry[key]` if it is of this type, else None and a finding."""
        value = entry.get(key) if isinstance(entry, dict) else None
        if type(value) is kind:
            return value
        self.add("manifest", where, f"'{key}' must be of type {kind.__name__}, got {value!r:.80}")
        return None
