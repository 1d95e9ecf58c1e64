"""`DenseStep`: the dense model on this node's accelerator, as a function of flat arrays.

TensorFlow stays behind this border: NumPy arrays go in and come out. The model's variables are
scratch space; their values arrive with every pull and leave as gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from ps.errors import ConfigError
from ps.ragged import F32
from workers.batches import Batch
from workers.config import Loss, ModelConfig
from workers.model import ModelInputs, build_model


@dataclass(frozen=True, slots=True, eq=False)
class DenseResult:
    """What one training step of the dense model gives."""

    loss: float
    """Mean over the batch."""
    activation_grads: dict[str, F32]
    """float32, the shape of each activation."""
    dense_grad: F32
    """float32 [P]."""
    state: F32
    """float32 [S]: non-trainable values after the step."""


class DenseStep:
    """Forward and backward pass of a dense model, compiled by XLA with static shapes.

    With a strategy of R replicas (TPU cores, say) a batch of B examples is cut into R parts; the
    loss is the mean over all B, so gradients do not depend on R.
    """

    def __init__(
        self, config: ModelConfig, inputs: ModelInputs, loss: Loss, strategy: Any = None
    ) -> None:
        self._distributed = strategy is not None
        self._strategy = strategy or tf.distribute.get_strategy()
        self._replicas = self._strategy.num_replicas_in_sync
        self._loss = loss
        with self._strategy.scope():
            self._model = build_model(config, inputs)
            example = {n: tf.zeros((1, *s)) for n, s in inputs.activations.items()}
            # Keras models make their variables at the first call.
            self._model(example, tf.zeros((1, inputs.num_dense)), training=False)
        self._trainable = list(self._model.trainable_variables)
        # What is not a float, such as the seeds of Keras' Dropout, stays in this worker.
        self._state = [
            v for v in self._model.non_trainable_variables if tf.as_dtype(v.dtype).is_floating
        ]
        self._check_float32()
        # TPUStrategy compiles what it runs with XLA by itself, and XLA on CPU or GPU cannot reach
        # the variables of another replica's device.
        jit = None if self._distributed else True
        self._compiled = tf.function(self._forward_backward, jit_compile=jit)
        self._compiled_predict = tf.function(self._forward, jit_compile=jit)
        self._run_all = tf.function(self._on_replicas)
        self._predict_all = tf.function(self._predict_on_replicas)
        self._assign = tf.function(self._load)

    def initial(self) -> tuple[F32, F32]:
        """First values: float32 [P] trainable and [S] non-trainable, flat."""
        return _flat(self._trainable), _flat(self._state)

    def variables(self, dense: F32, state: F32) -> dict[str, F32]:
        """Flat values as named arrays, for an export. Equal names get a number."""
        named: dict[str, F32] = {}
        for variables, flat in ((self._trainable, dense), (self._state, state)):
            for variable, value in zip(variables, _unflat(variables, flat), strict=True):
                name = getattr(variable, "path", variable.name).removesuffix(":0")
                numbered = (f"{name}_{number}" if number else name for number in itertools.count())
                named[next(n for n in numbered if n not in named)] = value
        return named

    def train(
        self, batch: Batch, activations: Mapping[str, F32], dense: F32, state: F32
    ) -> DenseResult:
        """Loss and gradients of a batch, at the given flat variable values."""
        self._assign(tf.constant(dense), tf.constant(state))
        arguments = (dict(activations), batch.dense, batch.labels)
        if not self._distributed:
            loss, grads, dense_grad = self._compiled(*_tensors(arguments))
            joined = {name: grad.numpy() for name, grad in grads.items()}
        else:
            loss, parts, dense_grad = self._run_all(self._split(arguments))
            joined = {
                name: np.concatenate([p.numpy() for p in self._local(part)])
                for name, part in parts.items()
            }
        new_state = _flat(self._state) if self._state else state
        return DenseResult(float(loss), joined, dense_grad.numpy(), new_state)

    def predict(self, batch: Batch, activations: Mapping[str, F32], dense: F32, state: F32) -> F32:
        """float32 [B] predictions, at the given flat variable values."""
        self._assign(tf.constant(dense), tf.constant(state))
        arguments = (dict(activations), batch.dense)
        if not self._distributed:
            result: F32 = self._compiled_predict(*_tensors(arguments)).numpy()
            return result
        parts = self._local(self._predict_all(self._split(arguments)))
        return np.concatenate([part.numpy() for part in parts])

    def _forward(self, activations: Mapping[str, Any], dense: Any, training: bool = False) -> Any:
        return tf.reshape(self._model(activations, dense, training=training), [-1])

    def _forward_backward(self, activations: Mapping[str, Any], dense: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(activations)
            predictions = self._forward(activations, dense, training=True)
            if self._loss == "mse":
                losses = tf.square(predictions - labels)
            else:
                losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, predictions)
            loss = tf.reduce_mean(losses) / self._replicas
        grads, dense_grads = tape.gradient(
            loss, (activations, self._trainable), unconnected_gradients="zero"
        )
        flat = [tf.reshape(g, [-1]) for g in dense_grads]
        return loss, grads, tf.concat(flat, 0) if flat else tf.zeros(0)

    def _on_replicas(self, arguments: Any) -> Any:
        loss, grads, dense_grad = self._strategy.run(self._compiled, args=arguments)
        total = tf.distribute.ReduceOp.SUM
        return (
            self._strategy.reduce(total, loss, axis=None),
            grads,
            self._strategy.reduce(total, dense_grad, axis=None),
        )

    def _predict_on_replicas(self, arguments: Any) -> Any:
        return self._strategy.run(self._compiled_predict, args=arguments)

    def _split(self, arguments: Any) -> Any:
        """Arrays [B, …] as per-replica tensors [B / R, …]."""

        def cut(array: F32) -> Any:
            if len(array) % self._replicas:
                raise ConfigError(
                    f"a worker's batch of {len(array)} examples does not split over "
                    f"{self._replicas} replicas"
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


def _flat(variables: Sequence[Any]) -> F32:
    parts = [np.asarray(v.numpy(), dtype=np.float32).reshape(-1) for v in variables]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _unflat(variables: Sequence[Any], flat: F32) -> list[F32]:
    sizes = [int(np.prod(v.shape)) for v in variables]
    parts = np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
    return [part.reshape(tuple(v.shape)) for part, v in zip(parts, variables, strict=True)]
