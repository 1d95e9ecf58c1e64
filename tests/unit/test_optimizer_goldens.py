"""Every optimizer option acts: published numbers out of one, two and three shards."""

from __future__ import annotations

import numpy as np
import pytest

from ps.config import FeatureConfig, TableConfig
from ps.custom_optimizer import CustomOptimizer
from ps.initializers import Constant
from ps.optimizers import SGD, Adagrad, Optimizer
from ps.ragged import F32, Ragged
from ps.spec import resolve
from tests.support.goldens import (
    DENSE,
    GOLDENS,
    custom_adagrad,
    golden_spec,
    local_shards,
    run_goldens,
    shard_spec,
    table_of,
)
from tests.support.reference import optimize, same_bits
from workers.plan import plan_batch, row_gradients


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_every_option_gives_the_published_numbers(num_shards: int, num_workers: int) -> None:
    shards, clients = local_shards(shard_spec(golden_spec(), num_shards, num_workers))
    run_goldens(clients, table_of(shards))


def test_goldens_have_names_of_their_own() -> None:
    assert len({golden.name for golden in GOLDENS}) == len(GOLDENS)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("accumulate", [True, False])
def test_a_row_gets_the_gradients_of_all_its_positions_on_all_workers(
    num_shards: int, num_workers: int, accumulate: bool
) -> None:
    """Row 3 stands in three positions per worker, so it moves by -.1·3 for each; padding by 0."""
    optimizer = SGD(0.1, use_gradient_accumulation=accumulate)
    table = TableConfig(6, 2, Constant(0.0), optimizer, name="t")
    spec = resolve({"f": FeatureConfig(table, max_sequence_length=4)})
    shards, clients = local_shards(shard_spec(spec, num_shards, num_workers))
    for client in clients:
        plan = plan_batch(spec, client.layout, {"f": Ragged.from_lists([[3, 3], [], [5, 3]])})
        ones = {"f": np.ones((3, 4, 2), dtype=np.float32)}
        client.push(0, *row_gradients(spec, plan, ones, {}), DENSE, None)
    want = np.zeros((6, 2))
    want[3], want[5] = -0.3 * num_workers, -0.1 * num_workers
    np.testing.assert_allclose(table_of(shards)("t", 1)[0], want, rtol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        Adagrad(0.1, use_gradient_accumulation=False),
        CustomOptimizer(custom_adagrad, 0.1, ["accumulators"], [0.1]),
    ],
    ids=["adagrad", "custom"],
)
def test_contributions_are_applied_by_worker_then_feature_then_example(
    optimizer: Optimizer,
) -> None:
    """Whichever worker pushes first, and on any number of shards; the order shows in the bits."""
    spec = resolve({k: FeatureConfig(t) for t in [_table(optimizer)] for k in ("a", "b")})
    rng = np.random.default_rng(1)
    grads = [
        {k: rng.normal(scale=4.0, size=(2, 2)).astype(np.float32) for k in ("a", "b")}
        for _ in range(3)
    ]
    lists = {"a": [[1, 2], [1]], "b": [[2, 1], [1]]}  # sums: a gradient is its example's
    order = [(k, e, row) for k in lists for e, ids in enumerate(lists[k]) for row in ids]
    rows = np.full((6, 2), 0.5, dtype=np.float32)
    slots = {"accumulators": np.full_like(rows, 0.1)}
    adagrad = Adagrad(0.1, use_gradient_accumulation=False)
    for of_worker in grads:
        index = np.array([row for _, _, row in order])
        values = np.stack([of_worker[k][e] for k, e, _ in order])
        rows, slots = optimize(adagrad, rows, slots, index, values, 0.1)
    for num_shards, arrival in [(1, (0, 1, 2)), (1, (2, 0, 1)), (3, (1, 2, 0))]:
        shards, clients = local_shards(shard_spec(spec, num_shards, 3))
        for w in arrival:
            bags = {k: Ragged.from_lists(ids) for k, ids in lists.items()}
            plan = plan_batch(spec, clients[w].layout, bags)
            clients[w].push(0, *row_gradients(spec, plan, grads[w], {}), DENSE, None)
        got: list[F32] = list(table_of(shards)("t", 1))
        assert same_bits(got[0], rows)
        assert same_bits(got[1], slots["accumulators"])


def _table(optimizer: Optimizer) -> TableConfig:
    return TableConfig(6, 2, Constant(0.5), optimizer, "sum", "t")
