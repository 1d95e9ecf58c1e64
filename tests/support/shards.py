"""One shard in this process, the messages it gets, and everything it holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ps.config import FeatureConfig, TableConfig
from ps.custom_optimizer import CustomOptimizer
from ps.initializers import RandomUniform
from ps.messages import Bags, Pull, Push, no_weights
from ps.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam, Optimizer
from ps.partition import Layout
from ps.ragged import F32, I64
from ps.reduction import Reduction
from ps.shard import ShardSpec, ShardState
from ps.spec import EmbeddingSpec, resolve
from tests.support.reference import same_bits

P = 5  # trainable dense values
S = 3  # non-trainable ones


def spec_of(*optimizers: Optimizer, num_rows: int = 200, dim: int = 2) -> EmbeddingSpec:
    """One table per optimizer: table_0, table_1, ..."""
    start = RandomUniform(-1.0, 1.0)
    return resolve([FeatureConfig(TableConfig(num_rows, dim, start, o)) for o in optimizers])


def shard_of(
    *optimizers: Optimizer,
    num_workers: int = 2,
    reduction: Reduction = "sum",
    dense_optimizer: Optimizer | None = None,
    ready: bool = True,
) -> ShardState:
    """The only shard of a job, with dense values 0 ... P - 1 if it is ready."""
    shard = ShardState(
        ShardSpec(
            shard_id=0,
            num_shards=1,
            num_workers=num_workers,
            embedding=spec_of(*(optimizers or (SGD(1.0),))),
            dense_optimizer=dense_optimizer or SGD(1.0),
            reduction=reduction,
        )
    )
    if ready:
        shard.set_dense(np.arange(P, dtype=np.float32), np.zeros(S, dtype=np.float32))
    return shard


def i64(*values: int) -> I64:
    return np.array(values, dtype=np.int64)


def push_of(worker: int, step: int, rows: Sequence[int] = (0,), value: float = 1.0) -> Push:
    """Every gradient has this value."""
    return Push(
        worker,
        step,
        (i64(*rows),),
        (np.full((len(rows), 2), value, dtype=np.float32),),
        np.full(P, value, dtype=np.float32),
        None,
    )


def pull_of(version: int, rows: Sequence[int] = (0,)) -> Pull:
    return Pull(0, version, version, (i64(*rows),))


def contents(shard: ShardState) -> list[F32]:
    """Copies of everything that training changes."""
    tables = [
        array.copy()
        for table in shard.spec.embedding.tables
        for _, rows, slots in shard.slabs(table.name)
        for array in (rows, *slots.values())
    ]
    dense, slots, state = shard.dense()
    return [*tables, dense.copy(), *(s.copy() for s in slots.values()), state.copy()]


def same_contents(a: list[F32], b: list[F32]) -> bool:
    return len(a) == len(b) and all(itertools.starmap(same_bits, zip(a, b, strict=True)))


def whole_table(shards: Sequence[ShardState], name: str) -> list[F32]:
    """The table and its slots, put together from all shards."""
    table = shards[0].spec.embedding.table(name)
    size = (1 + len(table.optimizer.slot_names), table.vocabulary_size, table.dim)
    out = np.full(size, np.nan, dtype=np.float32)
    for shard in shards:
        for slab, rows, slots in shard.slabs(name):
            span = slice(slab.first_id, slab.first_id + slab.num_rows)
            for k, array in enumerate((rows, *slots.values())):
                out[k, span] = array
    return list(out)


# --- a shard of everything: all optimizers, several dims, rows that repeat


def _slow_sgd(
    gradient: F32, rows: F32, slots: list[F32], rate: np.float32, numbers: list[np.float32]
) -> tuple[F32, F32]:
    momentum = slots[0] * np.float32(0.5) + gradient
    return rows - rate * momentum, momentum


MIXED = (
    (SGD(0.1), 1, 50),
    (Adagrad(0.1), 16, 90),
    (Adam(0.1), 5, 40),
    (Adam(0.1, lazy_adam=False), 3, 30),
    (AdagradMomentum(0.1, momentum=0.5), 2, 64),
    (FTRL(0.1), 33, 20),
    (SGD(0.1, use_gradient_accumulation=False), 4, 12),
    (CustomOptimizer(_slow_sgd, 0.1, ["momenta"], [0.0]), 6, 25),
    (SGD(0.1), 8, 1),
)
"""(optimizer, dim, number of rows) of each table."""


def mixed_spec(**options: Any) -> ShardSpec:
    """The only shard of a job with one table of each kind, unless options say more."""
    start = RandomUniform(-1.0, 1.0)
    tables = [TableConfig(rows, dim, start, optimizer, name=f"table_{i}")
              for i, (optimizer, dim, rows) in enumerate(MIXED)]  # fmt: skip
    given: dict[str, Any] = {
        "shard_id": 0,
        "num_shards": 1,
        "num_workers": 2,
        "embedding": resolve([FeatureConfig(table) for table in tables]),
        "dense_optimizer": Adam(0.1),
    }
    return ShardSpec(**(given | options))


def mixed_shard(**options: Any) -> ShardState:
    """It is ready, at version 0."""
    return started(mixed_spec(**options))


def started(spec: ShardSpec) -> ShardState:
    """A shard with dense values 0 ... P - 1, at version 0."""
    shard = ShardState(spec)
    shard.set_dense(np.arange(P, dtype=np.float32), np.zeros(S, dtype=np.float32))
    return shard


def sizes_of(spec: ShardSpec) -> list[int]:
    """Rows of each table on the shard."""
    placements = Layout.of(spec.embedding, spec.num_shards).placements
    return [placements[t.name].num_local_rows(spec.shard_id) for t in spec.embedding.tables]


def random_push(spec: ShardSpec, worker: int, step: int, seed: int = 0) -> Push:
    """Some rows of most tables; bags in every second one that can have them."""
    rng = np.random.default_rng([seed, worker, step])
    rows, grads, bags = list[I64](), list[F32](), list[Bags | None]()
    for i, (table, size) in enumerate(zip(spec.embedding.tables, sizes_of(spec), strict=True)):
        sums = table.optimizer.use_gradient_accumulation
        bag = random_bags(rng, size) if sums and i % 2 else None
        if bag is not None:
            rows.append(bag[0])
        elif sums:
            rows.append(rng.choice(size, size=rng.integers(0, size // 3 + 1), replace=False))
        else:
            rows.append(rng.integers(0, size, size=rng.integers(0, size + 1) if size else 0))
        bags.append(bag and bag[1])
        count = rows[-1].size if bag is None else bag[1].count
        grads.append(rng.normal(size=(count, table.dim)).astype(np.float32))
    state = rng.normal(size=S).astype(np.float32) if worker == 0 and step % 2 else None
    dense = rng.normal(size=P).astype(np.float32)
    return Push(worker, step, tuple(rows), tuple(grads), dense, state, tuple(bags))


def random_bags(rng: np.random.Generator, size: int) -> tuple[I64, Bags]:
    """Rows of a table of this size in a few bags, some empty; rows repeat."""
    rows = rng.integers(0, size, size=rng.integers(0, 12)) if size else i64()
    splits = np.sort(rng.integers(0, rows.size + 1, size=rng.integers(1, 5)))
    splits = np.concatenate([[0], splits, [rows.size]])
    weights = rng.normal(size=rows.size).astype(np.float32) if rng.random() < 0.5 else no_weights()
    return rows, Bags(splits, weights)


def random_pull(spec: ShardSpec, version: int, seed: int) -> Pull:
    """Rows of every table, in bags here and there; rows repeat."""
    rng = np.random.default_rng([seed, version])
    rows, bags = list[I64](), list[Bags | None]()
    for table, size in zip(spec.embedding.tables, sizes_of(spec), strict=True):
        bag = None
        if table.optimizer.use_gradient_accumulation and rng.random() < 0.5:
            local, bag = random_bags(rng, size)
        else:
            local = rng.integers(0, size, size=rng.integers(0, 20)) if size else i64()
        rows.append(local)
        bags.append(bag)
    return Pull(0, version, version, tuple(rows), tuple(bags))


def make_step(shard: ShardState, step: int, seed: int = 0) -> None:
    """All workers push a step."""
    for worker in range(shard.spec.num_workers):
        shard.push(random_push(shard.spec, worker, step, seed))


def frozen(shard: ShardState) -> list[Any]:
    """Copies of all that a shard is: versions, then `contents`."""
    return [shard.version, shard.fences(), shard.entries_applied, contents(shard)]


def same_state(a: list[Any], b: list[Any]) -> bool:
    return a[:-1] == b[:-1] and same_contents(a[-1], b[-1])
