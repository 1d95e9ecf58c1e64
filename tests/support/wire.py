"""The data plane without Ray: jobs, shards in threads, clients, and what they train."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from ps.bags import ShardBags, shard_bags
from ps.client import LocalTransport, PulledRows, ShardClient
from ps.config import FeatureConfig, TableConfig
from ps.initializers import RandomUniform
from ps.messages import LATEST
from ps.optimizers import FTRL, SGD, Adagrad, Adam, Optimizer
from ps.partition import DistinctRows, Layout, distinct_rows
from ps.ragged import F32
from ps.shard import Mode, ShardSpec, ShardState
from ps.spec import EmbeddingSpec, resolve
from ps.wire.greeting import Credentials
from ps.wire.messages import WireDtype, WireFormat
from ps.wire.server import Endpoint, ServerOptions, ShardLoop
from ps.wire.transport import TransportName, TransportOptions, WireTransport
from tests.support.shards import contents

TOKEN = b"t" * 32
FINGERPRINT = 0xF00D
TIMEOUT_S = 60.0

Names = dict[str, DistinctRows | ShardBags]


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Wait for something that another thread or process does."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)


# --- jobs


@dataclass(frozen=True, kw_only=True)
class Job:
    """What shards and workers of one test have in common."""

    optimizers: tuple[Optimizer, ...] = (SGD(0.1),)
    """One table per optimizer."""
    dims: tuple[int, ...] = (4,)
    """Of the tables."""
    num_rows: int = 300
    num_shards: int = 1
    num_workers: int = 1
    dense_size: int = 7
    state_size: int = 3
    mode: Mode = "sync"
    max_staleness: int = 0
    dtype: WireDtype = "float32"
    history: int = 0

    @property
    def embedding(self) -> EmbeddingSpec:
        start = RandomUniform(-1.0, 1.0)
        pairs = zip(self.optimizers, self.dims, strict=True)
        return resolve(
            [
                FeatureConfig(TableConfig(self.num_rows, dim, start, o, name=f"t{i}"))
                for i, (o, dim) in enumerate(pairs)
            ]
        )

    @property
    def layout(self) -> Layout:
        return Layout.of(self.embedding, self.num_shards, self.dense_size, self.state_size)

    @property
    def format(self) -> WireFormat:
        return WireFormat(self.dims, self.dtype, max_payload_bytes=1 << 26)

    def shard(self, k: int) -> ShardState:
        """A shard that is ready."""
        spec = ShardSpec(
            shard_id=k,
            num_shards=self.num_shards,
            num_workers=self.num_workers,
            embedding=self.embedding,
            dense_optimizer=Adam(0.1),
            mode=self.mode,
            max_staleness=self.max_staleness,
            history=self.history,
        )
        state, layout = ShardState(spec), self.layout
        dense = np.linspace(-1, 1, self.dense_size, dtype=np.float32)
        state.set_dense(
            dense[layout.dense_splits[k] : layout.dense_splits[k + 1]],
            np.zeros(layout.state_splits[k + 1] - layout.state_splits[k], dtype=np.float32),
        )
        return state

    def names(self, seed: Sequence[int] | int, size: int = 40, bags: int | None = None) -> Names:
        """The rows of a batch per table; every second table in bags if `bags` says how many."""
        rng = np.random.default_rng(seed)
        out: Names = {}
        for i, (name, placement) in enumerate(self.layout.placements.items()):
            ids = rng.integers(0, self.num_rows, size=rng.integers(0, size + 1))
            if bags is None or i % 2 == 0:
                out[name] = distinct_rows(ids, placement)[0]
            else:
                ids = ids[: bags * size]  # no bags, no entries
                splits = np.sort(rng.integers(0, ids.size + 1, size=bags + 1))
                splits[0], splits[-1] = 0, ids.size
                weights = np.zeros(0, np.float32) if i % 4 == 1 else floats(rng, ids.size)
                out[name] = shard_bags(ids, splits, weights, placement)
        return out


EVERY_OPTIMIZER = (
    Adagrad(0.1),
    SGD(0.1, use_gradient_accumulation=False),
    Adam(0.01, lazy_adam=False),
    FTRL(0.1),
)


def floats(rng: np.random.Generator, *shape: int) -> F32:
    return rng.normal(size=shape).astype(np.float32)


def any_bits(rng: np.random.Generator, *shape: int) -> F32:
    """Any float32 numbers: infinities, NaN, subnormal ones."""
    return rng.integers(0, 2**32, size=shape, dtype=np.uint32).view(np.float32)


def num_gradients(names: DistinctRows | ShardBags) -> int:
    """Rows of the gradients that a push needs."""
    return names.bags.count if isinstance(names, ShardBags) else names.local_rows.size


# --- shards in this process


@contextmanager
def shards_in_threads(job: Job, **options: Any) -> Iterator[list[ShardLoop]]:
    """One loop per shard."""
    with ExitStack() as stack:
        loops = []
        for k in range(job.num_shards):
            loops.append(
                ShardLoop(cast("ShardState", job.shard(k)), server_options(job, **options))
            )
            stack.enter_context(closing(loops[-1]))
        yield loops


def server_options(job: Job, **options: Any) -> ServerOptions:
    given: dict[str, Any] = {"token": TOKEN, "fingerprint": FINGERPRINT, "format": job.format}
    return ServerOptions(**(given | options))


def endpoints_of(loops: Sequence[ShardLoop]) -> list[Endpoint]:
    return [loop.endpoint for loop in loops]


def contents_of(loop: ShardLoop) -> list[bytes]:
    """Everything that training changes."""
    return [a.tobytes() for a in loop.call(lambda: contents(loop.state)).result(TIMEOUT_S)]


# --- workers


@contextmanager
def connected(
    job: Job,
    endpoints: Sequence[Endpoint],
    name: TransportName = "arena",
    *,
    worker: int = 0,
    token: bytes = TOKEN,
    fingerprint: int = FINGERPRINT,
    **options: Any,
) -> Iterator[tuple[ShardClient, WireTransport]]:
    """A worker's client and its transport."""
    given = TransportOptions(**({"name": name, "format": job.format} | options))
    transport = WireTransport(endpoints, Credentials(token, worker, fingerprint), given)
    with closing(transport):
        yield ShardClient(job.embedding, job.layout, transport, worker, job.format), transport


