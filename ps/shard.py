"""`ShardState`: one shard's rows, slots and dense slices, and when they may be read and changed.

Pure: no Ray, clock, thread or disk. Version v is the state after v steps. The version t + 1 is made
when the pushes of all workers for step t are in; they are summed by row in worker-rank order, so
the result does not depend on which arrived first. A pull names the version it wants and is
answered the moment that version is made, before anything later can be applied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ps.custom_optimizer import CustomOptimizer
from ps.errors import ConfigError, ProtocolError, ShardNotReadyError
from ps.initializers import Constant, table_key
from ps.kernels.dedup import distinct_ids, first_out_of_range
from ps.kernels.gradients import add_rows
from ps.memory import zeros
from ps.messages import Pull, Push, Rows, ShardStats
from ps.optimizers import Optimizer, Rate, evaluate_rate
from ps.partition import Layout, Slab
from ps.ragged import F32, I64
from ps.rowstore import FlatStore, RowStore
from ps.spec import EmbeddingSpec, TableSpec
from ps.threads import Threads

Reduction = Literal["mean", "sum"]
Reply = Callable[[Rows], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """Everything a shard needs to know to start."""

    shard_id: int
    num_shards: int
    num_workers: int
    embedding: EmbeddingSpec
    dense_optimizer: Optimizer
    reduction: Reduction = "mean"
    """How the workers' gradients become one: their mean (default) or their sum."""
    seed: int = 0
    threads: int = 1
    """Cores that its kernels may use; results have the same bits for any number."""

    def __post_init__(self) -> None:
        if isinstance(self.dense_optimizer, CustomOptimizer):
            raise ConfigError(
                "dense_optimizer: a CustomOptimizer updates rows of tables, and the dense values "
                "have none; use one of TensorFlow's other optimizers"
            )
        try:
            self.dense_optimizer.for_shards()
        except ConfigError as e:
            raise ConfigError(f"dense_optimizer: {e}") from None


