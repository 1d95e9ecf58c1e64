"""Contenders: a client in a process of its own, with servers that it has started.

What is timed is one step of a training loop, from the moment when the gradients of a
batch are there until the rows of the next batch are: push, update on the shards, pull. Nothing is
under way afterwards, so nobody's work falls into the time of another. Before, and not timed, the
batch's own rows are pulled, and its gradients are written where this contender sends them from:
so rows and gradients are as warm as they are in training. A contender's turn is a number of steps,
one after the other, and counts with their median.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Protocol

import numpy as np

from benchmarks.kernels.timing import Contender
from benchmarks.ps.processes import Child
from benchmarks.ps.table import DIM, Batch, make_batches, num_batches
from ps.memory import empty
from ps.ragged import F32

_START_S = 240.0
_TURN_S, _MOST_STEPS = 0.03, 40
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "-1",
    "GRPC_VERBOSITY": "NONE",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONWARNINGS": "ignore",
}


class Client(Protocol):
    """One worker, as a contender has it. `Any` array of its library will do as rows."""

    def pull(self, batch: Batch) -> Sequence[F32]:
        """Rows of a batch, per shard or in one piece."""
        ...

    def make_gradients(self, batch: Batch) -> None:
        """Put the gradients of a batch where a push takes them from."""
        ...

    def step(self, batch: Batch, upcoming: Batch) -> Sequence[F32]:
        """Push the gradients of a batch; when they are applied, pull the rows of the next one."""
        ...

    def close(self) -> None:
        """End the servers."""
        ...


Step = Callable[[Batch, Batch], Sequence[F32]]


class Gradients:
    """Where a client without a place of its own writes gradients."""

    def __init__(self, batches: Mapping[int, Sequence[Batch]]) -> None:
        self._memory: F32 = empty((max(batches), DIM))

    def written(self, batch: Batch) -> list[F32]:
        """The gradients of a batch, per shard."""
        array = self._memory[: len(batch.grads)]
        array[:] = batch.grads
        return batch.parts(array)


class Process:
    """A client's process."""

    def __init__(self, client: str, sizes: Sequence[int]) -> None:
        """Start it; `client` is `module:class`."""
        os.environ.update(ENVIRONMENT)
        self._child = Child(_serve, client, tuple(sizes), leaf=False)

    def wait_ready(self) -> None:
        """Wait until its servers are there."""
        self._child.receive(_START_S)

    def seconds(self, step: str, size: int, i: int) -> float:
        """How long a step takes, from batch i on; `step` is the client's method."""
        self._child.send(("seconds", step, size, i))
        return float(self._child.receive())

    def rows(self, step: str, size: int, i: int) -> F32:
        """What the step of batch i returns: the rows of the batch after it."""
        self._child.send(("rows", step, size, i))
        rows: F32 = self._child.receive()
        return rows

    def stop(self) -> None:
        """End it and its servers."""
        self._child.stop()


@dataclass(frozen=True, kw_only=True)
class RemoteContender(Contender):
    """A contender that measures its time itself."""

    process: Process
    step: str
    size: int

    def seconds(self, i: int) -> float:
        """See `Contender.seconds`."""
        return self.process.seconds(self.step, self.size, i)


def contender(name: str, process: Process, step: str, size: int) -> RemoteContender:
    """Steps of one size."""
    calls = [partial(process.rows, step, size, i) for i in range(num_batches(size))]
    return RemoteContender(name=name, calls=calls, process=process, step=step, size=size)


def _serve(pipe: Connection, client_class: str, sizes: Sequence[int]) -> None:
    batches = make_batches(sizes)
    module, _, name = client_class.partition(":")
    client: Client = getattr(import_module(module), name)(batches)
    usual: dict[tuple[str, int], float] = {}
    try:
        pipe.send("ready")
        while True:
            what, step, size, i = pipe.recv()
            take_step: Step = getattr(client, step)
            if what == "rows":
                _, rows = _step(client, take_step, batches[size], i)
                pipe.send(np.concatenate([*map(np.asarray, rows)]))
            else:
                usual[step, size] = _turn(
                    client, take_step, batches[size], i, usual.get((step, size), _TURN_S)
                )
                pipe.send(usual[step, size])
    except (EOFError, OSError):
        pass
    finally:
        client.close()


def _turn(client: Client, take_step: Step, batches: Sequence[Batch], i: int, once: float) -> float:
    """The median of steps one after the other, as in training, for about `_TURN_S`."""
    count = int(np.clip(_TURN_S / once, 1, _MOST_STEPS))
    return float(np.median([_step(client, take_step, batches, i + j)[0] for j in range(count)]))


def _step(
    client: Client, take_step: Step, batches: Sequence[Batch], i: int
) -> tuple[float, Sequence[F32]]:
    """(seconds, rows of the next batch) of one step."""
    batch, upcoming = batches[i % len(batches)], batches[(i + 1) % len(batches)]
    client.pull(batch)
    client.make_gradients(batch)
    start = time.perf_counter()
    rows = take_step(batch, upcoming)
    return time.perf_counter() - start, rows
