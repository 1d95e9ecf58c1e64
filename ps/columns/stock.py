"""TensorFlow's categorical columns as ours.

The objects are read by their attributes and told apart by the names of their classes, so this
module never imports TensorFlow itself: whoever holds such an object has already done so.
"""

from __future__ import annotations

from typing import Any

from ps.columns.categorical import (
    CategoricalColumn,
    HashedColumn,
    IdentityColumn,
    SequenceColumn,
    ValueColumn,
    VocabularyColumn,
    WeightedColumn,
    normal_dtype,
)
from ps.columns.vocabulary import Vocabulary, read_vocabulary_file, vocabulary_array
from ps.errors import ConfigError


def is_categorical(column: object) -> bool:
    """Whether it is a categorical column, ours or TensorFlow's, of any kind."""
    return isinstance(column, CategoricalColumn) or "CategoricalColumn" in _stock_classes(column)


def is_sequence(column: object) -> bool:
    """Whether it is a sequence column; a weighted column around one is not."""
    if isinstance(column, SequenceColumn):
        return True
    return bool(
        {"SequenceCategoricalColumn", "_SequenceCategoricalColumn"} & _stock_classes(column)
    )


def is_weighted(column: object) -> bool:
    """Whether it is a weighted column."""
    return isinstance(column, WeightedColumn) or (
        "WeightedCategoricalColumn" in _stock_classes(column)
    )


def light_column(column: Any) -> CategoricalColumn:
    """A categorical column of TensorFlow as ours; ours as it is.

    Raises:
        TypeError: not a categorical column.
        ConfigError: a kind that needs TensorFlow to turn values into ids, or a bad vocabulary file.
    """
    if isinstance(column, CategoricalColumn):
        return column
    if not is_categorical(column):
        raise TypeError(f"wanted a CategoricalColumn, got {type(column)}: {column!r}")
    kind = type(column).__name__
    if kind == "WeightedCategoricalColumn":
        inner = light_column(column.categorical_column)
        return WeightedColumn(inner, column.weight_feature_key, normal_dtype(column.dtype))
    if kind == "SequenceCategoricalColumn":
        inner = light_column(column.categorical_column)
        if isinstance(inner, ValueColumn):
            return SequenceColumn(inner)
        kind = f"SequenceCategoricalColumn of {type(column.categorical_column).__name__}"
    if kind == "IdentityCategoricalColumn":
        return IdentityColumn(column.key, column.number_buckets, column.default_value)
    if kind == "HashedCategoricalColumn":
        return HashedColumn(column.key, column.hash_bucket_size, normal_dtype(column.dtype))
    if kind == "VocabularyListCategoricalColumn":
        keys = vocabulary_array(column.vocabulary_list, column.key)
    elif kind == "VocabularyFileCategoricalColumn":
        keys = _file_keys(column)
    else:
        raise ConfigError(
            f"column '{column.name}': a {kind} cannot be computed without TensorFlow; use an "
            "identity, vocabulary, hashed, weighted or sequence column"
        )
    vocabulary = Vocabulary(keys, column.key, "vocabulary")
    return VocabularyColumn(
        column.key, vocabulary, column.default_value, column.num_oov_buckets or 0
    )


def _file_keys(column: Any) -> Any:
    return read_vocabulary_file(
        column.vocabulary_file,
        int(column.vocabulary_size),
        normal_dtype(column.dtype) != "string",
        column.key,
        column.file_format or "text",
    )


def _stock_classes(column: object) -> set[str]:
    """Names of TensorFlow's classes that it is an instance of."""
    parents = type(column).__mro__
    return {cls.__name__ for cls in parents if cls.__module__.split(".")[0] == "tensorflow"}
