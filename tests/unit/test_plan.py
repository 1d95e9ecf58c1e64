"""The host side of a training step equals its twin on whole tables, whatever the sharding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.config import FeatureConfig, TableConfig
from ps.errors import IdRangeError
from ps.optimizers import SGD
from ps.partition import Layout
from ps.ragged import F32, Ragged
from ps.spec import EmbeddingSpec, resolve
from tests.support import reference as twin
from tests.support.reference import same_bits
from tests.support.strategies import bags
from workers.plan import BatchPlan, activation_shape, activations, plan_batch, row_gradients

V, W, L = 70, 6, 3
TAME = st.sampled_from([1.0, 0.5, 2.0, -1.0, 0.0, 3.25])


def spec_of(combiner: str = "mean", *, accumulate: bool = True) -> EmbeddingSpec:
    """Two bags and a sequence on one table, and a one-column table of its own."""
    optimizer = SGD(use_gradient_accumulation=accumulate)
    items = TableConfig(V, 3, combiner=combiner, name="items", optimizer=optimizer)
    small = TableConfig(W, 1, combiner="sum", name="small", optimizer=optimizer)
    return resolve(
        {
            "bag": FeatureConfig(items),
            "more": FeatureConfig(items),
            "seq": FeatureConfig(items, max_sequence_length=L),
            "bias": FeatureConfig(small),
        }
    )


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Ragged]:
    size = draw(st.integers(0, 4))
    return {
        "bag": draw(bags(V, num_examples=size, weights=TAME)),
        "more": draw(bags(V, num_examples=size, weighted=False)),
        "seq": draw(bags(V, num_examples=size, weighted=False)),
        "bias": draw(bags(W, num_examples=size, weighted=True, weights=TAME)),
    }


def tables_of(spec: EmbeddingSpec, seed: int = 0) -> dict[str, F32]:
    rng = np.random.default_rng(seed)
    return {
        t.name: rng.normal(size=(t.vocabulary_size, t.dim)).astype(np.float32) for t in spec.tables
    }


def upstream_of(spec: EmbeddingSpec, plan: BatchPlan, seed: int = 1) -> dict[str, F32]:
    rng = np.random.default_rng(seed)
    return {
        f.name: rng.normal(size=activation_shape(spec, f, plan.num_examples)).astype(np.float32)
        for f in spec.features
    }


def pulled(plan: BatchPlan, tables: dict[str, F32]) -> dict[str, F32]:
    return {name: table[plan.distinct[name].ids] for name, table in tables.items()}


def planned(
    spec: EmbeddingSpec, batch: dict[str, Ragged], num_shards: int
) -> tuple[BatchPlan, dict[str, F32], dict[str, F32]]:
    plan = plan_batch(spec, Layout.of(spec, num_shards), batch)
    return plan, tables_of(spec), upstream_of(spec, plan)


def want_gradient(spec: EmbeddingSpec, table: str, batch: Any, upstream: Any) -> F32:
    """float32 [V, D]: every feature's gradient added in feature order, entry by entry."""
    config = spec.table(table)
    total = np.zeros((config.vocabulary_size, config.dim), dtype=np.float32)
    for f in spec.features_of(table):
        bag, grad = batch[f.name], upstream[f.name]
        if f.max_sequence_length:
            total = twin.sequence_gradients(grad, bag.ids, bag.row_splits, total)
        else:
            args = (bag.ids, bag.row_splits, bag.weights, config.combiner, total)
            total = twin.combine_gradients(grad, *args)
    return total


COMBINERS = st.sampled_from(["sum", "mean", "sqrtn"])


@settings(max_examples=60)
@given(batch=batches(), combiner=COMBINERS, num_shards=st.integers(1, 5))
def test_activations_equal_a_lookup_in_the_whole_table(
    batch: dict[str, Ragged], combiner: str, num_shards: int
) -> None:
    spec = spec_of(combiner)
    plan, tables, _ = planned(spec, batch, num_shards)
    got = activations(spec, plan, pulled(plan, tables))
    assert list(got) == [f.name for f in spec.features]
    for f in spec.features:
        bag, table = batch[f.name], tables[f.table]
        if f.max_sequence_length:
            want = twin.scatter_sequences(table, bag.ids, bag.row_splits, L)
        else:
            code = spec.table(f.table).combiner
            want = twin.combine_rows(table, bag.ids, bag.row_splits, bag.weights, code)
        assert same_bits(got[f.name], want)


@settings(max_examples=60)
@given(batch=batches(), combiner=COMBINERS, num_shards=st.integers(1, 5))
def test_row_gradients_are_summed_once_per_distinct_row(
    batch: dict[str, Ragged], combiner: str, num_shards: int
) -> None:
    spec = spec_of(combiner)
    plan, _, upstream = planned(spec, batch, num_shards)
    rows, grads = row_gradients(spec, plan, upstream)
    for table in spec.tables:
        want = want_gradient(spec, table.name, batch, upstream)
        distinct = rows[table.name]
        assert len(set(distinct.ids.tolist())) == distinct.ids.size
        assert same_bits(grads[table.name], want[distinct.ids])
        untouched = np.delete(want, distinct.ids, axis=0)
        assert not untouched.any()


