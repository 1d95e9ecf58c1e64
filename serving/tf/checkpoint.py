"""A training snapshot as a TensorFlow checkpoint that TensorFlow's own classes restore.

Keys and object graph are those of `tf.train.Checkpoint(model=…, embedding=TPUEmbedding…)`. A table
is written as slices of rows under one key, by several processes if it is large, and the parts are
merged; no process ever holds a whole table.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf import text_format  # type: ignore[import-untyped]
from tensorflow.python.training.checkpoint_state_pb2 import CheckpointState

from ps.errors import CheckpointError, ConfigError, StorageError
from ps.export_file import sync, write_text
from ps.ragged import F32
from ps.snapshot import Snapshot, SnapshotTable
from ps.start import check_variables
from serving.tf.model_variables import described, named_variables
from serving.tf.object_graph import (
    GRAPH_KEY,
    SAVE_COUNTER,
    add_save_counter,
    add_variables,
    key_of,
    new_graph,
    parse_graph,
)

SLICE_BYTES = 64 << 20
_BYTES_PER_WRITER = 4 << 30  # a process more costs 3 s and 500 MB for importing TensorFlow


@dataclass(frozen=True, slots=True)
class _Array:
    """The rows of a table, or one of its slots."""

    table: SnapshotTable
    slot: str | None = None


@dataclass(frozen=True, slots=True)
class _Slice:
    """Rows first … first + count - 1 of a tensor."""

    key: str
    array: _Array
    first: int
    count: int

    @property
    def spec(self) -> str:
        """TensorFlow's `shape_and_slices`; empty for a whole tensor."""
        num_rows, dim = self.array.table.vocabulary_size, self.array.table.dim
        if self.count == num_rows:
            return ""
        return f"{num_rows} {dim} {self.first},{self.count}:0,{dim}"

    @property
    def size_bytes(self) -> int:
        return 4 * self.count * self.array.table.dim

    def read(self) -> F32:
        """The rows, float32 [count, D]."""
        rows = np.empty((self.count, self.array.table.dim), dtype=np.float32)
        self.array.table.read_rows(self.first, rows, self.array.slot)
        return rows


def write_checkpoint(
    snapshot: Snapshot,
    folder: Path,
    *,
    model: Any = None,
    slots: bool = True,
    attribute: str = "embedding",
    slice_bytes: int = SLICE_BYTES,
    num_writers: int | None = None,
) -> str:
    """Write a checkpoint `ckpt-<step>` that `tf.train.latest_checkpoint(folder)` finds.

    `tf.train.Checkpoint(model=model, embedding=embedding).restore(prefix)` reads it, where
    `embedding` is TensorFlow's `TPUEmbeddingForServing`, with optimizer None or that of training.

    Args:
        snapshot: from `ps.snapshot.open_snapshot`.
        folder: made if it is not there; older checkpoints in it stay.
        model: the dense model as training built it (a `tf.Module` or a Keras model, with its
            variables made). Its variables get the snapshot's values, and it is saved as TensorFlow
            saves it, under `model`. None leaves the dense model out.
        slots: with the optimizer slots of the tables.
        attribute: name of the embedding in the `tf.train.Checkpoint`.
        slice_bytes: of rows that a writer reads at a time; it takes about three times as much.
        num_writers: processes; None is 1 and one more per 4 GiB, at most the number of cores.

    Returns:
        The checkpoint's prefix.

    Raises:
        CheckpointError: there is such a checkpoint already, two tensors have one name, or the disk
            refuses; nothing half-written stays.
        ConfigError: an argument is wrong, or `model` is not the snapshot's.
    """
    if not attribute.isidentifier() or attribute in ("model", SAVE_COUNTER):
        raise ConfigError(f"`attribute` must be a Python name of its own, got {attribute!r}")
    if slice_bytes < 1 or (num_writers is not None and num_writers < 1):
        raise ConfigError(f"{slice_bytes=} and {num_writers=} must be at least 1")
    arrays = _arrays(snapshot, slots)
    tensors = {key_of(attribute, name): array for name, array in arrays.items()}
    prefix = Path(folder).absolute() / f"ckpt-{snapshot.step}"
    with _hidden(prefix) as hidden:
        graph, values = _model_part(snapshot, model, hidden)
        add_variables(graph, attribute, arrays)
        # `tf.train.Checkpoint.save` counts on from here, so the next name is not taken.
        values[add_save_counter(graph)] = np.int64(snapshot.step)
        values[GRAPH_KEY] = graph.SerializeToString()
        head = str(hidden / "head")
        tf.raw_ops.SaveV2(
            prefix=head,
            tensor_names=list(values),
            shape_and_slices=[""] * len(values),
            tensors=list(values.values()),
        )
        parts = _write_parts(hidden, list(_parts(tensors, slice_bytes)), num_writers)
        merged = hidden / prefix.name
        tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=[head, *parts],
            destination_prefix=str(merged),
            delete_old_dirs=False,
        )
        _publish(merged, prefix)
    return str(prefix)


