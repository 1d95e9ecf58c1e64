"""Activations of a training batch, and gradients of its rows, equal TensorFlow's.

`output_shape` against TensorFlow's own ragged lookup. Sequences with weights against
`tf.nn.embedding_lookup_sparse` with one row per position, which is how the training classes hand
them to the accelerator (indices [example, position, 0]).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.config import FeatureConfig, TableConfig
from ps.errors import ConfigError
from ps.partition import Layout
from ps.ragged import F32, Ragged
from ps.spec import EmbeddingSpec, resolve
from tests.support.parity_size import examples
from tests.support.strategies import bags
from workers.plan import activations, plan_batch, row_gradients
from workers.shapes import check_trainable

pytestmark = pytest.mark.parity

stock = tf.tpu.experimental.embedding

V, D = 30, 3
TABLE = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
COMBINERS = st.sampled_from(["sum", "mean", "sqrtn"])
TAME = st.sampled_from([1.0, 0.5, 2.0, -1.0, 0.0, 3.25])


def config_of(module: Any, combiner: str, **feature: Any) -> Any:
    return module.FeatureConfig(module.TableConfig(V, D, combiner=combiner, name="t"), **feature)


class Ours:
    """`tf.tpu.experimental.embedding`'s names for our classes."""

    TableConfig = TableConfig
    FeatureConfig = FeatureConfig


def step_of(spec: EmbeddingSpec, bag: Ragged, seed: int = 1) -> tuple[F32, F32, F32]:
    """The activation of feature 'f', a gradient for it, and the gradient [V, D] of its table."""
    plan = plan_batch(spec, Layout.of(spec, 2), {"f": bag})
    out = activations(spec, plan, {"t": TABLE[plan.distinct["t"].ids]})["f"]
    upstream = np.random.default_rng(seed).normal(size=out.shape).astype(np.float32)
    rows, grads = row_gradients(spec, plan, {"f": upstream}, {})
    whole = np.zeros_like(TABLE)
    whole[rows["t"].ids] = grads["t"]
    return out, upstream, whole


@settings(max_examples=examples(40), deadline=None)
@given(
    bag=bags(V, num_examples=4, weights=TAME),
    combiner=COMBINERS,
    shape=st.sampled_from([4, [4], [2, 2], [4, 1], [4, 2], [2, 4], [8], [12], [3, 2, 2], [4, 6]]),
    length=st.integers(0, 2),
)
def test_output_shapes_equal_stock(bag: Ragged, combiner: str, shape: Any, length: int) -> None:
    if bag.weights is not None:
        length = 0  # the oracle is a serving lookup, which refuses weights then
    options = {"output_shape": shape, "max_sequence_length": length}
    spec = resolve({"f": config_of(Ours, combiner, **options)})
    check_trainable(spec, 4)
    got, upstream, got_grad = step_of(spec, bag)

    feature = config_of(stock, combiner, **options)
    ids = tf.RaggedTensor.from_row_splits(bag.ids, bag.row_splits)
    weights = None if bag.weights is None else {"f": ids.with_values(tf.constant(bag.weights))}
    variable = tf.Variable(TABLE)
    with tf.GradientTape() as tape:
        want = stock.serving_embedding_lookup(
            {"f": ids}, weights, {feature.table: variable}, {"f": feature}
        )["f"]
    grad = tape.gradient(want, variable, output_gradients=tf.constant(upstream))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_grad, tf.convert_to_tensor(grad), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [[], [3], [5], [2, 3], [2, 1], [0], [4, 0], [4, None]], ids=str)
def test_output_shapes_that_fit_no_batch_are_refused_as_by_stock(shape: Any) -> None:
    feature = config_of(stock, "sum", output_shape=shape)
    ids = tf.RaggedTensor.from_row_lengths([1, 2, 3, 4], [1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"should be the factor|partially known"):
        stock.serving_embedding_lookup(
            {"f": ids}, None, {feature.table: tf.Variable(TABLE)}, {"f": feature}
        )
    with pytest.raises(ConfigError, match="`output_shape`"):
        check_trainable(resolve({"f": config_of(Ours, "sum", output_shape=shape)}), 4)


@settings(max_examples=examples(40), deadline=None)
@given(bag=bags(V, num_examples=4, weights=TAME), combiner=COMBINERS, length=st.integers(1, 4))
def test_sequences_with_weights_are_bags_of_one(bag: Ragged, combiner: str, length: int) -> None:
    spec = resolve({"f": config_of(Ours, combiner, max_sequence_length=length)})
    got, upstream, got_grad = step_of(spec, bag)

    example = np.repeat(np.arange(4), np.diff(bag.row_splits))
    kept = bag.positions < length
    rows = (example * length + bag.positions)[kept]
    indices = np.stack([rows, np.zeros_like(rows)], axis=1)
    shape = [4 * length, 1]
    weights = None if bag.weights is None else tf.SparseTensor(indices, bag.weights[kept], shape)
    variable = tf.Variable(TABLE)
    with tf.GradientTape() as tape:
        found = tf.nn.embedding_lookup_sparse(
            variable, tf.SparseTensor(indices, bag.ids[kept], shape), weights, combiner=combiner
        )
        missing = 4 * length - tf.shape(found)[0]
        want = tf.reshape(tf.pad(found, [[0, missing], [0, 0]]), [4, length, D])
    grad = tape.gradient(want, variable, output_gradients=tf.constant(upstream))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_grad, tf.convert_to_tensor(grad), rtol=1e-5, atol=1e-5)
