"""Optimizer configurations: TensorFlow's names, argument order, defaults and checks.

Each class says which slots it keeps and which float32 numbers its kernel takes; the update loops
are in `ps.kernels.update`. `ps.custom_optimizer` has the one whose update is the user's own
function. Reference: `tf.tpu.experimental.embedding` of TensorFlow 2.21.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ps.errors import ConfigError

Rate = float | Callable[..., float]
ClipValue = float | tuple[float | None, float | None] | None


def evaluate_rate(rate: Rate, step: int) -> float:
    """The learning rate of a step: a number, `rate(step)`, or TensorFlow's `rate()`.

    Every shard has its own copy of a callable, so `rate(step)` is the form that does not forget: a
    function of nothing that counts its calls starts anew when a shard does.
    """
    if not callable(rate):
        return float(rate)
    return float(rate(step) if _takes_step(rate) else rate())


def _takes_step(rate: Callable[..., float]) -> bool:
    try:
        inspect.signature(rate).bind(0)
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class ExponentialDecay:
    """`initial * rate ** (step / steps)`: a schedule that YAML can name.

    Equals `tf.keras.optimizers.schedules.ExponentialDecay` with `staircase=False`.
    """

    initial: float
    rate: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"schedule: `steps` must be at least 1, got {self.steps}")

    def __call__(self, step: int) -> float:
        """The learning rate of a step."""
        return float(self.initial * self.rate ** (step / self.steps))


@dataclass(frozen=True)
class LinearDecay:
    """From `initial` to `final` in `steps` steps, `final` afterwards.

    Equals `tf.keras.optimizers.schedules.PolynomialDecay` with `power=1`.
    """

    initial: float
    final: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"schedule: `steps` must be at least 1, got {self.steps}")

    def __call__(self, step: int) -> float:
        """The learning rate of a step."""
        part = min(step, self.steps) / self.steps
        return float(self.initial + (self.final - self.initial) * part)


class Optimizer:
    """What all optimizers share: clipping, decay, and how slots are described.

    A step does, per touched row: sum the gradients → clip the sum to `clipvalue` → decay the row →
    the optimizer's own formula → clip the row to [`clip_weight_min`, `clip_weight_max`]. Slots are
    neither decayed nor clipped.

    `weight_decay_factor` f is decoupled: the row becomes w - f·w (times the learning rate when
    `multiply_weight_decay_factor_by_learning_rate`).

    With `use_gradient_accumulation=False` every contribution is a step of its own, in the order of
    worker rank, then feature, then example; a gradient cannot be clipped then.

    `low_dimensional_packing_status` is a hint about a TPU's memory layout: it is accepted and
    changes no result, here as there.
    """

    slot_names: tuple[str, ...] = ()
    """What is kept per row besides its values, by TensorFlow's names."""

    learning_rate: Rate
    use_gradient_accumulation: bool
    clip_weight_min: float | None
    clip_weight_max: float | None
    weight_decay_factor: float | None
    multiply_weight_decay_factor_by_learning_rate: bool | None
    clipvalue: ClipValue
    slot_variable_creation_fn: Callable[..., object] | None = None
    """For TensorFlow's own variables only: shards make their own slots and refuse it."""

    @property
    def slot_initial_values(self) -> tuple[float, ...]:
        """The constant that each slot starts with, in the order of `slot_names`."""
        return (0.0,) * len(self.slot_names)

    @property
    def rates(self) -> tuple[Rate, ...]:
        """Everything that may be a callable and is evaluated each step, the learning rate first."""
        return (self.learning_rate,)

    @property
    def updates_untouched_rows(self) -> bool:
        """True if rows that a step does not touch change nevertheless (non-lazy Adam)."""
        return False

    @property
    def clip_gradient_min(self) -> float | None:
        """Lower bound of a summed gradient, None for none."""
        return _clip_bounds(self.clipvalue)[0]

    @property
    def clip_gradient_max(self) -> float | None:
        """Upper bound of a summed gradient, None for none."""
        return _clip_bounds(self.clipvalue)[1]

    def decay(self, rate: float) -> float:
        """The factor f of w - f·w for a step with this learning rate; 0 is off."""
        factor = self.weight_decay_factor or 0.0
        return factor * rate if self.multiply_weight_decay_factor_by_learning_rate else factor

    def for_shards(self) -> Optimizer:
        """This optimizer, as shards run it.

        TensorFlow's constructors check little, so this is where an argument is refused that no
        update could act on.

        Raises:
            ConfigError: slots that the caller would make, or text where a number belongs.
        """
        if self.slot_variable_creation_fn is not None:
            raise ConfigError("shards make their own slots; leave out `slot_variable_creation_fn`")
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.name == "learning_rate" and callable(value):
                continue
            for number in value if field.name == "clipvalue" and value else (value,):
                if not is_number(number) and not (number is None and field.default is None):
                    raise ConfigError(
                        f"{type(self).__name__}: `{field.name}` must be a number, got {number!r}"
                    )
        return self

    def describe(self) -> dict[str, Any]:
        """Name and arguments as JSON holds them, functions by their import path: for manifests."""
        described = _plain(self)
        assert isinstance(described, dict)
        return described

    def _check_common(self) -> None:
        """TensorFlow's checks, in its order."""
        name = type(self).__name__
        slot_fn = self.slot_variable_creation_fn
        if slot_fn is not None and not callable(slot_fn):
            raise ConfigError(
                f"{name}: `slot_variable_creation_fn` must be None or callable, got {slot_fn!r}"
            )
        if self.clipvalue is not None and not self.use_gradient_accumulation:
            raise ConfigError(
                f"{name}: clipvalue={self.clipvalue!r} needs `use_gradient_accumulation` to be "
                f"True, got {self.use_gradient_accumulation}"
            )
        # One spelling for one meaning, so that equal bounds are equal optimizers.
        low, high = _clip_bounds(self.clipvalue)
        bounds = None if low is None and high is None else (low, high)
        object.__setattr__(self, "clipvalue", bounds)

    def _positive(self, argument: str) -> None:
        value = getattr(self, argument)
        if value <= 0:
            raise ConfigError(f"{type(self).__name__}: `{argument}` must be > 0, got {value}")


