"""Plain Ray actor calls: what a parameter server on Ray does without a data plane of its own.

Arrays travel as arguments and results. The actors have the product's kernels, so only the transport
differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray

from benchmarks.ps.contenders import Gradients
from benchmarks.ps.table import SHARDS, Batch, Store
from ps.ragged import F32, I64

_STORE_BYTES = 1 << 29
_TIMEOUT_S = 60.0


class _Shard:
    """An actor; its calls run in the order in which they were made."""

    def __init__(self, shard: int) -> None:
        self._store = Store(shard)

    def pull(self, local: I64) -> F32:
        return self._store.gather(local).copy()  # the result may still be under way

    def push(self, local: I64, grads: F32) -> None:
        self._store.apply(local, grads)


class RayActors:
    """Calls to both actors at once; a pull follows a push without waiting for it."""

    def __init__(self, batches: Mapping[int, Sequence[Batch]]) -> None:
        ray.init(
            address="local",
            num_cpus=SHARDS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=_STORE_BYTES,
        )
        self._shards: list[Any] = [ray.remote(_Shard).remote(k) for k in range(SHARDS)]
        self._gradients = Gradients(batches)
        self._grads: list[F32] = []

    def pull(self, batch: Batch) -> Sequence[F32]:
        calls = [s.pull.remote(i) for s, i in zip(self._shards, batch.local_rows, strict=True)]
        rows: Sequence[F32] = ray.get(calls, timeout=_TIMEOUT_S)
        return rows

    def make_gradients(self, batch: Batch) -> None:
        self._grads = self._gradients.written(batch)

    def step(self, batch: Batch, upcoming: Batch) -> Sequence[F32]:
        for shard, local, grads in zip(self._shards, batch.local_rows, self._grads, strict=True):
            shard.push.remote(local, grads)
        return self.pull(upcoming)

    def step_one_by_one(self, batch: Batch, upcoming: Batch) -> Sequence[F32]:
        """One call after the other, each waited for."""
        for shard, local, grads in zip(self._shards, batch.local_rows, self._grads, strict=True):
            ray.get(shard.push.remote(local, grads), timeout=_TIMEOUT_S)
        return [
            ray.get(shard.pull.remote(local), timeout=_TIMEOUT_S)
            for shard, local in zip(self._shards, upcoming.local_rows, strict=True)
        ]

    def close(self) -> None:
        ray.shutdown()
