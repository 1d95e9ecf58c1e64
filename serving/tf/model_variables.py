"""The variables of a dense model in the order in which training keeps them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import tensorflow as tf

from ps.ragged import F32
from ps.snapshot import DenseValues, DenseVariable


def named_variables(model: Any) -> dict[str, Any]:
    """Trainable variables, then the others that are floats, by the names that training gives them.

    The second variable of one name is `<name>_1`.
    """
    state = [v for v in model.non_trainable_variables if tf.as_dtype(v.dtype).is_floating]
    named: dict[str, Any] = {}
    for variable in (*model.trainable_variables, *state):
        name = getattr(variable, "path", variable.name).removesuffix(":0")
        numbered = (f"{name}_{number}" if number else name for number in itertools.count())
        named[next(n for n in numbered if n not in named)] = variable
    return named


def described(model: Any) -> list[DenseVariable]:
    """What the flat values of a model are."""
    num_trainable = len(model.trainable_variables)
    return [
        DenseVariable(name=name, shape=tuple(variable.shape), trainable=place < num_trainable)
        for place, (name, variable) in enumerate(named_variables(model).items())
    ]


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
