"""Compile (or load from the cache) every kernel a shard needs before it says it is ready.

Not a list of kernels, which would fall behind: a shard of the same tables and optimizers, with one
row each, takes one step of all workers. If it will be cut and logged, so is that one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np

from ps.custom_optimizer import CustomOptimizer
from ps.cut import Cut
from ps.messages import Bags, LogEntry, Pull, Push, no_weights
from ps.optimizers import SGD, Optimizer
from ps.shard import ShardSpec, ShardState
from ps.spec import TableSpec


def warm_up(spec: ShardSpec) -> None:
    """Run the kernels of this shard once, on one row of every table."""
    embedding = replace(spec.embedding, tables=tuple(map(_one_row, spec.embedding.tables)))
    dense = _constant(spec.dense_optimizer)
    shard = ShardState(
        replace(spec, shard_id=0, num_shards=1, embedding=embedding, dense_optimizer=dense)
    )
    shard.set_dense(np.zeros(1, dtype=np.float32), np.zeros(0, dtype=np.float32))
    first = (np.zeros(1, dtype=np.int64),) * len(embedding.tables)
    grads = tuple(np.zeros((1, table.dim), dtype=np.float32) for table in embedding.tables)
    one_bag = Bags(np.array([0, 1], dtype=np.int64), no_weights())
    bags = tuple(one_bag if t.name in spec.combined else None for t in embedding.tables)
    cuts, entries = list[Cut](), list[LogEntry]()
    if spec.history:
        shard.on_version = entries.append
        shard.arm_cut(0, cuts.append)
    for worker in range(spec.num_workers):
        shard.push(Push(worker, 0, first, grads, np.zeros(1, dtype=np.float32), None, bags))
    shard.pull(Pull(0, 1, 1, first, bags), lambda rows: None)
    if spec.history:
        cuts[0].next_piece()
        if spec.mode == "sync":
            shard.pull(Pull(0, 1, 0, first, bags), lambda rows: None)
        fences, version = (2,) * spec.num_workers, shard.entries_applied + 1
        shard.apply_entry(replace(entries[-1], version=version, fences=fences))


def _one_row(table: TableSpec) -> TableSpec:
    return replace(table, vocabulary_size=1, optimizer=_constant(table.optimizer))


def _constant(optimizer: Optimizer) -> Optimizer:
    """The optimizer without what the user wrote: functions are called in steps only."""
    if isinstance(optimizer, CustomOptimizer):
        return SGD()
    return cast("Optimizer", replace(cast("Any", optimizer), learning_rate=0.0))
