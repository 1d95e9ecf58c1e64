"""What the variants that save bytes do to a step over shared memory and over TCP.

`python -m benchmarks.wire_variants`. Two shards in processes of their own, one worker, one table
of 1M×64 with Adagrad. A step is: pull, combine, gradients of rows, push; the next pull waits until
they are applied. What is prepared ahead in training (`plan_batch`) is not timed. Printed are
medians of steps that plain rows and the variant take in turn, and their ratio: below 1 the variant
is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from multiprocessing.connection import Connection
from statistics import median

import numpy as np

from benchmarks.ps.processes import Child, keep_to_cpu, wait_for_end
from benchmarks.variants import BATCH, CACHE_IDS, CACHED, DIM, SHARDS, spec_of, uniform, zipf
from ps.client import ShardClient
from ps.messages import LATEST
from ps.optimizers import SGD
from ps.partition import DistinctRows, Layout
from ps.ragged import F32, Ragged
from ps.shard import Mode, ShardSpec, ShardState
from ps.warm import warm_up
from ps.wire.greeting import Credentials
from ps.wire.handshake import new_token
from ps.wire.messages import WireDtype, WireFormat
from ps.wire.server import ServerOptions, ShardLoop
from ps.wire.transport import TransportName, TransportOptions, WireTransport
from workers.plan import BatchPlan, activations, plan_batch, row_gradients
from workers.rowcache import RowCache

SPEC = spec_of()
LAYOUT = Layout.of(SPEC, SHARDS)
TURNS, BATCHES = 15, 4
TRANSPORTS: tuple[TransportName, ...] = ("arena", "tcp")
_NOTHING = np.zeros(0, dtype=np.float32)
Step = Callable[[int], object]


def serve(
    pipe: Connection, shard: int, token: bytes, format: WireFormat, mode: Mode, max_staleness: int
) -> None:
    keep_to_cpu(shard)
    spec = ShardSpec(
        shard_id=shard,
        num_shards=SHARDS,
        num_workers=1,
        embedding=SPEC,
        dense_optimizer=SGD(),
        mode=mode,
        max_staleness=max_staleness,
        combined=frozenset({"items"}),
    )
    warm_up(spec)
    state = ShardState(spec)
    state.set_dense(_NOTHING, _NOTHING)
    loop = ShardLoop(state, ServerOptions(token=token, fingerprint=1, format=format))
    pipe.send(loop.endpoint)
    wait_for_end(pipe)
    loop.close()


class Shards:
    """Shards that one worker after the other trains."""

    def __init__(self, dtype: WireDtype = "float32", mode: Mode = "sync") -> None:
        self.format = WireFormat((DIM,), dtype)
        self._token = new_token()
        arguments = (self._token, self.format, mode, 0)
        self._children = [Child(serve, k, *arguments) for k in range(SHARDS)]
        self._endpoints = [child.receive() for child in self._children]
        self.step = count()

    def client(self, name: TransportName) -> ShardClient:
        options = TransportOptions(name=name, format=self.format)
        transport = WireTransport(self._endpoints, Credentials(self._token, 0, 1), options)
        return ShardClient(SPEC, LAYOUT, transport, 0, self.format)

    def close(self) -> None:
        for child in self._children:
            child.kill()


def plans(draw: Callable[..., np.ndarray], length: int, on_shards: bool) -> list[BatchPlan]:
    rng = np.random.default_rng(length)
    splits = np.arange(BATCH + 1) * length
    bags = [Ragged(draw(rng, BATCH * length), splits) for _ in range(BATCHES)]
    names = ("items",) if on_shards else ()
    return [plan_batch(SPEC, LAYOUT, {"items": bag}, names) for bag in bags]


def step_of(shards: Shards, client: ShardClient, planned: Sequence[BatchPlan]) -> Step:
    upstream: F32 = np.full((BATCH, DIM), 1e-3, dtype=np.float32)

    def step(turn: int) -> None:
        plan, t = planned[turn % BATCHES], next(shards.step)
        pulled = client.pull(t, t, plan.distinct).result()
        activations(SPEC, plan, pulled.rows)
        named, grads = row_gradients(SPEC, plan, {"items": upstream}, {}, client.gradients)
        client.push(t, named, grads, _NOTHING, None)

    return step


def timed(steps: Sequence[Step]) -> list[float]:
    """Median seconds of each, in turn; a step's time holds the update of the one before."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(TURNS):
        for step, seconds in zip(steps, times, strict=True):
            step(turn)
            start = time.perf_counter()
            step(turn + 1)
            seconds.append(time.perf_counter() - start)
    return [median(seconds) for seconds in times]


def line(what: str, rows_s: float, variant_s: float) -> None:
    ratio = variant_s / rows_s
    print(f"{what:44}{1e3 * rows_s:9.2f} ms{1e3 * variant_s:9.2f} ms{ratio:8.2f}", flush=True)


def compare_bags() -> None:
    shards = Shards()
    for name in TRANSPORTS:
        client = shards.client(name)
        for draw in (uniform, zipf):
            for length in (10, 50, 100, 200):
                both = [plans(draw, length, on_shards) for on_shards in (False, True)]
                steps = [step_of(shards, client, planned) for planned in both]
                line(f"{name}: bags of {length}, {draw.__name__}", *timed(steps))
        client.flush()
    shards.close()


def compare_bfloat16() -> None:
    plain, narrow = Shards(), Shards("bfloat16")
    for name in TRANSPORTS:
        planned = plans(uniform, 20, False)
        steps = [step_of(s, s.client(name), planned) for s in (plain, narrow)]
        line(f"{name}: bfloat16, {planned[0].num_ids:,} rows", *timed(steps))
    plain.close()
    narrow.close()


def compare_cache() -> None:
    shards = Shards(mode="async")
    rng = np.random.default_rng(3)
    bags = [Ragged(zipf(rng, CACHE_IDS), np.arange(CACHE_IDS + 1)) for _ in range(40)]
    batches = [plan_batch(SPEC, LAYOUT, {"items": bag}).distinct["items"] for bag in bags]
    for name in TRANSPORTS:
        client = shards.client(name)
        cache, clock = RowCache(DIM, CACHED, 16), count()

        def rows(turn: int, client: ShardClient = client) -> None:
            client.pull(0, LATEST, {"items": batches[turn]}).result()

        def cached(
            turn: int,
            client: ShardClient = client,
            cache: RowCache = cache,
            clock: Iterator[int] = clock,
        ) -> None:
            distinct = batches[turn]
            assert isinstance(distinct, DistinctRows)
            lookup = cache.lookup(distinct, next(clock))
            cache.fill(
                lookup, client.pull(0, LATEST, {"items": lookup.missing}).result().rows["items"]
            )

        for turn in range(20):
            cached(turn)
        line(f"{name}: pull with cached rows, max age 16", *timed([rows, cached]))
    shards.close()


def main() -> None:
    print(f"{'':44}{'rows':>12}{'variant':>12}{'ratio':>8}")
    compare_bags()
    compare_bfloat16()
    compare_cache()


if __name__ == "__main__":
    main()
