"""Optimizer steps on unique rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.kernels import limit, ours, update_peers
from benchmarks.kernels.cases import NUM_BATCHES, Gradients, Size, fill_random, make_gradients
from benchmarks.kernels.machine import huge_percent
from benchmarks.kernels.options import Options
from benchmarks.kernels.report import Cell, Section, lowest, lowest_of_limit, table
from benchmarks.kernels.shared import SharedArray, shared_array
from benchmarks.kernels.timing import Contender, Timing, interleaved
from benchmarks.kernels.update_peers import KERAS, RATE, TF, TORCH, Arrays, Batches
from ps.optimizers import Adagrad, Adam, Optimizer
from ps.ragged import F32

COUNTS = (10_000, 100_000)
_TABLE, _QUICK_TABLE = Size(10_000_000, 64), Size(1_000_000, 64)
_KERAS_TABLE = Size(1_000_000, 64)
_ADAGRAD = Adagrad(RATE)
_ADAM = Adam(
    RATE, update_peers.BETA_1, update_peers.BETA_2, update_peers.EPSILON, sum_inside_sqrt=False
)
_TEXT = f"""\
Millions of rows changed per second, one thread, each row with one gradient. *TF* is
`ResourceSparseApplyAdagradV2` and, for Adam, a lazy Adam of gather and scatter operations; *Keras*
is `keras.optimizers.Adam` on `IndexedSlices`, which changes every row of the table each step and
needs memory for it, hence the table of {_KERAS_TABLE}; *torch* is `Adagrad` and `SparseAdam` on
gradients that are already coalesced. The peers change the same memory; Manta has rows and slots
side by side in records of its own, and its turn is before theirs: both at once would not fit. All
are on huge pages. *limit* reads, adds to and writes back the same records in the same order, in C,
with the best of several prefetch distances, in turn with Manta."""


@dataclass(frozen=True)
class _Case:
    name: str
    optimizer: Optimizer
    size: Size
    make_peers: Callable[[Arrays, Batches], list[Contender]]


def run(options: Options) -> Section:
    """Adagrad and Adam on the big table, Adam once more where Keras fits.

    First ours and the limit, then the peers: both tables at once would not fit.
    """
    big, small = (_QUICK_TABLE,) * 2 if options.quick else (_TABLE, _KERAS_TABLE)
    cases = [
        _Case("Adam", _ADAM, big, _adam_peers),  # the first, for TensorFlow keeps its memory
        _Case("Adagrad", _ADAGRAD, big, _adagrad_peers),
        _Case("Adam", _ADAM, small, _adam_peers_with_keras),
    ]
    found = [_ours(case, options.cell_s) for case in cases]
    cells = [
        cell
        for case, (changes, timings) in zip(cases, found, strict=True)
        for cell in _with_peers(case, changes, timings, options)
    ]
    return Section(
        "Optimizer step",
        _TEXT,
        [table("Steps on unique rows", ("optimizer", "table", "rows"), cells, "M/s")],
        [
            *lowest("optimizer step: TensorFlow", 8, cells, (TF, KERAS)),
            *lowest("optimizer step: torch", 6, cells, (TORCH,)),
            *lowest_of_limit("optimizer step: share of the limit", 70, cells),
        ],
    )


def _adagrad_peers(arrays: Arrays, batches: Batches) -> list[Contender]:
    return [
        update_peers.tensorflow_adagrad(arrays, batches),
        update_peers.torch_adagrad(arrays, batches, unique=True),
    ]


def _adam_peers(arrays: Arrays, batches: Batches) -> list[Contender]:
    return [
        update_peers.tensorflow_adam(arrays, batches),
        update_peers.torch_adam(arrays, batches),
    ]


def _adam_peers_with_keras(arrays: Arrays, batches: Batches) -> list[Contender]:
    # Not TensorFlow's too: a variable that sparse operations have changed is copied by dense ones.
    return [update_peers.torch_adam(arrays, batches), update_peers.keras_adam(arrays, batches)]


def _ours(case: _Case, budget_s: float) -> tuple[list[list[F32]], list[dict[str, Timing]]]:
    store = ours.make_store(case.size, case.optimizer)
    assert huge_percent(store.rows.ctypes.data) > 90
    views = [store.rows, *store.slots.values()]
    batches = _batches(case.size)
    contenders = [ours.optimizer_step(store, each, RATE) for each in batches]
    changes = [change(c, views, each[0]) for c, each in zip(contenders, batches, strict=True)]
    timings = []
    for contender, each in zip(contenders, batches, strict=True):
        limits = limit.touch_records(store.rows, len(store.slots), each)
        timings.append(interleaved([contender, *limits], budget_s))
    return changes, timings


def _with_peers(
    case: _Case, changes: list[list[F32]], timings: list[dict[str, Timing]], options: Options
) -> Iterator[Cell]:
    gc.collect()  # TensorFlow's objects refer to one another in cycles
    arrays = make_arrays(case.size, case.optimizer)
    assert all(huge_percent(array.numpy.ctypes.data) > 90 for array in arrays)
    batches = _batches(case.size)
    peers = [case.make_peers(arrays, each) for each in batches]
    for some, each, expected in zip(peers, batches, changes, strict=True):
        for peer in some:
            check_change(peer, [array.numpy for array in arrays], each[0], expected)
    for count, our_timings, some in zip(COUNTS, timings, peers, strict=True):
        label = (case.name, str(case.size), f"{count:,}")
        cell = Cell(label, count, our_timings | interleaved(some, options.cell_s))
        yield options.done("steps", cell)


def _batches(size: Size) -> list[Batches]:
    order = np.random.default_rng(3).permutation(size.rows)
    parts = [np.split(order[: NUM_BATCHES * count], NUM_BATCHES) for count in COUNTS]
    return [make_gradients(each, size.dim) for each in parts]


def make_arrays(size: Size, optimizer: Optimizer) -> list[SharedArray]:
    """Rows and slots for the peers, with the same numbers as `ours.make_store`."""
    shape = (size.rows, size.dim)
    rows, *slots = (shared_array(shape, v) for v in (0.0, *optimizer.slot_initial_values))
    fill_random(rows.numpy)
    return [rows, *slots]


def change(contender: Contender, views: Sequence[F32], batch: Gradients) -> list[F32]:
    """What the rows and slots of a batch become; they are put back afterwards."""
    ids_U = np.unique(batch.ids_N)
    start = [view[ids_U] for view in views]
    contender.run(0)
    found = [view[ids_U] for view in views]
    assert not np.array_equal(found[0], start[0]), f"{contender.name} has changed nothing"
    for view, values in zip(views, start, strict=True):
        view[ids_U] = values
    return found


def check_change(
    contender: Contender, views: Sequence[F32], batch: Gradients, expected: Sequence[F32]
) -> None:
    """Make sure that a contender changes rows and slots as another did."""
    for found, wanted in zip(change(contender, views, batch), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5, err_msg=contender.name)
