"""Published numbers of every optimizer option, and how to get them out of shards, real or not.

Each `Golden` is one table. Its gradients reach the shards as in training: through a batch plan, by
every worker, for some rows of the table, which lie on different shards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ps.client import LocalTransport, ShardClient
from ps.config import FeatureConfig, TableConfig
from ps.custom_optimizer import CustomOptimizer
from ps.initializers import Constant, Initializer
from ps.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam, Optimizer
from ps.partition import Layout
from ps.ragged import F32, I64, Ragged
from ps.shard import ShardSpec, ShardState
from ps.spec import EmbeddingSpec, resolve
from tests.support.shards import whole_table
from workers.plan import plan_batch, row_gradients

Vector = Sequence[float]
TableOf = Callable[[str, int], Sequence[F32]]
"""(table, version) to its rows and slots."""

V, D = 7, 2
TOUCHED = (1, 2, 4, 6)
RTOL = 5e-7
"""Seven digits are published."""
W0, G1, G2 = (1.0, -2.0), (0.5, -1.0), (-0.25, 2.0)
GLOBAL_OPTIMIZER = SGD(0.1)
DENSE = np.zeros(5, dtype=np.float32)


@dataclass(frozen=True)
class Golden:
    """A table, the contributions to its touched rows, and what they must become."""

    name: str
    optimizer: Optimizer | None
    steps: Sequence[Sequence[Vector]]
    """Per step, the gradients that each touched row gets, one after the other."""
    want: Mapping[int, Sequence[Vector]]
    """After so many steps: the values of a touched row, and of its slots as far as published."""
    start: Vector = W0
    untouched: Vector | None = None
    """What other rows are in the end, if not what they were."""


@dataclass(frozen=True)
class StartAt(Initializer):
    """Every row is this row."""

    row: tuple[float, ...]

    def rows(self, key: np.uint64, ids_N: I64, dim: int) -> F32:
        return np.tile(np.array(self.row, dtype=np.float32), (ids_N.size, 1))


class CountedRate:
    """TensorFlow's form, `rate()`: each call is one step further along 1 → .5 in 10 steps."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return falling_rate(self.calls - 1)


def falling_rate(step: int) -> float:
    return max(0.5, 1 - 0.05 * step)


def late_rate(step: int) -> float:
    return 0.0 if step < 2 else 0.1


# --- computations of custom optimizers


def custom_sgd(gradient: Any, embedding_table: Any, slots: Any, rate: Any, hyper: Any) -> Any:
    return embedding_table - rate * gradient


def custom_adagrad(gradient: Any, embedding_table: Any, slots: Any, rate: Any, hyper: Any) -> Any:
    """The example in TensorFlow's documentation."""
    accumulator = slots[0] + gradient * gradient
    return embedding_table - rate * gradient / np.sqrt(accumulator), accumulator


def custom_adam(gradient: Any, embedding_table: Any, slots: Any, rate: Any, hyper: Any) -> Any:
    beta_1, beta_2, epsilon = hyper
    one = np.float32(1)
    m = beta_1 * slots[0] + (one - beta_1) * gradient
    v = beta_2 * slots[1] + (one - beta_2) * gradient * gradient
    return embedding_table - rate * m / (np.sqrt(v) + epsilon), m, v


def times_hyperparameter(gradient: Any, table: Any, slots: Any, rate: Any, hyper: Any) -> Any:
    return table - hyper[0] * gradient


# --- the numbers

