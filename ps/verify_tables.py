"""Tables of a version: rows against slots against what the manifest says, and their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ps.errors import StorageError
from ps.export import EXPORT
from ps.manifest import MANIFEST
from ps.optimizers import OPTIMIZERS
from ps.part_reader import read_part
from ps.partition import Placement
from ps.table_parts import SealedPart
from ps.table_stats import NEVER_NEGATIVE, ImpossibleValues
from ps.verify_files import Damage, checksum_damage, scan_rows
from ps.verify_version import Checked, counted
from ps.version_files import listed_files


@dataclass(slots=True)
class TableReport:
    """One table of a verified version."""

    name: str
    vocabulary_size: int
    dim: int
    optimizer: str | None
    """Its name; None in an export."""
    slots: tuple[str, ...]
    num_files: int
    size_bytes: int
    nan: dict[str, int] = field(default_factory=dict)
    """Number of NaNs in "rows" and in every slot."""
    inf: dict[str, int] = field(default_factory=dict)
    """Number of infinities."""
    num_findings: int = 0

    def line(self) -> str:
        """For people."""
        kept = [] if self.optimizer is None else [self.optimizer]
        kept += [f"slots {', '.join(self.slots)}"] if self.slots else []
        files = counted(self.num_files, "file")
        bad = sum(self.nan.values()) + sum(self.inf.values())
        verdict = "sound" if not self.num_findings else counted(self.num_findings, "finding")
        return (
            f"table '{self.name}': {self.vocabulary_size} rows of {self.dim}, "
            f"{', '.join([*kept, files])}, {self.size_bytes} bytes, {bad} NaN or infinite: "
            f"{verdict}"
        )


def check_tables(checked: Checked) -> tuple[TableReport, ...]:
    """Check every table; those that the manifest does not describe are findings only."""
    reports: list[TableReport] = []
    for entry in checked.field(checked.files.manifest, "tables", list, MANIFEST) or []:
        before = len(checked.findings)
        report = _described(checked, entry)
        if report is None:
            continue
        where = f"table '{report.name}'"
        if report.name in (r.name for r in reports):
            checked.add("manifest", where, "is listed twice")
        if checked.files.kind is EXPORT:
            _check_array(checked, report, "rows", entry)
        elif checked.files.manifest.get("format_version") == 1:
            _check_whole_arrays(checked, report, entry)
        else:
            _check_parts(checked, report, entry)
        files = {listed.file for listed in listed_files(entry)}
        earlier = sum(finding.where in files for finding in checked.findings[:before])
        report.num_findings = len(checked.findings) - before + earlier
        reports.append(report)
    return tuple(reports)


def _described(checked: Checked, entry: Any) -> TableReport | None:
    """What the manifest says of a table, if it says enough to go on."""
    name = checked.field(entry, "name", str, MANIFEST)
    if name is None:
        return None
    where = f"table '{name}'"
    num_rows = checked.field(entry, "vocabulary_size", int, where)
    dim = checked.field(entry, "dim", int, where)
    if num_rows is None or dim is None:
        return None
    if num_rows < 1 or dim < 1:
        checked.add("manifest", where, f"must be at least [1, 1], got [{num_rows}, {dim}]")
        return None
    optimizer: str | None = None
    slots: tuple[str, ...] = ()
    if checked.files.kind is not EXPORT:
        described = checked.field(entry, "optimizer", dict, where)
        if described is None:
            return None
        optimizer = checked.field(described, "name", str, where)
        if optimizer is None:
            return None
        known = slot_names(described)
        if known is None:
            checked.add("manifest", where, f"optimizer {optimizer!r:.80} is not known")
            return None
        slots = known
    files = listed_files(entry)
    size = sum(file.size_bytes or 0 for file in files)
    return TableReport(name, num_rows, dim, optimizer, slots, len(files), size)


def slot_names(optimizer: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The slots that an optimizer of this description has; None if there is no such optimizer.

    >>> slot_names({"name": "Adam"})
    ('momenta', 'velocities')
    """
    name = optimizer.get("name")
    if name in OPTIMIZERS:
        return OPTIMIZERS[name].slot_names
    custom = optimizer.get("slot_names")
    if name == "CustomOptimizer" and isinstance(custom, list):
        return tuple(str(slot) for slot in custom)
    return None


def _check_whole_arrays(checked: Checked, report: TableReport, entry: Any) -> None:
    """Format 1: a file of rows, and one of each slot."""
    where = f"table '{report.name}'"
    _check_array(checked, report, "rows", entry.get("rows"))
    found = checked.field(entry, "slots", list, where)
    if found is None:
        return
    names = [checked.field(slot, "name", str, where) for slot in found]
    _check_slots(checked, report, names)
    for name, slot in zip(names, found, strict=True):
        if name is not None:
            _check_array(checked, report, name, slot)


