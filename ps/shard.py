"""`ShardState`: one shard's rows, slots and dense slices, and when they may be read and changed.

Pure: no Ray, clock, thread or disk. In sync mode version v is the state after v steps. The version
t + 1 is made when the pushes of all workers for step t are in (`ps.reduction`). A pull names the
version it wants and is answered the moment that version is made, before anything later is applied.

In async mode a push is applied when it arrives, as a step of its own, and a pull takes what is
there; it waits only while the slowest worker is more than `max_staleness` steps behind (stale
synchronous parallel: Ho et al., NIPS 2013). The version is the slowest worker's number of steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ps.custom_optimizer import CustomOptimizer
from ps.errors import ConfigError, ProtocolError, ShardNotReadyError
from ps.initializers import Constant, table_key
from ps.message_checks import check_named
from ps.messages import LATEST, Bags, Pull, Push, Rows, ShardStats, bags_of
from ps.optimizers import Optimizer, Rate, evaluate_rate
from ps.partition import Layout, Slab
from ps.ragged import F32, I64
from ps.reduction import Reduction, reduced_dense, reduced_rows
from ps.rowstore import FlatStore, RowStore
from ps.spec import EmbeddingSpec, TableSpec
from ps.threads import Threads

Mode = Literal["sync", "async"]
Reply = Callable[[Rows], None]
MAX_STEPS_AHEAD = 64
"""Pushes of one worker that a shard keeps for others to catch up; workers send fewer."""
STALENESS_BINS = 64


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
    mode: Mode = "sync"
    max_staleness: int = 0
    """Async mode: steps that a worker may be ahead of the slowest."""
    combined: frozenset[str] = frozenset()
    """Tables whose bags it will be asked to combine; their kernels are compiled at the start."""
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
        self._fixed_rates: list[list[float]] | None = None
        """Rates of all stores, once they are known not to change."""
        self._waiting: list[tuple[Pull, Reply]] = []
        self._flushes: list[tuple[int, int, Callable[[int], None]]] = []
        self._rows_pulled = self._rows_pushed = self._duplicates = 0
        self._updates = 0
        self._updates_at_pull: dict[tuple[int, int], int] = {}
        self._staleness = np.zeros(STALENESS_BINS, dtype=np.int64)

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
        self._check_pull(pull)
        if self._is_due(pull):
            reply(self._read(pull))
        else:
            self._waiting.append((pull, reply))

    def push(self, push: Push) -> None:
        """Take one worker's gradients; apply the step when all workers' are in (async: at once).

        A repeated push is dropped. The arrays must stay as they are until `done_step` is past it.

        Raises:
            ShardNotReadyError: no state yet.
            ProtocolError: a step of this worker is missing in between, it is too far ahead of the
                others, a row is not on this shard, or an array has the wrong shape.
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
        if self.spec.mode == "sync" and push.step >= self.version + MAX_STEPS_AHEAD:
            raise ProtocolError(
                f"shard {self.spec.shard_id}: worker {push.worker} pushed step {push.step}, "
                f"{MAX_STEPS_AHEAD} or more ahead of the slowest worker"
            )
        self._next_step[push.worker] = push.step + 1
        if self.spec.mode == "async":
            self._apply([push], push.step)
            self._note_staleness([push])
            self.version = min(self._next_step)
            self._answer_waiting()
            return
        step = self.version
        self._pushes[push.step][push.worker] = push
        # At most one version can be made: each worker's steps come one after the other.
        if len(self._pushes.get(step, ())) == self.spec.num_workers:
            pushes = self._pushes[step]
            ranked = [pushes[worker] for worker in range(self.spec.num_workers)]
            self._apply(ranked, step)
            self._note_staleness(ranked)
            del self._pushes[step]
            self.version += 1
            self._answer_waiting()

    def done_step(self, worker: int) -> int:
        """Pushes of a worker for steps below this one are applied; their arrays are free again."""
        if not 0 <= worker < self.spec.num_workers:
            return 0
        return self._next_step[worker] if self.spec.mode == "async" else self.version

    def flush(self, worker: int, reply: Callable[[int], None]) -> None:
        """Call `reply` with the version when all pushes of a worker so far are applied.

        Raises:
            ShardNotReadyError: no state yet.
        """
        self._check_ready()
        self._flushes.append((worker, self._next_step[worker], reply))
        self._answer_flushes()

    def forget(self, replies: Collection[object]) -> None:
        """Drop the pulls and flushes that wait to be answered so: who asked is gone."""
        self._waiting = [(pull, reply) for pull, reply in self._waiting if reply not in replies]
        self._flushes = [flush for flush in self._flushes if flush[2] not in replies]

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
            staleness=tuple(np.trim_zeros(self._staleness, "b").tolist()),
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

    def _check_pull(self, pull: Pull) -> None:
        dense = self._check_ready()
        self._check_worker(pull.worker)
        self._check_rows(pull.local_rows, pull.bags)
        if pull.into is not None:
            seen = pull.into.dense.shape, pull.into.state.shape
            if seen != (dense.values.shape, self._state.shape):
                raise ProtocolError(
                    f"shard {self.spec.shard_id}: room for dense values {seen}, wanted "
                    f"{(dense.values.shape, self._state.shape)}"
                )
        if pull.version < self.version and pull.version != LATEST:
            raise ProtocolError(
                f"shard {self.spec.shard_id}: worker {pull.worker} wants version {pull.version} "
                f"for step {pull.step}, but the shard is at version {self.version}"
            )
        ahead = pull.version - self.version
        if pull.version == LATEST:
            ahead = pull.step - self.version - self.spec.max_staleness
        if ahead > MAX_STEPS_AHEAD:
            raise ProtocolError(
                f"shard {self.spec.shard_id}: worker {pull.worker} pulls for step {pull.step}, "
                f"more than {MAX_STEPS_AHEAD} ahead of the shard's version {self.version}"
            )

    def _check_worker(self, worker: int) -> None:
        if not 0 <= worker < self.spec.num_workers:
            raise ProtocolError(
                f"shard {self.spec.shard_id}: worker {worker} is not in "
                f"[0, {self.spec.num_workers})"
            )

    def _check_rows(self, local_rows: tuple[I64, ...], bags: tuple[Bags | None, ...]) -> None:
        sizes = [len(store.rows) for store in self._tables]
        name, tables = f"shard {self.spec.shard_id}", self.spec.embedding.tables
        check_named(name, tables, sizes, local_rows, bags)

    def _check_push(self, push: Push) -> None:
        dense = self._check_ready()
        self._check_worker(push.worker)
        self._check_rows(push.local_rows, push.bags)
        bags = bags_of(push.bags, len(self._tables))
        sizes = [
            i.size if b is None else b.count for i, b in zip(push.local_rows, bags, strict=True)
        ]
        wanted = [(n, t.dim) for n, t in zip(sizes, self.spec.embedding.tables, strict=True)]
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

    def _is_due(self, pull: Pull) -> bool:
        if pull.version != LATEST:
            return pull.version == self.version
        return pull.step - self.version <= self.spec.max_staleness

    def _read(self, pull: Pull) -> Rows:
        outs = (None,) * len(self._tables) if pull.into is None else pull.into.rows
        bags = bags_of(pull.bags, len(self._tables))
        rows = tuple(
            store.gather(local, out) if of_table is None else store.sums(local, of_table, out)
            for store, local, of_table, out in zip(
                self._tables, pull.local_rows, bags, outs, strict=True
            )
        )
        self._rows_pulled += sum(local.size for local in pull.local_rows)
        if 0 <= pull.step - self._next_step[pull.worker] < MAX_STEPS_AHEAD:  # a push will follow
            self._updates_at_pull[pull.worker, pull.step] = self._updates
        dense, state = self._check_ready().values, self._state
        if pull.into is None:
            return Rows(self.version, rows, dense.copy(), state.copy())
        pull.into.dense[:], pull.into.state[:] = dense, state
        return Rows(self.version, rows, pull.into.dense, pull.into.state)

    def _answer_waiting(self) -> None:
        self._answer_flushes()
        if not self._waiting:
            return
        due = [(p, reply) for p, reply in self._waiting if self._is_due(p)]
        self._waiting = [(p, reply) for p, reply in self._waiting if not self._is_due(p)]
        for pull, reply in due:
            reply(self._read(pull))

    def _answer_flushes(self) -> None:
        if not self._flushes:
            return
        due = [f for f in self._flushes if self.done_step(f[0]) >= f[1]]
        self._flushes = [f for f in self._flushes if self.done_step(f[0]) < f[1]]
        for _, _, reply in due:
            reply(self.version)

    def _note_staleness(self, pushes: Sequence[Push]) -> None:
        """Count the updates between each push's pull and the push."""
        for push in pushes:
            at_pull = self._updates_at_pull.pop((push.worker, push.step), None)
            if at_pull is not None:
                self._staleness[min(self._updates - at_pull, STALENESS_BINS - 1)] += 1
        self._updates += 1

    def _apply(self, ranked: Sequence[Push], step: int) -> None:
        """Make one step of pushes of one step, in worker-rank order."""
        dense = self._check_ready()
        # Rates and custom computations may raise: all are called before anything changes.
        *rates, (dense_rate, *_) = self._rates([*self._tables, dense], step)
        updates = [self._prepare(i, ranked, rate) for i, rate in enumerate(rates)]
        for update in updates:
            update()
        accumulate = dense.optimizer.use_gradient_accumulation
        dense.apply(reduced_dense(ranked, self.spec.reduction, accumulate=accumulate), dense_rate)
        if ranked[0].state is not None:
            self._state = ranked[0].state.copy()

    def _prepare(self, i: int, ranked: Sequence[Push], rates: list[float]) -> Callable[[], None]:
        """What is left to do for a table when everything that may fail is done."""
        store = self._tables[i]
        distinct = store.optimizer.use_gradient_accumulation
        index, grads = reduced_rows(ranked, i, self.spec.reduction, accumulate=distinct)
        rate, *hyperparameters = rates
        try:
            update = store.prepare(index, grads, rate, hyperparameters, distinct=distinct)
        except ConfigError as e:
            name = self.spec.embedding.tables[i].name
            raise ConfigError(
                f"shard {self.spec.shard_id}: table '{name}', step {ranked[0].step}: {e}"
            ) from e
        self._rows_pushed += index.size
        return update

    def _rates(self, stores: Sequence[RowStore | FlatStore], step: int) -> list[list[float]]:
        """The rates of each; a callable is called once a step, however many share it."""
        if self._fixed_rates is not None:
            return self._fixed_rates
        known: list[tuple[Rate, float]] = []

        def value_of(rate: Rate) -> float:
            for seen, value in known:
                if seen == rate:
                    return value
            known.append((rate, evaluate_rate(rate, step)))
            return known[-1][1]

        rates = [[value_of(rate) for rate in store.optimizer.rates] for store in stores]
        if not any(callable(rate) for rate, _ in known):
            self._fixed_rates = rates
        return rates
