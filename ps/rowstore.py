"""`RowStore`: rows and their optimizer slots as parallel arrays, read and updated by kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ps.custom_optimizer import CustomOptimizer, updated_rows
from ps.kernels import update
from ps.kernels.combine import gather_rows
from ps.optimizers import (
    FTRL,
    SGD,
    Adagrad,
    AdagradMomentum,
    Adam,
    Optimizer,
)
from ps.ragged import F32, I64

_UNTOUCHED_CHUNK = 4096


class RowStore:
    """float32 rows [n, D] with one array of the same shape per slot."""

    def __init__(self, rows: F32, optimizer: Optimizer) -> None:
        self.rows = rows
        self.optimizer = optimizer
        self.slots: dict[str, F32] = {
            name: filled(rows.shape, value)
            for name, value in zip(optimizer.slot_names, optimizer.slot_initial_values, strict=True)
        }
        self._bounds = _bounds(optimizer)
        self._update = None if isinstance(optimizer, CustomOptimizer) else _kernel_of(optimizer)

    @property
    def size_bytes(self) -> int:
        """Bytes of rows and slots."""
        return self.rows.nbytes * (1 + len(self.slots))

    def gather(self, local_rows: I64) -> F32:
        """float32 [n, D]: a copy of the given rows, int64 [n]."""
        out = np.empty((local_rows.size, self.rows.shape[1]), dtype=np.float32)
        gather_rows(self.rows, local_rows, out)
        return out

    def apply(
        self, local_rows: I64, grads: F32, rate: float, hyperparameters: Sequence[float] = ()
    ) -> None:
        """Update rows int64 [n] with gradients float32 [n, D], in order; `rate` is λ.

        A row that appears several times is updated several times. Rows not named stay as they are,
        unless the optimizer is non-lazy Adam.

        Raises:
            ConfigError: a custom computation failed; nothing has changed then.
        """
        self.prepare(local_rows, grads, rate, hyperparameters)()

    def prepare(
        self, local_rows: I64, grads: F32, rate: float, hyperparameters: Sequence[float] = ()
    ) -> Callable[[], None]:
        """`apply` up to where it changes something; calling what is returned does the rest."""
        if not isinstance(self.optimizer, CustomOptimizer):
            return partial(self._apply_kernel, local_rows, grads, rate)
        arrays = (self.rows, *self.slots.values())
        rows, values = updated_rows(
            self.optimizer, arrays, local_rows, grads, rate, hyperparameters
        )
        return partial(self._write, rows, values)

    def _write(self, local_rows: I64, values: Sequence[F32]) -> None:
        for array, new in zip((self.rows, *self.slots.values()), values, strict=True):
            array[local_rows] = new

    def _apply_kernel(self, local_rows: I64, grads: F32, rate: float) -> None:
        decay = np.float32(self.optimizer.decay(rate))
        self._run(local_rows, grads, np.float32(rate), decay)
        if self.optimizer.updates_untouched_rows:
            untouched = np.ones(len(self.rows), dtype=bool)
            untouched[local_rows] = False
            rest = np.flatnonzero(untouched)
            for start in range(0, rest.size, _UNTOUCHED_CHUNK):
                chunk = rest[start : start + _UNTOUCHED_CHUNK]
                zeros = np.zeros((chunk.size, self.rows.shape[1]), dtype=np.float32)
                self._run(chunk, zeros, np.float32(rate), np.float32(0.0))

    def _run(self, index: I64, grads: F32, rate: np.float32, decay: np.float32) -> None:
        assert self._update is not None, "a custom computation has no kernel"
        self._update(self.rows, *self.slots.values(), index, grads, rate, decay, self._bounds)


def filled(shape: tuple[int, ...], value: float) -> F32:
    """A float32 array of one value. Zeros take no memory before they are written."""
    return np.full(shape, value, np.float32) if value else np.zeros(shape, np.float32)


def _bounds(optimizer: Optimizer) -> F32:
    given = (
        optimizer.clip_gradient_min,
        optimizer.clip_gradient_max,
        optimizer.clip_weight_min,
        optimizer.clip_weight_max,
    )
    open_ends = (-np.inf, np.inf, -np.inf, np.inf)
    return np.array(
        [o if g is None else g for g, o in zip(given, open_ends, strict=True)], dtype=np.float32
    )


def _kernel_of(optimizer: Optimizer) -> Callable[..., None]:
    """The optimizer's kernel with its own float32 numbers already given as the last arguments."""
    f32 = np.float32
    extra: tuple[object, ...]
    function: Callable[..., None]
    match optimizer:
        case SGD():
            function, extra = update.sgd, ()
        case Adagrad():
            function, extra = update.adagrad, ()
        case AdagradMomentum(momentum=m, use_nesterov=n, exponent=e, beta2=b, epsilon=eps):
            function, extra = (
                update.adagrad_momentum,
                (f32(m), n, f32(-1 / e), f32(b), f32(1 - b), f32(eps)),
            )
        case Adam(beta_1=b1, beta_2=b2, epsilon=eps, sum_inside_sqrt=inside):
            function, extra = (
                update.adam,
                (f32(b1), f32(1 - b1), f32(b2), f32(1 - b2), f32(eps), inside),
            )
        case FTRL(
            learning_rate_power=p,
            l1_regularization_strength=l1,
            l2_regularization_strength=l2,
            beta=b,
            multiply_linear_by_learning_rate=multiply,
        ):
            function = update.ftrl
            extra = (f32(-p), f32(l1), f32(l2), f32(b), multiply)
        case _:
            raise TypeError(f"no kernel for {type(optimizer).__name__}")
    return lambda *args: function(*args, *extra)
