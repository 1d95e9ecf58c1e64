"""Snapshots with random contents, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ps.config import FTRL, SGD, Adagrad, AdagradMomentum, Adam, FeatureConfig, TableConfig
from ps.dense_variables import DenseValues, DenseVariable
from ps.disk import Disk
from ps.optimizers import Optimizer
from ps.partition import Layout, Placement
from ps.ragged import F32
from ps.shard import ShardSpec, ShardState
from ps.shard_files import load_rows
from ps.snapshot import Snapshot, load_shard, open_snapshot, snapshot_location
from ps.snapshot_writer import SnapshotWriter
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


def small_spec(**changes: Any) -> EmbeddingSpec:
    """One table `t` [4, 2] under FTRL, with changes."""
    table = {"vocabulary_size": 4, "dim": 2, "optimizer": FTRL(), "name": "t"} | changes
    return resolve({"f": FeatureConfig(TableConfig(**table))})


def small(root: str | Path, *, step: int = 6, **about: Any) -> Snapshot:
    """A snapshot of `small_spec`, with a dense model."""
    spec = small_spec()
    dense = dense_values("momenta", "velocities")
    write_snapshot(root, spec, random_contents(spec), step=step, dense=dense, **about)
    return open_snapshot(snapshot_location(root, step))


def part_of(values: F32, placement: Placement, shard: int) -> F32:
    """The rows of a shard, in local order."""
    slabs = [values[s.first_id : s.first_id + s.num_rows] for s in placement.slabs(shard)]
    return np.concatenate([values[:0], *slabs])


def write_snapshot(
    root: str | Path,
    spec: EmbeddingSpec,
    contents: Contents,
    *,
    step: int = 6,
    dense: DenseValues | None = None,
    variables: tuple[DenseVariable, ...] = VARIABLES,
    num_shards: int = 1,
    job: str = "test",
    disk: Disk | None = None,
    **about: Any,
) -> Path:
    """A snapshot of these tables; returns its folder."""
    with SnapshotWriter(
        root, spec, step=step, seed=3, job=job, num_shards=num_shards, disk=disk, **about
    ) as writer:
        placements = Layout.of(spec, num_shards).placements
        for shard in range(num_shards):
            for name, arrays in contents.items():
                rows, *slots = (part_of(a, placements[name], shard) for a in arrays.values())
                part = writer.part(shard, name)
                try:
                    part.append(rows, dict(zip(list(arrays)[1:], slots, strict=True)))
                    sealed = part.close()
                finally:
                    part.abandon()
                writer.add_parts([sealed])
        if dense is not None:
            model = {"name": "mlp", "params": {"hidden": [8]}}
            optimizer = Adam() if dense.slots else None
            writer.add_dense(variables, dense, model=model, optimizer=optimizer)
        return Path(writer.commit())


def contents_of(snapshot: Snapshot) -> Contents:
    """Every table and slot of a snapshot."""
    return {
        t.name: {"rows": t.rows} | {slot: t.slot(slot) for slot in t.slot_names}
        for t in snapshot.tables
    }


def state_from(snapshot: Snapshot, spec: ShardSpec, dense: DenseValues) -> ShardState:
    """One shard that has taken its tables from a snapshot's files, and these dense values."""
    state = ShardState(spec)
    placements = Layout.of(spec.embedding, spec.num_shards).placements
    for table in spec.embedding.tables:
        pieces = load_shard(snapshot, table.name, placements[table.name], spec.shard_id)
        for _ in load_rows(state, table.name, pieces):
            pass
    state.set_dense(dense.trainable, dense.state, dense.slots, snapshot.step)
    return state
