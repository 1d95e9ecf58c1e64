"""Whole updates: many gradients, several for one row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.kernels import ours, update_peers
from benchmarks.kernels.cases import Draw, Size, draw_ids, make_gradients
from benchmarks.kernels.options import Options
from benchmarks.kernels.report import Cell, Section, lowest, table
from benchmarks.kernels.steps import change, check_change, make_arrays
from benchmarks.kernels.timing import Contender, interleaved
from benchmarks.kernels.update_peers import FBGEMM, NUMPY, RATE, TF, TORCH
from ps.optimizers import Adagrad

_TABLE, _QUICK_TABLE = Size(4_000_000, 64), Size(1_000_000, 64)
_MANY = 1_000_000
_CASES: tuple[tuple[int, Draw], ...] = (
    (82_000, "uniform"), (82_000, "Zipf"), (410_000, "Zipf"), (_MANY, "Zipf"),
)  # fmt: skip
_LABELS = ("ids", "draw", "distinct")
_TEXT = """\
Milliseconds of one thread. *Sums* is the distinct ids and the sum of the gradients of each: *TF* by
`tf.unique` and `unsorted_segment_sum`, *NumPy* by `numpy.unique(return_inverse=True)` and
`numpy.add.at`. *Updates* adds Adagrad on the rows: *TF* by `ResourceSparseApplyAdagradV2`; *torch*
is the backward pass of `embedding_bag(sparse=True)` and `optim.Adagrad`; *FBGEMM* is the backward
pass of the table-batched embedding with exact Adagrad. Forward passes are not counted. The peers
change the same memory, Manta records of its own, all on huge pages."""


def run(options: Options) -> Section:
    """The sums of a million ids, and updates with fewer and with as many."""
    size = _QUICK_TABLE if options.quick else _TABLE
    optimizer = Adagrad(RATE)
    store, arrays = ours.make_store(size, optimizer), make_arrays(size, optimizer)
    our_views = [store.rows, *store.slots.values()]
    their_views = [array.numpy for array in arrays]
    sums: list[Cell] = []
    updates: list[Cell] = []
    for count, draw in _CASES:
        rng = np.random.default_rng(count)
        batches = make_gradients(
            [draw_ids(size.rows, draw, count, rng) for _ in range(2)], size.dim
        )
        distinct = f"{np.unique(batches[0].ids_N).size:,}"
        case = (f"{count:,}", draw, distinct)
        if count == _MANY:
            contenders = [
                ours.sums(batches),
                update_peers.tensorflow_sums(batches),
                update_peers.numpy_sums(batches),
            ]
            _check_sums(contenders)
            cell = Cell(case, count, interleaved(contenders, options.cell_s))
            sums.append(options.done("sums", cell))
        for our_view, their_view in zip(our_views, their_views, strict=True):
            our_view[:] = their_view  # the runs of the case before have made them different
        our_update = ours.update(store, batches, RATE)
        peers = [
            update_peers.tensorflow_update(arrays, batches),
            update_peers.torch_adagrad(arrays, batches, unique=False),
            update_peers.fbgemm_update(arrays, batches),
        ]
        expected = change(our_update, our_views, batches[0])
        for peer in peers:
            check_change(peer, their_views, batches[0], expected)
        contenders = [our_update, *peers]
        cell = Cell(case, count, interleaved(contenders, options.cell_s))
        updates.append(options.done("updates", cell))
    return Section(
        f"Dedup, gradient sums and whole updates of {size}",
        _TEXT,
        [table("Sums", _LABELS, sums, "ms"), table("Updates", _LABELS, updates, "ms")],
        [
            *lowest("dedup and sums of 1M Zipf ids: NumPy", 15, sums, (NUMPY,)),
            *lowest("dedup and sums of 1M Zipf ids: TensorFlow", 5, sums, (TF,)),
            *lowest("whole update: TensorFlow", 10, updates, (TF,)),
            *lowest("whole update: torch", 6, updates, (TORCH,)),
            *lowest("whole update: FBGEMM", 4, updates, (FBGEMM,)),
        ],
    )


def _check_sums(contenders: Sequence[Contender]) -> None:
    """Make sure that all have the same ids and sums, whatever their order."""
    found = [tuple(np.asarray(part) for part in c.run(0)) for c in contenders]  # type: ignore[attr-defined]
    (ids, sums), *others = [(u[order], s[order]) for u, s in found for order in [np.argsort(u)]]
    for other_ids, other_sums in others:
        np.testing.assert_array_equal(other_ids, ids)
        np.testing.assert_allclose(other_sums, sums, rtol=1e-3, atol=1e-2)