def _check_array(checked: Checked, report: TableReport, name: str, entry: Any) -> None:
    """One row file."""
    where = f"table '{report.name}', {name}"
    file = checked.field(entry, "file", str, where)
    listed = checked.take(entry)
    if file is None or listed is None:
        return  # a finding already
    values = ImpossibleValues(may_be_negative=_may_be_negative(report, name))
    shape = (report.vocabulary_size, report.dim)
    damage = scan_rows(checked.files.storage, listed, shape, values)
    checked.add_damage(listed.file, damage)
    if damage is None:
        _add_values(checked, report, name, values)


def _check_parts(checked: Checked, report: TableReport, entry: Any) -> None:
    """Format 2: a part per shard, with columns of rows and of every slot."""
    where = f"table '{report.name}'"
    written = _placement(checked, report, entry)
    slots = checked.field(entry, "slots", list, where)
    parts = checked.field(entry, "parts", list, where)
    if written is None or slots is None or parts is None:
        return
    slots = [str(slot) for slot in slots]
    _check_slots(checked, report, slots)
    shards = [part.get("shard") if isinstance(part, dict) else None for part in parts]
    if shards != [*range(written.num_shards)]:
        message = f"has parts of shards {shards}, but {written.num_shards} shards wrote it"
        checked.add("rows", where, message)
        return
    values = {
        name: ImpossibleValues(may_be_negative=_may_be_negative(report, name))
        for name in ("rows", *slots)
    }
    for shard, part in enumerate(parts):
        num_rows = checked.field(part, "num_rows", int, f"{where}, shard {shard}")
        wanted = written.num_local_rows(shard)
        if num_rows not in (None, wanted):
            message = f"has a part of {num_rows} rows, but shard {shard} owns {wanted}"
            checked.add("rows", where, message)
        elif num_rows is not None:
            _check_part(checked, report, part, written, values)
    for name, found in values.items():
        _add_values(checked, report, name, found)


def _placement(checked: Checked, report: TableReport, entry: Any) -> Placement | None:
    """Which rows each part has; every id is in one part then, and once."""
    where = f"table '{report.name}'"
    num_shards = checked.field(checked.files.manifest, "num_shards", int, MANIFEST)
    slab_rows = checked.field(entry, "slab_rows", int, where)
    offset = checked.field(entry, "offset", int, where)
    if num_shards is None or slab_rows is None or offset is None:
        return None
    is_power = slab_rows >= 1 and slab_rows & (slab_rows - 1) == 0
    if not is_power or not 0 <= offset < num_shards:
        message = f"no placement on {num_shards} shards has {slab_rows=} and {offset=}"
        checked.add("manifest", where, message)
        return None
    return Placement(report.vocabulary_size, slab_rows, num_shards, offset)


def _check_part(
    checked: Checked,
    report: TableReport,
    entry: Any,
    written: Placement,
    values: Mapping[str, ImpossibleValues],
) -> None:
    """One part; its values count if it is whole."""
    shard, num_rows = entry["shard"], entry["num_rows"]
    where = f"table '{report.name}', shard {shard}"
    file, listed = checked.field(entry, "file", str, where), checked.take(entry)
    if file is None or listed is None:
        return  # a finding already
    storage, (_, *slots) = checked.files.storage, values
    sealed = SealedPart(
        report.name, shard, file, listed.size_bytes or 0, listed.checksum or "", num_rows
    )
    seen = {name: ImpossibleValues(may_be_negative=v.may_be_negative) for name, v in values.items()}
    try:
        for first, rows_ND, slots_ND in read_part(storage, sealed, dim=report.dim, slots=slots):
            for name, array_ND in {"rows": rows_ND, **slots_ND}.items():
                seen[name].add(first, array_ND)
    except StorageError as e:
        # The reader stops at what it notices first; a wrong checksum says more.
        checked.add_damage(file, checksum_damage(storage, listed) or Damage("rows", str(e)))
        return
    for name, found in seen.items():
        values[name].merge(found, lambda row: row_id(written, shard, row))


def row_id(placement: Placement, shard: int, local_row: int) -> int:
    """The id of a shard's row.

    >>> [row_id(Placement(10, 2, 3, 1), 1, row) for row in range(4)]
    [0, 1, 6, 7]
    """
    place, rest = divmod(local_row, placement.slab_rows)
    first = (shard - placement.offset) % placement.num_shards
    return (first + place * placement.num_shards) * placement.slab_rows + rest


def _check_slots(checked: Checked, report: TableReport, names: Sequence[str | None]) -> None:
    if sorted(map(str, names)) != sorted(report.slots):
        message = f"{report.optimizer} has slots {[*report.slots]}, but {[*names]} are here"
        checked.add("slots", f"table '{report.name}'", message)


def _may_be_negative(report: TableReport, name: str) -> bool:
    return name not in NEVER_NEGATIVE.get(report.optimizer or "", ())


def _add_values(checked: Checked, report: TableReport, name: str, values: ImpossibleValues) -> None:
    report.nan[name], report.inf[name] = values.nan, values.inf
    checked.add_values(f"table '{report.name}', {name}", values)
