"""The random-row limit of this machine: `limit.c`, compiled when the benchmark runs."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.kernels.cases import Batch, Gradients
from benchmarks.kernels.report import LIMIT
from benchmarks.kernels.timing import Contender, best_of
from ps import memory
from ps.ragged import F32, I64
from ps.threads import Threads

_LINES_AHEAD = (32, 64, 128, 192, 256)
"""Prefetch distances that are tried, in cache lines of rows."""

_int64 = ctypes.c_int64


def _address(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)  # keeps the array alive


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limit.so"
        source = Path(__file__).with_name("limit.c")
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, source, "-o", library], check=True)
        return ctypes.CDLL(str(library))


def describe() -> str:
    """Which compiler measures the limit; says so if there is none."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "no C compiler: the random-row limit was not measured"
    lines = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    return lines.stdout.splitlines()[0]


def sum_bags(rows_VD: F32, batches: Sequence[Batch], num_threads: int = 1) -> list[Contender]:
    """Sums of float32 rows; the fastest of all prefetch distances and kinds of stores.

    Nothing without a C compiler, as everywhere here.
    """
    dim = rows_VD.shape[1]
    return _bags(f"sum_bags_{dim}", rows_VD, 4 * dim, dim, batches, num_threads)


def read_bags(
    records: npt.NDArray[np.uint8], dim: int, batches: Sequence[Batch]
) -> list[Contender]:
    """Reads rows of any bytes, writes as many float32 as their sums would have."""
    record_bytes = records.shape[1]
    return _bags(f"read_bags_{record_bytes}_{dim}", records, record_bytes, dim, batches)


def _bags(
    name: str,
    rows: npt.NDArray[Any],
    row_bytes: int,
    dim: int,
    batches: Sequence[Batch],
    num_threads: int = 1,
) -> list[Contender]:
    library = _library()
    if library is None:
        return []
    function, threads = getattr(library, name), Threads(num_threads)
    out_BD: F32 = memory.empty((batches[0].num_bags, dim))

    def variant(ahead: int, stream: bool) -> Contender:
        def call_for(batch: Batch) -> Callable[[], F32]:
            def piece(part: slice) -> Callable[[], None]:
                return partial(
                    function, _address(rows), _address(batch.ids_N),
                    _address(batch.splits_B1[part.start :]), _int64(part.stop - part.start),
                    _address(out_BD[part]), _int64(ahead), ctypes.c_int(stream),
                )  # fmt: skip

            pieces = [piece(part) for part in threads.parts(batch.num_bags, 1)]

            def call() -> F32:
                threads.run(pieces)
                return out_BD

            return call

        variant_name = f"{ahead} rows ahead, {'streamed' if stream else 'ordinary'} stores"
        return Contender(variant_name, [call_for(batch) for batch in batches])

    return [_fastest([variant(a, s) for a in _distances(row_bytes) for s in (False, True)])]


def touch_records(rows_VD: F32, num_slots: int, batches: Sequence[Gradients]) -> list[Contender]:
    """Read and write back rows with their slots beside them; the fastest of several ways."""
    library = _library()
    if library is None:
        return []
    record_bytes = 4 * rows_VD.shape[1] * (1 + num_slots)
    assert rows_VD.strides[0] == record_bytes, "a row has its slots beside it"
    function = getattr(library, f"touch_records_{1 + num_slots}")
    # Next to nothing is added: slots must stay what an optimizer's step can work with.
    added = [np.full(b.grads_ND.shape, 1e-12, np.float32) for b in batches]

    def variant(ahead: int, write: bool) -> Contender:
        def call_for(index_N: I64, grads_ND: F32) -> Callable[[], object]:
            args = (
                _address(rows_VD), _address(index_N), _int64(index_N.size),
                _address(grads_ND), _int64(ahead), ctypes.c_int(write),
            )  # fmt: skip
            return partial(function, *args)

        name = f"{ahead} rows ahead, prefetched to {'write' if write else 'read'}"
        calls = [call_for(b.ids_N, g) for b, g in zip(batches, added, strict=True)]
        return Contender(name, calls)

    return [_fastest([variant(a, w) for a in _distances(record_bytes) for w in (False, True)])]


def _fastest(variants: Sequence[Contender]) -> Contender:
    return replace(best_of(variants), name=LIMIT)


def _distances(row_bytes: int) -> list[int]:
    return [max(1, lines * memory.CACHE_LINE // row_bytes) for lines in _LINES_AHEAD]
