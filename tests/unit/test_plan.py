"""The host side of a training step equals its twin on whole tables, whatever the sharding."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.config import CustomCombiner, FeatureConfig, QuantizationConfig, TableConfig
from ps.errors import IdRangeError
from ps.memory import CACHE_LINE
from ps.optimizers import SGD
from ps.partition import Layout
from ps.ragged import F32, Ragged
from ps.spec import EmbeddingSpec, resolve
from tests.support import reference as twin
from tests.support.reference import same_bits
from tests.support.strategies import bags
from workers.plan import (
    BatchPlan,
    activations,
    device_inputs,
    plan_batch,
    quantized,
    row_gradients,
)
from workers.shapes import activation_shape

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
    rows, grads = row_gradients(spec, plan, upstream, {})
    for table in spec.tables:
        want = want_gradient(spec, table.name, batch, upstream)
        distinct = rows[table.name]
        assert len(set(distinct.ids.tolist())) == distinct.ids.size
        assert same_bits(grads[table.name], want[distinct.ids])
        untouched = np.delete(want, distinct.ids, axis=0)
        assert not untouched.any()


@pytest.mark.parametrize("accumulate", [True, False])
def test_gradients_are_written_where_the_caller_says(accumulate: bool) -> None:
    spec = spec_of(accumulate=accumulate)
    batch = {f.name: Ragged.from_lists([[1, 1, 5], [], [5]]) for f in spec.features}
    plan, _, upstream = planned(spec, batch, 2)
    given: list[F32] = []

    def memory(shape: tuple[int, ...]) -> F32:
        given.append(np.full(shape, np.nan, dtype=np.float32))
        return given[-1]

    _, grads = row_gradients(spec, plan, upstream, {}, memory)
    assert [id(grads[table.name]) for table in spec.tables] == [id(array) for array in given]
    _, want = row_gradients(spec, plan, upstream, {})
    assert all(same_bits(grads[name], want[name]) for name in want)


def test_activations_start_at_cache_lines() -> None:
    spec = spec_of()
    batch = {f.name: Ragged.from_lists([[1], [2], [3]]) for f in spec.features}
    plan, tables, _ = planned(spec, batch, 1)
    out = activations(spec, plan, pulled(plan, tables))
    assert [array.ctypes.data % CACHE_LINE for array in out.values()] == [0] * len(out)
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(out.values(), 2))


@settings(max_examples=60)
@given(batch=batches(), num_shards=st.integers(1, 5))
def test_without_accumulation_contributions_come_by_shard_in_batch_order(
    batch: dict[str, Ragged], num_shards: int
) -> None:
    spec = spec_of(accumulate=False)
    plan, _, upstream = planned(spec, batch, num_shards)
    rows, grads = row_gradients(spec, plan, upstream, {})
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

    rows, grads = row_gradients(spec, plan, upstream, {})
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
    rows, grads = row_gradients(spec, plan, upstream, {})
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


FIVE_ROWS = np.arange(1, 11, dtype=np.float32).reshape(5, 2)


def looked_up(bag: Ragged, combiner: str = "sum", **options: Any) -> F32:
    """The activations of one feature on the table [1, 2] … [9, 10]."""
    spec = resolve({"f": FeatureConfig(TableConfig(5, 2, combiner=combiner), **options)})
    plan = plan_batch(spec, Layout.of(spec, 2), {"f": bag})
    return activations(spec, plan, pulled(plan, {"table_0": FIVE_ROWS}))["f"]


@pytest.mark.parametrize(
    ("combiner", "want"),
    [
        ("sum", [[5, 6], [-14, -16], [0, 0]]),
        ("mean", [[5, 6], [7, 8], [0, 0]]),
        ("sqrtn", [[2.236068, 2.683281], [-7, -8], [0, 0]]),
    ],
)
def test_weights_below_and_at_zero_count_in_training(combiner: str, want: Any) -> None:
    bag = Ragged.from_lists([[0, 1, 2], [3], [4]], [[-1, 2, 0], [-2], [0]])
    np.testing.assert_allclose(looked_up(bag, combiner), want, rtol=1e-6)


def test_a_nan_weight_makes_its_example_nan() -> None:
    bag = Ragged.from_lists([[0, 1], [2]], [[np.nan, 1], [2]])
    got = looked_up(bag, "mean")
    assert np.isnan(got[0]).all()
    assert got[1].tolist() == [5, 6]


ROWS = Ragged.from_lists([[0, 1, 2], [3], [], [4]])
WEIGHTED = Ragged.from_lists([[0, 1, 2], [3], [], [4]], [[5, 6, 7], [8], [], [9]])


@pytest.mark.parametrize("bag", [ROWS, WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("length", [0, 1], ids=["bag", "sequence"])
def test_a_multiple_of_the_batch_in_output_shape_leaves_ids_uncombined(
    bag: Ragged, combiner: str, length: int
) -> None:
    flat = [[1, 2], [3, 4], [7, 8], [0, 0], [0, 0], [0, 0], [9, 10], [0, 0]]
    for shape in ([4, 2], [2, 4], [8], [2, 1, 4]):
        got = looked_up(bag, combiner, output_shape=shape, max_sequence_length=length)
        assert got.shape == (*shape, 2)
        assert got.reshape(-1, 2).tolist() == flat
    got = looked_up(bag, combiner, output_shape=[12])
    assert got[:4].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]


def test_as_many_vectors_as_examples_in_output_shape_are_combined() -> None:
    ids = [[0, 1], [2, 3], [], [4]]
    for length in (0, 1):
        options: dict[str, Any] = {"output_shape": [2, 2], "max_sequence_length": length}
        got = looked_up(Ragged.from_lists(ids), **options)
        assert got.tolist() == [[[4, 6], [12, 14]], [[0, 0], [9, 10]]]
        got = looked_up(Ragged.from_lists(ids, [[1, 2], [3, 4], [], [5]]), **options)
        assert got.tolist() == [[[7, 10], [43, 50]], [[0, 0], [45, 50]]]
    assert looked_up(Ragged.from_lists([[0, 1]]), output_shape=[]).tolist() == [4, 6]


@pytest.mark.parametrize(
    ("combiner", "gains"),
    [("sum", [0.5, -2, 0]), ("mean", [1, 1, 0]), ("sqrtn", [1, -1, 0])],
)
def test_a_position_of_a_weighted_sequence_is_a_bag_of_one(
    combiner: str, gains: list[float]
) -> None:
    bag = Ragged.from_lists([[0, 1, 2, 3], []], [[0.5, -2, 0, 9], []])
    got = looked_up(bag, combiner, max_sequence_length=3)
    np.testing.assert_array_equal(got[0], FIVE_ROWS[:3] * np.array(gains)[:, None])
    assert not got[1].any()

    spec = resolve(
        {"f": FeatureConfig(TableConfig(5, 2, combiner=combiner), max_sequence_length=3)}
    )
    plan = plan_batch(spec, Layout.of(spec, 1), {"f": bag})
    upstream = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    rows, grads = row_gradients(spec, plan, {"f": upstream}, {})
    assert rows["table_0"].ids.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(grads["table_0"], upstream[0] * np.array(gains)[:, None])


def test_gradients_of_uncombined_ids_reach_their_rows() -> None:
    spec = resolve({"f": FeatureConfig(TableConfig(5, 2), output_shape=[2, 2])})
    bag = Ragged.from_lists([[3, 3, 4], [3]])
    plan = plan_batch(spec, Layout.of(spec, 1), {"f": bag})
    upstream = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    rows, grads = row_gradients(spec, plan, {"f": upstream}, {})
    assert rows["table_0"].ids.tolist() == [3]
    assert grads["table_0"].tolist() == [[0 + 2 + 4, 1 + 3 + 5]]


# --- simulated quantization


def test_rows_are_quantized_before_they_are_combined_and_stay_as_they_are() -> None:
    config = QuantizationConfig(5, -1.0, 1.0)
    tables = {
        "q": TableConfig(6, 1, combiner="sum", name="q", quantization_config=config),
        "plain": TableConfig(6, 1, combiner="sum", name="plain"),
    }
    spec = resolve({name: FeatureConfig(table) for name, table in tables.items()})
    rows = np.array([[0.3], [0.25], [0.24], [-0.25], [1.7], [-9.0]], dtype=np.float32)
    before = rows.copy()
    found = quantized(spec, {"q": rows, "plain": rows})
    assert found["q"].ravel().tolist() == [0.5, 0.5, 0.0, 0.0, 1.0, -1.0]
    assert found["q"].dtype == np.float32
    assert found["plain"] is rows
    assert same_bits(rows, before)


# --- features that the compiled step combines

TENSOR_CORE = {"tensor_core_shape": [None, 2]}


def test_the_tensor_core_gets_padded_indices_and_counts() -> None:
    """The example of semantics §8, beside an ordinary feature of the same table."""
    table = TableConfig(5, 2, combiner="sum", name="t")
    spec = resolve({"core": FeatureConfig(table, **TENSOR_CORE), "host": FeatureConfig(table)})
    for num_shards in (1, 3):
        batch = {"core": Ragged.from_lists([[0, 1, 2], [], [3]]),
                 "host": Ragged.from_lists([[4], [2, 0], []])}  # fmt: skip
        plan = plan_batch(spec, Layout.of(spec, num_shards), batch)
        inputs = device_inputs(plan, pulled(plan, {"t": FIVE_ROWS}))
        assert inputs.rows["t"].shape == (5, 2)  # min(3 examples of width 2, 5 rows)
        assert inputs.valency["core"].tolist() == [2, 0, 1]
        indices = inputs.indices["core"]
        assert indices.dtype == np.int32
        assert inputs.rows["t"][indices[0]].tolist() == [[1, 2], [3, 4]]
        assert inputs.rows["t"][indices[2, 0]].tolist() == [7, 8]
        assert indices[1].tolist() == [0, 0]
        assert indices[2, 1] == 0
        assert [f.spec.name for f in plan.features] == ["host"]
        assert plan.num_ids == 6  # id 2 of the first example is cut off, but used by the host


def test_gradients_from_the_device_are_added_to_those_of_the_host() -> None:
    table = TableConfig(5, 2, combiner="sum", name="t")
    spec = resolve({"core": FeatureConfig(table, **TENSOR_CORE), "host": FeatureConfig(table)})
    batch = {"core": Ragged.from_lists([[3], [1, 3]]), "host": Ragged.from_lists([[4], [1]])}
    plan = plan_batch(spec, Layout.of(spec, 2), batch)
    inputs = device_inputs(plan, pulled(plan, {"t": FIVE_ROWS}))
    upstream = {"host": np.array([[1, 2], [3, 4]], dtype=np.float32)}
    rows, grads = row_gradients(spec, plan, upstream, {"t": 10 * inputs.rows["t"]})
    found = dict(zip(rows["t"].ids.tolist(), grads["t"].tolist(), strict=True))
    assert found == {1: [30 + 3, 40 + 4], 3: [70, 80], 4: [1, 2]}


def test_shapes_for_the_device_are_the_same_in_every_batch() -> None:
    table = TableConfig(50, 2, combiner="sum", name="t")
    spec = resolve({"core": FeatureConfig(table, **TENSOR_CORE)})
    shapes = set()
    for ids in ([[], [], []], [[1], [1], [1]], [[1, 2, 3], [4, 5, 6], [7, 8]]):
        plan = plan_batch(spec, Layout.of(spec, 2), {"core": Ragged.from_lists(ids)})
        inputs = device_inputs(plan, {"t": np.ones((plan.distinct["t"].ids.size, 2), np.float32)})
        shapes.add((inputs.rows["t"].shape, inputs.indices["core"].shape))
    assert shapes == {((6, 2), (3, 2))}


def test_a_custom_combiner_gets_its_bags_and_leaves_sequences_alone() -> None:
    combiner = CustomCombiner("somewhere:function", 2)
    table = TableConfig(5, 2, combiner=combiner, name="t")
    spec = resolve({"bag": FeatureConfig(table), "seq": FeatureConfig(table, 2)})
    bag = Ragged.from_lists([[0, 1, 2], [], [3]])
    plan = plan_batch(spec, Layout.of(spec, 2), {"bag": bag, "seq": bag})
    assert list(plan.device["t"].indices) == ["bag"]
    assert plan.device["t"].valency["bag"].tolist() == [2, 0, 1]
    got = activations(spec, plan, pulled(plan, {"t": FIVE_ROWS}))
    assert list(got) == ["seq"]
    assert got["seq"].tolist() == [[[1, 2], [3, 4]], [[0, 0], [0, 0]], [[7, 8], [0, 0]]]


def test_an_id_behind_the_width_of_the_tensor_core_is_checked_too() -> None:
    spec = resolve({"core": FeatureConfig(TableConfig(5, 2), **TENSOR_CORE)})
    with pytest.raises(IdRangeError, match="'core': id 5 is not in"):
        plan_batch(spec, Layout.of(spec, 1), {"core": Ragged.from_lists([[0, 1, 5]])})


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
        rows, grads = row_gradients(spec, plan, upstream, {})
        assert {name: g.shape for name, g in grads.items()} == {"items": (0, 3), "small": (0, 1)}
        assert all(d.shard_splits.tolist() == [0, 0, 0] for d in rows.values())
