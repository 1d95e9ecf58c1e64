"""Bags that shards combine give what rows combined by the worker give; where not bit for bit, near.

The peers are the plain twins on the whole table; shards are simulated by their kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.client import LocalTransport, ShardClient
from ps.config import CustomCombiner, FeatureConfig, QuantizationConfig, TableConfig
from ps.errors import ConfigError
from ps.kernels.combine import COMBINER_CODES
from ps.kernels.dedup import distinct_ids
from ps.kernels.gradients import combine_gradients
from ps.kernels.shard_bags import sum_bags
from ps.optimizers import SGD, Adagrad
from ps.partition import Layout, Placement
from ps.ragged import F32, Ragged
from ps.shard import ShardSpec, ShardState
from ps.spec import EmbeddingSpec, resolve
from tests.support import reference as twin
from tests.support.reference import same_bits
from tests.support.strategies import bags
from workers.plan import activations as activations_of_plan
from workers.plan import plan_batch, row_gradients
from workers.shard_bags import (
    BagsPlan,
    bag_activations,
    bag_gradients,
    bags_bytes,
    check_combined_on_shards,
    plan_bags,
    rows_bytes,
)

V, D, SLAB = 40, 3, 4
COMBINERS = st.sampled_from(["sum", "mean", "sqrtn"])
TAME = st.sampled_from([1.0, 0.5, 2.0, 0.1, 3.25])
few = settings(max_examples=50)


def spec_of(combiner: Any = "mean", table: Any = None, **options: Any) -> EmbeddingSpec:
    """Two features of one table."""
    optimizer = options.pop("optimizer", SGD())
    items = TableConfig(V, D, combiner=combiner, name="items", optimizer=optimizer, **(table or {}))
    return resolve({"one": FeatureConfig(items), "two": FeatureConfig(items, **options)})


@st.composite
def batches(draw: st.DrawFn, **options: Any) -> tuple[Ragged, Ragged]:
    size = draw(st.integers(0, 4))
    one, two = (draw(bags(V, num_examples=size, **options)) for _ in range(2))
    return one, two


def planned(combiner: str, batch: tuple[Ragged, Ragged], num_shards: int) -> BagsPlan:
    spec = spec_of(combiner)
    placement = Placement(V, SLAB, num_shards, num_shards - 1)
    return plan_bags(spec.tables[0], spec.features, batch, placement)


def ids_of(num_shards: int, shard: int) -> list[int]:
    """The ids of a shard's local rows."""
    slabs = Placement(V, SLAB, num_shards, num_shards - 1).slabs(shard)
    return [slab.first_id + i for slab in slabs for i in range(slab.num_rows)]


