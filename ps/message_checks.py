"""What a message must be like before kernels see it: they do not check bounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ps.errors import ProtocolError
from ps.kernels.dedup import first_out_of_range
from ps.messages import Bags, bags_of
from ps.ragged import I64
from ps.spec import TableSpec


def check_named(
    where: str,
    tables: Sequence[TableSpec],
    sizes: Sequence[int],
    local_rows: Sequence[I64],
    bags: tuple[Bags | None, ...],
) -> None:
    """See that the rows that a message names are there, and that its bags are made of them.

    Args:
        where: starts the message of an error.
        tables: of the shard.
        sizes: rows that the shard holds of each.
        local_rows: int64 [n] per table.
        bags: per table, or ().

    Raises:
        ProtocolError: names the table and what is wrong.
    """
    if len(local_rows) != len(tables) or len(bags) not in (0, len(tables)):
        raise ProtocolError(
            f"{where}: message has {len(local_rows)} tables, the shard has {len(tables)}"
        )
    of_tables = bags_of(bags, len(tables))
    for table, size, index, of_table in zip(tables, sizes, local_rows, of_tables, strict=True):
        bad = first_out_of_range(index, size)
        if bad >= 0:
            raise ProtocolError(
                f"{where}: table '{table.name}': local row {index[bad]} is not in [0, {size})"
            )
        if of_table is not None:
            _check_bags(f"{where}: table '{table.name}'", table, index, of_table)


def _check_bags(where: str, table: TableSpec, index: I64, bags: Bags) -> None:
    splits = bags.row_splits
    if not table.optimizer.use_gradient_accumulation:
        raise ProtocolError(f"{where}: bags need `use_gradient_accumulation`")
    if (
        splits.size < 1
        or splits[0] != 0
        or splits[-1] != index.size
        or np.any(splits[1:] < splits[:-1])
    ):
        raise ProtocolError(f"{where}: row splits do not cut {index.size} entries into bags")
    if bags.weights.size not in (0, index.size):
        raise ProtocolError(f"{where}: {bags.weights.size} weights for {index.size} entries")
