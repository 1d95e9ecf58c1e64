"""`ShardValues`: all numbers of a shard, read and changed; no versions, fences or workers.

Tables with their slots, slices of the flat dense vectors, and on request what is kept of their
past: a history of old versions, and a cut that is being read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ps.cut import Cut
from ps.errors import ConfigError, ProtocolError, ShardNotReadyError
from ps.history import History, OldRows, OldVersion
from ps.initializers import Constant, table_key
from ps.kernels.dedup import distinct_ids
from ps.memory import empty
from ps.message_checks import check_entry, check_gradients, check_named, check_room, check_span
from ps.messages import Bags, LogEntry, Pull, Push, bags_of
from ps.partition import Layout, Slab
from ps.ragged import F32, I64
from ps.reduction import reduced_dense, reduced_rows
from ps.rowstore import FlatStore, RowStore, StepRates, Update, sum_rows
from ps.shard_spec import ShardSpec
from ps.spec import TableSpec
from ps.threads import Threads

Touched = list[I64 | None]
"""Per table: the distinct rows that a step changed, int64 [n]; None for all of the table."""


class ShardValues:
    """The numbers of one shard. Dense values are there once `set_dense` has been called."""

    def __init__(self, spec: ShardSpec) -> None:
        self.spec = spec
        self.is_logged = False
        """Whether what a step touched is noted, for `entry`."""
        self.rows_pushed = 0
        self._name = f"shard {spec.shard_id}"
        self._layout = Layout.of(spec.embedding, spec.num_shards)
        self._threads = Threads(spec.threads)
        self._tables = [self._new_table(table) for table in spec.embedding.tables]
        self._rates = StepRates([*(t.optimizer for t in self._tables), spec.dense_optimizer])
        self._dense: FlatStore | None = None
        self._state = np.zeros(0, dtype=np.float32)  # replaced, never changed
        self._history = History(spec.history if spec.mode == "sync" else 0)
        self._keeps_history = spec.mode == "sync" and spec.history > 0
        self._cut: Cut | None = None

    # --- as a whole

    @property
    def is_ready(self) -> bool:
        """Whether all values are there."""
        return self._dense is not None

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(len(table.rows) for table in self._tables)

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows and slots."""
        return sum(table.size_bytes for table in self._tables)

    @property
    def num_old_versions(self) -> int:
        """How many updates back can still be read."""
        return len(self._history)

    @property
    def cut(self) -> Cut | None:
        """The cut for which rows are saved, None if there is none."""
        return self._cut if self._cut is not None and self._cut.is_open else None

    def check_ready(self) -> FlatStore:
        """The dense values.

        Raises:
            ShardNotReadyError: there are none yet.
        """
        if self._dense is None:
            raise ShardNotReadyError(f"{self._name} has no state yet")
        return self._dense

    def dense(self) -> tuple[F32, dict[str, F32], F32]:
        """Views of (trainable slice, its slots, non-trainable slice)."""
        store = self.check_ready()
        return store.values, dict(store.slots), self._state

    def set_dense(self, dense: F32, state: F32, slots: Mapping[str, F32] | None) -> None:
        """See `ShardState.set_dense`."""
        self.close_cut()
        self._history.clear()
        self._dense = FlatStore(dense, self.spec.dense_optimizer, self._threads)
        for name, values in (slots or {}).items():
            self._dense.slots[name][:] = values
        self._state = state.copy()

    def slabs(self, table: str) -> Iterator[tuple[Slab, F32, dict[str, F32]]]:
        """See `ShardState.slabs`."""
        store = self._store(table)
        for slab in self._layout.placements[table].slabs(self.spec.shard_id):
            span = slice(slab.first_local_row, slab.first_local_row + slab.num_rows)
            yield slab, store.rows[span], {n: s[span] for n, s in store.slots.items()}

    def write_rows(
        self, table: str, first_local_row: int, rows: F32, slots: Mapping[str, F32]
    ) -> None:
        """See `ShardState.write_rows`; there are no dense values afterwards."""
        store = self._store(table)
        check_span(f"{self._name}: table '{table}'", store, first_local_row, rows, slots)
        self.close_cut()
        self._dense = None
        span = slice(first_local_row, first_local_row + len(rows))
        store.rows[span] = rows
        for name, values in slots.items():
            store.slots[name][span] = values

    def start_cut(self, version: int, fences: tuple[int, ...], entries_applied: int) -> Cut:
        """A cut of the present values; there must be no other one."""
        assert self.cut is None
        dense = self.check_ready()
        self._cut = Cut(version, fences, self._tables, dense, self._state, entries_applied)
        return self._cut

    def close_cut(self) -> None:
        """Give up the cut, if there is one."""
        if self._cut is not None:
            self._cut.close()
            self._cut = None

    # --- pulls

    def check_pull(self, pull: Pull) -> None:
        """See that a pull can be answered from these values.

        Raises:
            ShardNotReadyError: there are no dense values yet.
            ProtocolError: it names what is not there.
        """
        dense = self.check_ready()
        self._check_rows(pull.local_rows, pull.bags)
        if pull.into is not None:
            check_room(self._name, pull.into, dense, self._state)

    def read(self, pull: Pull, behind: int) -> tuple[tuple[F32, ...], F32, F32]:
        """(rows or sums of bags per table, dense values, non-trainable values) that a pull wants.

        They are copies, in the arrays of `pull.into` if it has any.

        Args:
            pull: checked by `check_pull`.
            behind: how many updates ago; at most `num_old_versions`.
        """
        outs = (None,) * len(self._tables) if pull.into is None else pull.into.rows
        bags = bags_of(pull.bags, len(self._tables))
        parts = zip(self._tables, pull.local_rows, bags, outs, strict=True)
        if behind:
            rows = tuple(self._old(i, behind, *part) for i, part in enumerate(parts))
            dense, state = self._history.flat(behind)
        else:
            rows = tuple(
                store.gather(local, out) if of_table is None else store.sums(local, of_table, out)
                for store, local, of_table, out in parts
            )
            dense, state = self.check_ready().values, self._state
        if pull.into is None:
            return rows, dense.copy(), state.copy()
        pull.into.dense[:], pull.into.state[:] = dense, state
        return rows, pull.into.dense, pull.into.state

    def _old(
        self, i: int, behind: int, store: RowStore, local: I64, bags: Bags | None, out: F32 | None
    ) -> F32:
        """Rows of table i, or their sums in the order of entries, so with the same bits."""
        rows = store.gather(local, None if bags else out)
        self._history.put_rows(i, behind, local, rows)
        if bags is None:
            return rows
        if out is None:
            out = empty((bags.count, rows.shape[1]))
        return sum_rows(self._threads, rows, np.arange(local.size, dtype=np.int64), bags, out)

    # --- updates

    def check_push(self, push: Push) -> None:
        """See that a push fits these values.

        Raises:
            ShardNotReadyError: there are no dense values yet.
            ProtocolError: it does not.
        """
        dense = self.check_ready()
        self._check_rows(push.local_rows, push.bags)
        check_gradients(self._name, self.spec.embedding.tables, push, dense, self._state)

    def apply(self, ranked: Sequence[Push], step: int) -> Touched:
        """Make one update of pushes of one step, in worker-rank order.

        Returns:
            What it changed, in arrays that nobody changes; [] if neither a history nor a log needs
            to know.

        Raises:
            Exception: what a learning rate or a custom computation raised; nothing has changed.
        """
        dense = self.check_ready()
        # Rates and custom computations may raise: all are called before anything changes.
        *rates, (dense_rate, *_) = self._rates.at(step)
        updates = [self._prepare(i, ranked, rate) for i, rate in enumerate(rates)]
        touched = self._keep_old([rows for rows, _ in updates])
        for _, update in updates:
            update()
        accumulate = dense.optimizer.use_gradient_accumulation
        dense.apply(reduced_dense(ranked, self.spec.reduction, accumulate=accumulate), dense_rate)
        if ranked[0].state is not None:
            self._state = ranked[0].state.copy()
        return touched

    def entry(self, version: int, fences: tuple[int, ...], touched: Touched) -> LogEntry:
        """What the last update made of the rows that it touched; `is_logged` must be set."""
        dense = self.check_ready()
        tables = [
            (np.arange(len(store.rows), dtype=np.int64), store.records.copy())
            if rows is None
            else (rows, store.gather_records(rows))
            for store, rows in zip(self._tables, touched, strict=True)
        ]
        flat = dense.arrays[:, : dense.values.size].copy()
        return LogEntry(version, fences, tuple(tables), flat, self._state.copy())

    def check_entry(self, entry: LogEntry) -> None:
        """See that a log entry fits these values.

        Raises:
            ShardNotReadyError: there are no dense values yet.
            ProtocolError: it does not.
        """
        check_entry(self._name, self._tables, entry, self.check_ready(), self._state)

    def apply_entry(self, entry: LogEntry) -> None:
        """Make the update again that an entry is of; `check_entry` has seen it."""
        dense = self.check_ready()
        self._keep_old([rows for rows, _ in entry.tables])
        for store, (rows, records) in zip(self._tables, entry.tables, strict=True):
            store.put_records(rows, records)
        dense.arrays[:, : dense.values.size] = entry.dense
        self._state = entry.state.copy()

    def _keep_old(self, indices: Sequence[I64 | None]) -> Touched:
        """Rows of every table are about to change (None: all): keep what somebody still wants."""
        if self._cut is not None:
            for i, index in enumerate(indices):
                self._cut.save(i, index)
            self._cut = self.cut
        if not (self._keeps_history or self.is_logged):
            return []
        touched = [_distinct(s, index) for s, index in zip(self._tables, indices, strict=True)]
        if self._keeps_history:
            old = [OldRows(r, s.old_rows(r)) for s, r in zip(self._tables, touched, strict=True)]
            self._history.keep(OldVersion(old, self.check_ready().values.copy(), self._state))
        return touched

    def _prepare(self, i: int, ranked: Sequence[Push], rates: list[float]) -> Update:
        """What is left to do for a table when everything that may fail is done."""
        store = self._tables[i]
        distinct = store.optimizer.use_gradient_accumulation
        index, grads = reduced_rows(ranked, i, self.spec.reduction, accumulate=distinct)
        self.rows_pushed += index.size
        rate, *hyperparameters = rates
        try:
            return store.prepare(index, grads, rate, hyperparameters, distinct=distinct)
        except ConfigError as e:
            name = self.spec.embedding.tables[i].name
            raise ConfigError(f"{self._name}: table '{name}', step {ranked[0].step}: {e}") from e

    def _check_rows(self, local_rows: tuple[I64, ...], bags: tuple[Bags | None, ...]) -> None:
        sizes = [len(store.rows) for store in self._tables]
        check_named(self._name, self.spec.embedding.tables, sizes, local_rows, bags)

    def _store(self, table: str) -> RowStore:
        names = [t.name for t in self.spec.embedding.tables]
        if table not in names:
            raise ProtocolError(f"{self._name}: no table '{table}' among {names}")
        return self._tables[names.index(table)]

    def _new_table(self, table: TableSpec) -> RowStore:
        placement = self._layout.placements[table.name]
        key = table_key(self.spec.seed, table.name)
        num_rows = placement.num_local_rows(self.spec.shard_id)
        store = RowStore.zeros((num_rows, table.dim), table.optimizer, self._threads)
        if table.initializer == Constant(0.0):
            return store
        for slab in placement.slabs(self.spec.shard_id):
            ids = np.arange(slab.first_id, slab.first_id + slab.num_rows, dtype=np.int64)
            span = slice(slab.first_local_row, slab.first_local_row + slab.num_rows)
            store.rows[span] = table.initializer.rows(key, ids, table.dim)
        return store


def _distinct(store: RowStore, index: I64 | None) -> I64 | None:
    """The distinct rows of an index, in an array of its own: that of a push is the worker's."""
    if index is None:
        return None
    rows = index if store.optimizer.use_gradient_accumulation else distinct_ids(index)[0]
    return rows.copy()