def numbers(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def activations(combiner: str, batch: tuple[Ragged, Ragged], table: F32, num_shards: int) -> F32:
    """Of both features, by way of the shards, of which the last answers first."""
    plan = planned(combiner, batch, num_shards)
    entries = plan.entries
    parts = np.full((num_shards, entries.bags.count, D), np.nan, dtype=np.float32)
    for k in reversed(range(num_shards)):
        splits, span = entries.bags.row_splits[k], slice(*entries.shard_splits[k : k + 2])
        records = np.hstack(
            [table[ids_of(num_shards, k)], numbers(9, len(ids_of(num_shards, k)), 2)]
        )
        weights = entries.bags.weights[span] if entries.bags.weights.size else entries.bags.weights
        sum_bags(records, entries.of_shard(k), splits, weights, parts[k])
    parts.flags.writeable = False
    found = bag_activations(plan, parts)
    assert list(found) == ["one", "two"]
    return np.concatenate(list(found.values()))


def wanted(combiner: str, batch: tuple[Ragged, Ragged], table: F32) -> F32:
    found = [twin.combine_rows(table, b.ids, b.row_splits, b.weights, combiner) for b in batch]
    return np.concatenate(found)


@few
@given(batch=batches(), combiner=COMBINERS)
def test_one_shard_gives_the_bits_of_the_worker(
    batch: tuple[Ragged, Ragged], combiner: str
) -> None:
    table = numbers(1, V, D)
    assert same_bits(activations(combiner, batch, table, 1), wanted(combiner, batch, table))


@few
@given(batch=batches(weights=TAME), combiner=COMBINERS, num_shards=st.integers(2, 5))
def test_more_shards_are_as_near_as_their_roundings(
    batch: tuple[Ragged, Ragged], combiner: str, num_shards: int
) -> None:
    """The sums within (n + K)·2⁻²⁴·Σ|w·row|; a division and its divisor add n + 3 roundings."""
    table = numbers(1, V, D)
    got = activations(combiner, batch, table, num_shards)
    at = 0
    for bag in batch:
        weights = np.ones(bag.ids.size) if bag.weights is None else bag.weights.astype(np.float64)
        for ids, w in zip(bag.to_lists(), np.split(weights, bag.row_splits[1:-1]), strict=False):
            divisor = {"sum": 1.0, "mean": w.sum(), "sqrtn": np.sqrt((w * w).sum())}[combiner]
            entries = w[:, None] * table[ids].astype(np.float64)
            if not ids:
                assert not got[at].any()
            else:
                roundings = len(ids) + num_shards + (combiner != "sum") * (len(ids) + 3)
                error = np.abs(got[at] - entries.sum(axis=0) / divisor)
                assert (error <= roundings * 2.0**-24 * np.abs(entries).sum(axis=0) / divisor).all()
            at += 1
    assert same_bits(got, activations(combiner, batch, table, num_shards))


@few
@given(batch=batches(), combiner=COMBINERS, num_shards=st.integers(1, 5))
def test_rows_get_the_bits_of_gradients_that_the_worker_sums(
    batch: tuple[Ragged, Ragged], combiner: str, num_shards: int
) -> None:
    plan = planned(combiner, batch, num_shards)
    grads = {
        "one": numbers(2, batch[0].num_examples, D),
        "two": numbers(3, batch[1].num_examples, D),
    }
    pushed, upstream = bag_gradients(plan, grads)
    got = np.zeros((V, D), dtype=np.float32)
    for k in range(num_shards):
        span = slice(*pushed.shard_splits[k : k + 2])
        weights = pushed.bags.weights[span] if pushed.bags.weights.size else pushed.bags.weights
        rows, index = distinct_ids(pushed.of_shard(k))
        total = np.zeros((rows.size, D), dtype=np.float32)
        args = (upstream, index, pushed.bags.row_splits[k], weights, COMBINER_CODES["sum"], total)
        combine_gradients(*args)
        got[np.array(ids_of(num_shards, k))[rows]] = total
    want = np.zeros((V, D), dtype=np.float32)
    for bag, grad in zip(batch, grads.values(), strict=True):
        args = (grad, bag.ids, bag.row_splits, bag.weights, combiner, want)
        want = twin.combine_gradients(*args)
    assert same_bits(got, want)


def test_parts_are_added_in_the_order_of_the_shards() -> None:
    bag = Ragged.from_lists([[0, 4, 8]])
    plan = planned("sum", (bag, bag), 3)
    for order, want in [([1e8, 1, -1e8], 0), ([1e8, -1e8, 1], 1)]:
        parts = np.array(order, dtype=np.float32)[:, None, None] * np.ones((2, D), np.float32)
        assert (np.stack(list(bag_activations(plan, parts).values())) == want).all()


def test_weights_of_one_feature_are_ones_for_the_others() -> None:
    weighted, plain = Ragged.from_lists([[1, 2]], [[2.0, 3.0]]), Ragged.from_lists([[3]])
    assert planned("sum", (plain, weighted), 1).entries.bags.weights.tolist() == [1, 2, 3]
    assert planned("mean", (plain, plain), 1).entries.bags.weights.size == 0
    assert planned("mean", (plain, weighted), 1).divisors.tolist() == [1, 5]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"combiner": CustomCombiner(lambda *a: a, max_valency=3)}, "custom `combiner`"),
        (
            {"table": {"quantization_config": QuantizationConfig(2, 0.0, 1.0)}},
            "`quantization_config`",
        ),
        ({"optimizer": SGD(use_gradient_accumulation=False)}, "`use_gradient_accumulation: false`"),
        ({"max_sequence_length": 3}, "`max_sequence_length` of feature 'two'"),
        ({"output_shape": [2, 2]}, "`output_shape` of feature 'two'"),
    ],
    ids=["custom", "quantized", "contributions", "sequence", "shape"],
)
def test_what_shards_cannot_combine_is_refused(options: dict[str, Any], named: str) -> None:
    spec = spec_of(**options)
    with pytest.raises(ConfigError, match=f"table 'items': `combine_on: shard`.*{named}"):
        check_combined_on_shards(spec.tables[0], spec.features)


