"""Shard actors as a group: start them, carry messages to them, read and export their tables."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from ps.actor import ShardServer
from ps.client import DEFAULT_TIMEOUT_S, PendingRows
from ps.cluster import actor_options, free_resources
from ps.dense_variables import DenseValues
from ps.errors import JobError
from ps.export import ExportWriter
from ps.messages import Pull, Push, Rows, ShardStats
from ps.partition import Layout, slices
from ps.ragged import F32
from ps.shard import ShardSpec
from ps.snapshot import Snapshot, SnapshotWriter
from ps.spec import EmbeddingSpec


@dataclass(frozen=True, slots=True, eq=False)
class TableState:
    """A whole table in id order: for tests and small tables."""

    rows: F32
    slots: dict[str, F32]


CALLS_PER_WORKER = 16
"""Room in an actor for a worker's calls: pulls that wait and pushes, 3 + 5 at lookahead 2."""
CHECK_EVERY_S = 1.0
FILES_TIMEOUT_S = 3600.0


class RayTransport:
    """Carries one worker's messages to shard actors (see `ps.client.Transport`)."""

    MAX_UNANSWERED_STEPS = 4

    def __init__(self, handles: Sequence[Any], timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._handles = handles
        self._timeout_s = timeout_s
        self._numbers = [0] * len(handles)
        self._pushes: deque[Any] = deque()

    def pull(self, shard: int, pull: Pull) -> PendingRows:
        """See `Transport.pull`."""
        ref = self._handles[shard].pull.remote(self._next_number(shard), pull)
        what = f"shard {shard} has not answered the pull of version {pull.version}"
        return _RayRows(ref, what, self._raise_failed_push)

    def push(self, shard: int, push: Push) -> None:
        """See `Transport.push`."""
        self._pushes.append(self._handles[shard].push.remote(self._next_number(shard), push))
        if len(self._pushes) > self.MAX_UNANSWERED_STEPS * len(self._handles):
            ray.get(self._pushes.popleft(), timeout=self._timeout_s)

    def flush(self, timeout_s: float) -> None:
        """See `Transport.flush`."""
        ray.get(list(self._pushes), timeout=timeout_s)
        self._pushes.clear()

    def _raise_failed_push(self) -> None:
        """A step that a shard could not apply makes no version: a pull would wait in vain."""
        if not self._pushes:
            return
        done, _ = ray.wait(list(self._pushes), num_returns=len(self._pushes), timeout=0)
        ray.get(done)

    def _next_number(self, shard: int) -> int:
        self._numbers[shard] += 1
        return self._numbers[shard] - 1


class _RayRows:
    def __init__(self, ref: Any, what: str, check: Callable[[], None]) -> None:
        self._ref = ref
        self._what = what
        self._check = check

    def result(self, timeout_s: float) -> Rows:
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            try:
                rows: Rows = ray.get(self._ref, timeout=min(CHECK_EVERY_S, left_s))
                return rows
            except ray.exceptions.GetTimeoutError:
                self._check()
                if left_s == 0.0:
                    raise JobError(
                        f"{self._what} within {timeout_s:g} s: another worker is slow or stuck"
                    ) from None


class ShardGroup:
    """All shard actors of a job, as the driver sees them."""

    def __init__(self, spec: ShardSpec, resources: Mapping[str, float], name: str) -> None:
        """Create the actors; `spec.shard_id` is ignored, `resources` are per shard."""
        self.spec = spec
        self.embedding: EmbeddingSpec = spec.embedding
        self._resources = dict(resources)
        self.handles = [
            ray.remote(ShardServer)
            .options(
                name=f"{name}-shard-{shard}",
                **actor_options(resources),
                max_restarts=0,
                max_concurrency=CALLS_PER_WORKER * spec.num_workers + 100,
            )
            .remote(replace(spec, shard_id=shard))
            for shard in range(spec.num_shards)
        ]

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until every shard is placed and its kernels are compiled.

        Raises:
            JobError: they are not, within the time.
        """
        try:
            self.stats(timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise JobError(
                f"{self.spec.num_shards} shards were not ready within {timeout_s:g} s: "
                f"each asks for {self._resources}, the cluster has {free_resources()} free"
            ) from None

    def load_tables(self, snapshot: Snapshot) -> None:
        """Let every shard take its rows and slots of every table from a snapshot."""
        for table in snapshot.tables:
            loads = [
                h.load_table.remote(table.name, table.row_file, table.slot_files)
                for h in self.handles
            ]
            ray.get(loads, timeout=FILES_TIMEOUT_S)

    def set_dense(self, values: DenseValues, version: int = 0) -> Layout:
        """Cut the flat dense vectors into slices and hand them out; the shards are ready then.

        Args:
            values: slots that are missing get their first values.
            version: number of steps that these values, and the tables, have behind them.
        """
        layout = Layout.of(
            self.embedding, self.spec.num_shards, values.trainable.size, values.state.size
        )
        dense = slices(values.trainable, layout.dense_splits)
        slots = {name: slices(v, layout.dense_splits) for name, v in values.slots.items()}
        state = slices(values.state, layout.state_splits)
        calls = [
            h.set_dense.remote(
                dense[k], state[k], {name: parts[k] for name, parts in slots.items()}, version
            )
            for k, h in enumerate(self.handles)
        ]
        ray.get(calls, timeout=DEFAULT_TIMEOUT_S)
        return layout

    def stats(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[ShardStats]:
        """Counters of every shard."""
        stats: list[ShardStats] = ray.get(
            [h.stats.remote() for h in self.handles], timeout=timeout_s
        )
        return stats

    def read_table(self, table: str, version: int) -> TableState:
        """A whole table with its slots, in id order, at exactly `version`."""
        config = self.embedding.table(table)
        shape = (config.vocabulary_size, config.dim)
        rows = np.empty(shape, dtype=np.float32)
        slots = {name: np.empty(shape, dtype=np.float32) for name in config.optimizer.slot_names}
        for handle in self.handles:
            for first_id, part, slot_parts in ray.get(
                handle.read.remote(version, table), timeout=DEFAULT_TIMEOUT_S
            ):
                rows[first_id : first_id + len(part)] = part
                for name, values in slot_parts.items():
                    slots[name][first_id : first_id + len(part)] = values
        return TableState(rows, slots)

    def read_dense(self, version: int) -> tuple[F32, dict[str, F32], F32]:
        """The flat dense vector, its slots, and the non-trainable vector, at `version`."""
        parts = ray.get(
            [h.read_dense.remote(version) for h in self.handles], timeout=DEFAULT_TIMEOUT_S
        )
        slots = {name: np.concatenate([p[1][name] for p in parts]) for name in parts[0][1]}
        dense = np.concatenate([p[0] for p in parts])
        return dense, slots, np.concatenate([p[2] for p in parts])

    def write_tables(self, writer: ExportWriter | SnapshotWriter, version: int) -> None:
        """Let every shard write its rows, and for a snapshot its slots, at `version`."""
        for table in self.embedding.tables:
            rows, slots = writer.row_file(table.name), writer.slot_files(table.name)
            counts = ray.get(
                [h.write_table.remote(version, table.name, rows, slots) for h in self.handles],
                timeout=FILES_TIMEOUT_S,
            )
            assert sum(counts) == table.vocabulary_size, "every row belongs to one shard"

    def stop(self) -> None:
        """Kill the actors; their state is gone."""
        for handle in self.handles:
            ray.kill(handle)