_REG = {"l1_regularization_strength": 0.2, "l2_regularization_strength": 0.3, "beta": 0.4}
_TWO_STEPS: list[tuple[str, Optimizer, Sequence[Vector], Sequence[Vector]]] = [
    # (w, slots ...) after step 1, the same after step 2
    ("sgd", SGD(0.1), ([0.95, -1.9],), ([0.975, -2.1],)),
    (
        "adagrad",
        Adagrad(0.1),
        ([0.9154845, -1.904654], [0.35, 1.1]),
        ([0.9544095, -1.993215], [0.4125, 5.1]),
    ),
    (
        "adagrad_momentum",
        AdagradMomentum(0.1, momentum=0.9),
        ([0.9, -1.9], [0.25, 1], [1, -1]),
        ([0.8547213, -1.899443], [0.3125, 5], [0.4527864, -0.005572796]),
    ),
    (
        "adagrad_momentum_nesterov",
        AdagradMomentum(0.1, momentum=0.9, use_nesterov=True, exponent=3, beta2=0.9, epsilon=0.1),
        ([0.81, -1.675105], [0.025, 0.1], [1, -1.709976]),
        ([0.8230686, -1.989668], [0.02875, 0.49], [0.4049022, 0.8456059]),
    ),
    (
        "adam",
        Adam(0.1),
        ([0.6837722, -1.683772], [0.05, -0.1], [0.00025, 0.001]),
        ([0.5705898, -1.839351], [0.02, 0.11], [0.00031225, 0.004999]),
    ),
    (
        "adam_outside",
        Adam(0.1, epsilon=0.1, sum_inside_sqrt=False),
        ([0.9568263, -1.924025],),
        ([0.9398297, -1.988464],),
    ),
    (
        "adam_inside",
        Adam(0.1, epsilon=0.1),
        ([0.9506135, -1.904654],),
        ([0.9309186, -1.994471],),
    ),
    (
        "ftrl",
        FTRL(0.1),
        ([0.3809621, -1.301631], [0.35, 1.1], [-2.253802, 13.65162]),
        ([0.4198871, -1.390193], [0.4125, 5.1], [-2.696774, 31.39497]),
    ),
    (
        "ftrl_regularized",
        FTRL(0.1, **_REG),
        ([0.1953011, -0.8915391], [0.35, 1.1], [-2.253802, 13.65162]),
        ([0.2179818, -0.965114], [0.4125, 5.1], [-2.602729, 26.43487]),
    ),
    (
        "ftrl_multiplied",
        FTRL(0.1, **_REG, multiply_linear_by_learning_rate=True),
        ([0.1953011, -0.8915391], [0.35, 1.1], [-0.2253802, 1.365162]),
        ([0.2179818, -0.965114], [0.4125, 5.1], [-0.2602729, 2.643487]),
    ),
    (
        "ftrl_allow_zero",
        FTRL(0.1, allow_zero_accumulator=True),
        ([0.3809621, -1.301631], [0.35, 1.1], [-2.253802, 13.65162]),
        ([0.4198871, -1.390193], [0.4125, 5.1], [-2.696774, 31.39497]),
    ),
    (
        "custom_adagrad",
        CustomOptimizer(custom_adagrad, 0.1, ["accumulators"], [0.1]),
        ([0.9154845, -1.904654], [0.35, 1.1]),
        ([0.9544095, -1.993215], [0.4125, 5.1]),
    ),
    (
        "custom_adam",
        CustomOptimizer(
            custom_adam, 0.1, ["m", "v"], [Constant(0.0), 0], [0.9, 0.999, 0.1], slot_dims=[2, 2]
        ),
        ([0.9568263, -1.924025],),
        ([0.9398297, -1.988464],),
    ),
]
_ONE_STEP: list[tuple[str, Optimizer, Vector]] = [
    ("decayed", SGD(0.1, weight_decay_factor=0.1), [0.85, -1.7]),
    (
        "decayed_by_rate",
        SGD(0.1, weight_decay_factor=0.1, multiply_weight_decay_factor_by_learning_rate=True),
        [0.94, -1.88],
    ),
    ("no_decay", SGD(0.1, weight_decay_factor=0), [0.95, -1.9]),
    ("rate_alone", SGD(0.1, multiply_weight_decay_factor_by_learning_rate=True), [0.95, -1.9]),
    ("weights_clipped", SGD(0.1, clip_weight_min=-1.5, clip_weight_max=0.9), [0.9, -1.5]),
    ("weights_clipped_above", SGD(0.1, clip_weight_max=0.9), [0.9, -1.9]),
    ("clipped", SGD(0.1, clipvalue=0.25), [0.975, -1.975]),
    ("clipped_above", SGD(0.1, clipvalue=(None, 0.25)), [0.975, -1.9]),
    ("clipped_below", SGD(0.1, clipvalue=(-0.25, None)), [0.95, -1.975]),
    ("clipped_nowhere", SGD(0.1, clipvalue=(None, None)), [0.95, -1.9]),
    # clip g to ±.25 → decay w to [.9, -1.8] → [.875, -1.775] → clip w
    (
        "all_in_order",
        SGD(0.1, clipvalue=0.25, weight_decay_factor=0.1, clip_weight_min=-1.5,
            clip_weight_max=0.85),
        [0.85, -1.5],
    ),
    ("custom_sgd", CustomOptimizer(custom_sgd, 0.1), [0.95, -1.9]),
]  # fmt: skip
_SCHEDULE = [0.0, -1.0, -1.95, -2.85, -3.7, -4.5]
_COUNTED = CountedRate()


