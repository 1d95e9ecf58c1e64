"""A stock TensorFlow checkpoint as a serving export, or as a snapshot to start training from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from ps.columns import Transform
from ps.errors import CheckpointError, ConfigError, SnapshotError
from ps.export import ExportWriter
from ps.export_file import fill_rows
from ps.ragged import F32
from ps.snapshot import SNAPSHOT, complete_snapshots, snapshot_name
from ps.snapshot_writer import SnapshotWriter
from ps.spec import EmbeddingSpec, TableSpec
from ps.table_parts import PartWriter, SealedPart
from serving.tf.checkpoint_reader import CheckpointReader, ReadRows
from serving.tf.model_variables import described, flat_values, named_variables

Slots = Literal["required", "initial"]
_CHUNK_BYTES = 16 << 20


def import_export(
    prefix: str | Path,
    spec: EmbeddingSpec,
    root: Path,
    *,
    attribute: str = "embedding",
    step: int = 0,
    job: str = "import",
    transforms: Mapping[str, Transform] | None = None,
    model: Any = None,
    model_info: Mapping[str, Any] | None = None,
) -> Path:
    """Make a serving export of a checkpoint's tables, without holding one.

    Args:
        prefix: of the checkpoint, or a folder, whose latest one is taken.
        spec: the tables and features wanted; the checkpoint may have more.
        root: of the exports.
        attribute: name of the embedding in the `tf.train.Checkpoint`, or a path.
        step: training steps behind the rows, for the manifest.
        job: name for the manifest.
        transforms: from raw values to ids, of features of embedding columns.
        model: the dense model with its variables made, saved under `model`; its variables get the
            checkpoint's values. None leaves it out.
        model_info: its `name`, `params` and what else the manifest should say of it; needed with
            `model`.

    Returns:
        The new version's folder.

    Raises:
        CheckpointError: a table is missing, of another shape or not float32; names its key.
        ConfigError: `model` without `model_info`, or the other way round.
        ExportError: the disk refuses.
    """
    _check_model(model, model_info)
    reader = CheckpointReader(prefix, attribute)
    sources = {table.name: reader.rows(table) for table in spec.tables}
    with ExportWriter(root, spec, step=step, job=job, transforms=transforms) as writer:
        for name, read in sources.items():
            fill_rows(writer.row_file(name), read)
        if model is not None and model_info is not None:
            _restore(model, reader.contents.prefix)
            named = {name: v.numpy() for name, v in named_variables(model).items()}
            writer.add_dense(named, model_info)
        return writer.commit()


def import_snapshot(
    prefix: str | Path,
    spec: EmbeddingSpec,
    root: str | Path,
    *,
    attribute: str = "embedding",
    step: int = 0,
    job: str = "import",
    transforms: Mapping[str, Transform] | None = None,
    seed: int = 0,
    slots: Slots = "required",
    model: Any = None,
    model_info: Mapping[str, Any] | None = None,
) -> str:
    """Make a snapshot of a checkpoint's tables and slots, to give as `train.start_from`.

    Args:
        prefix: of the checkpoint, or a folder, whose latest one is taken.
        spec: the tables with their optimizers, and the features; the checkpoint may have more.
        root: of the snapshots: a folder, `s3://…` or `gs://…`.
        attribute: name of the embedding in the `tf.train.Checkpoint`, or a path.
        step: training steps behind the values; learning rates go on from there.
        job: name for the manifest.
        transforms: from raw values to ids, of features of embedding columns.
        seed: for the manifest.
        slots: "required", or "initial" to give slots that the checkpoint lacks their first values.
        model: the dense model with its variables made, saved under `model`; its variables get the
            checkpoint's values. None leaves it out: training starts with a new one. Its optimizer
            slots always start anew.
        model_info: its `name`, `params` and what else the manifest should say of it; needed with
            `model`.

    Returns:
        The new snapshot's location.

    Raises:
        CheckpointError: a table or slot is missing, of another shape or not float32; names its key.
        ConfigError: an argument is wrong.
        SnapshotError: there is a snapshot of this step already, or the disk refuses.
    """
    _check_model(model, model_info)
    if slots not in ("required", "initial"):
        raise ConfigError(f"`slots` must be 'required' or 'initial', got {slots!r}")
    reader = CheckpointReader(prefix, attribute)
    sources = {t.name: (reader.rows(t), _slot_sources(reader, t, slots)) for t in spec.tables}
    if step in complete_snapshots(root):  # which a second attempt of one job would replace
        raise SnapshotError(f"'{root}/{snapshot_name(step)}': there is one already")
    with (
        SNAPSHOT.errors(),
        SnapshotWriter(
            root, spec, step=step, seed=seed, job=job, num_shards=1, transforms=transforms
        ) as writer,
    ):
        for table in spec.tables:
            writer.add_parts([_write_part(writer.part(0, table.name), table, *sources[table.name])])
        if model is not None and model_info is not None:
            _restore(model, reader.contents.prefix)
            values = flat_values(model)
            writer.add_dense(described(model), values, model=model_info, optimizer=None)
        return writer.commit()


def _write_part(
    part: PartWriter, table: TableSpec, rows: ReadRows, slots: Mapping[str, ReadRows]
) -> SealedPart:
    """The table as the part of a single shard, some rows at a time."""
    reads = [rows, *slots.values()]
    step = max(1, _CHUNK_BYTES // (4 * table.dim * len(reads)))
    for first in range(0, table.vocabulary_size, step):
        shape = (len(reads), min(step, table.vocabulary_size - first), table.dim)
        values = np.empty(shape, dtype=np.float32)
        for read, out_ND in zip(reads, values, strict=True):
            read(first, out_ND)
        part.append(values[0], dict(zip(slots, values[1:], strict=True)))
    return part.close()


def _slot_sources(reader: CheckpointReader, table: TableSpec, slots: Slots) -> dict[str, ReadRows]:
    optimizer = table.optimizer
    sources: dict[str, ReadRows] = {}
    for slot, value in zip(optimizer.slot_names, optimizer.slot_initial_values, strict=True):
        if slots == "initial" and not reader.has_slot(table, slot):
            sources[slot] = _Constant(value)
        else:
            sources[slot] = reader.slot(table, slot)
    return sources


class _Constant:
    """Rows of one value."""

    def __init__(self, value: float) -> None:
        self._value = np.float32(value)

    def __call__(self, first_row: int, out_ND: F32) -> None:
        out_ND[:] = self._value


def _check_model(model: Any, model_info: Mapping[str, Any] | None) -> None:
    if (model is None) != (model_info is None):
        raise ConfigError("`model` and `model_info` go together: give both or neither")
    if model_info is not None and not model_info.keys() >= {"name", "params"}:
        raise ConfigError(f"`model_info` must have 'name' and 'params', got {sorted(model_info)}")
    if model is None:
        return
    for name, variable in named_variables(model).items():
        if tf.as_dtype(variable.dtype) != tf.float32:
            raise ConfigError(f"model variable '{name}' is {variable.dtype}, wanted float32")


def _restore(model: Any, prefix: str) -> None:
    """Give a model the values that TensorFlow finds for it under `model`."""
    try:
        status = tf.train.Checkpoint(model=model).read(prefix)
        status.assert_existing_objects_matched().expect_partial()
    except (AssertionError, ValueError, tf.errors.OpError) as e:
        reason = str(e).splitlines()[0]
        raise CheckpointError(
            f"checkpoint '{prefix}': 'model' is not that of the model given: {reason}"
        ) from e
