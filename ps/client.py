"""`ShardClient`: one pull or push over all shards, whatever carries the messages.

A `Transport` carries messages to shards; the client cuts a batch into one message per shard and
puts the answers together. Calls of one client must not run at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ps.errors import ProtocolError
from ps.memory import empty
from ps.messages import Pull, Push, Rows
from ps.partition import DistinctRows, Layout, slices
from ps.ragged import F32
from ps.shard import ShardState
from ps.spec import EmbeddingSpec

DEFAULT_TIMEOUT_S = 120.0


class PendingRows(Protocol):
    """An answer under way."""

    def result(self, timeout_s: float) -> Rows:
        """Wait for the answer."""
        ...


class Transport(Protocol):
    """Carries the messages of one worker to shards, in order per shard."""

    def pull(self, shard: int, pull: Pull) -> PendingRows:
        """Send a pull; returns at once."""
        ...

    def push(self, shard: int, push: Push) -> None:
        """Send a push; returns at once, or after room is made in a bounded window."""
        ...

    def flush(self, timeout_s: float) -> None:
        """Wait until all pushes have been taken; raises what a shard raised."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PulledRows:
    """Rows of one batch, at one version."""

    version: int
    rows: dict[str, F32]
    """float32 [U, D] per table, in the order of its `DistinctRows`."""
    dense: F32
    """float32 [P]: all trainable dense values."""
    state: F32
    """float32 [S]: all non-trainable dense values."""


class PendingPull:
    """A pull under way on all shards."""

    def __init__(self, spec: EmbeddingSpec, answers: Sequence[PendingRows]) -> None:
        self._spec = spec
        self._answers = answers

    def result(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> PulledRows:
        """Wait for every shard and join the answers, shard by shard."""
        answers = [pending.result(timeout_s) for pending in self._answers]
        versions = {answer.version for answer in answers}
        if len(versions) != 1:
            raise ProtocolError(f"one pull was answered at several versions: {sorted(versions)}")
        return PulledRows(
            version=versions.pop(),
            rows={
                table.name: _joined([answer.rows[i] for answer in answers])
                for i, table in enumerate(self._spec.tables)
            },
            dense=np.concatenate([answer.dense for answer in answers]),
            state=np.concatenate([answer.state for answer in answers]),
        )


def _joined(parts: Sequence[F32]) -> F32:
    rows = empty((sum(map(len, parts)), parts[0].shape[1]))
    np.concatenate(parts, out=rows)
    return rows


class ShardClient:
    """One worker's access to all shards."""

    def __init__(
        self, spec: EmbeddingSpec, layout: Layout, transport: Transport, worker: int
    ) -> None:
        self.spec = spec
        self.layout = layout
        self._transport = transport
        self._worker = worker

    def pull(self, step: int, version: int, distinct: Mapping[str, DistinctRows]) -> PendingPull:
        """Ask for the rows of a batch at exactly `version`; returns without waiting."""
        tables = [distinct[table.name] for table in self.spec.tables]
        return PendingPull(
            self.spec,
            [
                self._transport.pull(
                    shard,
                    Pull(self._worker, step, version, tuple(t.of_shard(shard) for t in tables)),
                )
                for shard in range(self.layout.num_shards)
            ],
        )

    def push(
        self,
        step: int,
        distinct: Mapping[str, DistinctRows],
        grads: Mapping[str, F32],
        dense_grad: F32,
        state: F32 | None,
    ) -> None:
        """Send a step's gradients: float32 [U, D] per table, and the flat dense gradient [P]."""
        assert dense_grad.size == self.layout.dense_splits[-1], "one gradient per dense value"
        dense_parts = slices(dense_grad, self.layout.dense_splits)
        state_parts = None if state is None else slices(state, self.layout.state_splits)
        for shard in range(self.layout.num_shards):
            local, parts = [], []
            for table in self.spec.tables:
                d = distinct[table.name]
                local.append(d.of_shard(shard))
                parts.append(grads[table.name][d.shard_splits[shard] : d.shard_splits[shard + 1]])
            self._transport.push(
                shard,
                Push(
                    self._worker,
                    step,
                    tuple(local),
                    tuple(parts),
                    dense_parts[shard],
                    None if state_parts is None else state_parts[shard],
                ),
            )

    def flush(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Wait until every push sent so far has been taken by its shard."""
        self._transport.flush(timeout_s)


class LocalTransport:
    """Shards in this process: for tests, and for runs that want no Ray."""

    def __init__(self, shards: Sequence[ShardState]) -> None:
        self._shards = shards

    def pull(self, shard: int, pull: Pull) -> PendingRows:
        """See `Transport.pull`."""
        answer = _LocalRows()
        self._shards[shard].pull(pull, answer.set)
        return answer

    def push(self, shard: int, push: Push) -> None:
        """See `Transport.push`."""
        self._shards[shard].push(push)

    def flush(self, timeout_s: float) -> None:
        """Nothing to wait for: pushes have been taken when `push` returns."""


class _LocalRows:
    def __init__(self) -> None:
        self._rows: Rows | None = None

    def set(self, rows: Rows) -> None:
        self._rows = rows

    def result(self, timeout_s: float) -> Rows:
        if self._rows is None:
            raise ProtocolError("the version is not made yet, and nobody else will make it")
        return self._rows
