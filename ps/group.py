"""Shard actors as a group: start them, let workers in, restore, cut and export their tables."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from ps.actor import NODE_ADDRESS, WITH_DRIVER, Lifetime, LogPlace, ShardServer
from ps.client import DEFAULT_TIMEOUT_S
from ps.cluster import NAMESPACE, actor_options, free_resources, named, num_nodes
from ps.dense_variables import DenseValues
from ps.errors import JobError
from ps.export import ExportWriter
from ps.messages import ShardStats
from ps.partition import Layout, slices
from ps.ragged import F32
from ps.shard import ShardSpec
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
        self,
        worker: int,
        name: TransportName,
        background: bool,
        timeout_s: float,
        *,
        reconnect_s: float = 0.0,
        max_pushes: int = 4,
    ) -> WireTransport:
        """Connect a worker (a rank of the job) to all shards; see `WireTransport`."""
        credentials = Credentials(self.token, worker, self.fingerprint)
        options = TransportOptions(
            name=name,
            format=self.format,
            background=background,
            timeout_s=timeout_s,
            reconnect_s=reconnect_s,
            max_pushes=max_pushes,
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
        lifetime: Lifetime = WITH_DRIVER,
    ) -> None:
        """Take over the shards of an earlier driver of the same job, or create them.

        Only shards that outlive their driver (`lifetime.orphan_s`) can be taken over, and only all
        of them, with their state; `taken_over` says whether that is so.

        Args:
            spec: of all shards; `shard_id` is ignored.
            resources: what each asks of Ray.
            name: of the job; actors are `<name>-shard-<k>`.
            wire_dtype: how rows and gradients travel.
            pin: whether each shard keeps to a CPU.
            lifetime: how long shards live without their driver.

        Raises:
            JobError: another driver of this job is at work.
        """
        self.spec = spec
        self.embedding: EmbeddingSpec = spec.embedding
        self._name = name
        self._resources = dict(resources)
        self._lifetime = lifetime
        format = WireFormat(tuple(table.dim for table in spec.embedding.tables), wire_dtype)
        self._options = ServerOptions(
            token=new_token(),
            fingerprint=_fingerprint(spec, format),
            format=format,
            host="127.0.0.1" if num_nodes() == 1 else NODE_ADDRESS,
            pin=pin and spec.threads == 1,
        )
        self.handles: list[Any] = []
        self.taken_over = lifetime.orphan_s > 0 and self._take_over()
        if not self.taken_over:
            self.handles = [self._created(shard) for shard in range(spec.num_shards)]

    def replace(self, shards: Sequence[int]) -> None:
        """New processes, without state, in place of these; what is left of the old ones ends."""
        for shard in shards:
            ray.kill(self.handles[shard])
        for shard in shards:
            self.handles[shard] = self._created(shard)

    def start_anew(self) -> None:
        """New processes, without state, for all shards."""
        self.taken_over = False
        self.replace(range(self.spec.num_shards))

    def wait_ready(self, timeout_s: float, shards: Sequence[int] | None = None) -> None:
        """Wait until every shard (of these) is placed and its kernels are compiled.

        Raises:
            JobError: they are not, within the time.
        """
        handles = self.handles if shards is None else [self.handles[k] for k in shards]
        try:
            ray.get([h.endpoint.remote() for h in handles], timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise JobError(
                f"{len(handles)} shards were not ready within {timeout_s:g} s: "
                f"each asks for {self._resources}, the cluster has {free_resources()} free"
            ) from None

    def endpoints(self) -> list[Endpoint]:
        """Where workers reach each shard."""
        endpoints: list[Endpoint] = ray.get(
            [h.endpoint.remote() for h in self.handles], timeout=DEFAULT_TIMEOUT_S
        )
        return endpoints

    def access(self) -> ShardAccess:
        """How workers reach the shards."""
        options = self._options
        return ShardAccess(
            tuple(self.endpoints()), options.token, options.fingerprint, options.format
        )

    def load_tables(self, location: str, shards: Sequence[int] | None = None) -> float:
        """Let shards take their rows and slots from a snapshot; returns the longest one's seconds.

        Raises:
            SnapshotError: it is damaged.
        """
        loads = [self.handles[k].load_tables.remote(location) for k in self._all(shards)]
        return float(max(ray.get(loads, timeout=FILES_TIMEOUT_S)))

    def layout(self, values: DenseValues) -> Layout:
        """Where everything lies, with dense values of these sizes."""
        return Layout.of(
            self.embedding, self.spec.num_shards, values.trainable.size, values.state.size
        )

    def set_dense(
        self, values: DenseValues, version: int = 0, shards: Sequence[int] | None = None
    ) -> Layout:
        """Cut the flat dense vectors into slices and hand them out; the shards are ready then.

        Args:
            values: slots that are missing get their first values.
            version: number of steps that these values, and the tables, have behind them.
            shards: None for all.
        """
        layout = self.layout(values)
        dense = slices(values.trainable, layout.dense_splits)
        slots = {name: slices(v, layout.dense_splits) for name, v in values.slots.items()}
        state = slices(values.state, layout.state_splits)
        calls = [
            self.handles[k].set_dense.remote(
                dense[k], state[k], {name: parts[k] for name, parts in slots.items()}, version
            )
            for k in self._all(shards)
        ]
        ray.get(calls, timeout=DEFAULT_TIMEOUT_S)
        return layout

    def log_place(self, root: Path, shard: int) -> LogPlace:
        """Where a shard's commit log is."""
        identity = {
            "job": self._lifetime.job,
            "shard": shard,
            "num_shards": self.spec.num_shards,
            "workers": self.spec.num_workers,
        }
        folder = root / f"{shard:05d}-of-{self.spec.num_shards:05d}"
        return LogPlace(folder=folder, identity=identity)

    def log_ends(self, root: Path) -> list[int | None]:
        """The last version in each shard's log."""
        calls = [h.log_end.remote(self.log_place(root, k)) for k, h in enumerate(self.handles)]
        ends: list[int | None] = ray.get(calls, timeout=FILES_TIMEOUT_S)
        return ends

    def start_logs(
        self, root: Path, upto: int | None = None, shards: Sequence[int] | None = None
    ) -> int:
        """Let shards replay their logs, and go on with them; returns the most versions replayed."""
        calls = [
            self.handles[k].start_log.remote(self.log_place(root, k), upto)
            for k in self._all(shards)
        ]
        return int(max(ray.get(calls, timeout=FILES_TIMEOUT_S)))

    def arm_cut(self, version: int) -> None:
        """Let every shard cut its state at `version`; all have agreed when this returns."""
        calls = [h.arm_cut.remote(version) for h in self.handles]
        ray.get(calls, timeout=DEFAULT_TIMEOUT_S)

    def disarm(self) -> None:
        """Call off cuts that are armed or being written."""
        ray.get([h.disarm.remote() for h in self.handles], timeout=DEFAULT_TIMEOUT_S)

    def truncate_logs(self, version: int) -> None:
        """Let every shard forget its log up to a version; waits for nobody."""
        for handle in self.handles:
            handle.truncate_log.remote(version)

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

    def write_tables(self, writer: ExportWriter, version: int) -> None:
        """Let every shard write its rows into an export, at `version`."""
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

    def _all(self, shards: Sequence[int] | None) -> Sequence[int]:
        return range(self.spec.num_shards) if shards is None else shards

    def _created(self, shard: int) -> Any:
        outlives = {"lifetime": "detached"} if self._lifetime.orphan_s else {}
        options = {
            **actor_options(self._resources),
            **outlives,
            "max_restarts": 0,  # a restart by Ray would have no rows: the driver restores
            "max_concurrency": _CONTROL_CALLS,
        }
        spec = replace(self.spec, shard_id=shard)
        return named(
            f"{self._name}-shard-{shard}",
            lambda **name: (
                ray.remote(ShardServer)
                .options(**options, **name)
                .remote(spec, self._options, self._lifetime)
            ),
        )

    def _take_over(self) -> bool:
        """Find the shards of a driver that is gone; those that cannot be used are stopped."""
        found: dict[int, Any] = {}
        for shard in range(self.spec.num_shards):
            try:
                found[shard] = ray.get_actor(f"{self._name}-shard-{shard}", NAMESPACE)
            except ValueError:
                continue
        usable = len(found) == self.spec.num_shards
        for shard, handle in found.items():
            try:
                lifetime, options, observed = _after_driver(handle)
                ready = ray.get(handle.stats.remote(), timeout=_TAKE_OVER_S).ready
            except (ray.exceptions.RayError, JobError) as e:
                if isinstance(e, JobError):
                    raise
                usable = False
                continue
            if observed:
                raise JobError(
                    f"job '{self._name}' is being driven already: its shard {shard} answers to "
                    "another driver; stop that one, or give this job another name"
                )
            usable &= lifetime.job == self._lifetime.job and ready
            self._options = options if usable else self._options
        if usable:
            self.handles = [found[k] for k in range(self.spec.num_shards)]
            return True
        for handle in found.values():
            ray.kill(handle)
        return False


_TAKE_OVER_S = 10.0
_DRIVER_GONE_S = 5.0


def _after_driver(handle: Any) -> tuple[Lifetime, ServerOptions, bool]:
    """A shard's identity; waits a little for the end of a driver that was just killed."""
    deadline = time.monotonic() + _DRIVER_GONE_S
    while True:
        found: tuple[Lifetime, ServerOptions, bool]
        found = ray.get(handle.identity.remote(), timeout=_TAKE_OVER_S)
        if not found[2] or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def _fingerprint(spec: ShardSpec, format: WireFormat) -> int:
    """64 bits of what worker and shard must have in common to understand each other."""
    tables = [(t.name, t.vocabulary_size, t.dim) for t in spec.embedding.tables]
    said = repr((spec.num_shards, spec.num_workers, spec.mode, tables, format.dtype))
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")
