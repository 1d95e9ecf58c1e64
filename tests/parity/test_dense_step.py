"""The dense step takes arrays as they lie and gives the gradients of plain TensorFlow."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from ps.memory import empty
from ps.ragged import F32
from workers.batches import Batch
from workers.config import ModelConfig
from workers.dense import DenseResult, DenseStep
from workers.model import ModelInputs, PairProducts

pytestmark = pytest.mark.parity

B, D, NAMES = 12, 4, ("a", "b", "c")
MODEL = ModelConfig(build="tests.support.models:build_mlp")
"""With non-trainable state."""
INPUTS = ModelInputs(activations=dict.fromkeys(NAMES, (D,)), num_dense=2, seed=1, batch_size=B)


def values(seed: int, *shape: int) -> F32:
    """At a cache line, which TensorFlow reads without a copy."""
    array: F32 = empty(shape)
    array[...] = np.random.default_rng(seed).normal(size=shape)
    return array


def unaligned(array: F32) -> F32:
    room: F32 = empty((array.size + 1,))
    room[1:] = array.reshape(-1)
    return room[1:].reshape(array.shape)


def read_only(array: F32) -> F32:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def every_second(array: F32) -> F32:
    return np.repeat(array, 2, axis=0)[::2]


def result_of(
    step: DenseStep, activations: dict[str, F32], first: tuple[F32, F32], seed: int = 9
) -> DenseResult:
    labels = (values(seed, B) > 0).astype(np.float32)
    batch = Batch({}, values(seed + 1, B, 2), labels, np.ones(B, np.float32))
    return step.train(batch, activations, *first)


def bits(result: DenseResult) -> tuple[bytes, ...]:
    arrays = (*result.activation_grads.values(), result.dense_grad, result.state)
    return (np.float64(result.loss).tobytes(), *(a.tobytes() for a in arrays))


@pytest.mark.parametrize("num_vectors", [1, 2, 5])
def test_pair_products_have_tensorflows_gradient(num_vectors: int) -> None:
    stacked = tf.constant(values(0, B, num_vectors, D))
    rows, columns = np.tril_indices(num_vectors, -1)
    upstream = tf.constant(values(1, B, rows.size))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(stacked)
        products = PairProducts(num_vectors)(stacked, training=True)
        plain = tf.reduce_sum(
            tf.gather(stacked, rows, axis=1) * tf.gather(stacked, columns, axis=1), axis=-1
        )
    np.testing.assert_allclose(products, plain, rtol=1e-5, atol=1e-6)
    got = tape.gradient(products, stacked, output_gradients=upstream)
    want = tf.convert_to_tensor(tape.gradient(plain, stacked, output_gradients=upstream))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("laid", [unaligned, read_only, every_second], ids=lambda f: f.__name__)
def test_the_result_does_not_depend_on_where_arrays_lie(laid) -> None:
    activations = {name: values(i, B, D) for i, name in enumerate(NAMES)}
    step = DenseStep(MODEL, INPUTS, "bce")
    first = step.initial()
    want = bits(result_of(step, activations, first))
    assert bits(result_of(step, {n: laid(a) for n, a in activations.items()}, first)) == want


def test_a_result_outlives_later_steps_and_its_inputs() -> None:
    step = DenseStep(MODEL, INPUTS, "bce")
    activations = {name: values(i, B, D) for i, name in enumerate(NAMES)}
    first = step.initial()
    result = result_of(step, activations, first)
    kept = bits(result)
    for array in activations.values():
        array[...] = 7.0
    for seed in range(3):
        result_of(step, activations, first, seed)
    assert bits(result) == kept
    assert result.state.any()


def test_each_step_starts_from_the_values_it_is_given() -> None:
    step = DenseStep(MODEL, INPUTS, "bce")
    activations = {name: values(i, B, D) for i, name in enumerate(NAMES)}
    dense, state = step.initial()
    want = bits(result_of(step, activations, (dense, state)))
    other = bits(result_of(step, activations, (dense + 1, state + 1)))
    assert other != want
    assert bits(result_of(step, activations, (dense, state))) == want
