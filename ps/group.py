"""Shard actors as a group: start them, let workers in, read and export their tables."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import ray

from ps.actor import NODE_ADDRESS, ShardServer
from ps.client import DEFAULT_TIMEOUT_S
from ps.cluster import actor_options, free_resources, num_nodes
from ps.dense_variables import DenseValues
from ps.errors import JobError
from ps.export import ExportWriter
from ps.messages import ShardStats
from ps.partition import Layout, slices
from ps.ragged import F32
from ps.shard import ShardSpec
from ps.snapshot import Snapshot, SnapshotWriter
from ps.spec import EmbeddingSpec
from ps.wire.greeting import Credentials
from ps.wire.handshake import new_token
from ps.wire.messages import WireDtype, WireFormat
from ps.wire.server import Endpoint, ServerOptions
from ps.wire.transport import TransportName, TransportOptions, WireTransport


@dataclass(frozen=True, slots=True, eq=False)
class TableState:
    """A whole table in id order: for tests and small tables."""

    rows: F32
    slots: dict[str, F32]


FILES_TIMEOUT_S = 3600.0
_CONTROL_CALLS = 100


@dataclass(frozen=True, slots=True)
class ShardAccess:
    """What a worker needs to reach the shards; it travels through Ray, to workers only."""

    endpoints: tuple[Endpoint, ...]
    token: bytes = field(repr=False)
    fingerprint: int
    format: WireFormat

    def connect(
        self, worker: int, name: TransportName, background: bool, timeout_s: float
    ) -> WireTransport:
        """Connect a worker to all shards; see `WireTransport`."""
        credentials = Credentials(self.token, worker, self.fingerprint)
        options = TransportOptions(
            name=name, format=self.format, background=background, timeout_s=timeout_s
        )
        return WireTransport(self.endpoints, credentials, options)


class ShardGroup:
    """All shard actors of a job, as the driver sees them."""

    def __init__(
        self,
        spec: ShardSpec,
        resources: Mapping[str, float],
        name: str,
        wire_dtype: WireDtype = "float32",
        pin: bool = False,
    ) -> None:
        """Create the actors; `spec.shard_id` is ignored, `resources` are per shard."""
        self.spec = spec
        format = WireFormat(tuple(table.dim for table in spec.embedding.tables), wire_dtype)
        options = ServerOptions(
            token=new_token(),
            fingerprint=_fingerprint(spec, format),
            format=format,
            host="127.0.0.1" if num_nodes() == 1 else NODE_ADDRESS,
            pin=pin and spec.threads == 1,
        )
        self._options = options
        self.embedding: EmbeddingSpec = spec.embedding
        self._resources = dict(resources)
        self.handles = [
            ray.remote(ShardServer)
            .options(
                name=f"{name}-shard-{shard}",
                **actor_options(resources),
                max_restarts=0,
                max_concurrency=_CONTROL_CALLS,
            )
            .remote(replace(spec, shard_id=shard), options)
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

    def access(self) -> ShardAccess:
        """How workers reach the shards."""
        endpoints = ray.get([h.endpoint.remote() for h in self.handles], timeout=DEFAULT_TIMEOUT_S)
        options = self._options
        return ShardAccess(tuple(endpoints), options.token, options.fingerprint, options.format)

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


def _fingerprint(spec: ShardSpec, format: WireFormat) -> int:
    """64 bits of what worker and shard must have in common to understand each other."""
    tables = [(t.name, t.vocabulary_size, t.dim) for t in spec.embedding.tables]
    said = repr((spec.num_shards, spec.num_workers, spec.mode, tables, format.dtype))
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")
