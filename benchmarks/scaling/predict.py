"""What the model says of clusters: tables for `docs/scaling.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from benchmarks.scaling.model import Case, Costs, Machine, step
from benchmarks.scaling.simulate import simulated_step
from workers.shard_bags import bags_bytes, rows_bytes

TABLES = 26
VOCABULARY = 10_000_000
"""Of each table."""
ZIPF = 1.05
ROUND_TRIP_S = 5e-5
CORES_PER_HOST = 16
SHARDS = (16, 32, 64, 128, 256)
BATCHES = (4_096, 65_536)
DIMS = (16, 64, 128)
_GIGABIT = 1e9 / 8
_USABLE = 0.9
"""Of a network's bits: headers, and gaps."""


@dataclass(frozen=True)
class TableText:
    """A title, and rows of text under a header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def markdown(self) -> str:
        """With the first column to the left."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = (self.header, rule, *self.rows)
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(r)} |" for r in lines)])


def distinct(draws: float, vocabulary: int = VOCABULARY, exponent: float = ZIPF) -> float:
    """Expected number of distinct ids among so many, where id r comes with weight r^-exponent.

    >>> round(distinct(10, vocabulary=1))
    1
    >>> distinct(1000) < 1000
    True
    """
    edges = np.unique(np.concatenate([np.arange(1, 1001), np.geomspace(1e3, vocabulary + 1, 4000)]))
    edges = edges[edges <= vocabulary + 1]
    counts = np.diff(edges)
    middles = np.where(counts == 1, edges[:-1], np.sqrt(edges[:-1] * edges[1:]))
    weights = middles**-exponent
    chances = weights / np.sum(weights * counts)
    return float(np.sum(counts * -np.expm1(draws * np.log1p(-np.minimum(chances, 1 - 1e-12)))))


def cluster(gigabits: float, cores_per_host: int = CORES_PER_HOST) -> Machine:
    """Hosts with a core per shard and one network card; workers on hosts of their own."""
    return Machine(
        bytes_per_s=gigabits * _GIGABIT * _USABLE,
        round_trip_s=ROUND_TRIP_S,
        shards_per_host=cores_per_host,
    )


def click_case(shards: int, workers: int, batch: int, dim: int) -> Case:
    """26 features with one id per example, a table each."""
    return Case(
        shards=shards,
        workers=workers,
        rows=round(TABLES * distinct(batch)),
        dim=dim,
        tables=TABLES,
        transport="tcp",
        union_rows=TABLES * distinct(batch * workers),
    )


