"""What the compiled step combines equals TensorFlow's own tensor-core lookup, and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.python.tpu import feature_column_v2 as stock

from ps.config import CustomCombiner, FeatureConfig, TableConfig
from ps.errors import ConfigError
from ps.partition import Layout
from ps.ragged import F32, Ragged
from ps.spec import EmbeddingSpec, resolve
from tests.support.parity_size import examples
from tests.support.strategies import bags
from workers.device import DeviceCombine
from workers.plan import device_inputs, plan_batch, row_gradients
from workers.shapes import check_trainable, device_lookups

pytestmark = pytest.mark.parity

FIVE_ROWS = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
V, D = 40, 3


def spec_of(width: int, combiner: Any = "sum", rows: int = V, dim: int = D) -> EmbeddingSpec:
    """Feature 'f' of table 't'; a width of 0 leaves it to the combiner."""
    table = TableConfig(rows, dim, combiner=combiner, name="t")
    return resolve({"f": FeatureConfig(table, tensor_core_shape=[None, width] if width else None)})


def step_of(
    spec: EmbeddingSpec, bag: Ragged, table: F32, upstream: F32 | None = None, num_shards: int = 2
) -> tuple[F32, F32]:
    """The activation of feature 'f', and the gradient [V, D] of its table."""
    plan = plan_batch(spec, Layout.of(spec, num_shards), {"f": bag})
    inputs = device_inputs(plan, {"t": table[plan.distinct["t"].ids]})
    rows = tf.constant(inputs.rows["t"])
    combine = DeviceCombine(device_lookups(spec, bag.num_examples))
    with tf.GradientTape() as tape:
        tape.watch(rows)
        out = combine({"t": rows}, inputs.indices, inputs.valency)["f"]
    seed = None if upstream is None else tf.constant(upstream)
    grad = tf.convert_to_tensor(tape.gradient(out, rows, output_gradients=seed)).numpy()
    distinct, grads = row_gradients(spec, plan, {}, {"t": grad})
    whole = np.zeros_like(table)
    whole[distinct["t"].ids] = grads["t"]
    return out.numpy(), whole


@pytest.mark.parametrize(
    ("combiner", "want"), [("sum", [[4, 6], [0, 0], [7, 8]]), ("mean", [[2, 3], [0, 0], [7, 8]])]
)
def test_the_first_w_rows_are_combined(combiner: str, want: list[list[float]]) -> None:
    """The example of TensorFlow's tensor-core columns: three ids, a width of 2."""
    for weights in (None, [[9, 9, 9], [], [0]]):
        bag = Ragged.from_lists([[0, 1, 2], [], [3]], weights)
        out, _ = step_of(spec_of(2, combiner, 5, 2), bag, FIVE_ROWS)
        assert out.tolist() == want


@settings(max_examples=examples(25), deadline=None)
@given(
    bag=bags(V, num_examples=4),
    width=st.integers(1, 4),
    combiner=st.sampled_from(["sum", "mean"]),
    num_shards=st.integers(1, 3),
)
def test_activations_and_gradients_equal_those_of_stock(
    bag: Ragged, width: int, combiner: str, num_shards: int
) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(V, D)).astype(np.float32)
    upstream = rng.normal(size=(4, D)).astype(np.float32)
    got, got_grad = step_of(spec_of(width, combiner), bag, table, upstream, num_shards)

    ids = tf.RaggedTensor.from_row_splits(bag.ids, bag.row_splits).to_sparse()
    padded = stock.pad_sparse_embedding_lookup_indices(ids, width)
    variable = tf.Variable(table)
    with tf.GradientTape() as tape:
        want = stock.sparse_embedding_aggregate_slice(variable, padded, combiner)
    grad = tf.convert_to_tensor(tape.gradient(want, variable, output_gradients=upstream))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_grad, grad, rtol=1e-5, atol=1e-6)


def test_sqrtn_is_refused_as_by_stock() -> None:
    padded = (tf.zeros((1, 2), tf.int32), tf.ones((1, 2)))
    with pytest.raises(ValueError, match="other than sum and mean"):
        stock.sparse_embedding_aggregate_slice(tf.Variable(FIVE_ROWS), padded, "sqrtn")
    with pytest.raises(ConfigError, match=r"by sum or mean, .*'sqrtn'"):
        check_trainable(spec_of(2, "sqrtn"), 4)


@settings(max_examples=examples(10), deadline=None)
@given(bag=bags(V, num_examples=3, weighted=False))
def test_a_custom_sum_equals_the_combiner_sum(bag: Ragged) -> None:
    table = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
    custom = CustomCombiner("tests.support.combiners:total", 5)
    got = step_of(spec_of(0, custom), bag, table)
    want = step_of(spec_of(5), bag, table)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_ids_behind_the_max_valency_are_left_out() -> None:
    custom = CustomCombiner(lambda valency, vectors: tf.reduce_sum(vectors, 0), 2)
    out, grad = step_of(spec_of(0, custom, 5, 2), Ragged.from_lists([[0, 1, 2], [3]]), FIVE_ROWS)
    assert out.tolist() == [[4, 6], [7, 8]]
    assert grad[:, 0].tolist() == [1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("function", "fragment"),
    [
        ("tests.support.combiners:whole", r"table 't'.* gives \[3, 3\], wanted \[3\]"),
        ("tests.support.combiners:failing", r"table 't': its custom combiner: "),
        ("tests.support.combiners:nobody", r"tables.t.combiner tests.support.combiners:nobody"),
        ("no.such.module:function", r"tables.t.combiner no.such.module:function"),
        (lambda valency: valency, r"table 't': its custom combiner: .*positional argument"),
    ],
)
def test_a_custom_combiner_that_cannot_work_is_found_before_training(
    function: Any, fragment: str
) -> None:
    lookups = device_lookups(spec_of(0, CustomCombiner(function, 3)), 4)
    with pytest.raises(ConfigError, match=fragment):
        DeviceCombine(lookups).check()