@settings(max_examples=60)
@given(batch=batches(), num_shards=st.integers(1, 5))
def test_without_accumulation_contributions_come_by_shard_in_batch_order(
    batch: dict[str, Ragged], num_shards: int
) -> None:
    spec = spec_of(accumulate=False)
    plan, _, upstream = planned(spec, batch, num_shards)
    rows, grads = row_gradients(spec, plan, upstream)
    for table in spec.tables:
        ids, entries = [], []
        for f in spec.features_of(table.name):
            bag = batch[f.name]
            if f.max_sequence_length:
                entry, places = twin.sequence_entries(upstream[f.name], bag.row_splits)
                ids.append(bag.ids[places])
            else:
                args = (bag.row_splits, bag.weights, table.combiner)
                entry = twin.entry_gradients(upstream[f.name], *args)
                ids.append(bag.ids)
            entries.append(entry)
        placement = Layout.of(spec, num_shards).placements[table.name]
        flat = np.concatenate(ids)
        shard = (flat // placement.slab_rows + placement.offset) % num_shards
        order = np.argsort(shard, kind="stable")
        got = rows[table.name]
        np.testing.assert_array_equal(got.ids, flat[order])
        assert same_bits(grads[table.name], np.concatenate(entries)[order])
        counts = np.bincount(shard, minlength=num_shards)
        np.testing.assert_array_equal(np.diff(got.shard_splits), counts)
        home = dict(
            zip(plan.distinct[table.name].ids, plan.distinct[table.name].local_rows, strict=True)
        )
        np.testing.assert_array_equal(got.local_rows, [home[i] for i in got.ids])


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_gradients_are_the_derivative_of_the_activations(combiner: str) -> None:
    """Central differences; activations are linear in the rows, so only rounding is left."""
    spec = spec_of(combiner)
    batch = {
        "bag": Ragged.from_lists([[1, 1, 69], [], [5]], [[1, 2, -0.5], [], [3]]),
        "more": Ragged.from_lists([[1], [5, 2, 5], []]),
        "seq": Ragged.from_lists([[5, 1, 5, 64, 2], [7], []]),
        "bias": Ragged.from_lists([[0, 0], [5], [0]], [[1, 0.5], [2], [-1]]),
    }
    plan, tables, upstream = planned(spec, batch, 3)

    def loss(rows: dict[str, F32]) -> float:
        out = activations(spec, plan, pulled(plan, rows))
        return sum(float(np.sum(out[n].astype(np.float64) * g)) for n, g in upstream.items())

    rows, grads = row_gradients(spec, plan, upstream)
    step = 0.5
    for name in tables:
        for u, row in enumerate(rows[name].ids):
            for d in range(tables[name].shape[1]):
                ends = []
                for sign in (1, -1):
                    moved = {n: t.copy() for n, t in tables.items()}
                    moved[name][row, d] += sign * step
                    ends.append(loss(moved))
                slope = (ends[0] - ends[1]) / (2 * step)
                assert grads[name][u, d] == pytest.approx(slope, rel=1e-5, abs=1e-5)


def test_ids_behind_the_end_of_a_sequence_are_neither_pulled_nor_pushed() -> None:
    spec = resolve({"seq": FeatureConfig(TableConfig(V, 2), max_sequence_length=2)})
    batch = {"seq": Ragged.from_lists([[3, 4, 5, 6], [], [7], [3, 8, 9]])}
    plan, _, upstream = planned(spec, batch, 1)
    assert plan.distinct["table_0"].ids.tolist() == [3, 4, 7, 8]
    rows, grads = row_gradients(spec, plan, upstream)
    g = upstream["seq"]
    np.testing.assert_array_equal(
        grads["table_0"], np.stack([g[0, 0] + g[3, 0], g[0, 1], g[2, 0], g[3, 1]])
    )
    assert rows["table_0"].ids.tolist() == [3, 4, 7, 8]


@pytest.mark.parametrize("feature", ["bag", "more", "seq", "bias"])
@pytest.mark.parametrize("bad", [-1, V, 2**40])
def test_a_bad_id_is_reported_with_its_feature(feature: str, bad: int) -> None:
    spec = spec_of()
    batch = {f.name: Ragged.from_lists([[1], [2, 0]]) for f in spec.features}
    batch[feature] = Ragged.from_lists([[1, 2, 0, 3, bad], [4]])  # behind the end of "seq" too
    table = spec.table("small" if feature == "bias" else "items")
    with pytest.raises(IdRangeError) as caught:
        plan_batch(spec, Layout.of(spec, 2), batch)
    error = caught.value
    assert (error.feature, error.table) == (feature, table.name)
    assert (error.bad_id, error.num_rows) == (bad, table.vocabulary_size)


def test_weights_below_and_at_zero_count_in_training() -> None:
    spec = resolve({"f": FeatureConfig(TableConfig(5, 2))})
    table = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    bag = Ragged.from_lists([[0, 1, 2], [3], [4]], [[-1, 2, 0], [-2], [0]])
    plan = plan_batch(spec, Layout.of(spec, 1), {"f": bag})
    got = activations(spec, plan, pulled(plan, {"table_0": table}))
    np.testing.assert_array_equal(got["f"], [[5, 6], [7, 8], [0, 0]])


@pytest.mark.parametrize("accumulate", [True, False])
def test_a_batch_without_ids_needs_no_rows(accumulate: bool) -> None:
    spec = spec_of(accumulate=accumulate)
    for size in (0, 3):
        batch = {f.name: Ragged.from_lists([[]] * size) for f in spec.features}
        plan, tables, upstream = planned(spec, batch, 2)
        out = activations(spec, plan, pulled(plan, tables))
        assert out["seq"].shape == (size, L, 3)
        assert out["bag"].shape == (size, 3)
        assert not any(a.any() for a in out.values())
        rows, grads = row_gradients(spec, plan, upstream)
        assert {name: g.shape for name, g in grads.items()} == {"items": (0, 3), "small": (0, 1)}
        assert all(d.shard_splits.tolist() == [0, 0, 0] for d in rows.values())
