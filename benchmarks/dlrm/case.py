"""What is trained: 26 tables with 10 million rows in all, in the proportions of Criteo's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ps.initializers import TruncatedNormal, table_key
from ps.optimizers import SGD, Adagrad, Optimizer
from ps.ragged import F32, I64, Ragged
from workers.batches import ExampleReader
from workers.config import (
    ClusterConfig,
    DataConfig,
    FeatureEntry,
    JobConfig,
    ModelConfig,
    TableEntry,
    TrainConfig,
)
from workers.prepare import prepare_synthetic
from workers.prepare.criteo import CATEGORICAL_NAMES, INTEGER_NAMES
from workers.prepare.synthetic_criteo import CriteoShape

OptimizerName = Literal["Adagrad", "SGD"]

ROWS, DIM, BATCH, SEED = 10_000_000, 16, 4096, 1
MODEL = ModelConfig(build="dlrm", params={"bottom": [64, 32], "top": [64, 32]})
INITIALIZER = TruncatedNormal(stddev=0.05)
CHUNK = 20
"""Steps between two looks at the clock, and of the losses that are compared."""


@dataclass(frozen=True)
class Case:
    """Where the data is, how big the tables are, how many steps are run."""

    data: Path
    rows: int
    steps: int

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each table."""
        sizes = CriteoShape(total_vocabulary=self.rows).vocabulary_sizes()
        return dict(zip(CATEGORICAL_NAMES, sizes, strict=True))

    def prepare(self) -> None:
        """Write the data set: one epoch."""
        prepare_synthetic(
            "criteo",
            self.data,
            rows=self.steps * BATCH,
            seed=SEED,
            test_fraction=0.0,
            total_vocabulary=self.rows,
        )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How Manta runs the job."""

    optimizer: OptimizerName = "Adagrad"
    lookahead: int = 1
    threads: int = 1
    """TensorFlow's, in each worker."""
    workers: int = 1

    def __str__(self) -> str:
        return f"{self.workers} worker{'s' * (self.workers > 1)}, {self.threads} thread" + (
            f"{'s' * (self.threads > 1)}, lookahead {self.lookahead}"
        )


def optimizers(name: OptimizerName) -> tuple[Optimizer, Optimizer]:
    """Of the tables, and of the dense model."""
    if name == "SGD":
        return SGD(0.5), SGD(0.05)
    return (
        Adagrad(0.02, initial_accumulator_value=1e-4),
        Adagrad(0.01, initial_accumulator_value=1e-4),
    )


def job(case: Case, setting: Setting) -> JobConfig:
    """The job, with 2 shards."""
    tables, dense = optimizers(setting.optimizer)
    return JobConfig(
        name="dlrm",
        seed=SEED,
        data=DataConfig(train=case.data / "train.parquet", label="label", dense=INTEGER_NAMES),
        tables={
            name: TableEntry(
                vocabulary_size=size,
                dim=DIM,
                combiner="sum",
                initializer=INITIALIZER,
                optimizer=tables,
            )
            for name, size in case.sizes.items()
        },
        features={name: FeatureEntry(table=name) for name in case.sizes},
        model=MODEL,
        train=TrainConfig(
            batch_size=BATCH,
            loss="bce",
            dense_optimizer=dense,
            lookahead=setting.lookahead,
            report_every=CHUNK,
        ),
        cluster=ClusterConfig(
            shards=2, workers=setting.workers, threads_per_worker=setting.threads
        ),
    )


def batches(case: Case) -> Iterator[tuple[I64, F32, F32]]:
    """The batches of the job, in its order: int64 [26, B], float32 [B, 13], float32 [B]."""
    whole: JobConfig = job(case, Setting())
    reader = ExampleReader(whole.data.train, whole.data, whole.features, seed=whole.seed)
    for batch in reader.epoch(0, BATCH):
        yield np.stack([_ids(batch.bags[n]) for n in case.sizes]), batch.dense, batch.labels


def _ids(bag: Any) -> I64:
    assert isinstance(bag, Ragged), "one id per example"
    return bag.ids


def first_rows(case: Case) -> F32:
    """float32 [rows, D]: the first values of all tables, one after the other, as shards have."""
    out = np.empty((case.rows, DIM), dtype=np.float32)
    start = 0
    for name, size in case.sizes.items():
        ids = np.arange(size, dtype=np.int64)
        out[start : start + size] = INITIALIZER.rows(table_key(SEED, name), ids, DIM)
        start += size
    return out
