"""`ShardSpec`: everything a shard needs to know to start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ps.custom_optimizer import CustomOptimizer
from ps.errors import ConfigError
from ps.optimizers import Optimizer
from ps.reduction import Reduction
from ps.spec import EmbeddingSpec

Mode = Literal["sync", "async"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """Everything a shard needs to know to start."""

    shard_id: int
    num_shards: int
    num_workers: int
    """Of ranks: each has pulls, pushes and a fence of its own."""
    embedding: EmbeddingSpec
    dense_optimizer: Optimizer
    reduction: Reduction = "mean"
    """How the workers' gradients become one: their mean (default) or their sum."""
    seed: int = 0
    mode: Mode = "sync"
    max_staleness: int = 0
    """Async mode: steps that a worker may be ahead of the slowest."""
    history: int = 0
    """Sync mode: versions before the present one that pulls may still ask for, kept in memory.

    In any mode, more than 0 says that the shard will be cut or logged: those kernels are compiled
    at the start too."""
    combined: frozenset[str] = frozenset()
    """Tables whose bags it will be asked to combine; their kernels are compiled at the start."""
    threads: int = 1
    """Cores that its kernels may use; results have the same bits for any number."""

    def __post_init__(self) -> None:
        if self.history < 0:
            raise ConfigError(f"history must be at least 0 versions, got {self.history}")
        if isinstance(self.dense_optimizer, CustomOptimizer):
            raise ConfigError(
                "dense_optimizer: a CustomOptimizer updates rows of tables, and the dense values "
                "have none; use one of TensorFlow's other optimizers"
            )
        try:
            self.dense_optimizer.for_shards()
        except ConfigError as e:
            raise ConfigError(f"dense_optimizer: {e}") from None
