"""What two variants save: bags combined by shards, and rows kept by the worker. Without a network.

`python -m benchmarks.variants`. Both sides of every comparison run in this thread, in turn, on the
same batches of one table of dim 64; printed are bytes (pull and push of bags, pull of kept rows),
medians of the CPU time that worker and shards take together, optimizers left out, and ratios: below
1 the variant is better. What a byte costs depends on the transport.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from ps.bags import ShardBags
from ps.config import FeatureConfig, TableConfig
from ps.kernels.combine import COMBINER_CODES, combine_rows, gather_rows
from ps.kernels.dedup import distinct_ids
from ps.kernels.gradients import combine_gradients
from ps.kernels.shard_bags import sum_bags
from ps.memory import empty, zeros
from ps.optimizers import Adagrad
from ps.partition import DistinctRows, Layout, Placement, distinct_rows
from ps.ragged import F32, I64, Ragged
from ps.spec import EmbeddingSpec, resolve
from workers.rowcache import RowCache
from workers.shard_bags import bag_activations, bag_gradients, bags_bytes, plan_bags, rows_bytes

ROWS, DIM, SHARDS = 1_000_000, 64, 2
BATCH, TURNS = 1024, 15
LENGTHS = (10, 50, 100, 200)
STEPS, WARM_UP = 60, 20
CACHE_IDS, CACHED = 50_000, ROWS // 10
ZIPF = 1.05
SUM = COMBINER_CODES["sum"]
NO_WEIGHTS = np.zeros(0, dtype=np.float32)


def spec_of() -> EmbeddingSpec:
    table = TableConfig(ROWS, DIM, combiner="mean", name="items", optimizer=Adagrad())
    return resolve({"items": FeatureConfig(table)})


def zipf(rng: np.random.Generator, size: int) -> I64:
    """Ids whose frequency falls as 1/rank^1.05, in a random order of ranks."""
    share = np.cumsum(np.arange(1, ROWS + 1) ** -ZIPF)
    ranks = np.searchsorted(share / share[-1], rng.random(size))
    return np.random.default_rng(7).permutation(ROWS)[ranks]


def uniform(rng: np.random.Generator, size: int) -> I64:
    return rng.integers(0, ROWS, size)


def shards_of(placement: Placement) -> list[F32]:
    """Records of rows and one slot, per shard."""
    rng = np.random.default_rng(0)
    records = [zeros((placement.num_local_rows(k), 2 * DIM)) for k in range(SHARDS)]
    for array in records:
        array[:] = rng.random(array.shape, dtype=np.float32)
    return records


# --- bags combined by shards ----------------------------------------------------------------------


class OnWorker:
    """Distinct rows are pulled and combined on the worker, which sums their gradients."""

    def __init__(self, placement: Placement, shards: list[F32]) -> None:
        self.placement, self.shards = placement, shards
        self.rows, self.grads = _arena(), _arena()

    def step(self, bag: Ragged, grads: F32) -> tuple[F32, list[F32]]:
        distinct, index = distinct_rows(bag.ids, self.placement)
        size = distinct.ids.size
        rows, pushed = self.rows[:size], self.grads[:size]
        gather(self.shards, distinct, rows)
        found, mean = empty((bag.num_examples, DIM)), COMBINER_CODES["mean"]
        combine_rows(rows, index, bag.row_splits, NO_WEIGHTS, mean, found)
        pushed[:] = 0
        combine_gradients(grads, index, bag.row_splits, NO_WEIGHTS, mean, pushed)
        self.bytes = rows_bytes(size, DIM)
        return found, [pushed]


class OnShards:
    """Entries are sent, the shards sum the bags, and the gradients of their rows."""

    def __init__(self, placement: Placement, shards: list[F32]) -> None:
        self.spec, self.placement, self.shards = spec_of(), placement, shards
        self.grads = _arena()

    def step(self, bag: Ragged, grads: F32) -> tuple[F32, list[F32]]:
        plan = plan_bags(self.spec.tables[0], self.spec.features, [bag], self.placement)
        sums = empty((SHARDS, bag.num_examples, DIM))
        for k, records in enumerate(self.shards):
            splits = plan.entries.bags.row_splits[k]
            sum_bags(records, plan.entries.of_shard(k), splits, NO_WEIGHTS, sums[k])
        found = bag_activations(plan, sums)["items"]
        entries, upstream = bag_gradients(plan, {"items": grads})
        self.bytes = bags_bytes(bag.ids.size, bag.num_examples, DIM, num_shards=SHARDS)
        return found, [self._summed(entries, k, upstream) for k in range(SHARDS)]

    def _summed(self, entries: ShardBags, shard: int, upstream: F32) -> F32:
        """What a shard makes of the gradients of bags: one per row."""
        rows, index = distinct_ids(entries.of_shard(shard))
        total = self.grads[: rows.size]
        total[:] = 0
        splits = entries.bags.row_splits[shard]
        combine_gradients(upstream, index, splits, NO_WEIGHTS, SUM, total)
        return total


def _arena() -> F32:
    """Memory that every step uses again, as transports do."""
    made: F32 = np.ones((BATCH * max(LENGTHS), DIM), dtype=np.float32)
    return made


def gather(shards: list[F32], distinct: DistinctRows, rows: F32) -> None:
    for k, records in enumerate(shards):
        own = slice(*distinct.shard_splits[k : k + 2])
        gather_rows(records, distinct.of_shard(k), rows[own])


def compare_bags(placement: Placement, shards: list[F32]) -> None:
    print(f"\nBags of {BATCH} examples, {SHARDS} shards: combined by shards against by the worker")
    print("ids      bag   MB rows   MB bags  ratio   ms rows   ms bags  ratio")
    for draw in (uniform, zipf):
        for length in LENGTHS:
            rng = np.random.default_rng(length)
            bag = Ragged(draw(rng, BATCH * length), np.arange(BATCH + 1) * length)
            grads = rng.normal(size=(BATCH, DIM)).astype(np.float32)
            rows, bags = OnWorker(placement, shards), OnShards(placement, shards)
            calls = partial(rows.step, bag, grads), partial(bags.step, bag, grads)
            t_rows, t_bags = timed(*calls)
            print(
                f"{draw.__name__:8} {length:3}"
                f"{2 * rows.bytes / 1e6:10.2f}{2 * bags.bytes / 1e6:10.2f}"
                f"{bags.bytes / rows.bytes:7.2f}"
                f"{1e3 * t_rows:10.2f}{1e3 * t_bags:10.2f}{t_bags / t_rows:7.2f}"
            )


def timed(*calls: Callable[[], Any]) -> list[float]:
    """Median seconds of each, called in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(TURNS + 1):
        for call, seconds in zip(calls, times, strict=True):
            start = time.thread_time()
            call()
            if turn:
                seconds.append(time.thread_time() - start)
    return [median(seconds) for seconds in times]