class ShardState:
    """One shard. Refuses pulls and pushes until `set_dense` has been called."""

    def __init__(self, spec: ShardSpec) -> None:
        self.spec = spec
        self.version = 0
        self._layout = Layout.of(spec.embedding, spec.num_shards)
        self._threads = Threads(spec.threads)
        self._tables = [self._new_table(table) for table in spec.embedding.tables]
        self._dense: FlatStore | None = None
        self._state = np.zeros(0, dtype=np.float32)
        self._next_step = [0] * spec.num_workers
        self._pushes: defaultdict[int, dict[int, Push]] = defaultdict(dict)
        self._waiting: list[tuple[Pull, Reply]] = []
        self._rows_pulled = self._rows_pushed = self._duplicates = 0

    def set_dense(
        self, dense: F32, state: F32, slots: Mapping[str, F32] | None = None, version: int = 0
    ) -> None:
        """Give the shard its slices of the flat dense vectors; it is ready from then on.

        Args:
            dense: float32 [p], trainable.
            state: float32 [s], non-trainable.
            slots: float32 [p] per slot of the dense optimizer; None for their first values.
            version: number of steps that these values, and the tables, have behind them.
        """
        self._dense = FlatStore(dense, self.spec.dense_optimizer, self._threads)
        for name, values in (slots or {}).items():
            self._dense.slots[name][:] = values
        self._state = state.copy()
        self.version = version
        self._next_step = [version] * self.spec.num_workers

    def pull(self, pull: Pull, reply: Reply) -> None:
        """Answer through `reply`, at once or when the wanted version is made.

        Raises:
            ShardNotReadyError: no state yet.
            ProtocolError: the version has gone by, or a row is not on this shard.
        """
        self._check_ready()
        self._check_rows(pull.local_rows)
        if pull.version < self.version:
            raise ProtocolError(
                f"shard {self.spec.shard_id}: worker {pull.worker} wants version {pull.version} "
                f"for step {pull.step}, but the shard is at version {self.version}"
            )
        if pull.version == self.version:
            reply(self._read(pull))
        else:
            self._waiting.append((pull, reply))

    def push(self, push: Push) -> None:
        """Take one worker's gradients; apply the step when all workers' are in.

        A repeated push is dropped.

        Raises:
            ShardNotReadyError: no state yet.
            ProtocolError: a step of this worker is missing in between, a row is not on this
                shard, or an array has the wrong shape.
        """
        self._check_push(push)
        expected = self._next_step[push.worker]
        if push.step < expected:
            self._duplicates += 1
            return
        if push.step > expected:
            raise ProtocolError(
                f"shard {self.spec.shard_id}: worker {push.worker} pushed step {push.step}, "
                f"but step {expected} is next"
            )
        self._next_step[push.worker] = push.step + 1
        self._pushes[push.step][push.worker] = push
        # At most one version can be made: each worker's steps come one after the other.
        if len(self._pushes.get(self.version, ())) == self.spec.num_workers:
            self._apply(self._pushes[self.version])
            del self._pushes[self.version]
            self.version += 1
            self._answer_waiting()

    def check_version(self, version: int) -> None:
        """See that exactly `version` steps are applied, before the whole state is read.

        Raises:
            ProtocolError: more or fewer steps.
        """
        if self.version != version:
            raise ProtocolError(
                f"shard {self.spec.shard_id} is at version {self.version}, not {version}"
            )

    def stats(self) -> ShardStats:
        """Counters and sizes."""
        return ShardStats(
            shard_id=self.spec.shard_id,
            version=self.version,
            rows_pulled=self._rows_pulled,
            rows_pushed=self._rows_pushed,
            duplicates_dropped=self._duplicates,
            num_rows=sum(len(table.rows) for table in self._tables),
            size_bytes=sum(table.size_bytes for table in self._tables),
        )

    def slabs(self, table: str) -> Iterator[tuple[Slab, F32, dict[str, F32]]]:
        """(slab, its rows, its slots) of a table, as views, in local order."""
        store = self._store(table)
        for slab in self._layout.placements[table].slabs(self.spec.shard_id):
            span = slice(slab.first_local_row, slab.first_local_row + slab.num_rows)
            yield slab, store.rows[span], {n: s[span] for n, s in store.slots.items()}

    def dense(self) -> tuple[F32, dict[str, F32], F32]:
        """Views of (trainable slice, its slots, non-trainable slice)."""
        store = self._check_ready()
        return store.values, dict(store.slots), self._state

    def _check_ready(self) -> FlatStore:
        if self._dense is None:
            raise ShardNotReadyError(f"shard {self.spec.shard_id} has no state yet")
        return self._dense

    def _check_rows(self, local_rows: tuple[I64, ...]) -> None:
        # The kernels do not check bounds, so nothing may pass here that they cannot take.
        if len(local_rows) != len(self._tables):
            raise ProtocolError(
                f"shard {self.spec.shard_id}: message has {len(local_rows)} tables, "
                f"the shard has {len(self._tables)}"
            )
        for table, store, index in zip(
            self.spec.embedding.tables, self._tables, local_rows, strict=True
        ):
            bad = first_out_of_range(index, len(store.rows))
            if bad >= 0:
                raise ProtocolError(
                    f"shard {self.spec.shard_id}: table '{table.name}': local row {index[bad]} "
                    f"is not in [0, {len(store.rows)})"
                )

    def _check_push(self, push: Push) -> None:
        dense = self._check_ready()
        if not 0 <= push.worker < self.spec.num_workers:
            raise ProtocolError(
                f"shard {self.spec.shard_id}: worker {push.worker} is not in "
                f"[0, {self.spec.num_workers})"
            )
        self._check_rows(push.local_rows)
        wanted = [
            (index.size, table.dim)
            for index, table in zip(push.local_rows, self.spec.embedding.tables, strict=True)
        ]
        seen = [grads.shape for grads in push.grads]
        if seen != wanted or push.dense_grad.shape != (dense.values.size,):
            raise ProtocolError(
                f"shard {self.spec.shard_id}: gradients of shapes {seen} and "
                f"{push.dense_grad.shape}, wanted {wanted} and ({dense.values.size},)"
            )
        if push.state is not None and push.state.shape != self._state.shape:
            raise ProtocolError(
                f"shard {self.spec.shard_id}: {push.state.size} non-trainable values, "
                f"wanted {self._state.size}"
            )

    def _store(self, table: str) -> RowStore:
        names = [t.name for t in self.spec.embedding.tables]
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

    def _read(self, pull: Pull) -> Rows:
        rows = tuple(
            store.gather(local) for store, local in zip(self._tables, pull.local_rows, strict=True)
        )
        self._rows_pulled += sum(len(r) for r in rows)
        dense = self._check_ready().values.copy()
        return Rows(self.version, rows, dense, self._state.copy())

    def _answer_waiting(self) -> None:
        due = [(p, reply) for p, reply in self._waiting if p.version == self.version]
        self._waiting = [(p, reply) for p, reply in self._waiting if p.version != self.version]
        for pull, reply in due:
            reply(self._read(pull))

    def _apply(self, pushes: dict[int, Push]) -> None:
        ranked = [pushes[worker] for worker in range(self.spec.num_workers)]
        dense = self._check_ready()
        # Rates and custom computations may raise: all are called before anything changes.
        *rates, (dense_rate, *_) = self._rates([*self._tables, dense])
        updates = [self._prepare(i, ranked, rate) for i, rate in enumerate(rates)]
        for update in updates:
            update()
        grads = self._reduce_dense(
            [p.dense_grad for p in ranked], dense.optimizer.use_gradient_accumulation
        )
        dense.apply(grads, dense_rate)
        if ranked[0].state is not None:
            self._state = ranked[0].state.copy()

    def _prepare(self, i: int, ranked: list[Push], rates: list[float]) -> Callable[[], None]:
        """What is left to do for a table when everything that may fail is done."""
        store = self._tables[i]
        index, grads = self._reduce(
            [p.local_rows[i] for p in ranked],
            [p.grads[i] for p in ranked],
            store.optimizer.use_gradient_accumulation,
        )
        rate, *hyperparameters = rates
        try:
            distinct = store.optimizer.use_gradient_accumulation
            update = store.prepare(index, grads, rate, hyperparameters, distinct=distinct)
        except ConfigError as e:
            name = self.spec.embedding.tables[i].name
            raise ConfigError(
                f"shard {self.spec.shard_id}: table '{name}', step {self.version}: {e}"
            ) from e
        self._rows_pushed += index.size
        return update

    def _rates(self, stores: Sequence[RowStore | FlatStore]) -> list[list[float]]:
        """The rates of each; a callable is called once a step, however many share it."""
        known: list[tuple[Rate, float]] = []

        def value_of(rate: Rate) -> float:
            for seen, value in known:
                if seen == rate:
                    return value
            known.append((rate, evaluate_rate(rate, self.version)))
            return known[-1][1]

        return [[value_of(rate) for rate in store.optimizer.rates] for store in stores]

    def _reduce(self, indices: list[I64], grads: list[F32], accumulate: bool) -> tuple[I64, F32]:
        """One gradient per row (or per contribution), summed in worker-rank order."""
        if len(grads) == 1:
            return indices[0], grads[0]
        index = np.concatenate(indices)
        if not accumulate:
            return index, self._scaled(np.concatenate(grads), len(grads))
        index, places = distinct_ids(index)
        total: F32 = zeros((index.size, grads[0].shape[1]))
        stop = 0
        for grad in grads:
            start, stop = stop, stop + len(grad)
            add_rows(grad, places[start:stop], total)
        return index, self._scaled(total, len(grads))

    def _reduce_dense(self, grads: list[F32], accumulate: bool) -> F32:
        """float32 [1, P], or [N, P] where contributions are not summed; in worker-rank order."""
        if len(grads) == 1:
            return grads[0].reshape(1, -1)
        if not accumulate:
            return self._scaled(np.stack(grads), len(grads))
        total = np.zeros((1, grads[0].size), dtype=np.float32)
        for grad in grads:
            total += grad
        return self._scaled(total, len(grads))

    def _scaled(self, total: F32, num_workers: int) -> F32:
        """The mean of so many workers if that is wanted; changes `total`."""
        if self.spec.reduction == "mean":
            total *= np.float32(1.0 / num_workers)
        return total
