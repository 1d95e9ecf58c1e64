"""Sums of bags of float32 rows."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.kernels import limit, ours
from benchmarks.kernels.cases import BAGS, DRAWS, Batch, Draw, Size, fill_random, make_batches
from benchmarks.kernels.lookup_peers import (
    FBGEMM,
    RAGGED,
    SPARSE,
    TORCH,
    fbgemm_bag,
    tensorflow_lookups,
    torch_bag,
)
from benchmarks.kernels.machine import huge_percent
from benchmarks.kernels.options import Options
from benchmarks.kernels.report import OURS, Cell, Section, Target, lowest, median_of_limit, table
from benchmarks.kernels.shared import SharedArray, shared_array
from benchmarks.kernels.timing import Contender, interleaved
from ps.ragged import F32

_PEERS = (SPARSE, RAGGED, TORCH, FBGEMM)
_ON_ONE = f"{OURS} on one"
_LABELS = ("table", "ids", "bag")
_TEXT = """\
Millions of rows read per second; a call has 400,000 ids (100,000 in bags of one) and makes its own
output. *TF sparse* and *TF ragged* are `tf.tpu.experimental.embedding.serving_embedding_lookup` in
a `tf.function`; *torch* is `embedding_bag`; *FBGEMM* is the float32 table-batched embedding. All
read the same memory. *limit* is the same loop in C with the best of several prefetch distances,
with ordinary or streaming stores, into memory that it keeps from run to run. At least {huge:.0f}%
of the tables' memory was on huge pages."""


def run(options: Options) -> Section:
    """All tables, draws and bags, with one and with two threads."""
    on_one: list[Cell] = []
    on_two: list[Cell] = []
    huge = 100.0
    for size in options.tables:
        shared = shared_array((size.rows, size.dim))
        fill_random(shared.numpy)
        huge = min(huge, huge_percent(shared.numpy.ctypes.data))
        for draw in DRAWS:
            for bag in BAGS:
                cell, cell_on_two = _measure(shared, size, draw, bag, options.cell_s)
                on_one.append(options.done("combine", cell))
                on_two.append(cell_on_two)
        del shared
        gc.collect()  # TensorFlow's objects refer to one another in cycles
    tables = [
        table("One thread", _LABELS, on_one, "M/s"),
        table("Two threads", _LABELS, on_two, "M/s"),
    ]
    return Section("Combine, float32", _TEXT.format(huge=huge), tables, _targets(on_one, on_two))


def _measure(
    shared: SharedArray, size: Size, draw: Draw, bag: int, budget_s: float
) -> tuple[Cell, Cell]:
    batches = make_batches(size.rows, draw, bag)
    rows, weights = shared.numpy, shared.torch
    one = [
        ours.combine(rows, batches),
        *limit.sum_bags(rows, batches),
        *tensorflow_lookups(shared, batches),
        torch_bag(weights, batches),
        fbgemm_bag(weights, batches),
    ]
    two = [
        ours.combine(rows, batches, num_threads=2),
        replace(ours.combine(rows, batches), name=_ON_ONE),
        *limit.sum_bags(rows, batches, num_threads=2),
        torch_bag(weights, batches, num_threads=2),
        fbgemm_bag(weights, batches, num_threads=2),
    ]
    check_sums([*one, *two], rows, batches)
    case, count = (str(size), draw, str(bag)), batches[0].ids_N.size
    return (
        Cell(case, count, interleaved(one, budget_s)),
        Cell(case, count, interleaved(two, budget_s / 2)),
    )


def check_sums(
    contenders: Sequence[Contender], rows_VD: F32, batches: Sequence[Batch], error: float = 1e-6
) -> None:
    """Make sure that all give the same numbers; `error` is that of one number of a row."""
    first = batches[0]
    expected = rows_VD[first.ids_N].reshape(first.num_bags, first.bag, -1).sum(axis=1)
    for contender in contenders:
        found = np.asarray(contender.run(0))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=error * first.bag)


def _targets(on_one: Sequence[Cell], on_two: Sequence[Cell]) -> list[Target]:
    uniform = [c for c in on_one if c.case[1] == "uniform"]
    named = [c for c in uniform if c.case[0] in ("1M×64", "10M×64") and c.case[2] == "20"]
    what = "combine, 1M×64 and 10M×64, uniform, bag 20"
    return [
        *lowest(f"{what}: TensorFlow", 8, named, (SPARSE, RAGGED)),
        *lowest(f"{what}: torch", 1.3, named, (TORCH,)),
        *lowest(f"{what}: FBGEMM", 2, named, (FBGEMM,)),
        *lowest("combine, any cell: any peer", 1, on_one, _PEERS),
        *lowest("combine on 2 threads, any cell: any peer on 2", 1, on_two, (TORCH, FBGEMM)),
        *median_of_limit(
            "combine: median over uniform cells of the share of the limit", 85, uniform
        ),
        *lowest(
            "combine, uniform, bag 20: 2 threads against 1",
            1.6,
            [c for c in on_two if c.case[1:] == ("uniform", "20")],
            (_ON_ONE,),
        ),
    ]
