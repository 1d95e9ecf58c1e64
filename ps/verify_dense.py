"""The dense model of a version: its variables against what the manifest says, and their slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ps.dense_variables import DenseVariable
from ps.errors import StorageError
from ps.export import EXPORT
from ps.manifest import MANIFEST, read_variables
from ps.table_stats import NEVER_NEGATIVE, ImpossibleValues
from ps.verify_tables import slot_names
from ps.verify_version import Checked

Shapes = dict[str, tuple[int, ...]]


def check_dense(checked: Checked) -> None:
    """Check the dense model, if there is one."""
    if checked.files.manifest.get("dense") is None:
        return
    entry = checked.field(checked.files.manifest, "dense", dict, MANIFEST)
    if entry is None or checked.field(entry, "model", dict, "dense") is None:
        return
    if checked.files.kind is EXPORT:
        _check_variables(checked, "dense", entry, None)  # which they are, only their file says
        return
    variables = _described(checked, entry)
    if variables is None:
        return
    _check_variables(checked, "dense", entry, {v.name: v.shape for v in variables})
    _check_slots(checked, entry, {v.name: v.shape for v in variables if v.trainable})


def _check_slots(checked: Checked, entry: Mapping[str, Any], trainable: Shapes) -> None:
    slots = checked.field(entry, "slots", list, "dense")
    if slots is None:
        return
    optimizer = entry.get("optimizer")
    known = slot_names(optimizer) if isinstance(optimizer, dict) else ()
    names = [checked.field(slot, "name", str, "dense") for slot in slots]
    if known is None or sorted(map(str, names)) != sorted(known):
        name = optimizer.get("name") if isinstance(optimizer, dict) else None
        checked.add("slots", "dense", f"optimizer {name} has slots {known}, but {names} are here")
    never_negative = NEVER_NEGATIVE.get(str((optimizer or {}).get("name")), ())
    for name, slot in zip(names, slots, strict=True):
        if name is not None:
            negative = name not in never_negative
            _check_variables(checked, f"dense, {name}", slot, trainable, may_be_negative=negative)


def _described(checked: Checked, entry: Any) -> list[DenseVariable] | None:
    found = checked.field(entry, "variables", list, "dense")
    variables: list[DenseVariable] = []
    for variable in found or ():
        name = checked.field(variable, "name", str, "dense")
        shape = checked.field(variable, "shape", list, "dense")
        trainable = checked.field(variable, "trainable", bool, "dense")
        if name is None or shape is None or trainable is None:
            return None
        variables.append(DenseVariable(name=name, shape=tuple(shape), trainable=trainable))
    return None if found is None else variables


def _check_variables(
    checked: Checked, where: str, entry: Any, wanted: Shapes | None, *, may_be_negative: bool = True
) -> None:
    """One file of named arrays."""
    file = checked.field(entry, "file", str, where)
    listed = checked.take_whole(entry)
    if file is None or listed is None:
        return  # a finding already
    try:
        found = read_variables(checked.files.storage.read(listed.file), listed.file)
    except StorageError as e:
        checked.add("dense", where, str(e))
        return
    seen = [(name, value.shape) for name, value in found.items()]
    if wanted is not None and seen != [*wanted.items()]:
        names = [f"{name} {[*shape]}" for name, shape in seen]
        should = [f"{name} {[*shape]}" for name, shape in wanted.items()]
        checked.add("dense", where, f"holds {names}, but the manifest says {should}")
    for name, value in found.items():
        values = ImpossibleValues(may_be_negative=may_be_negative)
        values.add(0, np.reshape(value, (-1, 1)))
        checked.add_values(f"{where}, {name}", values, "element")
