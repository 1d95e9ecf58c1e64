"""`embedding_column` and `shared_embedding_columns`: a categorical column and its table.

Signatures, checks and names of `tf.compat.v1.tpu.experimental` in TensorFlow 2.21. Categorical
columns may be ours or TensorFlow's. Lookups are in `ps.columns.layers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ps.columns.steps import length_key
from ps.columns.stock import is_categorical, is_sequence, is_weighted
from ps.columns.transform import Transform
from ps.errors import ConfigError
from ps.initializers import TruncatedNormal

DEVICES = ("cpu", "tpu_tensor_core", "tpu_embedding_core")


@dataclass(frozen=True, eq=False)
class Collection:
    """The table of shared columns: they hold one object, and share its rows."""

    name: str
    """Of the table."""


@dataclass(frozen=True)
class EmbeddingColumn:
    """A feature and the table that it looks up; made by `embedding_column`.

    Unlike TensorFlow's, a deep copy of a shared column keeps `use_safe_embedding_lookup`.
    """

    categorical_column: Any
    """As given."""
    dimension: int
    combiner: str | None
    """Not checked before a lookup; None is mean."""
    initializer: Callable[..., Any]
    max_sequence_length: int
    """L of a sequence, 0 for no sequence."""
    learning_rate_fn: Callable[..., Any] | None
    """step → rate; tables with the same function object share one rate."""
    embedding_lookup_device: str | None
    """cpu, tpu_tensor_core, tpu_embedding_core, or None for the default."""
    tensor_core_shape: tuple[int | None, ...] | None
    """[batch, W] for tpu_tensor_core."""
    use_safe_embedding_lookup: bool
    """Drop ids < 0 and, for mean and sqrtn, weights <= 0 in a lookup that is no sequence."""
    collection: Collection | None = None
    """What shared columns share; None for a table of its own."""

    def __post_init__(self) -> None:
        name, length = self.categorical_column.name, self.max_sequence_length
        if self.is_sequence and length < 1:
            raise ConfigError(
                "max_sequence_length must be greater than 0 for sequence columns. "
                f"Got max_sequence_length={length} for sequence column {name}."
            )
        if not self.is_sequence and length != 0:
            raise ConfigError(
                f"Non zero max_seq_length={length} specified for non sequence column {name}."
            )

    @property
    def name(self) -> str:
        """`<column>_embedding` or `<column>_shared_embedding`."""
        kind = "embedding" if self.collection is None else "shared_embedding"
        return f"{self.categorical_column.name}_{kind}"

    @property
    def table_name(self) -> str:
        """The categorical column's name, or the collection's."""
        name: str = self.categorical_column.name
        return name if self.collection is None else self.collection.name

    @property
    def table_size(self) -> tuple[int, int]:
        """(number of rows, dimension)."""
        return self.categorical_column.num_buckets, self.dimension

    @property
    def feature_key(self) -> str:
        """Name of the feature: the categorical column's, without its weights."""
        column = self.categorical_column
        name: str = column.categorical_column.name if self.is_weighted else column.name
        return name

    @property
    def weight_key(self) -> str | None:
        """The raw input with the weights, None without."""
        return self.categorical_column.weight_feature_key if self.is_weighted else None

    @property
    def sequence_length_key(self) -> str:
        """`<feature key>_seq_length_`, under which TensorFlow passes the lengths of sequences."""
        return length_key(self.feature_key)

    @property
    def is_sequence(self) -> bool:
        """Whether steps in time are kept apart; never for a weighted column."""
        return is_sequence(self.categorical_column)

    @property
    def is_weighted(self) -> bool:
        """Whether the values have weights."""
        return is_weighted(self.categorical_column)

    @cached_property
    def transform(self) -> Transform:
        """Raw inputs to ids; a vocabulary file is read on first use if TensorFlow made the column.

        Raises:
            ConfigError: only TensorFlow can compute it (crossed and bucketized columns).
        """
        return Transform.of(self.categorical_column)


def embedding_column(
    categorical_column: Any,
    dimension: int,
    combiner: str | None = "mean",
    initializer: Callable[..., Any] | None = None,
    max_sequence_length: int = 0,
    learning_rate_fn: Callable[..., Any] | None = None,
    embedding_lookup_device: str | None = None,
    tensor_core_shape: Sequence[int | None] | None = None,
    use_safe_embedding_lookup: bool = True,
) -> EmbeddingColumn:
    """A column with a table of its own.

    Args:
        categorical_column: any categorical column, ours or TensorFlow's.
        dimension: length of a row.
        combiner: mean, sum or sqrtn; how the rows of an example become one vector.
        initializer: of the table; None is TruncatedNormal(0, 1/√dimension).
        max_sequence_length: positive for sequence columns, which are cut or padded to it, else 0.
        learning_rate_fn: step → learning rate of the table; None is the optimizer's rate.
        embedding_lookup_device: cpu (serving only), tpu_tensor_core or tpu_embedding_core.
        tensor_core_shape: [batch, W], needed with tpu_tensor_core, which looks up the first W ids.
        use_safe_embedding_lookup: see `EmbeddingColumn`.

    Raises:
        TypeError: not a categorical column.
        ConfigError: a bad argument.
    """
    _check_columns([categorical_column])
    initializer = _checked_initializer(dimension, tensor_core_shape, initializer)
    _check_device([categorical_column], embedding_lookup_device, tensor_core_shape)
    return EmbeddingColumn(
        categorical_column,
        dimension,
        combiner,
        initializer,
        max_sequence_length,
        learning_rate_fn,
        embedding_lookup_device or None,
        tuple(tensor_core_shape) if tensor_core_shape else None,
        use_safe_embedding_lookup,
    )


