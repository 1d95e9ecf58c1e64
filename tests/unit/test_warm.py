"""A warmed shard compiles nothing more in its steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STEP = """
from dataclasses import replace
import numpy as np
from numba.core import event
from ps.config import FeatureConfig, TableConfig
from ps.messages import Bags, Pull, Push, no_weights
from ps.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam
from ps.shard import ShardSpec, ShardState
from ps.spec import resolve
from ps.warm import warm_up

def forbidden(step):
    raise AssertionError("a learning rate was asked for")

optimizers = [SGD(forbidden), Adagrad(0.1, clipvalue=1.0), Adam(0.1, lazy_adam=False),
              AdagradMomentum(0.1, momentum=0.5), FTRL(0.1, weight_decay_factor=0.1)]
dims = [8, 5, 16, 3, 1]
features = {
    str(i): FeatureConfig(TableConfig(100, dim, optimizer=optimizer, name=f"t{i}"))
    for i, (dim, optimizer) in enumerate(zip(dims, optimizers))
}
plain = ShardSpec(shard_id=1, num_shards=2, num_workers=2, embedding=resolve(features),
                  dense_optimizer=Adam(0.1))
kept = replace(plain, history=4, combined=frozenset(["t1", "t3"]))

def started(spec):
    shard = ShardState(spec)
    shard.set_dense(np.zeros(7, np.float32), np.zeros(2, np.float32))
    return shard

def use(spec):
    shard, calls, cuts, entries = started(spec), [], [], []
    rows = tuple(np.array([0, 7, 3]) for _ in dims)
    bag = Bags(np.array([0, 2, 3]), no_weights())
    bags = tuple(bag if t.name in spec.combined else None for t in spec.embedding.tables)
    if spec.history:
        shard.on_version = entries.append
        shard.arm_cut(0, cuts.append)
    for worker in range(2):
        grads = tuple(np.ones((3 if b is None else 2, d), np.float32) for b, d in zip(bags, dims))
        dense, state = np.ones(7, np.float32), np.zeros(2, np.float32)
        shard.push(Push(worker, 0, rows, grads, dense, state, bags))
    shard.pull(Pull(0, 1, 1, rows, bags), calls.append)
    if spec.history:
        shard.pull(Pull(0, 1, 0, rows, bags), calls.append)
        while cuts[0].next_piece(100):
            pass
        started(spec).apply_entry(entries[0])
    assert [rows.version for rows in calls] == ([1, 0] if spec.history else [1])

for spec in plain, kept:
    with event.install_recorder("numba:compile") as before:
        warm_up(spec)
    assert before.buffer, "warming up compiles"
    usable = resolve({n: replace(f, table=replace(f.table, optimizer=replace(
        f.table.optimizer, learning_rate=0.1))) for n, f in features.items()})
    with event.install_recorder("numba:compile") as after:
        use(replace(spec, embedding=usable))
    assert not after.buffer, after.buffer
"""


def test_a_warmed_shard_compiles_nothing_more(tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "NUMBA_CACHE_DIR": str(tmp_path),  # the cache of this machine may be warm
    }
    subprocess.run([sys.executable, "-c", STEP], check=True, env=environment, timeout=120)
