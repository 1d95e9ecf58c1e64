"""Dense models that tests name by import path."""

from __future__ import annotations

import os
import signal

import numpy as np
import tensorflow as tf

from workers.model import MLP, ModelInputs


class JoinedMLP(tf.Module):
    """An MLP over everything, with a running mean of its inputs as non-trainable state."""

    def __init__(self, inputs: ModelInputs) -> None:
        super().__init__()
        width = sum(int(np.prod(shape)) for shape in inputs.activations.values())
        self.mlp = MLP([width + inputs.num_dense, 16, 1], np.random.default_rng(inputs.seed), "mlp")
        self.running = tf.Variable(tf.zeros(width + inputs.num_dense), trainable=False)

    def __call__(self, activations, dense, training):
        flat = [tf.reshape(a, [tf.shape(a)[0], -1]) for a in activations.values()]
        x = tf.concat([*flat, dense], axis=1)
        if training:
            self.running.assign(0.9 * self.running + 0.1 * tf.reduce_mean(x, axis=0))
        return self.mlp(x - self.running)


def build_mlp(inputs: ModelInputs) -> tf.Module:
    """See `JoinedMLP`."""
    return JoinedMLP(inputs)


def build_keras(inputs: ModelInputs, units: int = 4) -> tf.Module:
    """A user's Keras model: unseeded layers, dropout, batch normalisation."""

    class Ranker(tf.keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm = tf.keras.layers.BatchNormalization()
            self.dropout = tf.keras.layers.Dropout(0.2)
            self.hidden = tf.keras.layers.Dense(units, activation="relu")
            self.out = tf.keras.layers.Dense(1)

        def call(self, activations, dense, training=False):
            flat = [tf.reshape(a, [tf.shape(a)[0], a.shape[-1]]) for a in activations.values()]
            x = self.norm(tf.concat([*flat, dense], axis=1), training=training)
            return self.out(self.dropout(self.hidden(x), training=training))

    return Ranker()


def build_deadly(inputs: ModelInputs) -> tf.Module:
    """A model whose training kills the process, as a broken driver of an accelerator may."""

    class Deadly(JoinedMLP):
        def __call__(self, activations, dense, training):
            if training:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(activations, dense, training)

    return Deadly(inputs)
