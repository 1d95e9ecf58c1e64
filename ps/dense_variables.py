"""The variables of a dense model as training and its files keep them: named, flat, in one order.

Knows no TensorFlow: a variable is what has a name (Keras: a path) and a shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ps.ragged import F32


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseVariable:
    """One variable of the dense model."""

    name: str
    shape: tuple[int, ...]
    trainable: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseValues:
    """The flat values of a dense model, as shards hold them."""

    trainable: F32
    """float32 [P]."""
    slots: dict[str, F32]
    """float32 [P] per slot of the dense optimizer; empty if they are not known."""
    state: F32
    """float32 [S]: non-trainable values."""


def by_name(variables: Iterable[Any]) -> dict[str, Any]:
    """Variables by their names, in order; the second of one name is `<name>_1`."""
    named: dict[str, Any] = {}
    for variable in variables:
        name = getattr(variable, "path", variable.name).removesuffix(":0")
        numbered = (f"{name}_{number}" if number else name for number in itertools.count())
        named[next(n for n in numbered if n not in named)] = variable
    return named


def describe(trainable: Iterable[Any], state: Iterable[Any]) -> list[DenseVariable]:
    """What the flat values are: trainable variables, then the others that are kept."""
    trainable = list(trainable)
    return [
        DenseVariable(
            name=name,
            shape=tuple(int(size) for size in variable.shape),
            trainable=place < len(trainable),
        )
        for place, (name, variable) in enumerate(by_name([*trainable, *state]).items())
    ]


def flat(arrays: Iterable[F32]) -> F32:
    """float32 [P]: the values of all arrays, one behind the other."""
    return np.concatenate([np.zeros(0, np.float32), *(np.ravel(a) for a in arrays)])


def unflat(variables: Sequence[DenseVariable], values: F32) -> dict[str, F32]:
    """Flat values, float32 [P], as views by the variables' names."""
    sizes = [int(np.prod(v.shape)) for v in variables]
    assert sum(sizes) == values.size, "the flat values are those of the variables"
    parts = np.split(values, np.cumsum(sizes)[:-1]) if sizes else []
    return {v.name: p.reshape(v.shape) for v, p in zip(variables, parts, strict=True)}
