"""`DenseStep`: the dense model on this node's accelerator, as a function of flat arrays.

TensorFlow stays behind this border: NumPy arrays go in and come out. The model's variables are
scratch space; their values arrive with every pull and leave as gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from ps.dense_variables import DenseVariable, describe
from ps.errors import ConfigError
from ps.memory import CACHE_LINE
from ps.ragged import F32
from workers.batches import Batch
from workers.config import Loss, ModelConfig
from workers.device import DeviceCombine
from workers.model import ModelInputs, built_model
from workers.plan import NO_DEVICE_INPUTS, DeviceInputs
from workers.shapes import DeviceLookup


@dataclass(frozen=True, slots=True, eq=False)
class DenseResult:
    """What one training step of the dense model gives."""

    loss: float
    """Mean over the batch."""
    activation_grads: dict[str, F32]
    """float32, the shape of each activation that was given."""
    device_grads: dict[str, F32]
    """float32, the shape of each table's `DeviceInputs.rows`."""
    dense_grad: F32
    """float32 [P]."""
    state: F32
    """float32 [S]: non-trainable values after the step."""


class DenseStep:
    """Forward and backward pass of a dense model, compiled by XLA with static shapes.

    With a strategy of R replicas (TPU cores, say) a batch of B examples is cut into R parts; the
    loss is the mean over all B, so gradients do not depend on R. `lookups` names the features that
    the step combines itself, from `DeviceInputs`.
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: ModelInputs,
        loss: Loss,
        strategy: Any = None,
        lookups: Sequence[DeviceLookup] = (),
    ) -> None:
        self._names = tuple(inputs.activations)
        self._combine = DeviceCombine(lookups)
        self._combine.check()
        self._distributed = strategy is not None
        self._strategy = strategy or tf.distribute.get_strategy()
        self._replicas = self._strategy.num_replicas_in_sync
        self._loss = loss
        with self._strategy.scope():
            self._model = built_model(config, inputs)
        self._trainable = list(self._model.trainable_variables)
        # What is not a float, such as the seeds of Keras' Dropout, stays in this worker.
        self._state = [
            v for v in self._model.non_trainable_variables if tf.as_dtype(v.dtype).is_floating
        ]
        self._check_float32()
        # TPUStrategy compiles what it runs with XLA by itself, and XLA on CPU or GPU cannot reach
        # the variables of another replica's device.
        jit = None if self._distributed else True
        step = self._forward_backward if self._distributed else self._loaded_step
        self._compiled = tf.function(step, jit_compile=jit)
        self._compiled_predict = tf.function(self._forward, jit_compile=jit)
        self._run_all = tf.function(self._on_replicas)
        self._predict_all = tf.function(self._predict_on_replicas)
        self._assign = tf.function(self._load)

    @property
    def non_trainable(self) -> Sequence[Any]:
        """All variables of the model that are not trained, those that no shard keeps too."""
        found: Sequence[Any] = self._model.non_trainable_variables
        return found

    def initial(self) -> tuple[F32, F32]:
        """First values: float32 [P] trainable and [S] non-trainable, flat."""
        return _flat(self._trainable), _flat(self._state)

    def described(self) -> list[DenseVariable]:
        """What the flat values are, trainable variables first. Equal names get a number."""
        return describe(self._trainable, self._state)

    def variables(self, dense: F32, state: F32) -> dict[str, F32]:
        """Flat values as named arrays, for an export."""
        values = [*_unflat(self._trainable, dense), *_unflat(self._state, state)]
        return {v.name: value for v, value in zip(self.described(), values, strict=True)}

    def train(
        self,
        batch: Batch,
        activations: Mapping[str, F32],
        dense: F32,
        state: F32,
        device: DeviceInputs = NO_DEVICE_INPUTS,
    ) -> DenseResult:
        """Loss and gradients of a batch, at the given flat variable values."""
        arguments = (dict(activations), device.indices, device.valency, batch.dense, batch.labels)
        if self._distributed:
            return self._train_distributed(dense, state, device.rows, arguments)
        values = tf.constant(dense), tf.constant(state)
        loss, grads, row_grads, dense_grad, new_state = self._compiled(
            *values, *_shared((dict(device.rows), *arguments))
        )
        return DenseResult(
            float(loss),
            _arrays(grads),
            _arrays(row_grads),
            _array(dense_grad),
            _array(new_state) if self._state else state,
        )

    def _train_distributed(
        self, dense: F32, state: F32, rows: Mapping[str, F32], arguments: Any
    ) -> DenseResult:
        self._assign(tf.constant(dense), tf.constant(state))
        loss, parts, row_grads, dense_grad = self._run_all(_tensors(rows), self._split(arguments))
        joined = {
            name: np.concatenate([_array(p) for p in self._local(part)])
            for name, part in parts.items()
        }
        new_state = _flat(self._state) if self._state else state
        return DenseResult(float(loss), joined, _arrays(row_grads), _array(dense_grad), new_state)

    def predict(
        self,
        batch: Batch,
        activations: Mapping[str, F32],
        dense: F32,
        state: F32,
        device: DeviceInputs = NO_DEVICE_INPUTS,
    ) -> F32:
        """float32 [B] predictions, at the given flat variable values."""
        self._assign(tf.constant(dense), tf.constant(state))
        rows = _tensors(device.rows)
        arguments = (dict(activations), device.indices, device.valency, batch.dense)
        if not self._distributed:
            result: F32 = self._compiled_predict(rows, *_tensors(arguments)).numpy()
            return result
        parts = self._local(self._predict_all(rows, self._split(arguments)))
        return np.concatenate([part.numpy() for part in parts])

    def _forward(
        self,
        rows: Mapping[str, Any],
        activations: Mapping[str, Any],
        indices: Mapping[str, Any],
        valency: Mapping[str, Any],
        dense: Any,
        training: bool = False,
    ) -> Any:
        found = {**activations, **self._combine(rows, indices, valency)}
        ordered = {name: found[name] for name in self._names}
        return tf.reshape(self._model(ordered, dense, training=training), [-1])

    def _forward_backward(
        self, rows: Any, activations: Any, indices: Any, valency: Any, dense: Any, labels: Any
    ) -> Any:
        with tf.GradientTape() as tape:
            tape.watch((rows, activations))
            predictions = self._forward(rows, activations, indices, valency, dense, training=True)
            if self._loss == "mse":
                losses = tf.square(predictions - labels)
            else:
                losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, predictions)
            loss = tf.reduce_mean(losses) / self._replicas
        grads, row_grads, dense_grads = tape.gradient(
            loss, (activations, rows, self._trainable), unconnected_gradients="zero"
        )
        summed = {table: tf.convert_to_tensor(grad) for table, grad in row_grads.items()}
        flat = [tf.reshape(g, [-1]) for g in dense_grads]
        return loss, grads, summed, tf.concat(flat, 0) if flat else tf.zeros(0)

    def _loaded_step(self, dense: Any, state: Any, rows: Any, *arguments: Any) -> Any:
        """One program that takes the flat values in, rather than an assignment per variable."""
        self._load(dense, state)
        results = self._forward_backward(rows, *arguments)
        flat = [tf.reshape(variable, [-1]) for variable in self._state]
        return *results, tf.concat(flat, 0) if flat else state

    def _on_replicas(self, rows: Any, arguments: Any) -> Any:
        loss, *grads = self._strategy.run(self._compiled, args=(rows, *arguments))
        activation_grads, row_grads, dense_grad = grads
        return (
            self._total(loss),
            activation_grads,
            {table: self._total(grad) for table, grad in row_grads.items()},
            self._total(dense_grad),
        )

    def _total(self, value: Any) -> Any:
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)

    def _predict_on_replicas(self, rows: Any, arguments: Any) -> Any:
        return self._strategy.run(self._compiled_predict, args=(rows, *arguments))

    def _split(self, arguments: Any) -> Any:
        """Arrays [B, …] as per-replica tensors [B / R, …]."""

        def cut(array: F32) -> Any:
            if len(array) % self._replicas:
                raise ConfigError(
                    f"a worker's batch of {len(array)} examples (or a first axis of that length) "
                    f"does not split over {self._replicas} replicas"
                )
            parts = np.split(array, self._replicas)
            return self._strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(parts[context.replica_id_in_sync_group])
            )

        return tf.nest.map_structure(cut, arguments)

    def _local(self, value: Any) -> Sequence[Any]:
        results: Sequence[Any] = self._strategy.experimental_local_results(value)
        return results

    def _load(self, dense: Any, state: Any) -> None:
        for variables, flat in ((self._trainable, dense), (self._state, state)):
            start = 0
            for variable in variables:
                size = int(np.prod(variable.shape))
                variable.assign(tf.reshape(flat[start : start + size], variable.shape))
                start += size

    def _check_float32(self) -> None:
        for variable in (*self._trainable, *self._state):
            if tf.as_dtype(variable.dtype) != tf.float32:
                raise ConfigError(
                    f"model variable '{variable.name}' is {variable.dtype}, wanted float32"
                )


def _tensors(arguments: Any) -> Any:
    return tf.nest.map_structure(tf.constant, arguments)


def _shared(arguments: Any) -> Any:
    """Tensors on the memory of arrays, where TensorFlow can read it; copies of the others.

    They are for the duration of a call that XLA compiles. Others may keep what they are given: an
    assignment makes the memory the variable's, without a copy.
    """
    return tf.nest.map_structure(_shared_tensor, arguments)


def _shared_tensor(array: F32) -> Any:
    # TensorFlow takes any address, but reads as if it were a multiple of its alignment. DLPack has
    # no way to say that an array is read-only.
    flags, aligned = array.flags, array.ctypes.data % CACHE_LINE == 0
    if not (aligned and array.size and flags.writeable and flags.c_contiguous):
        return tf.constant(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _array(tensor: Any) -> F32:
    """The values where they lie, which this array keeps alive; `numpy()` would copy them."""
    return np.asarray(memoryview(tensor))


def _arrays(tensors: Mapping[str, Any]) -> dict[str, F32]:
    return {name: _array(tensor) for name, tensor in tensors.items()}


def _flat(variables: Sequence[Any]) -> F32:
    parts = [np.asarray(v.numpy(), dtype=np.float32).reshape(-1) for v in variables]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _unflat(variables: Sequence[Any], flat: F32) -> list[F32]:
    sizes = [int(np.prod(v.shape)) for v in variables]
    parts = np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
    return [part.reshape(tuple(v.shape)) for part, v in zip(parts, variables, strict=True)]
