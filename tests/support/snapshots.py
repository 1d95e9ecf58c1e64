"""Snapshots with random contents, and what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ps.config import FTRL, SGD, Adagrad, AdagradMomentum, Adam, FeatureConfig, TableConfig
from ps.dense_variables import DenseValues, DenseVariable
from ps.export_file import write_rows
from ps.optimizers import Optimizer
from ps.ragged import F32
from ps.shard import ShardSpec, ShardState
from ps.shard_files import load_pieces
from ps.snapshot import Snapshot, SnapshotWriter
from ps.spec import EmbeddingSpec, resolve

OPTIMIZERS: dict[str, Optimizer] = {
    "users": Adam(0.01, epsilon=1e-3),
    "site/ads": Adagrad(0.1),
    "a.b c": FTRL(0.05),
    "one.row/": AdagradMomentum(0.01, momentum=0.9, epsilon=1e-3),
    "plain": SGD(0.05),
}
"""By table; the names need escaping in files and in checkpoint keys."""
SIZES = {"users": (300, 8), "site/ads": (97, 4), "a.b c": (17, 3), "one.row/": (1, 2),
         "plain": (50, 1)}  # fmt: skip
VARIABLES = (
    DenseVariable(name="kernel", shape=(2, 3), trainable=True),
    DenseVariable(name="scale", shape=(), trainable=True),
    DenseVariable(name="mean", shape=(3,), trainable=False),
)
Contents = dict[str, dict[str, F32]]
"""Per table: "rows" and every slot."""


def every_optimizer_spec() -> EmbeddingSpec:
    """The tables of `SIZES`, each with one feature `f_<table>`."""
    return resolve(
        {
            f"f_{name}": FeatureConfig(
                TableConfig(*SIZES[name], optimizer=optimizer, combiner="sum", name=name)
            )
            for name, optimizer in OPTIMIZERS.items()
        }
    )


def random_contents(spec: EmbeddingSpec, seed: int = 0) -> Contents:
    """Rows of both signs; slots above zero, as training leaves accumulators."""
    rng = np.random.default_rng(seed)
    return {
        t.name: {"rows": rng.normal(size=(t.vocabulary_size, t.dim)).astype(np.float32)}
        | {
            slot: rng.uniform(0.1, 2.0, (t.vocabulary_size, t.dim)).astype(np.float32)
            for slot in t.optimizer.slot_names
        }
        for t in spec.tables
    }


def dense_values(*slots: str, seed: int = 1) -> DenseValues:
    """Values for `VARIABLES`."""
    rng = np.random.default_rng(seed)
    return DenseValues(
        trainable=rng.normal(size=7).astype(np.float32),
        slots={slot: rng.normal(size=7).astype(np.float32) for slot in slots},
        state=rng.normal(size=3).astype(np.float32),
    )


def write_snapshot(
    root: Path,
    spec: EmbeddingSpec,
    contents: Contents,
    *,
    step: int = 6,
    dense: DenseValues | None = None,
    variables: tuple[DenseVariable, ...] = VARIABLES,
) -> Path:
    """A snapshot of these tables; returns its folder."""
    with SnapshotWriter(root, spec, step=step, seed=3, job="test") as writer:
        for name, arrays in contents.items():
            files = {"rows": writer.row_file(name), **writer.slot_files(name)}
            for key, values in arrays.items():
                write_rows(files[key], 0, values)
        if dense is not None:
            model = {"name": "mlp", "params": {"hidden": [8]}}
            optimizer = Adam() if dense.slots else None
            writer.add_dense(variables, dense, model=model, optimizer=optimizer)
        return writer.commit()


def state_from(snapshot: Snapshot, spec: ShardSpec, dense: DenseValues) -> ShardState:
    """One shard that has taken its tables from a snapshot's files, and these dense values."""
    state = ShardState(spec)
    for table in snapshot.tables:
        for _ in load_pieces(state, table.name, table.row_file, table.slot_files):
            pass
    state.set_dense(dense.trainable, dense.state, dense.slots, snapshot.step)
    return state
