"""A one-process trainer in plain TensorFlow: whole tables, dense gradients, formulas as published.

Independent of Manta's kernels on purpose: lookups are `tests.support.tf_lookup`, gradients are
`GradientTape`'s, and the updates are written out once more, over whole NumPy arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from ps.initializers import table_key
from ps.optimizers import FTRL, SGD, Adagrad, AdagradMomentum, Adam, Optimizer
from ps.spec import TableSpec
from tests.support.tf_lookup import activation, used_ids, width_of
from workers.batches import Batch
from workers.config import JobConfig


class ReferenceTrainer:
    """Holds every table whole; `step` takes the batches of all workers for one step."""

    def __init__(self, job: JobConfig, model: Any) -> None:
        self._spec = job.embedding_spec()
        self._model = model
        self._dense_optimizer = job.train.dense_optimizer
        self.rows = {t.name: _initial(t, job.seed) for t in self._spec.tables}
        self.slots = {t.name: _slots(t.optimizer, self.rows[t.name]) for t in self._spec.tables}
        self._dense_slots = [
            _slots(self._dense_optimizer, v.numpy()) for v in model.trainable_variables
        ]
        self.steps = 0

    def step(self, batches: list[Batch]) -> None:
        tables = {name: tf.Variable(rows) for name, rows in self.rows.items()}
        variables = self._model.trainable_variables
        with tf.GradientTape() as tape:
            losses = [self._loss(tables, batch) for batch in batches]
            loss = tf.add_n(losses) / len(losses)
        table_grads, dense_grads = tape.gradient(loss, (tables, variables))
        touched = {name: np.zeros(len(rows), bool) for name, rows in self.rows.items()}
        for batch in batches:
            for f in self._spec.features:
                width = width_of(self._spec.table(f.table), f, batch.labels.size)
                touched[f.table][used_ids(batch.bags[f.name], width)] = True
        for table in self._spec.tables:
            grad = tf.convert_to_tensor(table_grads[table.name]).numpy()
            self._update_table(table, grad, touched[table.name])
        for variable, grad, slots in zip(variables, dense_grads, self._dense_slots, strict=True):
            value, new = update(self._dense_optimizer, variable.numpy(), slots, grad.numpy())
            variable.assign(value)
            slots.update(new)
        self.steps += 1

    def dense_values(self) -> np.ndarray:
        return np.concatenate([v.numpy().reshape(-1) for v in self._model.trainable_variables])

    def _loss(self, tables: dict[str, tf.Variable], batch: Batch) -> tf.Tensor:
        activations = {
            f.name: activation(tables[f.table], self._spec.table(f.table), f, batch.bags[f.name])
            for f in self._spec.features
        }
        predictions = self._model(activations, tf.constant(batch.dense), training=True)
        return tf.reduce_mean(tf.square(predictions - batch.labels))

    def _update_table(self, table: TableSpec, grad: np.ndarray, touched: np.ndarray) -> None:
        rows, slots = self.rows[table.name], self.slots[table.name]
        everywhere = isinstance(table.optimizer, Adam) and not table.optimizer.lazy_adam
        at = np.ones_like(touched) if everywhere else touched
        part, new = update(
            table.optimizer, rows[at], {name: slot[at] for name, slot in slots.items()}, grad[at]
        )
        rows[at] = part
        for name, values in new.items():
            slots[name][at] = values


def update(
    optimizer: Optimizer, w: np.ndarray, slots: dict[str, np.ndarray], g: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """clip g → decay w → formula → clip w, in float32, over whole arrays."""
    rate = np.float32(optimizer.learning_rate)
    g = np.clip(g, optimizer.clip_gradient_min, optimizer.clip_gradient_max)
    factor = np.float32(optimizer.weight_decay_factor or 0.0)
    if optimizer.multiply_weight_decay_factor_by_learning_rate:
        factor = factor * rate
    w = w - factor * w
    w, slots = _formula(optimizer, w, slots, g, rate)
    w = np.clip(w, optimizer.clip_weight_min, optimizer.clip_weight_max)
    return w.astype(np.float32), slots


def _formula(
    o: Optimizer, w: np.ndarray, slots: dict[str, np.ndarray], g: np.ndarray, rate: np.float32
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if isinstance(o, SGD):
        return w - rate * g, {}
    if isinstance(o, Adagrad):
        a = slots["accumulators"] + g * g
        return w - rate * g / np.sqrt(a), {"accumulators": a}
    if isinstance(o, AdagradMomentum):
        decayed = 1.0 if o.beta2 == 1 else 1.0 - o.beta2
        a = o.beta2 * slots["accumulators"] + decayed * g * g
        scaled = g * (a + o.epsilon) ** (-1.0 / o.exponent)
        m = o.momentum * slots["momenta"] + scaled
        direction = o.momentum * m + scaled if o.use_nesterov else m
        return w - rate * direction, {"accumulators": a, "momenta": m}
    if isinstance(o, Adam):
        m = o.beta_1 * slots["momenta"] + (1 - o.beta_1) * g
        v = o.beta_2 * slots["velocities"] + (1 - o.beta_2) * g * g
        root = np.sqrt(v + o.epsilon**2) if o.sum_inside_sqrt else np.sqrt(v) + o.epsilon
        return w - rate * m / root, {"momenta": m, "velocities": v}
    assert isinstance(o, FTRL)
    p, a = -o.learning_rate_power, slots["accumulators"]
    l1, l2 = o.l1_regularization_strength, o.l2_regularization_strength
    new_a = a + g * g
    delta = new_a**p - a**p
    if o.multiply_linear_by_learning_rate:
        linear = slots["linears"] + rate * g - delta * w
        w = (np.clip(linear, -rate * l1, rate * l1) - linear) / (new_a**p + o.beta + 2 * rate * l2)
    else:
        linear = slots["linears"] + g - delta * w / rate
        w = (np.clip(linear, -l1, l1) - linear) / ((new_a**p + o.beta) / rate + 2 * l2)
    return w, {"accumulators": new_a, "linears": linear}


def _initial(table: TableSpec, seed: int) -> np.ndarray:
    ids = np.arange(table.vocabulary_size, dtype=np.int64)
    return table.initializer.rows(table_key(seed, table.name), ids, table.dim)


def _slots(optimizer: Optimizer, like: np.ndarray) -> dict[str, np.ndarray]:
    values = zip(optimizer.slot_names, optimizer.slot_initial_values, strict=True)
    return {name: np.full_like(like, value) for name, value in values}
