"""What workers and shards say to each other: one fused message per shard and step.

Arrays are per table, in the order of `EmbeddingSpec.tables`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ps.ragged import F32, I64


@dataclass(frozen=True, slots=True, eq=False)
class Pull:
    """Read rows of every table, and the shard's dense slices, at one exact version."""

    worker: int
    step: int
    version: int
    """Number of steps applied; the shard answers when it is at exactly this version."""
    local_rows: tuple[I64, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The answer to a `Pull`."""

    version: int
    rows: tuple[F32, ...]
    """float32 [n, D] per table."""
    dense: F32
    state: F32


@dataclass(frozen=True, slots=True, eq=False)
class Push:
    """One worker's gradients of one step."""

    worker: int
    step: int
    local_rows: tuple[I64, ...]
    grads: tuple[F32, ...]
    """float32 [n, D] per table; one summed gradient per row, unless the table's optimizer has
    `use_gradient_accumulation=False` (then a row appears once per contribution)."""
    dense_grad: F32
    state: F32 | None
    """New non-trainable values, from worker 0 only."""


@dataclass(frozen=True, slots=True)
class ShardStats:
    """Counters of a shard since it started."""

    shard_id: int
    version: int
    rows_pulled: int
    rows_pushed: int
    duplicates_dropped: int
    num_rows: int
    size_bytes: int
