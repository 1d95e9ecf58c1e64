"""The variables of a dense model in the order in which training keeps them."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from ps.dense_variables import DenseValues, DenseVariable, by_name, describe
from ps.ragged import F32


def named_variables(model: Any) -> dict[str, Any]:
    """Trainable variables, then the others that are floats, by the names that training gives them.

    The second variable of one name is `<name>_1`.
    """
    return by_name([*model.trainable_variables, *_state(model)])


def described(model: Any) -> list[DenseVariable]:
    """What the flat values of a model are."""
    return describe(model.trainable_variables, _state(model))


def _state(model: Any) -> list[Any]:
    return [v for v in model.non_trainable_variables if tf.as_dtype(v.dtype).is_floating]


def flat_values(model: Any) -> DenseValues:
    """The values of a model, without slots."""
    num_trainable = len(model.trainable_variables)
    parts: list[F32] = [v.numpy().reshape(-1) for v in named_variables(model).values()]
    empty = np.zeros(0, dtype=np.float32)
    return DenseValues(
        trainable=np.concatenate([empty, *parts[:num_trainable]]),
        slots={},
        state=np.concatenate([empty, *parts[num_trainable:]]),
    )