def _arrays(snapshot: Snapshot, slots: bool) -> dict[str, _Array]:
    """The tables, and slots as `<table>/<slot>`, by the names that TensorFlow gives them."""
    arrays: dict[str, _Array] = {}
    for table in snapshot.tables:
        own = {table.name: _Array(table)}
        if slots:
            own |= {f"{table.name}/{slot}": _Array(table, slot) for slot in table.slot_names}
        if twice := arrays.keys() & own.keys():
            raise CheckpointError(
                f"'{min(twice)}' is the name of a table and of another one's slot; a TensorFlow "
                "checkpoint cannot hold both"
            )
        arrays |= own
    return arrays


def _parts(tensors: dict[str, _Array], slice_bytes: int) -> Iterator[list[_Slice]]:
    """All tensors as slices, in bunches of at most `slice_bytes`, or of one row."""
    part: list[_Slice] = []
    room = slice_bytes
    for key, array in tensors.items():
        num_rows, row_bytes, first = array.table.vocabulary_size, 4 * array.table.dim, 0
        while first < num_rows:
            rows = min(room // row_bytes, num_rows - first)
            if rows == 0 and part:
                yield part
                part, room = [], slice_bytes
                continue
            rows = max(1, rows)
            part.append(_Slice(key, array, first, rows))
            first, room = first + rows, room - rows * row_bytes
    if part:
        yield part


def _write_parts(hidden: Path, parts: list[list[_Slice]], num_writers: int | None) -> list[str]:
    prefixes = [str(hidden / f"part-{number:06d}") for number in range(len(parts))]
    if num_writers is None:
        size = sum(s.size_bytes for part in parts for s in part)
        num_writers = min(1 + size // _BYTES_PER_WRITER, os.cpu_count() or 1)
    if num_writers == 1:
        for prefix, part in zip(prefixes, parts, strict=True):
            _write_part(prefix, part)
        return prefixes
    context = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
    with ProcessPoolExecutor(num_writers, mp_context=context) as pool:
        try:
            list(pool.map(_write_part, prefixes, parts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return prefixes


def _write_part(prefix: str, part: Sequence[_Slice]) -> None:
    with tf.device("CPU"):
        try:
            tf.raw_ops.SaveV2(
                prefix=prefix,
                tensor_names=[s.key for s in part],
                shape_and_slices=[s.spec for s in part],
                tensors=[s.read() for s in part],
            )
        except tf.errors.OpError as e:  # it does not survive pickling
            raise CheckpointError(f"cannot write '{prefix}': {e.message}") from None


def _model_part(snapshot: Snapshot, model: Any, hidden: Path) -> tuple[Any, dict[str, Any]]:
    """The object graph and the tensors of a checkpoint of the dense model alone."""
    if model is None:
        return new_graph(), {}
    if snapshot.dense is None:
        raise ConfigError(f"snapshot '{snapshot.location}' has no dense model; leave out `model`")
    check_variables(snapshot, snapshot.dense, described(model))
    variables, values = named_variables(model).values(), snapshot.dense.named().values()
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    prefix = tf.train.Checkpoint(model=model).write(str(hidden / "model"))
    reader = tf.train.load_checkpoint(prefix)
    tensors = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    return parse_graph(tensors.pop(GRAPH_KEY)), tensors


@contextmanager
def _hidden(prefix: Path) -> Iterator[Path]:
    """A folder beside the checkpoint for all that is not finished, gone afterwards."""
    hidden = prefix.parent / f".{prefix.name}-{uuid.uuid4().hex}"
    if Path(f"{prefix}.index").exists():
        raise CheckpointError(f"checkpoint '{prefix}' exists already")
    try:
        hidden.mkdir(parents=True)
        yield hidden
    except (OSError, StorageError, BrokenExecutor) as e:
        reason = e.strerror if isinstance(e, OSError) else None
        raise CheckpointError(f"cannot write checkpoint '{prefix}': {reason or e}") from e
    except tf.errors.OpError as e:
        raise CheckpointError(f"cannot write checkpoint '{prefix}': {e.message}") from e
    except UnicodeDecodeError as e:
        raise CheckpointError(f"'{prefix.parent}/checkpoint' is damaged: {e}") from e
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _publish(merged: Path, prefix: Path) -> None:
    """Move the files of a checkpoint to where they belong, the index, which makes it one, last."""
    folder, moved = prefix.parent, []
    files = [*merged.parent.glob(f"{merged.name}.data-*"), Path(f"{merged}.index")]
    for path in files:
        sync(path)
    state = merged.parent / "checkpoint"
    write_text(state, _state(folder, prefix.name))
    try:
        for path in files:
            moved.append(path.replace(folder / path.name))
        sync(folder)
        state.replace(folder / state.name)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def _state(folder: Path, name: str) -> str:
    """The `checkpoint` file, which names a folder's checkpoints and the latest of them."""
    old = tf.train.get_checkpoint_state(str(folder))
    known = [] if old is None else old.all_model_checkpoint_paths
    # Relative to the folder, so that it can be moved.
    names = [*(os.path.relpath(path, folder) for path in known), name]
    state = CheckpointState(model_checkpoint_path=name, all_model_checkpoint_paths=names)
    return str(text_format.MessageToString(state))