# --- rows kept by the worker ----------------------------------------------------------------------


def compare_cache(placement: Placement, shards: list[F32]) -> None:
    print(
        f"\nPulls of {CACHE_IDS} Zipf ids, {CACHED} of {ROWS} rows kept: with the cache against "
        f"without, steps {WARM_UP} to {STEPS}"
    )
    print("max age  hits   MB all   MB with  ratio   ms all   ms with  ratio  of it cache")
    rng = np.random.default_rng(3)
    batches = [distinct_rows(zipf(rng, CACHE_IDS), placement)[0] for _ in range(STEPS)]
    for max_age in (1, 4, 16, 64):
        cache = RowCache(DIM, CACHED, max_age)
        seen = [_cached_step(cache, shards, batch, t) for t, batch in enumerate(batches)]
        plain, gathered, cached, missing = np.array(seen[WARM_UP:]).T
        rows = np.mean([batch.ids.size for batch in batches[WARM_UP:]])
        both = np.median(gathered + cached)
        mb_all, mb = rows_bytes(1, DIM) * rows / 1e6, rows_bytes(1, DIM) * missing.mean() / 1e6
        print(
            f"{max_age:7}{1 - missing.mean() / rows:6.2f}{mb_all:9.2f}{mb:10.2f}{mb / mb_all:7.2f}"
            f"{1e3 * np.median(plain):9.2f}{1e3 * both:10.2f}{both / np.median(plain):7.2f}"
            f"{1e3 * np.median(cached):13.2f}"
        )


def _cached_step(
    cache: RowCache, shards: list[F32], batch: DistinctRows, step: int
) -> tuple[float, float, float, int]:
    """Seconds to gather all rows, the missing ones, and in the cache; rows missing."""
    start = time.thread_time()
    gather(shards, batch, empty((batch.ids.size, DIM)))
    plain = time.thread_time()
    lookup = cache.lookup(batch, step)
    looked_up = time.thread_time()
    rows = empty((lookup.places.size, DIM))
    gather(shards, lookup.missing, rows)
    gathered = time.thread_time()
    cache.fill(lookup, rows)
    end = time.thread_time()
    return plain - start, gathered - looked_up, looked_up - plain + end - gathered, len(rows)


def main() -> None:
    placement = Layout.of(spec_of(), SHARDS).placements["items"]
    shards = shards_of(placement)
    compare_bags(placement, shards)
    compare_cache(placement, shards)


if __name__ == "__main__":
    main()