def shared_embedding_columns(
    categorical_columns: Sequence[Any],
    dimension: int,
    combiner: str | None = "mean",
    initializer: Callable[..., Any] | None = None,
    shared_embedding_collection_name: str | None = None,
    max_sequence_lengths: Sequence[int] | None = None,
    learning_rate_fn: Callable[..., Any] | None = None,
    embedding_lookup_device: str | None = None,
    tensor_core_shape: Sequence[int | None] | None = None,
    use_safe_embedding_lookup: bool = True,
) -> list[EmbeddingColumn]:
    """Columns that share one table, in the order given.

    Args:
        categorical_columns: with the same number of buckets.
        dimension: see `embedding_column`; so are the arguments that are not here.
        combiner: see there.
        initializer: see there.
        shared_embedding_collection_name: of the table; None is the sorted names of the columns,
            joined by "_", and "_shared_embedding".
        max_sequence_lengths: one per column, 0 for those that are no sequence; None is all 0.
        learning_rate_fn: see there.
        embedding_lookup_device: see there.
        tensor_core_shape: see there.
        use_safe_embedding_lookup: see there.

    Raises:
        TypeError: not categorical columns.
        ConfigError: a bad argument.
        IndexError: no column.
    """
    _check_columns(categorical_columns)
    lengths = max_sequence_lengths or [0] * len(categorical_columns)
    if len(lengths) != len(categorical_columns):
        raise ConfigError(
            "max_sequence_lengths and categorical_columns must be of the same length. "
            f"len(max_sequence_lengths)={len(lengths)} "
            f"len(categorical_columns)={len(categorical_columns)}."
        )
    initializer = _checked_initializer(dimension, tensor_core_shape, initializer)
    ordered = sorted(categorical_columns, key=lambda column: str(column.name))
    collection = _collection(ordered, shared_embedding_collection_name)
    _check_device(ordered, embedding_lookup_device, tensor_core_shape)
    return [
        EmbeddingColumn(
            column,
            dimension,
            combiner,
            initializer,
            length,
            learning_rate_fn,
            embedding_lookup_device or None,
            tuple(tensor_core_shape) if tensor_core_shape else None,
            use_safe_embedding_lookup,
            collection,
        )
        for column, length in zip(categorical_columns, lengths, strict=True)
    ]


def _check_columns(columns: Sequence[Any]) -> None:
    for column in columns:
        if not is_categorical(column):
            raise TypeError(
                f"categorical_column must be type CategoricalColumn, got {type(column)}."
            )


def _checked_initializer(
    dimension: int,
    shape: Sequence[int | None] | None,
    initializer: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """The initializer or its default; the checks that both functions make at this point."""
    if dimension is None or dimension < 1:
        raise ConfigError(f"Invalid dimension {dimension}.")
    if shape and len(shape) != 2:
        raise ConfigError(f"tensor_core_shape must be size 2. Got {shape}.")
    if initializer is None:
        return TruncatedNormal(0.0, 1 / math.sqrt(dimension))
    if not callable(initializer):
        raise ConfigError(f"initializer must be callable if specified, got {initializer!r}")
    return initializer


def _collection(ordered: Sequence[Any], name: str | None) -> Collection:
    first = ordered[0]
    for column in ordered[1:]:
        if column.num_buckets != first.num_buckets:
            raise ConfigError(
                "To use shared_embedding_columns, all categorical_columns must have the same "
                f"number of buckets. Column '{first.name}' has {first.num_buckets}, column "
                f"'{column.name}' has {column.num_buckets}"
            )
    default = "_".join(column.name for column in ordered) + "_shared_embedding"
    return Collection(name or default)


def _check_device(
    columns: Sequence[Any], device: str | None, shape: Sequence[int | None] | None
) -> None:
    if device and device not in DEVICES:
        raise ConfigError(f"If set, embedding_lookup_device must be in {list(DEVICES)}: {device!r}")
    if device != "tpu_tensor_core":
        return
    if not shape:
        raise ConfigError(
            "Using embedding_lookup_device=tpu_tensor_core requires tensor_core_shape to be set."
        )
    if any(is_sequence(column) for column in columns):
        raise ConfigError(
            "embedding_lookup_device=tpu_tensor_core currently does not support sequence columns."
        )
