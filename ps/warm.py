"""Compile (or load from the cache) every kernel a shard needs before it says it is ready.

Arrays that arrive through Ray are read-only, which numba compiles apart: both kinds are warmed.
"""

from __future__ import annotations

import itertools

import numpy as np

from ps.custom_optimizer import CustomOptimizer
from ps.kernels.combine import add_rows
from ps.kernels.dedup import distinct_ids, first_out_of_range
from ps.rowstore import RowStore
from ps.shard import ShardSpec


def warm_up(spec: ShardSpec) -> None:
    """Run the kernels of this shard once, on one row."""
    tables = spec.embedding.tables
    optimizers = {type(o): o for o in (spec.dense_optimizer, *(t.optimizer for t in tables))}
    optimizers.pop(CustomOptimizer, None)  # has no kernel
    for index_writeable, grads_writeable in itertools.product((False, True), repeat=2):
        index = np.zeros(1, dtype=np.int64)
        grads = np.zeros((1, 1), dtype=np.float32)
        index.flags.writeable, grads.flags.writeable = index_writeable, grads_writeable
        first_out_of_range(index, 1)
        distinct_ids(index)
        add_rows(grads, index, np.zeros((1, 1), dtype=np.float32))
        for optimizer in optimizers.values():
            store = RowStore(np.ones((1, 1), dtype=np.float32), optimizer)
            store.gather(index)
            store.apply(index, grads, 0.0)
