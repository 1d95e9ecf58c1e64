"""Rules of the reference that no other unit test states: what must make no difference, and where.

The table is `ROWS_VD`: row i is [2i + 1, 2i + 2].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import ps.columns as fc
from ps.config import FeatureConfig, QuantizationConfig, TableConfig
from ps.errors import ConfigError
from ps.initializers import Constant
from ps.inputs import Dense, Ragged
from ps.lookup import embedding_lookup
from ps.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam, Optimizer
from ps.partition import Layout
from ps.ragged import F32
from ps.rowstore import RowStore
from ps.spec import resolve
from tests.support.exports import ROWS_VD
from tests.support.goldens import DENSE, local_shards, shard_spec, table_of
from tests.support.reference import same_bits
from workers.columns import bag_column
from workers.plan import activations, plan_batch, row_gradients


def stepped(optimizer: Optimizer, *grads: list[float], start: float = 1.0) -> RowStore:
    """One row that makes a step at rate .1 for each gradient."""
    store = RowStore(np.full((1, len(grads[0])), start, dtype=np.float32), optimizer)
    for grad in grads:
        store.apply(np.zeros(1, dtype=np.int64), np.array([grad], dtype=np.float32), 0.1)
    return store


def test_a_quantized_table_is_served_as_it_is_stored() -> None:
    config = QuantizationConfig(2, -1.0, 1.0)
    table = TableConfig(5, 2, combiner="sum", name="t", quantization_config=config)
    found = embedding_lookup(
        {"f": Ragged.from_lists([[0, 1]])}, {table: ROWS_VD}, {"f": FeatureConfig(table)}
    )
    assert found["f"].tolist() == [[4, 6]]


def test_true_is_a_sequence_of_one() -> None:
    table = TableConfig(5, 2, name="t")
    config = {"f": FeatureConfig(table, max_sequence_length=True)}
    found = embedding_lookup({"f": Ragged.from_lists([[1, 2]])}, {table: ROWS_VD}, config)
    assert found["f"].tolist() == [[[3, 4]]]


def test_a_dense_column_of_one_id_is_reduced_in_training_and_kept_in_serving() -> None:
    columns = pa.table({"flat": [3, 1], "listed": [[3], [1]]})
    table = TableConfig(5, 2, combiner="sum", name="t")
    features = {name: FeatureConfig(table) for name in columns.column_names}
    spec = resolve(features)
    bags = {name: bag_column(columns, name, None) for name in columns.column_names}
    plan = plan_batch(spec, Layout.of(spec, 2), bags)
    for found in activations(spec, plan, {"t": ROWS_VD[plan.distinct["t"].ids]}).values():
        assert found.tolist() == [[7, 8], [3, 4]]
    served = embedding_lookup(
        {"flat": Dense([3, 1]), "listed": Dense([[3], [1]])}, {table: ROWS_VD}, features
    )
    assert served["flat"].tolist() == [[7, 8], [3, 4]]
    assert served["listed"].tolist() == [[[7, 8]], [[3, 4]]]


# --- updates


def test_beta_of_ftrl_is_l2_of_half_beta_by_rate() -> None:
    common = {"l1_regularization_strength": 0.2}
    beta = stepped(FTRL(beta=0.4, l2_regularization_strength=0.3, **common), [0.5, -1], [-0.25, 2])
    l2 = stepped(FTRL(l2_regularization_strength=0.3 + 0.4 / 0.2, **common), [0.5, -1], [-0.25, 2])
    np.testing.assert_allclose(beta.rows, l2.rows, rtol=1e-6)
    np.testing.assert_allclose(beta.slots["linears"], l2.slots["linears"], rtol=1e-6)


@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("kind", [SGD, Adagrad, AdagradMomentum, Adam, FTRL])
def test_packing_changes_no_bit_of_narrow_rows(kind: Any, dim: int) -> None:
    plain, packed = (
        stepped(kind(low_dimensional_packing_status=status), [0.5] * dim, [-0.25] * dim)
        for status in (False, True)
    )
    assert same_bits(plain.rows, packed.rows)
    assert all(same_bits(plain.slots[name], packed.slots[name]) for name in plain.slots)


def test_a_zero_accumulator_is_no_more_allowed_with_the_flag() -> None:
    assert same_bits(
        stepped(FTRL(allow_zero_accumulator=True), [0.5]).rows, stepped(FTRL(), [0.5]).rows
    )
    with pytest.raises(ConfigError, match="`initial_accumulator_value`"):
        FTRL(initial_accumulator_value=0, allow_zero_accumulator=True)


def pushed(optimizer: Optimizer, upstream: F32, steps: int) -> F32:
    """Row 1 of a table of 1.0, looked up in every step, with this gradient in the first one."""
    spec = resolve({"f": FeatureConfig(TableConfig(5, 2, Constant(1.0), optimizer, "sum", "t"))})
    shards, (client,) = local_shards(shard_spec(spec, 2, 1))
    for step in range(steps):
        plan = plan_batch(spec, client.layout, {"f": Ragged.from_lists([[1]])})
        grads = {"f": upstream if step == 0 else np.zeros_like(upstream)}
        client.push(step, *row_gradients(spec, plan, grads, {}), DENSE, None)
    return table_of(shards)("t", steps)[0][1]


def test_a_touched_row_without_a_gradient_still_follows_its_optimizer() -> None:
    """A zero gradient is a step: momenta move the row on, and it decays."""
    one = np.ones((1, 2), dtype=np.float32)
    after_1, after_2 = (pushed(Adam(0.1), one, steps) for steps in (1, 2))
    assert (after_2 < after_1).all()
    decayed = pushed(SGD(0.1, weight_decay_factor=0.1), one * 0, 2)
    np.testing.assert_allclose(decayed, 0.81, rtol=1e-6)


def test_one_rate_object_in_unlike_optimizers_is_one_rate_and_two_lambdas_are_two() -> None:
    asked: list[str] = []

    def shared() -> float:
        asked.append("shared")
        return 0.1

    rates = {
        "a": SGD(shared),
        "b": SGD(lambda: asked.append("b") or 0.1),  # type: ignore[func-returns-value]
        "c": SGD(lambda: asked.append("c") or 0.1),  # type: ignore[func-returns-value]
        "d": Adagrad(shared),
    }
    tables = {name: TableConfig(5, 2, Constant(0.0), rates[name], "sum", name) for name in rates}
    spec = resolve({name: FeatureConfig(table) for name, table in tables.items()})
    shards, (client,) = local_shards(shard_spec(spec, 1, 1))
    asked.clear()
    plan = plan_batch(spec, client.layout, {name: Ragged.from_lists([[1]]) for name in rates})
    ones = dict.fromkeys(rates, np.ones((1, 2), dtype=np.float32))
    client.push(0, *row_gradients(spec, plan, ones, {}), DENSE, None)
    assert sorted(asked) == ["b", "c", "shared"]
    assert table_of(shards)("a", 1)[0][1].tolist() == pytest.approx([-0.1, -0.1])


# --- embedding columns


def column(**options: Any) -> fc.EmbeddingColumn:
    return fc.embedding_column(fc.categorical_column_with_identity("k", 5), 2, **options)


def test_combiner_rate_and_safety_are_not_checked_when_a_column_is_made() -> None:
    odd: Any = column(combiner="max", learning_rate_fn=3, use_safe_embedding_lookup="x")
    assert (odd.combiner, odd.learning_rate_fn) == ("max", 3)
    with pytest.raises(ConfigError, match="'max'"):
        fc.input_layer({"k": [[0]]}, odd, {"k": ROWS_VD})


@pytest.mark.parametrize("device", [None, "", "cpu", "tpu_tensor_core", "tpu_embedding_core"])
@pytest.mark.parametrize(
    ("combiner", "wanted"),
    [("sum", [9, 12]), ("mean", [3, 4]), ("sqrtn", [5.196152, 6.928203]), (None, [3, 4])],
)
def test_the_device_of_a_column_changes_nothing_on_the_cpu(
    device: str | None, combiner: str | None, wanted: list[float]
) -> None:
    one = column(combiner=combiner, embedding_lookup_device=device, tensor_core_shape=[None, 2])
    found = fc.input_layer({"k": [[0, 1, 2]]}, one, {"k": ROWS_VD})
    np.testing.assert_allclose(found, [wanted], rtol=1e-6)
