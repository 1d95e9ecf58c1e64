"""The product's own functions, as the benchmark calls them: the only module that knows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np

from benchmarks.kernels.cases import Batch, Gradients, Size, fill_random
from benchmarks.kernels.report import OURS
from benchmarks.kernels.timing import Contender
from ps import memory, threads
from ps.feature_group import FeatureGroup, Source
from ps.inputs import Bags
from ps.kernels.dedup import distinct_ids
from ps.kernels.gradients import add_rows
from ps.keymap import KeyMap
from ps.optimizers import Optimizer
from ps.quantized import QuantizedRows, quantized
from ps.ragged import F32, I64
from ps.rowstore import RowStore
from serving.lookup import LookupService

_NO_WEIGHTS = np.empty(0, dtype=np.float32)
_SUM = 0


def combine(rows: F32 | QuantizedRows, batches: Sequence[Batch], num_threads: int = 1) -> Contender:
    """Sums of bags of float32 or quantised rows, the output's allocation included."""
    pool = threads.Threads(num_threads)
    dim = rows.dim if isinstance(rows, QuantizedRows) else rows.shape[1]

    def call_for(batch: Batch) -> Callable[[], F32]:
        def call() -> F32:
            out_BD: F32 = memory.empty((batch.num_bags, dim))
            threads.combine(pool, rows, batch.ids_N, batch.splits_B1, _NO_WEIGHTS, _SUM, out_BD)
            return out_BD

        return call

    return Contender(OURS, [call_for(batch) for batch in batches])


def quantize(rows_VD: F32, kind: Literal["float16", "int8"]) -> QuantizedRows:
    """Rows as float16 or int8, for `combine`."""
    return quantized(rows_VD, kind)


def make_store(size: Size, optimizer: Optimizer) -> RowStore:
    """Random rows and fresh slots."""
    store = RowStore.zeros((size.rows, size.dim), optimizer)
    fill_random(store.rows)
    return store


def optimizer_step(store: RowStore, batches: Sequence[Gradients], rate: float) -> Contender:
    """One gradient per row."""
    return Contender(OURS, [partial(_apply, store, rate, b.ids_N, b.grads_ND) for b in batches])


def sums(batches: Sequence[Gradients]) -> Contender:
    """Distinct ids and the sum of each one's gradients."""
    return Contender(OURS, [partial(_sums, b) for b in batches])


def update(store: RowStore, batches: Sequence[Gradients], rate: float) -> Contender:
    """`sums`, then the optimizer's step."""
    return Contender(OURS, [lambda b=b: _apply(store, rate, *_sums(b)) for b in batches])  # type: ignore[misc]


def _apply(store: RowStore, rate: float, ids_U: I64, grads_UD: F32) -> None:
    store.apply(ids_U, grads_UD, rate, distinct=True)


def _sums(batch: Gradients) -> tuple[I64, F32]:
    unique, inverse = distinct_ids(batch.ids_N)
    sums_UD: F32 = memory.zeros((unique.size, batch.grads_ND.shape[1]))
    add_rows(batch.grads_ND, inverse, sums_UD)
    return unique, sums_UD


def find(keys: I64, batches: Sequence[I64]) -> Contender:
    """Places of keys in a map that was filled with `keys` in order."""
    key_map = KeyMap()
    key_map.insert(keys)
    return Contender(OURS, [partial(key_map.find, batch) for batch in batches])


def fused_lookup(service: LookupService, inputs: Mapping[str, Bags]) -> Callable[[], object]:
    """All features of a request in one call."""
    export = service.export
    tables = [(feature, export.tables[feature.table]) for feature in export.features.values()]
    sources = [Source(feature, table.combiner, table.rows_VD) for feature, table in tables]
    return partial(FeatureGroup(Bags, sources, threads.ONE_THREAD).lookup, inputs)
