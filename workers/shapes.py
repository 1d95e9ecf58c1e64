"""What training makes of each feature: how many vectors per example, and who combines them.

Static facts of a job, known before its first step from the tables, the features and the number of
examples in a worker's batch. Rules as in TensorFlow's training classes: a sequence feature has L
positions per example; `output_shape` wins over it, and either has one vector per example, combined
and reshaped, or a multiple, and then every example fills its positions with rows as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ps.config import CustomCombiner
from ps.errors import ConfigError
from ps.spec import EmbeddingSpec, FeatureSpec, TableSpec


@dataclass(frozen=True, slots=True)
class DeviceLookup:
    """A feature whose rows are combined inside the compiled step."""

    feature: str
    table: str
    width: int
    """W: ids of an example that count; those behind are left out."""
    dim: int
    combiner: str | CustomCombiner
    shape: tuple[int, ...]
    """Of the activation, without its first axis."""


def num_positions(feature: FeatureSpec, batch: int) -> int:
    """Vectors of one example that are not combined; 0 for one combined vector.

    Raises:
        ConfigError: `output_shape` has None entries, or does not fit a batch of this many examples.
    """
    if feature.output_shape is None:
        return feature.max_sequence_length
    if None in feature.output_shape:
        raise ConfigError(
            f"feature '{feature.name}': `output_shape` {list(feature.output_shape)} is not fully "
            "defined, which training needs"
        )
    vectors = math.prod(size for size in feature.output_shape if size is not None)
    if vectors == batch:
        return 0
    if vectors < batch or vectors % batch:
        raise ConfigError(
            f"feature '{feature.name}': `output_shape` {list(feature.output_shape)} holds "
            f"{vectors} vectors, wanted a multiple of the {batch} examples of a worker's batch"
        )
    return vectors // batch


def activation_shape(spec: EmbeddingSpec, feature: FeatureSpec, batch: int) -> tuple[int, ...]:
    """[B, D], [B, L, D] for a sequence feature, or `output_shape` + [D].

    Raises:
        ConfigError: see `num_positions`.
    """
    dim = spec.table(feature.table).dim
    positions = num_positions(feature, batch)
    if feature.output_shape is not None:
        return (*(size for size in feature.output_shape if size is not None), dim)
    return (batch, positions, dim) if positions else (batch, dim)


def lookup_width(table: TableSpec, feature: FeatureSpec, batch: int) -> int | None:
    """W where the compiled step combines the feature; None where the host does."""
    if feature.tensor_core_width is not None:
        return feature.tensor_core_width
    if isinstance(table.combiner, CustomCombiner) and num_positions(feature, batch) == 0:
        return table.combiner.max_valency
    return None


def uses_weights(table: TableSpec, feature: FeatureSpec, batch: int) -> bool:
    """Whether weights of ids make a difference.

    They do not on the tensor core, in custom combiners, and where `output_shape` leaves ids
    uncombined. A position of a sequence is combined from its one id: its weight w multiplies the
    row for `sum`, and cancels out (w/w, w/√w²; 0 for w = 0) for `mean` and, but for its sign,
    `sqrtn`.
    """
    if isinstance(table.combiner, CustomCombiner) or feature.tensor_core_width is not None:
        return False
    return feature.output_shape is None or num_positions(feature, batch) == 0


def device_lookups(spec: EmbeddingSpec, batch: int) -> tuple[DeviceLookup, ...]:
    """The features that the compiled step combines, in order."""
    found = []
    for feature in spec.features:
        table = spec.table(feature.table)
        width = lookup_width(table, feature, batch)
        if width is not None:
            shape = activation_shape(spec, feature, batch)[1:]
            found.append(
                DeviceLookup(feature.name, table.name, width, table.dim, table.combiner, shape)
            )
    return tuple(found)


def check_trainable(spec: EmbeddingSpec, batch: int) -> None:
    """Refuse what TensorFlow's configs can say but a step of `batch` examples cannot do.

    Raises:
        ConfigError: names the table or feature, the option and what it would need.
    """
    for table in spec.tables:
        _check_table(table)
    for feature in spec.features:
        table = spec.table(feature.table)
        positions = num_positions(feature, batch)
        if feature.tensor_core_width is not None:
            if table.combiner not in ("sum", "mean"):
                raise ConfigError(
                    f"feature '{feature.name}': `tensor_core_shape` combines by sum or mean, "
                    f"table '{table.name}' has {table.combiner!r}"
                )
            if positions:
                raise ConfigError(
                    f"feature '{feature.name}': `tensor_core_shape` combines ids, but "
                    f"`output_shape` asks for {positions} vectors per example"
                )
        on_device = lookup_width(table, feature, batch) is not None
        if on_device and not table.optimizer.use_gradient_accumulation:
            raise ConfigError(
                f"feature '{feature.name}': the compiled step sums the gradients of a row, so its "
                f"table '{table.name}' needs `use_gradient_accumulation`"
            )


def _check_table(table: TableSpec) -> None:
    quantization, combiner = table.quantization_config, table.combiner
    if quantization is not None and not quantization.lower < quantization.upper:
        raise ConfigError(
            f"table '{table.name}': `quantization_config` needs lower < upper, got "
            f"{quantization.lower} and {quantization.upper}"
        )
    if not isinstance(combiner, CustomCombiner):
        return
    if not isinstance(combiner.max_valency, int) or combiner.max_valency < 1:
        raise ConfigError(
            f"table '{table.name}': `max_valency` must be an int >= 1, got {combiner.max_valency!r}"
        )
    if combiner.num_weights > 0:
        raise ConfigError(
            f"table '{table.name}': `num_weights` {combiner.num_weights}: weights of a custom "
            "combiner are not trained; leave it 0"
        )