def _schedule(name: str, optimizer: Optimizer) -> Golden:
    steps = [[(1.0, 0.0)]] * 5
    return Golden(name, optimizer, steps, {k: [(w, 0.0)] for k, w in enumerate(_SCHEDULE)}, (0, 0))


def _packed(golden: Golden) -> Golden:
    assert golden.optimizer is not None
    optimizer = replace(golden.optimizer, low_dimensional_packing_status=True)  # type: ignore[type-var]
    return replace(golden, name=f"{golden.name}_packed", optimizer=optimizer)


def _non_lazy_adam() -> Golden:
    """Two steps at rate 0 bring m to .02 and v to .0003; two more touch no row at all.

    Of v, .00029940 is published: .0003·.999².
    """
    g1 = (0.36 + math.sqrt(0.36**2 + 4 * 1.809 * 0.26)) / (2 * 1.809)
    g2 = 0.2 - 0.9 * g1
    want = {2: [(1, 1), (0.02, 0.02), (0.0003, 0.0003)],
            4: [(0.8024006,) * 2, (0.0162,) * 2, (0.0003 * 0.999**2,) * 2]}  # fmt: skip
    steps = [[(g1, g1)], [(g2, g2)], [], []]
    optimizer = Adam(late_rate, lazy_adam=False)
    return Golden("adam_not_lazy", optimizer, steps, want, (1, 1), untouched=(1, 1))


def _goldens() -> list[Golden]:
    two = [
        Golden(name, optimizer, [[G1], [G2]], {1: first, 2: second})
        for name, optimizer, first, second in _TWO_STEPS
    ]
    one = [Golden(name, optimizer, [[G1]], {1: [row]}) for name, optimizer, row in _ONE_STEP]
    packed = [_packed(g) for g in two if not isinstance(g.optimizer, CustomOptimizer)]
    one_by_one = {1: [(-0.1643528,) * 2, (2.1, 2.1)]}
    twice = [[(1.0, 1.0), (1.0, 1.0)]]
    custom = CustomOptimizer(custom_adagrad, 0.1, ["accumulators"], [0.1])
    return [
        *two,
        *one,
        *packed,
        Golden("global", None, [[G1], [G2]], {1: [(0.95, -1.9)], 2: [(0.975, -2.1)]}),
        Golden("summed", Adagrad(0.1), twice, {1: [(-0.0987730,) * 2, (4.1, 4.1)]}, (0, 0)),
        Golden("apart", Adagrad(0.1, use_gradient_accumulation=False), twice, one_by_one, (0, 0)),
        Golden("custom_apart", custom, twice, one_by_one, (0, 0)),
        # The clip sees the sum of .3 and .2.
        Golden("clipped_sum", SGD(0.1, clipvalue=0.25), [[(0.3, 0.3), (0.2, -0.2)]],
               {1: [(0.975, -2.01)]}),
        _non_lazy_adam(),
        _schedule("schedule", SGD(falling_rate)),
        # One object: asked once a step, though four tables have it.
        _schedule("counted", SGD(_COUNTED)),
        _schedule("counted_too", SGD(_COUNTED, clip_weight_max=9)),
        _schedule("counted_custom", CustomOptimizer(custom_sgd, _COUNTED)),
        _schedule("counted_hyperparameter",
                  CustomOptimizer(times_hyperparameter, 9.0, hyperparameters=[_COUNTED])),
    ]  # fmt: skip


