"""The stacked layout of checkpoints from SparseCores, and how a table's rows lie in it.

Several tables share one tensor [num_cores · rows_per_core, padded dim]. Row r of a table is on core
c = (r + rotation) mod num_cores, there at position offset + r div num_cores, which is row
c · rows_per_core + position of the tensor. The checkpoint holds these numbers as a serialized
`SparseCoreTableLayouts`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorflow.core.tpu.kernels import sparse_core_layout_pb2

from ps.errors import CheckpointError
from ps.ragged import F32
from serving.tf.bundle import Bundle
from serving.tf.object_graph import key_of

LAYOUTS = "_sparse_core_table_layouts"


@dataclass(frozen=True, slots=True)
class StackedTable:
    """Where a table lies in its stack."""

    key: str
    """Of the stack."""
    vocabulary_size: int
    dim: int
    padded_dim: int
    num_cores: int
    rows_per_core: int
    offset: int
    rotation: int

    def fits(self) -> bool:
        """Whether the table lies within its stack."""
        last = self.offset - (-self.vocabulary_size // self.num_cores)
        return self.dim <= self.padded_dim and self.offset >= 0 and last <= self.rows_per_core

    def read_rows(self, bundle: Bundle, first_row: int, out_ND: F32) -> None:
        """Fill `out_ND`, float32 [N, D], with rows first_row … first_row + N - 1 of the table."""
        for core in range(self.num_cores):
            skip = (core - self.rotation - first_row) % self.num_cores
            part_ND = out_ND[skip :: self.num_cores]
            if not len(part_ND):
                continue
            position = self.offset + (first_row + skip) // self.num_cores
            stored = np.empty((len(part_ND), self.padded_dim), dtype=np.float32)
            bundle.read_rows(self.key, core * self.rows_per_core + position, stored)
            part_ND[:] = stored[:, : self.dim]


def stacked_tables(bundle: Bundle, attribute: str) -> dict[str, StackedTable]:
    """The stacked tables of a checkpoint by name; empty if it is not from SparseCores.

    Raises:
        CheckpointError: the layouts do not fit the tensors.
    """
    key = key_of(attribute, LAYOUTS)
    if key not in bundle.keys:
        return {}
    try:
        serialized = tf.train.load_checkpoint(bundle.prefix).get_tensor(key)
        layouts = sparse_core_layout_pb2.SparseCoreTableLayouts.FromString(serialized).tables
    except (DecodeError, TypeError, ValueError, RuntimeError, tf.errors.OpError) as e:
        raise CheckpointError(f"checkpoint '{bundle.prefix}': '{key}' is damaged: {e}") from e
    tables = {}
    for layout in layouts:
        stack = key_of(attribute, layout.stacked_table_name)
        if len(layout.unsharded_shape) != 2 or len(layout.unsharded_padded_shape) != 2:
            raise CheckpointError(
                f"checkpoint '{bundle.prefix}': the layout of table '{layout.table_name}' must "
                f"have two dimensions, got {list(layout.unsharded_shape)} and "
                f"{list(layout.unsharded_padded_shape)}"
            )
        num_rows, dim = layout.unsharded_shape
        table = StackedTable(
            key=stack,
            vocabulary_size=num_rows,
            dim=dim,
            padded_dim=layout.unsharded_padded_shape[1],
            num_cores=layout.num_sparse_cores,
            rows_per_core=layout.total_rows_per_sparse_core_shard,
            offset=layout.sparse_core_shard_row_offset,
            rotation=layout.sparse_core_shard_rotation,
        )
        wanted = (table.num_cores * table.rows_per_core, table.padded_dim)
        if stack not in bundle.keys or bundle.shape(stack) != wanted:
            seen = list(bundle.shape(stack)) if stack in bundle.keys else "nothing"
            raise CheckpointError(
                f"checkpoint '{bundle.prefix}': the layout of table '{layout.table_name}' wants "
                f"'{stack}' of shape {list(wanted)}, there is {seen}"
            )
        if not table.fits():
            raise CheckpointError(
                f"checkpoint '{bundle.prefix}': table '{layout.table_name}' {[num_rows, dim]} at "
                f"offset {table.offset} is larger than its part of '{stack}'"
            )
        tables[layout.table_name] = table
    return tables
