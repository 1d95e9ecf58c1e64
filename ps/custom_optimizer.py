"""`CustomOptimizer`: an update rule that is the user's own NumPy function.

Owns the configuration (TensorFlow's names, order and checks) and the call of the function: which
rows it sees at a time, and what it must return. It writes to no table; `ps.rowstore` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ps.errors import ConfigError
from ps.kernels.dedup import distinct_ids
from ps.optimizers import Optimizer, Rate, is_number
from ps.ragged import F32, I64

Computation = Callable[[F32, F32, list[F32], np.float32, list[np.float32]], F32 | Sequence[F32]]


@dataclass(frozen=True, init=False)
class CustomOptimizer(Optimizer):
    """Rows are updated by a function of (gradient, embedding_table, slot_variables, learning_rate,
    hyperparameters).

    It gets float32 arrays [n, D]: gradients, the n rows that they belong to, and a list of the
    rows' slots; a float32 number; a list of float32 numbers. It returns the new rows, or
    (rows, *slots) when there are slots, as float32 [n, D]. Each row must be computed from its own
    entries alone: how many rows come together depends on the batch and on the number of shards.

    As in TensorFlow, contributions are not summed: each is applied by itself, in the order that
    `Optimizer` names, and there is neither clipping nor decay.

    >>> def adagrad(gradient, embedding_table, slot_variables, learning_rate, hyperparameters):
    ...     accumulator = slot_variables[0] + gradient * gradient
    ...     return embedding_table - learning_rate * gradient / np.sqrt(accumulator), accumulator
    >>> CustomOptimizer(adagrad, 1.0, ["accumulators"], [0.1]).slot_initial_values
    (0.1,)
    """  # noqa: D205

    custom_computation: Computation
    learning_rate: Rate
    slot_names: tuple[str, ...]
    slot_initializers: tuple[object, ...]
    """A number or a constant initializer, ours or TensorFlow's, per slot."""
    hyperparameters: tuple[Rate, ...]
    """Callables are called once a step, as the learning rate is."""
    slot_dims: tuple[int, ...]
    """2 per slot, or nothing. TensorFlow's 1 has no published meaning; shards refuse it."""

    use_gradient_accumulation = False
    clip_weight_min = None
    clip_weight_max = None
    weight_decay_factor = None
    multiply_weight_decay_factor_by_learning_rate = None
    clipvalue = None
    low_dimensional_packing_status = False

    def __init__(
        self,
        custom_computation: Computation,
        learning_rate: Rate = 0.01,
        slot_names: Sequence[str] | None = None,
        slot_initializers: Sequence[object] | None = None,
        hyperparameters: Sequence[Rate] | None = None,
        slot_dims: Sequence[int] | None = None,
    ) -> None:
        for name, value in {
            "custom_computation": custom_computation,
            "learning_rate": learning_rate,
            "slot_names": tuple(slot_names or ()),
            "slot_initializers": tuple(slot_initializers or ()),
            "slot_dims": tuple(slot_dims or ()),
        }.items():
            object.__setattr__(self, name, value)
        self._check_slots()
        object.__setattr__(self, "hyperparameters", tuple(hyperparameters or ()))

    @property
    def slot_initial_values(self) -> tuple[float, ...]:
        """What each slot starts with.

        Raises:
            ConfigError: an initializer that is not a constant.
        """
        return tuple(
            _constant(name, initializer)
            for name, initializer in zip(self.slot_names, self.slot_initializers, strict=True)
        )

    @property
    def rates(self) -> tuple[Rate, ...]:
        """The learning rate, then the hyperparameters."""
        return (self.learning_rate, *self.hyperparameters)

    def for_shards(self) -> CustomOptimizer:
        """See `Optimizer.for_shards`; slot initializers become numbers.

        Raises:
            ConfigError: a TensorFlow function, a one-dimensional slot, a slot that does not start
                from a constant, a name that is no name, text where a number belongs.
        """
        function = self.custom_computation
        if type(function).__module__.startswith("tensorflow"):
            raise ConfigError(
                "CustomOptimizer: `custom_computation` is a TensorFlow function, and shards run "
                "without TensorFlow; give the same formula as a function of NumPy arrays"
            )
        if not callable(function):
            raise ConfigError(
                f"CustomOptimizer: `custom_computation` must be callable, got {function!r}"
            )
        names = self.slot_names
        if len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
            raise ConfigError(f"CustomOptimizer: `slot_names` must be unique names, got {names}")
        if 1 in self.slot_dims:
            raise ConfigError(
                f"CustomOptimizer: `slot_dims` of slot '{names[self.slot_dims.index(1)]}' is 1, "
                "but a slot has the shape of its table; leave it out or give 2"
            )
        for rate in self.rates:
            if not callable(rate) and not is_number(rate):
                raise ConfigError(
                    "CustomOptimizer: `learning_rate` and `hyperparameters` must be numbers or "
                    f"callables, got {rate!r}"
                )
        return dataclasses.replace(self, slot_initializers=self.slot_initial_values)

    def _check_slots(self) -> None:
        num_names = len(self.slot_names)
        if len(self.slot_initializers) != num_names:
            raise ConfigError(
                f"CustomOptimizer: the number of `slot_names` ({num_names}) must match the number "
                f"of `slot_initializers` ({len(self.slot_initializers)})"
            )
        if self.slot_dims and len(self.slot_dims) != num_names:
            raise ConfigError(
                f"CustomOptimizer: the number of `slot_dims` ({len(self.slot_dims)}) must match "
                f"the number of `slot_names` ({num_names})"
            )
        for name, dim in zip(self.slot_names, self.slot_dims, strict=False):
            if dim not in (1, 2):
                raise ConfigError(
                    f"CustomOptimizer: `slot_dims` of slot '{name}' must be 1 or 2, got {dim!r}"
                )


