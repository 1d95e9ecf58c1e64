"""The input pipeline: Parquet to mixed batches, their distinct rows, activations and gradients.

Run it with `python -m benchmarks.input`. Two data sets: Criteo-like (13 numbers and one id for each
of 26 tables) and bags (three lists of about 20, 50 and 100 weighted ids). Everything runs on one
thread, in turn; times are of the processor, per batch, so that other load counts less. Printed are
medians, the spread (10th to 90th percentile) and ratios of medians: to decoding the Parquet columns
with pyarrow and doing nothing with them, which is the limit of a reader, and to `numpy.unique` per
table. The last lines are wall time: how long a consumer waits that is busy with a batch for twice
the time that it takes to prepare, with and without threads that prepare ahead; the first window,
which nothing can hide, is part of it.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ps.config import FeatureConfig, TableConfig
from ps.partition import Layout
from ps.ragged import F32, I64, Ragged
from ps.spec import EmbeddingSpec, resolve
from workers.batches import Batch, ExampleReader
from workers.config import DataConfig, FeatureEntry
from workers.plan import BatchPlan, activations, plan_batch, row_gradients
from workers.prefetch import Prefetched

ROWS, GROUP, DIM, SHARDS, TURNS = 384_000, 65_536, 16, 2, 7
CRITEO = [f"C{i}" for i in range(26)]
DENSE = [f"I{i}" for i in range(13)]
BAGS = {"short": 20, "middle": 50, "long": 100}
VOCABULARY = 384_615
"""Rows of a table; 26 of them are 10M."""

Times = dict[str, list[float]]


class Case:
    """One data set and its tables."""

    def __init__(self, path: Path, features: list[str], dense: list[str], weights: bool) -> None:
        tables = {
            name: TableConfig(VOCABULARY, DIM, combiner="sum", name=name) for name in features
        }
        self.spec: EmbeddingSpec = resolve({n: FeatureConfig(t) for n, t in tables.items()})
        self.layout = Layout.of(self.spec, SHARDS)
        entries = {
            n: FeatureEntry(table=n, weights=f"{n}_weights" if weights else None) for n in features
        }
        self.path = path
        self.columns: list[str] = pq.read_schema(path).names
        self._data = DataConfig(train=path, label="label", dense=tuple(dense))
        self._entries = entries

    def reader(self, ahead: int = 0) -> ExampleReader:
        return ExampleReader(self.path, self._data, self._entries, seed=1, ahead=ahead)

    def planned(self, batch: Batch) -> BatchPlan:
        return plan_batch(self.spec, self.layout, batch.bags)


def zipf_ids(rng: np.random.Generator, size: int) -> I64:
    return np.minimum(rng.zipf(1.2, size) - 1, VOCABULARY - 1)


def write(path: Path, groups: Iterator[dict[str, pa.Array]]) -> None:
    first = pa.table(next(groups))
    with pq.ParquetWriter(path, first.schema, compression="zstd", compression_level=1) as writer:
        for table in itertools.chain([first], map(pa.table, groups)):
            writer.write_table(table, row_group_size=len(table))


def criteo_groups(rng: np.random.Generator) -> Iterator[dict[str, pa.Array]]:
    for start in range(0, ROWS, GROUP):
        size = min(GROUP, ROWS - start)
        numbers = {n: rng.random(size, dtype=np.float32) for n in ["label", *DENSE]}
        yield {k: pa.array(v) for k, v in numbers.items()} | {
            n: pa.array(zipf_ids(rng, size)) for n in CRITEO
        }


def bag_groups(rng: np.random.Generator) -> Iterator[dict[str, pa.Array]]:
    size = GROUP // 3
    for _ in range(ROWS // 8 // size):
        columns = {"label": pa.array(rng.random(size, dtype=np.float32))}
        for name, mean in BAGS.items():
            splits = np.zeros(size + 1, dtype=np.int32)
            np.cumsum(rng.integers(mean // 2, mean * 3 // 2 + 1, size), out=splits[1:])
            ids, weights = zipf_ids(rng, splits[-1]), rng.random(splits[-1], dtype=np.float32)
            for key, values in ((name, ids), (f"{name}_weights", weights)):
                columns[key] = pa.ListArray.from_arrays(splits, pa.array(values))
        yield columns


def timed(times: Times, what: str, count: int, call: Callable[[], object]) -> None:
    start = time.process_time()
    call()
    times.setdefault(what, []).append((time.process_time() - start) / count * 1e3)


def decode(case: Case) -> None:
    file = pq.ParquetFile(case.path)
    for group in range(file.num_row_groups):
        file.read_row_group(group, columns=case.columns, use_threads=False)


def read(case: Case, size: int) -> None:
    for _ in case.reader().epoch(0, size):
        pass


def plan_with_numpy(batches: list[Batch]) -> None:
    for batch in batches:
        for bag in batch.bags.values():
            assert isinstance(bag, Ragged)
            np.unique(bag.ids, return_inverse=True)


def combine(case: Case, plans: list[BatchPlan], rows: dict[str, F32]) -> None:
    for plan in plans:
        pulled = {n: rows[n][: d.local_rows.size] for n, d in plan.distinct.items()}
        found = activations(case.spec, plan, pulled)
        row_gradients(case.spec, plan, found, {})


def measured(case: Case, size: int) -> Times:
    reader = case.reader()
    steps = reader.steps_per_epoch(size)
    batches = list(itertools.islice(reader.epoch(0, size), 10))
    plans = [case.planned(batch) for batch in batches]
    most = max(d.local_rows.size for plan in plans for d in plan.distinct.values())
    rows = {t.name: np.ones((most, DIM), dtype=np.float32) for t in case.spec.tables}
    combine(case, plans, rows)
    read(case, size)
    times: Times = {}
    for _ in range(TURNS):
        timed(times, "decode", reader.num_rows // size, lambda: decode(case))
        timed(times, "read", steps, lambda: read(case, size))
        timed(times, "plan", len(batches), lambda: [case.planned(b) for b in batches])
        timed(times, "numpy.unique", len(batches), lambda: plan_with_numpy(batches))
        timed(times, "combine", len(batches), lambda: combine(case, plans, rows))
    return times


def waits(case: Case, size: int, busy_s: float, prefetch: int) -> float:
    """Share of the time that a consumer of `busy_s` per batch waits for the next one."""
    batches = case.reader(ahead=min(prefetch, 1)).epoch(0, size)
    start = time.perf_counter()
    with Prefetched(((b, case.planned(b)) for b in batches), prefetch) as prepared:
        for _ in prepared:
            time.sleep(busy_s)  # as the dense step: without the interpreter
        return prepared.waited_s / (time.perf_counter() - start)


def show(name: str, case: Case, size: int) -> None:
    times = measured(case, size)
    middle = {what: float(np.median(found)) for what, found in times.items()}
    against = {"read": "decode", "plan": "numpy.unique"}
    for what, found in times.items():
        low, high = np.percentile(found, [10, 90])
        text = f"{name:>7} {size:>5} {what:<13} {middle[what]:7.2f} ms ({low:.2f}-{high:.2f})"
        if what in against:
            text += f"   {middle[what] / middle[against[what]]:.2f} of {against[what]}"
        print(text)
    prepare = middle["read"] + middle["plan"]
    print(f"{name:>7} {size:>5} read and plan {size / prepare * 1e3:,.0f} examples/s")
    for prefetch in (0, 2):
        share = waits(case, size, 2 * prepare / 1e3, prefetch)
        print(f"{name:>7} {size:>5} waiting with prefetch {prefetch}: {share:.0%}")


def main() -> None:
    pa.set_cpu_count(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        criteo, bags = Path(folder) / "criteo.parquet", Path(folder) / "bags.parquet"
        write(criteo, criteo_groups(rng))
        write(bags, bag_groups(rng))
        for size in (4096, 8192):
            show("criteo", Case(criteo, CRITEO, DENSE, weights=False), size)
        show("bags", Case(bags, list(BAGS), [], weights=True), 4096)


if __name__ == "__main__":
    main()
