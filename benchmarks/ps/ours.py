"""The product: its kernels in one process, and shards and a worker that speak `ps.wire`.

With `table`, the only module that knows the product's own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.ps.contenders import Gradients
from benchmarks.ps.processes import Child, keep_to_cpu, wait_for_end
from benchmarks.ps.table import DIM, LAYOUT, NAME, SHARDS, SPEC, Batch, Store, local_rows
from ps.client import ShardClient
from ps.memory import empty
from ps.optimizers import SGD
from ps.ragged import F32, I64
from ps.rowstore import RowStore, Update
from ps.shard import ShardSpec, ShardState
from ps.spec import TableSpec
from ps.warm import warm_up
from ps.wire.greeting import Credentials
from ps.wire.handshake import new_token
from ps.wire.messages import WireFormat
from ps.wire.server import ServerOptions, ShardLoop
from ps.wire.transport import TransportName, TransportOptions, WireTransport

_FORMAT = WireFormat((DIM,))
_FINGERPRINT = 5
_NOTHING = np.zeros(0, dtype=np.float32)
Batches = Mapping[int, Sequence[Batch]]


class Kernels:
    """Both shards in this process and thread, rows and gradients in memory that is used again."""

    def __init__(self, batches: Batches) -> None:
        self._stores = [Store(shard) for shard in range(SHARDS)]
        self._gradients = Gradients(batches)
        self._rows: F32 = empty((max(batches), DIM))
        self._grads: list[F32] = []

    def pull(self, batch: Batch) -> Sequence[F32]:
        rows = self._rows[: len(batch.grads)]
        for store, local, out in zip(
            self._stores, batch.local_rows, batch.parts(rows), strict=True
        ):
            store.gather(local, out)
        return (rows,)

    def make_gradients(self, batch: Batch) -> None:
        self._grads = self._gradients.written(batch)

    def step(self, batch: Batch, upcoming: Batch) -> Sequence[F32]:
        for store, local, grads in zip(self._stores, batch.local_rows, self._grads, strict=True):
            store.apply(local, grads)
        return self.pull(upcoming)

    def close(self) -> None:
        pass


class _Wire:
    """Shards in processes of their own, and a `ShardClient` here."""

    TRANSPORT: TransportName
    STATE: Callable[[ShardSpec], ShardState] = ShardState

    def __init__(self, batches: Batches) -> None:
        token = new_token()
        self._shards = [Child(_shard, k, token, self.STATE) for k in range(SHARDS)]
        endpoints = [shard.receive() for shard in self._shards]
        self._transport = WireTransport(
            endpoints,
            Credentials(token, 0, _FINGERPRINT),
            TransportOptions(name=self.TRANSPORT, format=_FORMAT),
        )
        self._client = ShardClient(SPEC, LAYOUT, self._transport, 0, _FORMAT)
        self._version = 0
        self._grads = _NOTHING

    def pull(self, batch: Batch) -> Sequence[F32]:
        pending = self._client.pull(self._version, self._version, {NAME: batch.rows})
        return (pending.result().rows[NAME],)

    def make_gradients(self, batch: Batch) -> None:
        self._grads = self._client.gradients(batch.grads.shape)
        self._grads[:] = batch.grads

    def step(self, batch: Batch, upcoming: Batch) -> Sequence[F32]:
        grads, self._grads = self._grads, _NOTHING
        self._client.push(self._version, {NAME: batch.rows}, {NAME: grads}, _NOTHING, None)
        self._version += 1
        return self.pull(upcoming)

    def close(self) -> None:
        self._transport.close()
        for shard in self._shards:
            shard.kill()


class _IdleStore(RowStore):
    """Rows that are neither read nor changed."""

    def gather(self, local_rows: I64, out: F32 | None = None) -> F32:
        return self.rows[: local_rows.size] if out is None else out

    def prepare(
        self,
        local_rows: I64,
        grads: F32,
        rate: float,
        hyperparameters: Sequence[float] = (),
        *,
        distinct: bool = False,
    ) -> Update:
        return local_rows[:0], lambda: None


class _IdleState(ShardState):
    """A shard without its kernels: what is left is the transport."""

    def _new_table(self, table: TableSpec) -> RowStore:
        return _IdleStore.zeros((local_rows(self.spec.shard_id), table.dim), table.optimizer)


class Arena(_Wire):
    """Shared memory, with a socket as doorbell."""

    TRANSPORT = "arena"


class Tcp(_Wire):
    """TCP over loopback."""

    TRANSPORT = "tcp"


class IdleTcp(Tcp):
    """The same bytes, and nothing done with them."""

    STATE = _IdleState


def _shard(
    pipe: Connection, shard: int, token: bytes, make_state: Callable[[ShardSpec], ShardState]
) -> None:
    keep_to_cpu(shard)
    spec = ShardSpec(
        shard_id=shard,
        num_shards=SHARDS,
        num_workers=1,
        embedding=SPEC,
        dense_optimizer=SGD(),
    )
    warm_up(spec)
    state = make_state(spec)
    state.set_dense(_NOTHING, _NOTHING)
    options = ServerOptions(token=token, fingerprint=_FINGERPRINT, format=_FORMAT)
    loop = ShardLoop(state, options)
    pipe.send(loop.endpoint)
    wait_for_end(pipe)
    loop.close()