def is_number(value: object) -> bool:
    """True for Python's and NumPy's numbers, bool included, as TensorFlow takes them."""
    return isinstance(value, Real)


def _clip_bounds(clipvalue: ClipValue) -> tuple[float | None, float | None]:
    if clipvalue is None:
        return None, None
    if isinstance(clipvalue, tuple):
        if len(clipvalue) != 2:
            raise ConfigError(f"clipvalue must be a number or (min, max), got {clipvalue}")
        return clipvalue
    if not is_number(clipvalue):
        raise TypeError(f"clipvalue must be a number or a tuple (min, max), got {clipvalue!r}")
    return -clipvalue, clipvalue


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):  # an optimizer, a schedule, an initializer
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"name": type(value).__name__, **fields}
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


@dataclass(frozen=True)
class SGD(Optimizer):
    """w ← w - λ·g."""

    learning_rate: Rate = 0.01
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float | None = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    clipvalue: ClipValue = None
    low_dimensional_packing_status: bool = False

    def __post_init__(self) -> None:
        self._check_common()


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """a ← a + g²; w ← w - λ·g/√a, without an epsilon."""

    slot_names = ("accumulators",)

    learning_rate: Rate = 0.001
    initial_accumulator_value: float = 0.1
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float | None = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    slot_variable_creation_fn: Callable[..., object] | None = None
    clipvalue: ClipValue = None
    low_dimensional_packing_status: bool = False

    def __post_init__(self) -> None:
        self._check_common()
        self._positive("initial_accumulator_value")

    @property
    def slot_initial_values(self) -> tuple[float, ...]:
        """Accumulators start at `initial_accumulator_value`."""
        return (self.initial_accumulator_value,)


