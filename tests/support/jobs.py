"""Small jobs for tests: data with bags, weights and a sequence, and every optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ps.config import FTRL, SGD, Adagrad, AdagradMomentum, Adam
from ps.optimizers import ExponentialDecay
from workers.config import (
    ClusterConfig,
    DataConfig,
    FeatureEntry,
    JobConfig,
    ModelConfig,
    OutputConfig,
    RecoveryConfig,
    TableEntry,
    TrainConfig,
)


@dataclass(frozen=True)
class BrokenRate:
    """A learning rate that fails at one step."""

    bad_step: int

    def __call__(self, step: int) -> float:
        if step == self.bad_step:
            raise RuntimeError(f"no rate for step {step}")
        return 0.01


def write_examples(folder: Path, rows: int = 1200, seed: int = 0) -> Path:
    """A Parquet file with ids, a weighted bag, a sequence, a dense column and a label."""
    rng = np.random.default_rng(seed)

    def bags(vocabulary: int) -> list[list[int]]:
        return [rng.integers(0, vocabulary, rng.integers(0, 7)).tolist() for _ in range(rows)]

    items = bags(900)
    table = pa.table(
        {
            "user": rng.integers(0, 300, rows),
            "items": pa.array(items, pa.list_(pa.int64())),
            "item_weights": pa.array(
                [rng.uniform(0.1, 2.0, len(i)).tolist() for i in items], pa.list_(pa.float32())
            ),
            "recent": pa.array(bags(900), pa.list_(pa.int64())),
            "genre": rng.integers(0, 17, rows),
            "x": rng.normal(size=rows).astype(np.float32),
            "label": rng.normal(size=rows).astype(np.float32),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "examples.parquet", row_group_size=100)
    return folder / "examples.parquet"


def every_optimizer_job(data: Path, **cluster: Any) -> JobConfig:
    """Five tables, one per optimizer, an MLP model, two workers."""
    tables = {
        "users": TableEntry(vocabulary_size=300, dim=8, optimizer=Adam(0.01)),
        "items": TableEntry(
            vocabulary_size=900,
            dim=8,
            combiner="sqrtn",
            optimizer=Adagrad(ExponentialDecay(0.1, 0.5, 20)),
        ),
        "genres": TableEntry(vocabulary_size=17, dim=4, optimizer=FTRL(0.05)),
        "recents": TableEntry(vocabulary_size=900, dim=8, optimizer=AdagradMomentum(0.01, 0.9)),
        "plain": TableEntry(
            vocabulary_size=300,
            dim=3,
            combiner="sum",
            optimizer=SGD(0.05, use_gradient_accumulation=False),
        ),
    }
    features = {
        "user": FeatureEntry(table="users"),
        "items": FeatureEntry(table="items", weights="item_weights"),
        "genre": FeatureEntry(table="genres"),
        "recent": FeatureEntry(table="recents", max_sequence_length=4),
        "recent_bag": FeatureEntry(table="recents", column="recent"),
        "user_again": FeatureEntry(table="plain", column="user"),
    }
    return JobConfig(
        name="every-optimizer",
        seed=11,
        data=DataConfig(train=data, test=data, label="label", dense=("x",)),
        tables=tables,
        features=features,
        model=ModelConfig(build="tests.support.models:build_mlp"),
        train=TrainConfig(epochs=2, batch_size=120, dense_optimizer=Adam(0.01), report_every=7),
        cluster=ClusterConfig(**{"shards": 2, "workers": 2, **cluster}),
        output=OutputConfig(),
    )


def with_lookahead(job: JobConfig, lookahead: int) -> JobConfig:
    """The same job with another lookahead."""
    return replace(job, train=replace(job.train, lookahead=lookahead))


def with_recovery(
    job: JobConfig, snapshots: Path | str, durability: str = "snapshot", **recovery: Any
) -> JobConfig:
    """The same job with a durability; a snapshot every 4 steps unless told otherwise."""
    options = {"snapshot_every": 4, **recovery}
    return replace(
        job,
        output=replace(job.output, snapshot=snapshots),
        recovery=RecoveryConfig(durability=durability, **options),  # type: ignore[arg-type]
    )


def with_ranks(job: JobConfig, ranks: int, workers: int) -> JobConfig:
    """The same job with this many ranks, on this many workers."""
    return replace(
        job,
        train=replace(job.train, ranks=ranks),
        cluster=replace(job.cluster, workers=workers),
    )
