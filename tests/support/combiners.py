"""Custom combiners that tests name by import path."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def attention(valency: Any, vectors: Any) -> Any:
    """A softmax over the sums of the vectors weighs them; zeros for no id."""
    valid = tf.range(vectors.shape[0]) < valency
    scores = tf.where(valid, tf.reduce_sum(vectors, axis=1), -1e9)
    weights = tf.nn.softmax(scores) * tf.cast(valid, tf.float32)
    return tf.reduce_sum(weights[:, tf.newaxis] * vectors, axis=0)


def total(valency: Any, vectors: Any) -> Any:
    """As the combiner `sum`; what is behind the valency is zero."""
    return tf.reduce_sum(vectors, axis=0)


def whole(valency: Any, vectors: Any) -> Any:
    """Wrong: not one vector."""
    return vectors


def failing(valency: Any, vectors: Any) -> Any:
    """Wrong: the shapes do not fit."""
    return tf.linalg.matvec(vectors, tf.zeros(97))
