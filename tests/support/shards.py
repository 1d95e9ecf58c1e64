"""One shard in this process, the messages it gets, and everything it holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ps.config import FeatureConfig, TableConfig
from ps.initializers import RandomUniform
from ps.messages import Pull, Push
from ps.optimizers import SGD, Optimizer
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