def updated_rows(
    optimizer: CustomOptimizer,
    arrays: Sequence[F32],
    index_N: I64,
    grads_ND: F32,
    rate: float,
    hyperparameters: Sequence[float],
) -> tuple[I64, list[F32]]:
    """Run a step on copies of the touched rows.

    A row that appears k times is computed k times, in order: the computation is called on the
    first contribution of every row, then on the second of those that have one, and so on.

    Args:
        optimizer: Whose computation is called.
        arrays: The table's rows, then its slots, float32 [V, D] each. They are only read.
        index_N: int64 [N]: the row of every contribution.
        grads_ND: float32 [N, D].
        rate: λ of this step.
        hyperparameters: Those of this step.

    Returns:
        The distinct rows int64 [U], and their new values for each array, float32 [U, D].

    Raises:
        ConfigError: the computation raised, or returned something else than it must.
    """
    rows_U, place_N = distinct_ids(index_N)
    new = [array[rows_U] for array in arrays]
    numbers = [np.float32(value) for value in hyperparameters]
    for contributions in _rounds(place_N):
        at = place_N[contributions]
        table, *slots = (array[at] for array in new)
        result = _call(optimizer, grads_ND[contributions], table, slots, np.float32(rate), numbers)
        for array, values in zip(new, result, strict=True):
            array[at] = values
    return rows_U, new


def _rounds(place_N: I64) -> Iterator[I64]:
    """Positions of the first contributions of all places, then of the second ones, and so on."""
    by_place = np.argsort(place_N, kind="stable")
    counts = np.bincount(place_N)
    nth = np.empty_like(place_N)
    nth[by_place] = np.arange(place_N.size) - np.repeat(np.cumsum(counts) - counts, counts)
    by_round = np.argsort(nth, kind="stable")
    yield from np.split(by_round, np.cumsum(np.bincount(nth))[:-1]) if place_N.size else ()


def _call(
    optimizer: CustomOptimizer,
    grads: F32,
    table: F32,
    slots: list[F32],
    rate: np.float32,
    hyperparameters: list[np.float32],
) -> Sequence[F32]:
    shape = table.shape
    what = f"custom_computation '{optimizer.describe()['custom_computation']}'"
    try:
        result = optimizer.custom_computation(grads, table, slots, rate, list(hyperparameters))
    except Exception as e:
        raise ConfigError(f"{what} raised {type(e).__name__}: {e}") from e
    parts: Sequence[Any] = result if isinstance(result, tuple | list) else (result,)
    names = ("embedding_table", *optimizer.slot_names)
    if len(parts) != len(names):
        raise ConfigError(f"{what} returned {len(parts)} arrays, wanted {', '.join(names)}")
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part, np.ndarray) or (part.dtype, part.shape) != (np.float32, shape):
            seen = f"{part.dtype} {part.shape}" if hasattr(part, "dtype") else repr(part)
            raise ConfigError(f"{what} returned {name} as {seen}, wanted a NumPy float32 {shape}")
    return parts


def _constant(slot: str, initializer: Any) -> float:
    """By class name and attribute, so that TensorFlow's and Keras' constants are known too."""
    if is_number(initializer):
        return float(initializer)
    kind = type(initializer).__name__
    if kind in ("Zeros", "Ones"):
        return float(kind == "Ones")
    if kind == "Constant" and is_number(initializer.value):
        return float(initializer.value)
    raise ConfigError(
        f"CustomOptimizer: `slot_initializers` of slot '{slot}' must be a number or a constant "
        f"initializer, got {initializer!r}"
    )