def local_client(job: Job, shards: Sequence[ShardState], worker: int) -> ShardClient:
    return ShardClient(job.embedding, job.layout, LocalTransport(shards), worker, job.format)


@dataclass
class Training:
    """The steps of one worker: what it does depends on what it pulls, and on nothing else."""

    job: Job
    client: ShardClient
    worker: int
    lookahead: int = 0
    bags: int | None = None
    seen: list[bytes] = field(default_factory=list)
    """Rows, dense values and state of every pull."""
    times_s: list[float] = field(default_factory=list)
    step: int = 0
    _pending: dict[int, Any] = field(default_factory=dict)

    def names(self, step: int) -> Names:
        return self.job.names([self.worker, step], bags=self.bags)

    def begin(self) -> None:
        """Pull for the steps up to the lookahead, of the versions that they would have had."""
        for step in range(self.step, self.step + self.lookahead):
            self._pull(step, max(0, step - self.lookahead))

    def _pull(self, step: int, version: int) -> None:
        names = self.names(step)
        version = version if self.job.mode == "sync" else LATEST
        self._pending[step] = names, self.client.pull(step, version, names)

    def take_step(self) -> None:
        """Pull for a step to come, wait for this one's rows, push."""
        started, t = time.perf_counter(), self.step
        self._pull(t + self.lookahead, t)
        names, pending = self._pending.pop(t)
        pulled: PulledRows = pending.result(TIMEOUT_S)
        self.seen += [pulled.rows[name].tobytes() for name in names]
        self.seen += [pulled.dense.tobytes(), pulled.state.tobytes()]
        self._push(t, names, pulled)
        self.times_s.append(time.perf_counter() - started)
        self.step += 1

    def _push(self, step: int, names: Names, pulled: PulledRows) -> None:
        rng = np.random.default_rng([7, self.worker, step])
        grads: dict[str, F32] = {}
        for i, (name, d) in enumerate(names.items()):
            rows = pulled.rows[name]
            # What a worker makes of partial sums depends on the number of shards; rows do not.
            seen = rows if rows.ndim == 2 else rows.sum(axis=0)
            grad = np.float32(0.1) * seen + _noise(step, d, seen.shape)
            if i % 2 == 0:  # of the transport's memory, and of its own
                grad, own = self.client.gradients(seen.shape), grad
                grad[...] = own
            grads[name] = grad
        dense = np.float32(0.1) * pulled.dense + floats(rng, pulled.dense.size)
        state = pulled.state + np.float32(step + 1) if self.worker == 0 else None
        self.client.push(step, names, grads, dense, state)

    def run(self, steps: int) -> None:
        """All steps, then wait until they are applied; pulls under way are waited for."""
        self.begin()
        for _ in range(steps):
            self.take_step()
        self.client.flush(TIMEOUT_S)


def _noise(step: int, names: DistinctRows | ShardBags, shape: tuple[int, ...]) -> F32:
    """The same for an id wherever it stands."""
    if isinstance(names, ShardBags):
        return floats(np.random.default_rng([8, step]), *shape)
    phase = names.ids[:, None] * np.arange(1, shape[1] + 1) + step
    return cast("F32", np.sin(phase.astype(np.float32)))


def train_in_threads(trainings: Sequence[Training], steps: int) -> None:
    """All workers at once."""
    errors: list[BaseException] = []

    def run(training: Training) -> None:
        try:
            training.run(steps)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(t,)) for t in trainings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "a worker hangs"
    if errors:
        raise errors[0]


def train_locally(
    job: Job, steps: int, lookahead: int = 0, bags: int | None = None
) -> tuple[list[list[bytes]], list[list[bytes]]]:
    """What shards of this process end with, and what each worker has seen."""
    shards = [job.shard(k) for k in range(job.num_shards)]
    trainings = [
        Training(job, local_client(job, shards, w), w, lookahead, bags)
        for w in range(job.num_workers)
    ]
    for training in trainings:
        training.begin()
    for _ in range(steps):
        for training in trainings:
            training.take_step()
    return [[a.tobytes() for a in contents(s)] for s in shards], [t.seen for t in trainings]
