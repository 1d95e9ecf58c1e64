"""Whether a job can start from a snapshot: the same tables, slots and dense variables."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ps.dense_variables import DenseVariable
from ps.errors import ConfigError
from ps.optimizers import Optimizer
from ps.snapshot import Snapshot, SnapshotDense
from ps.spec import EmbeddingSpec, TableSpec

_SLOT_MEANING = ("custom_computation", "multiply_linear_by_learning_rate")
"""Arguments that say what the numbers in the slots mean; others may change between runs."""


def check_tables(snapshot: Snapshot, spec: EmbeddingSpec) -> None:
    """See that the snapshot has exactly the job's tables, with its slots.

    Numbers such as the learning rate may differ.

    Raises:
        ConfigError: names the first table that differs, what is there and what is wanted.
    """
    found, wanted = {t.name for t in snapshot.tables}, {t.name for t in spec.tables}
    where = f"snapshot '{snapshot.location}'"
    if missing := sorted(wanted - found):
        raise ConfigError(f"{where} has no table '{missing[0]}'; it has {sorted(found)}")
    if extra := sorted(found - wanted):
        raise ConfigError(f"{where} has table '{extra[0]}', which the job has not")
    for table in spec.tables:
        _check_table(snapshot, table, f"{where}: table '{table.name}'")


def check_dense(
    snapshot: Snapshot, variables: Sequence[DenseVariable], optimizer: Optimizer
) -> None:
    """See that the snapshot's dense model and optimizer, if it has any, fit the job's.

    Raises:
        ConfigError: names the first variable that differs, or the optimizer.
    """
    dense = snapshot.dense
    if dense is None:
        return
    check_variables(snapshot, dense, variables)
    if dense.optimizer is not None:
        where = f"snapshot '{snapshot.location}': the dense model"
        _check_optimizer(dense.optimizer, tuple(dense.slot_files), optimizer, where)


def check_variables(
    snapshot: Snapshot, dense: SnapshotDense, variables: Sequence[DenseVariable]
) -> None:
    """See that the snapshot's dense variables are those of a model, in its order.

    Keras numbers layers of equal kind per process; such numbers may differ.

    Raises:
        ConfigError: names the first variable that differs.
    """
    where = f"snapshot '{snapshot.location}'"
    if len(dense.variables) != len(variables):
        raise ConfigError(
            f"{where}: the dense model has {len(dense.variables)} variables, "
            f"the one given has {len(variables)}"
        )
    for seen, wanted in zip(dense.variables, variables, strict=True):
        if _unnumbered(seen) != _unnumbered(wanted):
            raise ConfigError(
                f"{where}: dense variable {_text(seen)}, the model given has {_text(wanted)}"
            )


def _check_table(snapshot: Snapshot, table: TableSpec, where: str) -> None:
    found = snapshot.table(table.name)
    seen, wanted = [found.vocabulary_size, found.dim], [table.vocabulary_size, table.dim]
    if seen != wanted:
        raise ConfigError(f"{where} is {seen}, the job has {wanted}")
    _check_optimizer(found.optimizer, found.slot_names, table.optimizer, where)


def _check_optimizer(
    seen: dict[str, object], slots: tuple[str, ...], optimizer: Optimizer, where: str
) -> None:
    wanted = optimizer.describe()
    if seen["name"] != wanted["name"]:
        raise ConfigError(f"{where} has optimizer {seen['name']}, the job has {wanted['name']}")
    if set(slots) != set(optimizer.slot_names):
        raise ConfigError(
            f"{where} has slots {sorted(slots)}, the job wants {sorted(optimizer.slot_names)}"
        )
    for key in _SLOT_MEANING:
        if seen.get(key) != wanted.get(key):
            raise ConfigError(
                f"{where}: the slots are those of {seen['name']} with {key}={seen.get(key)}, "
                f"the job has {wanted.get(key)}"
            )


def _unnumbered(variable: DenseVariable) -> tuple[str, tuple[int, ...], bool]:
    parts = [re.sub(r"_\d+$", "", part) for part in variable.name.split("/")]
    return "/".join(parts), variable.shape, variable.trainable


def _text(variable: DenseVariable) -> str:
    kind = "" if variable.trainable else " (not trainable)"
    return f"'{variable.name}' {list(variable.shape)}{kind}"
