"""torch RPC over TensorPipe: `index_select` and `index_add_` on tensors of two servers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import rpc

from benchmarks.ps import table
from benchmarks.ps.contenders import Gradients
from benchmarks.ps.processes import Child, wait_for_end
from benchmarks.ps.table import DIM, RATE, SHARDS, Batch
from ps.memory import empty
from ps.ragged import F32

_THREADS = 1
"""Of torch in each process: two servers and a client have two cores."""
_WORKER_THREADS = 16
"""Of RPC, as is its default."""


class TorchRpc:
    """Calls to both servers at once; a pull is sent when the pushes have been answered."""

    def __init__(self, batches: Mapping[int, Sequence[Batch]]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        meeting_point = str(Path(self._folder.name) / "rendezvous")
        self._servers = [Child(_serve, shard, meeting_point) for shard in range(SHARDS)]
        _join("client", SHARDS, meeting_point)
        for server in self._servers:
            server.receive()
        self._gradients = Gradients(batches)
        self._grads: list[F32] = []

    def pull(self, batch: Batch) -> Sequence[F32]:
        return [rows.numpy() for rows in _call(_pull, batch.local_rows)]

    def make_gradients(self, batch: Batch) -> None:
        self._grads = self._gradients.written(batch)

    def step(self, batch: Batch, upcoming: Batch) -> Sequence[F32]:
        _call(_push, batch.local_rows, self._grads)
        return self.pull(upcoming)

    def step_in_one_call(self, batch: Batch, upcoming: Batch) -> Sequence[F32]:
        """The next batch's pull in the same call as the push."""
        calls = _call(_push_and_pull, batch.local_rows, self._grads, upcoming.local_rows)
        return [rows.numpy() for rows in calls]

    def close(self) -> None:
        for server in self._servers:
            server.kill()
        self._folder.cleanup()


def _call(function: Callable[..., Any], *arrays: Sequence[Any]) -> list[Any]:
    futures = [
        rpc.rpc_async(f"server{shard}", function, tuple(map(torch.from_numpy, of_shard)))
        for shard, of_shard in enumerate(zip(*arrays, strict=True))
    ]
    return [future.wait() for future in futures]


def _join(name: str, rank: int, meeting_point: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(_THREADS)
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=_WORKER_THREADS, init_method=f"file://{meeting_point}"
    )
    rpc.init_rpc(name, rank=rank, world_size=SHARDS + 1, rpc_backend_options=options)


# --- in the servers -------------------------------------------------------------------------------

_rows: dict[str, torch.Tensor] = {}


def _pull(local: torch.Tensor) -> torch.Tensor:
    return _rows["all"].index_select(0, local)


def _push(local: torch.Tensor, grads: torch.Tensor) -> None:
    _rows["all"].index_add_(0, local, grads, alpha=-RATE)


def _push_and_pull(
    local: torch.Tensor, grads: torch.Tensor, upcoming: torch.Tensor
) -> torch.Tensor:
    _push(local, grads)
    return _pull(upcoming)


def _serve(pipe: Connection, shard: int, meeting_point: str) -> None:
    rows: F32 = empty((table.local_rows(shard), DIM))  # on huge pages, as the product's
    table.fill(rows, shard)
    _rows["all"] = torch.from_numpy(rows)
    _join(f"server{shard}", shard, meeting_point)
    pipe.send("ready")
    wait_for_end(pipe)