@dataclass(frozen=True)
class AdagradMomentum(Optimizer):
    """Momentum over the scaled gradient s = g·(a+ε)^(-1/exponent).

    a ← a + g² (or β₂a + (1-β₂)g² if beta2 ≠ 1); m ← momentum·m + s;
    w ← w - λ·(momentum·m + s if use_nesterov else m).
    """

    slot_names = ("accumulators", "momenta")

    learning_rate: Rate = 0.001
    momentum: float = 0.0
    use_nesterov: bool = False
    exponent: float = 2
    beta2: float = 1
    epsilon: float = 1e-10
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float | None = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    slot_variable_creation_fn: Callable[..., object] | None = None
    clipvalue: ClipValue = None
    low_dimensional_packing_status: bool = False

    def __post_init__(self) -> None:
        self._check_common()
        self._positive("epsilon")
        self._positive("exponent")


@dataclass(frozen=True)
class Adam(Optimizer):
    """m ← β₁m + (1-β₁)g; v ← β₂v + (1-β₂)g²; w ← w - λ·m/√(v+ε²), without bias correction.

    The denominator is √v + ε when `sum_inside_sqrt` is False. With `lazy_adam=False` every row of
    the table is updated each step, rows without a gradient with g = 0.
    """

    slot_names = ("momenta", "velocities")

    learning_rate: Rate = 0.001
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-07
    lazy_adam: bool = True
    sum_inside_sqrt: bool = True
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float | None = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    slot_variable_creation_fn: Callable[..., object] | None = None
    clipvalue: ClipValue = None
    low_dimensional_packing_status: bool = False

    def __post_init__(self) -> None:
        self._check_common()
        for argument in ("beta_1", "beta_2"):
            value = getattr(self, argument)
            if value < 0.0 or value >= 1.0:  # as TensorFlow has it: NaN passes
                raise ConfigError(f"Adam: `{argument}` must be in [0, 1), got {value}")
        self._positive("epsilon")
        if not self.use_gradient_accumulation and not self.lazy_adam:
            raise ConfigError(
                "Adam: lazy_adam=False needs `use_gradient_accumulation` to be True, got False"
            )

    @property
    def updates_untouched_rows(self) -> bool:
        """True for non-lazy Adam."""
        return not self.lazy_adam


@dataclass(frozen=True)
class FTRL(Optimizer):
    """Follow the regularised leader; p = -learning_rate_power, a' = a + g², δ = a'^p - a^p.

    l ← l + g - δ·w/λ; w ← (clamp(l, -l1, l1) - l) / ((a'^p + beta)/λ + 2·l2); a ← a'. With
    `multiply_linear_by_learning_rate` the linear slot holds λ·l. `allow_zero_accumulator` is
    accepted and has no effect, as in TensorFlow.
    """

    slot_names = ("accumulators", "linears")

    learning_rate: Rate = 0.001
    learning_rate_power: float = -0.5
    l1_regularization_strength: float = 0.0
    l2_regularization_strength: float = 0.0
    beta: float = 0.0
    initial_accumulator_value: float = 0.1
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float | None = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    slot_variable_creation_fn: Callable[..., object] | None = None
    clipvalue: ClipValue = None
    multiply_linear_by_learning_rate: bool = False
    allow_zero_accumulator: bool = False
    low_dimensional_packing_status: bool = False

    def __post_init__(self) -> None:
        self._check_common()
        self._positive("initial_accumulator_value")

    @property
    def slot_initial_values(self) -> tuple[float, ...]:
        """Accumulators start at `initial_accumulator_value`, linears at 0."""
        return (self.initial_accumulator_value, 0.0)


OPTIMIZERS: dict[str, type[Optimizer]] = {
    cls.__name__: cls for cls in (SGD, Adagrad, AdagradMomentum, Adam, FTRL)
}
SCHEDULES: dict[str, type[ExponentialDecay] | type[LinearDecay]] = {
    cls.__name__: cls for cls in (ExponentialDecay, LinearDecay)
}
