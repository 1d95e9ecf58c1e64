"""A whole training run as one object: data, tables, features, model, training, cluster, output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ps.columns import ColumnConfigs, Transform, configs_from_columns
from ps.config import CustomCombiner
from ps.errors import ConfigError
from ps.loading import build, load_yaml
from ps.optimizers import SGD, Optimizer
from ps.shard import Mode
from ps.spec import EmbeddingSpec, resolve
from ps.wire.messages import WireDtype
from ps.wire.transport import TransportName
from workers.column_entries import embedding_columns
from workers.entries import FeatureEntry, TableEntry
from workers.modes import check_mode, check_ranks
from workers.recovery_config import (
    RecoveryConfig,
    absolute,
    check_recovery,
    location,
)
from workers.shapes import check_trainable, uses_weights
from workers.shard_bags import check_combined_on_shards

__all__ = [
    "ClusterConfig",
    "DataConfig",
    "FeatureEntry",
    "JobConfig",
    "Loss",
    "ModelConfig",
    "OutputConfig",
    "RecoveryConfig",
    "TableEntry",
    "TrainConfig",
    "load_job",
]

Loss = Literal["mse", "bce"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where the examples are: Parquet files or folders."""

    train: Path
    test: Path | None = None
    """Examples that the final metrics are computed on; None for no evaluation."""
    label: str
    """Number column that the model predicts."""
    dense: tuple[str, ...] = ()
    """Number columns that the model takes as they are, in this order."""
    shuffle_rows: int = 262_144
    """Rows that are held and mixed at a time; 0 keeps the order of the files."""
    prefetch: int = 2
    """Batches that a thread of each worker reads and prepares ahead; 0 prepares a batch when it is
    needed. The examples and their order are the same."""

    def __post_init__(self) -> None:
        for name in ("shuffle_rows", "prefetch"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The dense model: one of ours by name, or `package.module:function` of your own."""

    build: str
    params: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the build function, as JSON values: exports and snapshots keep them."""

    def __post_init__(self) -> None:
        try:
            json.dumps(self.params)
        except (TypeError, ValueError) as e:
            raise ConfigError(f"params must be JSON values, got {self.params!r:.80}: {e}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train."""

    epochs: int = 1
    batch_size: int = 1024
    """Examples per step over all ranks together."""
    ranks: int | None = None
    """Equal parts of a batch, each with its own gradients; None for one per worker. A worker takes
    every `cluster.workers`-th of them. Results depend on this number, and not on that of workers:
    set it where workers may become more or fewer."""
    loss: Loss = "mse"
    optimizer: Optimizer = field(default_factory=SGD)
    """For tables without one of their own."""
    dense_optimizer: Optimizer = field(default_factory=SGD)
    """For the variables of the dense model."""
    mode: Mode = "sync"
    """`sync`: all ranks' gradients of a step make one version, and results have the same bits in
    every run. `async`: each rank's gradients are applied when they arrive."""
    lookahead: int = 0
    """Steps by which a worker asks for rows ahead. In sync mode, step t reads version t - lookahead
    of every row (or a newer one, see `recovery.snapshot_every`); 0 is strictly synchronous."""
    max_staleness: int | None = None
    """Async mode, where it must be set: steps that a worker may be ahead of the slowest one."""
    cached_rows: int = 0
    """Async mode: rows per table that a worker keeps from earlier pulls; 0 for none."""
    cache_max_age: int = 0
    """Steps after its pull that a kept row may still be read."""
    wire_dtype: WireDtype = "float32"
    """How rows and gradients travel between workers and shards: `bfloat16` and `float16` are half
    as many bytes, with 8 and 11 bits of precision."""
    reduction: Literal["mean", "sum"] = "mean"
    """How the ranks' gradients become one; each rank's loss is a mean over its part of a batch."""
    clip_predictions: tuple[float, ...] | None = None
    """[low, high]: predictions are cut to this range in evaluation (ratings have one)."""
    report_every: int = 50
    """Steps between progress reports."""
    start_from: str | Path | None = None
    """Snapshot, or root whose LATEST is followed: rows, slots, dense values and the number of steps
    that the run starts with. It reads the input from the start, for `epochs` epochs. A folder,
    s3://… or gs://…."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "start_from", location("start_from", self.start_from))
        for name in ("epochs", "batch_size", "report_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.lookahead <= 2:
            raise ConfigError(f"lookahead must be 0, 1 or 2, got {self.lookahead}")
        check_mode(
            self.mode,
            self.lookahead,
            self.max_staleness,
            self.reduction,
            cached_rows=self.cached_rows,
            cache_max_age=self.cache_max_age,
        )
        clip = self.clip_predictions
        if clip is not None and (len(clip) != 2 or clip[0] > clip[1]):
            raise ConfigError(f"clip_predictions must be [low, high], got {list(clip)}")
        if clip is not None and self.loss != "mse":
            raise ConfigError(f"clip_predictions works with loss mse only, got loss {self.loss}")
        if getattr(self.dense_optimizer, "slot_variable_creation_fn", None) is not None:
            raise ConfigError(
                "dense_optimizer: shards make their own slots; leave out "
                "`slot_variable_creation_fn`"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """How many actors, and what each asks of Ray."""

    shards: int = 2
    workers: int = 1
    shard_resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    worker_resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    """`{TPU: 4}` puts each worker on a TPU host and runs the dense model under TPUStrategy."""
    threads_per_worker: int = 1
    """TensorFlow's threads per operation; 1 keeps results bit-identical from run to run."""
    threads_per_shard: int = 1
    """Cores that a shard's kernels use, for the same bits; `shard_resources` must ask for as many
    CPUs."""
    transport: TransportName = "auto"
    """How steps reach shards: `auto` takes shared memory on the same host and TCP to others;
    `arena` and `tcp` insist on one of them."""
    pin_shards: bool = True
    """Whether each shard keeps to one CPU of its host that no other shard keeps to, as long as
    there are some; shards of several threads never do."""
    start_timeout_s: float = 180.0
    step_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("shards", "workers", "threads_per_worker", "threads_per_shard"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        cpus = self.shard_resources.get("CPU", 0)
        if self.threads_per_shard > max(1, cpus):
            raise ConfigError(
                f"threads_per_shard: {self.threads_per_shard} threads need as many CPUs, but "
                f"shard_resources asks for CPU: {cpus:g}"
            )
        for name in ("start_timeout_s", "step_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("shard_resources", "worker_resources"):
            for resource, amount in getattr(self, name).items():
                if not amount >= 0 or resource == "object_store_memory":
                    raise ConfigError(f"{name}.{resource}: not to be asked for, got {amount}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """What a run leaves behind."""

    export: Path | None = None
    """Export root; every finished run adds a version."""
    metrics: Path | None = None
    """JSON-lines file with one object per progress report and one at the end."""
    metrics_every_step: bool = False
    """Whether that file also gets one object per step and worker."""
    snapshot: str | Path | None = None
    """Snapshot root: a folder, s3://… or gs://…. Every finished run adds a snapshot, named by its
    last step; `recovery` adds more of them on the way."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "snapshot", location("snapshot", self.snapshot))
        if self.metrics_every_step and self.metrics is None:
            raise ConfigError("metrics_every_step needs `metrics`, the file to write to")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """One runnable job."""

    name: str
    seed: int = 0
    data: DataConfig
    tables: dict[str, TableEntry] = field(default_factory=dict)
    features: dict[str, FeatureEntry] = field(default_factory=dict)
    columns: tuple[Any, ...] = ()
    """Embedding columns: more tables and features, with their raw values; `EmbeddingColumn`s or
    YAML's mappings of them (`workers.column_entries`)."""
    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")
        object.__setattr__(self, "columns", embedding_columns(self.columns))
        if not self.features and not self.columns:
            raise ConfigError("features: at least one is needed")
        for column in self.columns:
            if column.embedding_lookup_device == "cpu":
                raise ConfigError(
                    f"columns: '{column.name}' has embedding_lookup_device cpu, which is for "
                    "serving; training takes tpu_embedding_core or tpu_tensor_core"
                )
        for name, feature in self.features.items():
            if feature.table not in self.tables:
                raise ConfigError(
                    f"features.{name}.table: no table '{feature.table}'; "
                    f"known: {', '.join(sorted(self.tables))}"
                )
        for name, entry in self.tables.items():
            if self.output.export is not None and isinstance(entry.combiner, CustomCombiner):
                raise ConfigError(
                    f"output.export: serving cannot run the custom combiner of table '{name}'"
                )
        unused = set(self.tables) - {f.table for f in self.features.values()}
        if unused:
            raise ConfigError(f"tables.{min(unused)}: no feature uses this table")
        check_ranks(self.train.batch_size, self.train.ranks, self.cluster.workers)
        check_recovery(self.recovery, self.output)

    @property
    def num_cpus(self) -> float:
        """CPUs that all actors together ask of Ray."""
        cluster = self.cluster
        shards = cluster.shards * cluster.shard_resources.get("CPU", 0.0)
        return shards + cluster.workers * cluster.worker_resources.get("CPU", 0.0)

    @property
    def num_ranks(self) -> int:
        """Parts that a batch is cut into."""
        return self.train.ranks or self.cluster.workers

    @property
    def worker_batch_size(self) -> int:
        """Examples per step and rank: what shards and the dense model know as a worker's batch."""
        return self.train.batch_size // self.num_ranks

    def with_absolute_paths(self) -> JobConfig:
        """The same job for actors, whose working folder is not the driver's."""
        data, train, output = self.data, self.train, self.output
        return replace(
            self,
            data=replace(data, train=data.train.absolute(), test=_absolute(data.test)),
            train=replace(train, start_from=absolute(train.start_from)),
            output=replace(
                output, export=_absolute(output.export), snapshot=absolute(output.snapshot)
            ),
            recovery=replace(self.recovery, log=_absolute(self.recovery.log)),
        )

    def column_configs(self) -> ColumnConfigs:
        """Tables, features and transforms of the embedding columns.

        Raises:
            ConfigError: columns that do not go together.
        """
        if not self.columns:
            return ColumnConfigs({}, {}, {})
        return configs_from_columns(self.columns, self.train.optimizer)

    @property
    def shard_combined(self) -> frozenset[str]:
        """Tables whose bags the shards combine."""
        return frozenset(n for n, entry in self.tables.items() if entry.combine_on == "shard")

    def transforms(self) -> Mapping[str, Transform]:
        """From raw values to ids, by the features that have one."""
        return self.column_configs().transforms

    def embedding_spec(self) -> EmbeddingSpec:
        """Tables and features with every default filled in.

        Raises:
            ConfigError: an option is wrong, or does not go with the batch or another option.
        """
        tables = {name: entry.table_config(name) for name, entry in self.tables.items()}
        features = {
            name: entry.feature_config(name, tables[entry.table])
            for name, entry in self.features.items()
        }
        of_columns = self.column_configs().feature_config
        if both := sorted(features.keys() & of_columns.keys()):
            raise ConfigError(f"features.{both[0]}: a column is a feature of that name too")
        for column in self.columns:
            if column.is_sequence and column.sequence_length_key in {**features, **of_columns}:
                raise ConfigError(
                    f"features.{column.sequence_length_key}: the model gets the lengths of column "
                    f"'{column.name}' by this name"
                )
        spec = resolve({**features, **of_columns}, self.train.optimizer)
        check_trainable(spec, self.worker_batch_size)
        for name in sorted(self.shard_combined):
            check_combined_on_shards(spec.table(name), spec.features_of(name))
            if self.train.cached_rows:
                raise ConfigError(f"tables.{name}.combine_on: shard leaves no rows to cache")
        for feature in spec.features:
            entry = self.features.get(feature.name)
            weights = None if entry is None else entry.weights
            table = spec.table(feature.table)
            if weights and not uses_weights(table, feature, self.worker_batch_size):
                raise ConfigError(
                    f"features.{feature.name}.weights: '{weights}' would make no difference with "
                    "this combiner, `output_shape` or `tensor_core_shape`; leave it out"
                )
        return spec


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job from YAML, with `--set` overrides.

    Raises:
        ConfigError: one line that names the key, what was seen and what is wanted.
    """
    job: JobConfig = build(JobConfig, load_yaml(Path(path), overrides))
    job.embedding_spec()
    return job
