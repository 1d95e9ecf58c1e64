"""A warmed shard compiles nothing more in its steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STEP = """
import numpy as np
from numba.core import event
from ps.config import FeatureConfig, TableConfig
from ps.messages import Pull, Push
from ps.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam
from ps.shard import ShardSpec, ShardState
from ps.spec import resolve
from ps.warm import warm_up

def forbidden(step):
    raise AssertionError("a learning rate was asked for")

calls = []
optimizers = [SGD(forbidden), Adagrad(0.1, clipvalue=1.0), Adam(0.1, lazy_adam=False),
              AdagradMomentum(0.1, momentum=0.5), FTRL(0.1, weight_decay_factor=0.1)]
dims = [8, 5, 16, 3, 1]
features = {
    str(i): FeatureConfig(TableConfig(100, dim, optimizer=optimizer, name=f"t{i}"))
    for i, (dim, optimizer) in enumerate(zip(dims, optimizers))
}
spec = ShardSpec(shard_id=1, num_shards=2, num_workers=2, embedding=resolve(features),
                 dense_optimizer=Adam(0.1))
with event.install_recorder("numba:compile") as before:
    warm_up(spec)
assert before.buffer, "warming up compiles"
for table in spec.embedding.tables:
    object.__setattr__(table.optimizer, "learning_rate", 0.1)
shard = ShardState(spec)
shard.set_dense(np.zeros(7, np.float32), np.zeros(2, np.float32))
with event.install_recorder("numba:compile") as after:
    for worker in range(2):
        rows = tuple(np.array([0, 7, 3]) for _ in dims)
        grads = tuple(np.ones((3, dim), np.float32) for dim in dims)
        shard.push(Push(worker, 0, rows, grads, np.ones(7, np.float32), np.zeros(2, np.float32)))
    shard.pull(Pull(0, 1, 1, rows), calls.append)
assert calls and calls[0].version == 1
assert not after.buffer, after.buffer
"""


def test_a_warmed_shard_compiles_nothing_more(tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "NUMBA_CACHE_DIR": str(tmp_path),  # the cache of this machine may be warm
    }
    subprocess.run([sys.executable, "-c", STEP], check=True, env=environment, timeout=120)
