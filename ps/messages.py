"""What workers and shards say to each other: one fused message per shard and step.

Arrays are per table, in the order of `EmbeddingSpec.tables`. `ps.wire` says how a message travels.
Messages are not changed once they are made; that they are not frozen saves microseconds each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ps.ragged import F32, I64

LATEST = -1
"""Version of a pull that takes whatever the shard has: async mode."""


@dataclass(slots=True, eq=False)
class Bags:
    """The shard combines: entries of a message's `local_rows` in bags, summed row by row."""

    row_splits: I64
    """int64 [bags + 1]: the entries of each bag; the last is the number of entries."""
    weights: F32
    """float32 [entries], or empty for all ones."""

    @property
    def count(self) -> int:
        """Number of bags."""
        return self.row_splits.size - 1


@dataclass(slots=True, eq=False)
class Pull:
    """Read rows of every table, and the shard's dense slices, at one exact version."""

    worker: int
    step: int
    version: int
    """Number of steps applied; the shard answers when it is at exactly this version. `LATEST` for
    what is there, which async mode asks for."""
    local_rows: tuple[I64, ...]
    bags: tuple[Bags | None, ...] = ()
    """Per table: None for rows as they are, else one weighted sum per bag; () for all None."""
    into: Rows | None = None
    """Arrays that the answer is to be written to, where the transport has them ready."""


@dataclass(slots=True, eq=False)
class Rows:
    """The answer to a `Pull`."""

    version: int
    rows: tuple[F32, ...]
    """float32 [n, D] per table: n rows, or n bags."""
    dense: F32
    state: F32


@dataclass(slots=True, eq=False)
class Push:
    """One worker's gradients of one step."""

    worker: int
    step: int
    local_rows: tuple[I64, ...]
    grads: tuple[F32, ...]
    """float32 [n, D] per table; one summed gradient per row, unless the table's optimizer has
    `use_gradient_accumulation=False` (then a row appears once per contribution). With `bags`, one
    gradient per bag: an entry's is its weight times that of its bag."""
    dense_grad: F32
    state: F32 | None
    """New non-trainable values, from worker 0 only."""
    bags: tuple[Bags | None, ...] = ()
    """As in `Pull`."""


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
    staleness: tuple[int, ...] = ()
    """Pushes by the number of steps that were applied between a push's pull and itself."""
    fences: tuple[int, ...] = ()
    """Per worker: the step that the shard expects next, in the state that it has."""
    expected: tuple[int, ...] = ()
    """Per worker: the step that it has not pushed yet; pushes that wait for others' count."""
    ready: bool = False
    """Whether it has been given its state."""
    cut_version: int | None = None
    """Of the cut that is armed or running."""
    saved_bytes: int = 0
    """Memory of rows that changed since the running cut began."""


@dataclass(frozen=True, slots=True, eq=False)
class LogEntry:
    """What one version of a shard changed: with the version before, all of its state.

    Its arrays are copies: nobody changes them once it is made.
    """

    version: int
    """Sync mode: the version that was made. Async mode: pushes applied, this one included."""
    fences: tuple[int, ...]
    """Per worker: the step that the shard expects next."""
    tables: tuple[tuple[I64, F32], ...]
    """Per table: distinct local rows int64 [n], their new records float32 [n, (1 + slots) · D]."""
    dense: F32
    """float32 [1 + slots, p]: the shard's trainable values and their slots."""
    state: F32
    """float32 [s]: its non-trainable values."""


def bags_of(bags: tuple[Bags | None, ...], num_tables: int) -> tuple[Bags | None, ...]:
    """The bags of every table."""
    return bags or (None,) * num_tables


def no_weights() -> F32:
    """All ones."""
    return np.zeros(0, dtype=np.float32)
