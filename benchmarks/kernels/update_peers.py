"""Optimizer steps and whole updates by TensorFlow, torch and FBGEMM, in place, in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from benchmarks.kernels.cases import Gradients
from benchmarks.kernels.shared import SharedArray
from benchmarks.kernels.timing import Contender

Arrays = Sequence[SharedArray]
"""Rows, then slots."""
Batches = Sequence[Gradients]

TF, KERAS, TORCH, FBGEMM, NUMPY = "TF", "Keras", "torch", "FBGEMM", "NumPy"
RATE = 0.01
LATE_STEP = 1_000_000
"""Where torch's and Keras's bias corrections are 1: the others have none."""
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7


# --- one gradient per row -------------------------------------------------------------------------


def tensorflow_adagrad(arrays: Arrays, batches: Batches) -> Contender:
    """`ResourceSparseApplyAdagradV2`."""
    return Contender(TF, _traced(partial(_apply, arrays), batches))


def _apply(arrays: Arrays, ids: Any, grads: Any) -> None:
    rows, accumulators = arrays
    tf.raw_ops.ResourceSparseApplyAdagradV2(
        var=rows.variable.handle,
        accum=accumulators.variable.handle,
        lr=np.float32(RATE),
        epsilon=np.float32(0.0),
        grad=grads,
        indices=ids,
    )


def tensorflow_adam(arrays: Arrays, batches: Batches) -> Contender:
    """Adam on the rows that have a gradient, by gather and scatter, as TensorFlow Addons had it."""
    rows, m, v = (array.variable for array in arrays)

    def step(ids: Any, grads: Any) -> None:
        new_m = BETA_1 * tf.gather(m, ids) + (1 - BETA_1) * grads
        new_v = BETA_2 * tf.gather(v, ids) + (1 - BETA_2) * grads * grads
        m.scatter_update(tf.IndexedSlices(new_m, ids))
        v.scatter_update(tf.IndexedSlices(new_v, ids))
        change = RATE * new_m / (tf.sqrt(new_v) + EPSILON)
        rows.scatter_sub(tf.IndexedSlices(change, ids))

    return Contender(TF, _traced(step, batches))


def keras_adam(arrays: Arrays, batches: Batches) -> Contender:
    """Stock `keras.optimizers.Adam` on `IndexedSlices`: changes every row of the table."""
    rows, momenta, velocities = (array.variable for array in arrays)
    optimizer = keras.optimizers.Adam(RATE, BETA_1, BETA_2, EPSILON)
    optimizer.build([rows])
    optimizer._momentums, optimizer._velocities = [momenta], [velocities]
    optimizer.iterations.assign(LATE_STEP)
    shape = tf.constant(rows.shape, tf.int64)

    def step(ids: Any, grads: Any) -> None:
        optimizer.apply([tf.IndexedSlices(grads, ids, shape)])

    return Contender(KERAS, _traced(step, batches))


def _traced(step: Callable[[Any, Any], object], batches: Batches) -> list[Callable[[], object]]:
    function = tf.function(step)
    share = tf.experimental.dlpack.from_dlpack
    inputs = [(share(b.ids_N.__dlpack__()), share(b.grads_ND.__dlpack__())) for b in batches]
    return [partial(function, i, g) for i, g in inputs]


def torch_adagrad(arrays: Arrays, batches: Batches, unique: bool) -> Contender:
    """`torch.optim.Adagrad` on sparse gradients.

    Without `unique` the gradients are those that `embedding_bag(sparse=True)` makes backwards, and
    that is measured too.
    """
    rows, accumulators = arrays
    parameter = torch.nn.Parameter(rows.torch)
    optimizer = torch.optim.Adagrad([parameter], RATE, eps=0.0)
    optimizer.state[parameter]["sum"] = accumulators.torch
    if unique:
        return _torch_steps(parameter, optimizer, batches)
    lookup = partial(torch.nn.functional.embedding_bag, weight=parameter, mode="sum", sparse=True)
    backward = _backward(TORCH, lambda ids: lookup(ids, offsets=torch.arange(ids.numel())), batches)
    calls = [partial(_then, call, optimizer.step) for call in backward.calls]

    def before(k: int) -> None:
        parameter.grad = None
        assert backward.before
        backward.before(k)

    return Contender(TORCH, calls, before)


def _then(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()


def _backward(
    name: str, lookup: Callable[[torch.Tensor], torch.Tensor], batches: Batches
) -> Contender:
    """The backward pass of a lookup of one id per bag; the forward pass is not measured."""
    output: list[torch.Tensor] = []

    def forward(k: int) -> None:
        output[:] = [lookup(torch.from_numpy(batches[k].ids_N))]

    def call_for(batch: Gradients) -> Callable[[], object]:
        grads = torch.from_numpy(batch.grads_ND)
        return lambda: output[0].backward(grads)

    return Contender(name, [call_for(b) for b in batches], forward)


def torch_adam(arrays: Arrays, batches: Batches) -> Contender:
    """`torch.optim.SparseAdam`."""
    rows, momenta, velocities = arrays
    parameter = torch.nn.Parameter(rows.torch)
    optimizer = torch.optim.SparseAdam([parameter], RATE, (BETA_1, BETA_2), EPSILON)
    optimizer.state[parameter] = {
        "step": LATE_STEP,
        "exp_avg": momenta.torch,
        "exp_avg_sq": velocities.torch,
    }
    return _torch_steps(parameter, optimizer, batches)


def _torch_steps(
    parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, batches: Batches
) -> Contender:
    def call_for(batch: Gradients) -> Callable[[], object]:
        ids, grads = torch.from_numpy(batch.ids_N)[None], torch.from_numpy(batch.grads_ND)

        def call() -> None:
            parameter.grad = torch.sparse_coo_tensor(
                ids, grads, parameter.shape, is_coalesced=True, check_invariants=False
            )
            optimizer.step()

        return call

    return Contender(TORCH, [call_for(b) for b in batches])


# --- whole updates: the same row may have several gradients ---------------------------------------


def tensorflow_sums(batches: Batches) -> Contender:
    """`tf.unique` and `tf.math.unsorted_segment_sum`."""
    return Contender(TF, _traced(_sums, batches))


def _sums(ids: Any, grads: Any) -> tuple[Any, Any]:
    unique, inverse = tf.unique(ids, out_idx=tf.int64)
    return unique, tf.math.unsorted_segment_sum(grads, inverse, tf.size(unique))


def numpy_sums(batches: Batches) -> Contender:
    """`numpy.unique(return_inverse=True)` and `numpy.add.at`."""

    def call_for(batch: Gradients) -> Callable[[], object]:
        def call() -> object:
            unique, inverse = np.unique(batch.ids_N, return_inverse=True)
            sums = np.zeros((unique.size, batch.grads_ND.shape[1]), dtype=np.float32)
            np.add.at(sums, inverse, batch.grads_ND)
            return unique, sums

        return call

    return Contender(NUMPY, [call_for(b) for b in batches])


def tensorflow_update(arrays: Arrays, batches: Batches) -> Contender:
    """`tensorflow_sums`, then `tensorflow_adagrad`."""
    return Contender(TF, _traced(lambda i, g: _apply(arrays, *_sums(i, g)), batches))


def fbgemm_update(arrays: Arrays, batches: Batches) -> Contender:
    """FBGEMM's exact Adagrad: the backward pass of its table-batched embedding."""
    rows, accumulators = arrays
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(*rows.numpy.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ADAGRAD,
        learning_rate=RATE,
        eps=0.0,
        bounds_check_mode=BoundsCheckMode.NONE,
        preallocated_host_buffers={
            "weights": rows.torch.view(-1),
            "momentum1": accumulators.torch.view(-1),
        },
    )
    return _backward(FBGEMM, lambda ids: module(ids, torch.arange(ids.numel() + 1)), batches)