def sizes_table(costs: Costs) -> TableText:
    """Steps by size: a worker for four shards."""
    rows = []
    for batch, dim, gigabits in product(BATCHES, DIMS, (25, 100)):
        cells = [f"{batch:,} × {dim}, {gigabits} Gb"]
        for shards in SHARDS:
            case = click_case(shards, shards // 4, batch, dim)
            cells.append(_cell(case, costs, cluster(gigabits), batch))
        rows.append(cells)
    header = ("batch × dim, network", *(f"{k} shards, {k // 4} workers" for k in SHARDS))
    return TableText("Step in ms, million examples/s, and what bounds it", header, rows)


def ratios_table(costs: Costs, batch: int = 4_096, dim: int = 64) -> TableText:
    """Workers per shard."""
    rows = []
    for shards in (16, 64, 256):
        cells = [f"{shards} shards"]
        for ratio in (0.25, 0.5, 1, 2, 4):
            case = click_case(shards, int(shards * ratio), batch, dim)
            cells.append(_cell(case, costs, cluster(100), batch))
        rows.append(cells)
    header = ("", "¼ worker per shard", "½", "1", "2", "4")
    return TableText(f"Batch {batch:,}, dim {dim}, 100 Gb: workers per shard", header, rows)


def options_table(costs: Costs, shards: int = 64, dim: int = 64) -> TableText:
    """What options change."""
    rows = []
    for batch, gigabits in product(BATCHES, (25, 100)):
        base = click_case(shards, shards // 4, batch, dim)
        hosts = cluster(gigabits)
        narrow, ahead = replace(base, number_bytes=2), replace(base, lookahead=1)
        cases = (base, narrow, ahead, replace(narrow, lookahead=1))
        label = f"{batch:,}, {gigabits} Gb"
        rows.append([label, *(_cell(case, costs, hosts, batch) for case in cases)])
    header = ("batch, network", "float32", "bfloat16", "lookahead 1", "both")
    title = f"{shards} shards, {shards // 4} workers, dim {dim}: options"
    return TableText(title, header, rows)


def hosts_table(costs: Costs, shards: int = 64, batch: int = 65_536, dim: int = 64) -> TableText:
    """How many shards share a network card."""
    rows = []
    for gigabits in (25, 100):
        case = click_case(shards, shards // 4, batch, dim)
        cells = [_cell(case, costs, cluster(gigabits, cores), batch) for cores in (8, 16, 32)]
        rows.append([f"{gigabits} Gb", *cells])
    header = ("", "8 shards per host", "16", "32")
    return TableText(f"{shards} shards, batch {batch:,}, dim {dim}: hosts", header, rows)


def bags_table(batch: int = 4_096, dim: int = 64) -> TableText:
    """Bytes of a worker's pull (or push) of one table with `combine_on: shard`."""
    shards = (2, 4, 16, 64, 256)
    rows = []
    for length in (1, 20, 100, 500):
        plain = rows_bytes(round(distinct(batch * length)), dim)
        cells = [f"bags of {length}", f"{plain / 1e6:.1f} MB"]
        for k in shards:
            combined = bags_bytes(batch * length, batch, dim, num_shards=k)
            cells.append(f"{combined / 1e6:.1f} MB ({combined / plain:.2g}×)")
        rows.append(cells)
    header = ("", "rows", *(f"combined on {k} shards" for k in shards))
    return TableText(f"One table, batch {batch:,}, dim {dim}: bytes of a pull", header, rows)


def simulated_table(costs: Costs) -> TableText:
    """The formula against the simulation, with queues."""
    rows = []
    for shards, ratio, batch, gigabits in (
        (16, 0.25, 4_096, 25), (16, 1, 4_096, 100), (16, 0.25, 65_536, 25), (64, 0.25, 4_096, 100),
        (64, 0.25, 65_536, 25), (64, 1, 4_096, 100),
    ):  # fmt: skip
        for lookahead in (0, 1):
            case = click_case(shards, int(shards * ratio), batch, 64)
            case = replace(case, lookahead=lookahead)
            hosts = cluster(gigabits)
            formula, played = step(case, costs, hosts), simulated_step(case, costs, hosts, 8)
            rows.append([
                f"{shards} shards, {case.workers} workers, batch {batch:,}, {gigabits} Gb, "
                f"lookahead {lookahead}",
                f"{formula.step_s * 1e3:.1f}", f"{played * 1e3:.1f}",
                f"{formula.step_s / played - 1:+.0%}",
            ])  # fmt: skip
    header = ("dim 64", "formula, ms", "simulation, ms", "")
    return TableText("Formula and simulation", header, rows)


def _cell(case: Case, costs: Costs, machine: Machine, batch: int) -> str:
    found = step(case, costs, machine)
    rate = case.workers * batch / found.step_s / 1e6
    return f"{found.step_s * 1e3:.0f} · {rate:.2g} · {_SHORT[found.bound]} {found.busy:.0%}"


_SHORT = {
    "worker CPU": "worker",
    "shard CPU": "shard",
    "worker network": "worker's net",
    "shard network": "shards' net",
    "cores": "cores",
}


def tables(costs: Costs) -> list[TableText]:
    """All predictions."""
    return [
        sizes_table(costs), ratios_table(costs), options_table(costs), hosts_table(costs),
        bags_table(), simulated_table(costs),
    ]  # fmt: skip