GOLDENS = _goldens()


# --- through shards


def golden_spec(goldens: Sequence[Golden] = GOLDENS) -> EmbeddingSpec:
    """One table and one feature per golden."""
    features = {}
    for g in goldens:
        start = StartAt(tuple(map(float, g.start)))
        features[g.name] = FeatureConfig(TableConfig(V, D, start, g.optimizer, "sum", g.name))
    return resolve(features, GLOBAL_OPTIMIZER)


def shard_spec(spec: EmbeddingSpec, num_shards: int, num_workers: int) -> ShardSpec:
    return ShardSpec(
        shard_id=0,
        num_shards=num_shards,
        num_workers=num_workers,
        embedding=spec,
        dense_optimizer=SGD(0.1),
        reduction="sum",
    )


def local_shards(spec: ShardSpec) -> tuple[list[ShardState], list[ShardClient]]:
    """Shards in this process, each with its own copy of the spec as in an actor, and clients."""
    layout = Layout.of(spec.embedding, spec.num_shards, DENSE.size)
    shards = [ShardState(replace(copy.deepcopy(spec), shard_id=k)) for k in range(spec.num_shards)]
    for k, shard in enumerate(shards):
        part = slice(*layout.dense_splits[k : k + 2])
        shard.set_dense(DENSE[part], np.zeros(0, dtype=np.float32))
    clients = [
        ShardClient(spec.embedding, layout, LocalTransport(shards), w)
        for w in range(spec.num_workers)
    ]
    return shards, clients


def table_of(shards: Sequence[ShardState]) -> TableOf:
    """Reads whole tables of shards in this process."""

    def read(table: str, version: int) -> Sequence[F32]:
        for shard in shards:
            shard.check_version(version)
        return whole_table(shards, table)

    return read


def push_step(clients: Sequence[ShardClient], goldens: Sequence[Golden], step: int) -> None:
    """The contributions of a step, dealt out to the workers one by one."""
    todo = {g.name: g.steps[step] if step < len(g.steps) else [] for g in goldens}
    for w, client in enumerate(clients):
        mine = {name: list(vectors)[w :: len(clients)] for name, vectors in todo.items()}
        size = max(1, *map(len, mine.values()))
        bags, grads = {}, {}
        for name, vectors in mine.items():
            lists = [list(TOUCHED) if i < len(vectors) else [] for i in range(size)]
            bags[name] = Ragged.from_lists(lists)
            grads[name] = np.zeros((size, D), dtype=np.float32)
            grads[name][: len(vectors)] = np.array(vectors, dtype=np.float32).reshape(-1, D)
        plan = plan_batch(client.spec, client.layout, bags)
        rows, row_grads = row_gradients(client.spec, plan, grads, {})
        client.push(step, rows, row_grads, DENSE, None)


def run_goldens(
    clients: Sequence[ShardClient], table_of: TableOf, goldens: Sequence[Golden] = GOLDENS
) -> None:
    """Push step after step, and hold every table against its numbers after each."""
    num_steps = max(len(g.steps) for g in goldens)
    for version in range(num_steps + 1):
        for client in clients:
            client.flush()
        for golden in goldens:
            if version in golden.want:
                check(golden, version, table_of(golden.name, version))
        if version < num_steps:
            push_step(clients, goldens, version)


def check(golden: Golden, version: int, arrays: Sequence[F32]) -> None:
    what = f"{golden.name} after step {version}"
    for array, want in zip(arrays, golden.want[version], strict=False):
        expected = np.tile(np.array(want, dtype=np.float64), (len(TOUCHED), 1))
        np.testing.assert_allclose(array[list(TOUCHED)], expected, rtol=RTOL, err_msg=what)
    others = np.delete(arrays[0], TOUCHED, axis=0)
    same = golden.start if golden.untouched is None else golden.untouched
    np.testing.assert_array_equal(others, np.tile(np.float32(same), (len(others), 1)), what)
