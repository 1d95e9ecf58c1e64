"""What a message must be like before kernels see it: they do not check bounds.

So must what comes from files: entries of a log, and rows of a snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ps.errors import ProtocolError
from ps.kernels.dedup import first_out_of_range
from ps.messages import Bags, LogEntry, Push, Rows, bags_of
from ps.ragged import F32, I64
from ps.rowstore import FlatStore, RowStore
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


def check_worker(where: str, worker: int, num_workers: int) -> None:
    """See that there is such a worker.

    Raises:
        ProtocolError: there is not.
    """
    if not 0 <= worker < num_workers:
        raise ProtocolError(f"{where}: worker {worker} is not in [0, {num_workers})")


def check_fences(where: str, fences: Sequence[int], num_workers: int, version: int | None) -> None:
    """See that there is one fence per worker, and all are at `version` unless that is None.

    Raises:
        ProtocolError: it is not so.
    """
    if len(fences) != num_workers or not (version is None or set(fences) == {version}):
        wanted = "" if version is None else f", all of them {version}"
        raise ProtocolError(
            f"{where}: fences {list(fences)}, wanted those of {num_workers} workers{wanted}"
        )


def check_gradients(
    where: str, tables: Sequence[TableSpec], push: Push, dense: FlatStore, state: F32
) -> None:
    """See that a push has gradients of the right shapes; its rows are checked already.

    Raises:
        ProtocolError: it has not.
    """
    bags = bags_of(push.bags, len(tables))
    sizes = [i.size if b is None else b.count for i, b in zip(push.local_rows, bags, strict=True)]
    wanted = [(n, t.dim) for n, t in zip(sizes, tables, strict=True)]
    seen = [grads.shape for grads in push.grads]
    if seen != wanted or push.dense_grad.shape != (dense.values.size,):
        raise ProtocolError(
            f"{where}: gradients of shapes {seen} and {push.dense_grad.shape}, wanted {wanted} "
            f"and ({dense.values.size},)"
        )
    if push.state is not None and push.state.shape != state.shape:
        raise ProtocolError(f"{where}: {push.state.size} non-trainable values, wanted {state.size}")


def check_room(where: str, into: Rows, dense: FlatStore, state: F32) -> None:
    """See that the arrays that an answer is to be written to can take the dense values.

    Raises:
        ProtocolError: they cannot.
    """
    seen, wanted = (into.dense.shape, into.state.shape), (dense.values.shape, state.shape)
    if seen != wanted:
        raise ProtocolError(f"{where}: room for dense values {seen}, wanted {wanted}")


def check_entry(
    where: str, stores: Sequence[RowStore], entry: LogEntry, dense: FlatStore, state: F32
) -> None:
    """See that an entry of a log is one of this shard.

    Raises:
        ProtocolError: it is not; the message says what is wrong.
    """
    seen: list[object] = [(rows.dtype, new.dtype, new.shape) for rows, new in entry.tables]
    seen += [(flat.dtype, flat.shape) for flat in (entry.dense, entry.state)]
    wanted: list[object] = [
        (np.int64, np.float32, (rows.size, store.records.shape[1]))
        for store, (rows, _) in zip(stores, entry.tables, strict=False)
    ]
    wanted += [(np.float32, (len(dense.arrays), dense.values.size)), (np.float32, state.shape)]
    if len(entry.tables) != len(stores) or seen != wanted:
        raise ProtocolError(
            f"{where}: log entry {entry.version} has arrays {seen} of {len(entry.tables)} tables, "
            f"wanted {wanted} of {len(stores)}"
        )
    for store, (rows, _) in zip(stores, entry.tables, strict=True):
        bad = first_out_of_range(rows, len(store.rows))
        if bad >= 0:
            raise ProtocolError(
                f"{where}: log entry {entry.version} names local row {rows[bad]}, which is not in "
                f"[0, {len(store.rows)})"
            )


def check_span(
    where: str, store: RowStore, first: int, rows: F32, slots: Mapping[str, F32]
) -> None:
    """See that rows with their slots fit into a table from a local row on.

    Raises:
        ProtocolError: they do not.
    """
    arrays = {"rows": rows, **slots}
    wanted = (len(rows), store.rows.shape[1])
    for name, array in arrays.items():
        if array.dtype != np.float32 or array.shape != wanted:
            raise ProtocolError(
                f"{where}: {name} are {array.dtype} {array.shape}, wanted float32 {wanted}"
            )
    if slots.keys() != store.slots.keys():
        raise ProtocolError(f"{where}: slots {sorted(slots)}, wanted {sorted(store.slots)}")
    if not 0 <= first <= len(store.rows) - len(rows):
        raise ProtocolError(
            f"{where}: rows [{first}, {first + len(rows)}) are not all in [0, {len(store.rows)})"
        )


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
