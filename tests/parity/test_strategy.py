"""A strategy of several replicas gives the gradients of one: tried with logical CPU devices.

Runs in a process of its own, because logical devices must be set before TensorFlow starts.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.parity

SCRIPT = """
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
from ps.config import CustomCombiner
from workers.batches import Batch
from workers.config import ModelConfig
from workers.dense import DenseStep
from workers.model import ModelInputs
from workers.plan import DeviceInputs
from workers.shapes import DeviceLookup

rng = np.random.default_rng(0)
shapes = {"a": (8,), "b": (8,)}
lookups = [
    DeviceLookup("core", "t", 3, 8, "mean", (8,)),
    DeviceLookup("custom", "t", 2, 8,
                 CustomCombiner("tests.support.combiners:attention", 2), (8,))]
device = DeviceInputs(
    {"t": rng.normal(size=(20, 8)).astype("f4")},
    {k.feature: rng.integers(0, 20, (16, k.width)).astype("i4") for k in lookups},
    {k.feature: rng.integers(0, k.width + 1, 16).astype("i4") for k in lookups})
batch = Batch({}, rng.normal(size=(16, 3)).astype("f4"),
              rng.integers(0, 2, 16).astype("f4"), np.ones(16, "f4"))
activations = {n: rng.normal(size=(16, *s)).astype("f4") for n, s in shapes.items()}
model_shapes = shapes | {k.feature: k.shape for k in lookups}
inputs = ModelInputs(activations=model_shapes, num_dense=3, seed=1)
results = []
for devices in (None, ["CPU:0"], ["CPU:0", "CPU:1"], ["CPU:0", "CPU:1", "CPU:2", "CPU:3"]):
    strategy = None if devices is None else tf.distribute.MirroredStrategy(devices)
    step = DenseStep(ModelConfig(build="dlrm"), inputs, "bce", strategy, lookups)
    dense, state = step.initial()
    result = step.train(batch, activations, dense, state, device)
    predictions = step.predict(batch, activations, dense, state, device)
    results.append((result, predictions))
one, one_predictions = results[0]
assert np.abs(one.dense_grad).max() > 1e-3
assert np.abs(one.device_grads["t"]).max() > 1e-3
for other, predictions in results[1:]:
    np.testing.assert_allclose(other.loss, one.loss, rtol=1e-5)
    np.testing.assert_allclose(other.dense_grad, one.dense_grad, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        other.device_grads["t"], one.device_grads["t"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(predictions, one_predictions, rtol=1e-5, atol=1e-6)
    for name in shapes:
        np.testing.assert_allclose(
            other.activation_grads[name], one.activation_grads[name], rtol=1e-5, atol=1e-7)
print("same")
"""


def test_one_two_and_four_replicas_give_the_same_gradients() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip().endswith("same")
