"""Arrow Flight: one `do_exchange` stream to each of two servers, which lasts for all steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from benchmarks.ps.contenders import Gradients
from benchmarks.ps.processes import Child
from benchmarks.ps.table import DIM, SHARDS, Batch, Store
from ps.ragged import F32, I64

_REQUEST = pa.schema([("ids", pa.list_(pa.int64())), ("grads", pa.list_(pa.float32()))])
_ANSWER = pa.schema([("rows", pa.list_(pa.float32()))])
_NO_GRADS = np.zeros((0, DIM), dtype=np.float32)


class Flight:
    """A batch with gradients is a push, one without a pull; the servers use the same kernels."""

    def __init__(self, batches: Mapping[int, Sequence[Batch]]) -> None:
        self._servers = [Child(_serve, shard) for shard in range(SHARDS)]
        self._clients = [flight.connect(server.receive()) for server in self._servers]
        self._streams = [
            client.do_exchange(flight.FlightDescriptor.for_command(b"")) for client in self._clients
        ]
        for writer, _ in self._streams:
            writer.begin(_REQUEST)
        self._gradients = Gradients(batches)
        self._grads: list[F32] = []

    def pull(self, batch: Batch) -> Sequence[F32]:
        self._write(batch.local_rows, [_NO_GRADS] * SHARDS)
        return [
            _values(reader.read_chunk().data, 0).reshape(-1, DIM) for _, reader in self._streams
        ]

    def make_gradients(self, batch: Batch) -> None:
        self._grads = self._gradients.written(batch)

    def step(self, batch: Batch, upcoming: Batch) -> Sequence[F32]:
        self._write(batch.local_rows, self._grads)
        return self.pull(upcoming)

    def close(self) -> None:
        for server in self._servers:
            server.kill()

    def _write(self, ids: Sequence[I64], grads: Sequence[F32]) -> None:
        for (writer, _), i, g in zip(self._streams, ids, grads, strict=True):
            writer.write_batch(_batch(_REQUEST, [i, g]))


def _batch(schema: Any, arrays: Sequence[F32 | I64]) -> Any:
    """One row whose columns are lists, so that the arrays travel without a copy."""
    columns = [
        pa.ListArray.from_arrays(np.array([0, a.size], dtype=np.int32), pa.array(a.reshape(-1)))
        for a in arrays
    ]
    return pa.record_batch(columns, schema=schema)


def _values(batch: Any, column: int) -> Any:
    return batch.column(column).values.to_numpy(zero_copy_only=True)


class _Server(flight.FlightServerBase):  # type: ignore[misc]
    def __init__(self, shard: int) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._store = Store(shard)

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        writer.begin(_ANSWER)
        for chunk in reader:
            ids, grads = _values(chunk.data, 0), _values(chunk.data, 1)
            if grads.size:
                self._store.apply(ids, grads.reshape(-1, DIM))
            else:
                writer.write_batch(_batch(_ANSWER, [self._store.gather(ids)]))


def _serve(pipe: Connection, shard: int) -> None:
    server = _Server(shard)
    pipe.send(f"grpc://127.0.0.1:{server.port}")
    server.serve()