def test_bags_combined_on_the_device_are_refused() -> None:
    spec = spec_of()
    features = [replace(spec.features[0], tensor_core_width=4)]
    with pytest.raises(ConfigError, match="`tensor_core_shape` of feature 'one'"):
        check_combined_on_shards(spec.tables[0], features)
    check_combined_on_shards(spec.tables[0], spec.features)


@pytest.mark.parametrize("weighted", [False, True])
def test_bytes_are_those_of_the_arrays(weighted: bool) -> None:
    lists = [[1, 2, 3], [], [5, 39]]
    weights = [[1.0] * len(ids) for ids in lists] if weighted else None
    plan = planned("mean", (Ragged.from_lists(lists, weights), Ragged.from_lists(lists)), 2)
    pushed, upstream = bag_gradients(plan, {"one": numbers(1, 3, D), "two": numbers(2, 3, D)})
    splits = pushed.bags.row_splits
    sent = pushed.local_rows.nbytes + pushed.bags.weights.nbytes + splits.nbytes
    want = bags_bytes(10, 6, D, num_shards=2, weighted=weighted)
    assert sent + 2 * upstream.nbytes == want
    assert rows_bytes(5, D) == 5 * (8 + 4 * D)


def trained(num_shards: int, on_shards: set[str], num_workers: int = 2) -> list[F32]:
    """The activations of the workers' first step, and the rows after two, through real shards."""
    spec, layout = spec_of("sqrtn", optimizer=Adagrad(0.1)), Layout.of(spec_of(), num_shards)
    shards = [
        ShardState(
            ShardSpec(
                shard_id=k,
                num_shards=num_shards,
                num_workers=num_workers,
                embedding=spec,
                dense_optimizer=SGD(),
            )
        )
        for k in range(num_shards)
    ]
    for shard in shards:
        shard.set_dense(np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.float32))
    clients = [ShardClient(spec, layout, LocalTransport(shards), w) for w in range(num_workers)]
    rng, found, no_grad = np.random.default_rng(5), [], np.zeros(0, dtype=np.float32)
    for step in range(2):
        plans = []
        for client in clients:
            bags = {name: a_bag(rng, weighted=name == "two") for name in ("one", "two")}
            plans.append(plan_batch(spec, layout, bags, on_shards))
            rows = client.pull(step, step, plans[-1].distinct).result().rows
            if step == 0:
                found += activations_of_plan(spec, plans[-1], rows).values()
        for client, plan in zip(clients, plans, strict=True):
            grads = {name: numbers(step, 8, D) for name in ("one", "two")}
            client.push(step, *row_gradients(spec, plan, grads, {}), no_grad, None)
    slabs = [slab for shard in shards for slab in shard.slabs("items")]
    slabs.sort(key=lambda slab: slab[0].first_id)
    return [*found, np.concatenate([rows for _, rows, _ in slabs])]


def a_bag(rng: np.random.Generator, *, weighted: bool) -> Ragged:
    splits = np.concatenate([[0], np.cumsum(rng.integers(0, 30, 8))])
    weights = rng.random(splits[-1], dtype=np.float32) if weighted else None
    return Ragged(rng.integers(0, V, splits[-1]), splits, weights)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_two_workers_train_the_same_rows_either_way(num_shards: int) -> None:
    *first, rows = trained(num_shards, {"items"})
    *first_by_rows, rows_by_rows = trained(num_shards, set())
    assert same_bits(rows, rows_by_rows)
    for mine, theirs in zip(first, first_by_rows, strict=True):
        assert num_shards > 1 or same_bits(mine, theirs)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
    assert np.abs(rows).max() > 0
