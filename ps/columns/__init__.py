"""Feature columns: from raw strings and integers to ids, and to tables and features.

TensorFlow's `tf.feature_column.categorical_column_with_*` and
`tf.compat.v1.tpu.experimental.embedding_column`, by the same names and arguments, without
TensorFlow. A categorical column says how raw values become ids; an embedding column looks the ids
up in a table of its own or in a shared one.
"""

from ps.columns.categorical import CategoricalColumn
from ps.columns.configs import ColumnConfigs, configs_from_columns
from ps.columns.embedding import EmbeddingColumn, embedding_column, shared_embedding_columns
from ps.columns.factories import (
    categorical_column_with_hash_bucket,
    categorical_column_with_identity,
    categorical_column_with_vocabulary_file,
    categorical_column_with_vocabulary_list,
    sequence_categorical_column_with_hash_bucket,
    sequence_categorical_column_with_identity,
    sequence_categorical_column_with_vocabulary_file,
    sequence_categorical_column_with_vocabulary_list,
    weighted_categorical_column,
)
from ps.columns.layers import input_layer, lookup_steps, pad_to_width, sequence_input_layer
from ps.columns.raw import RawValues
from ps.columns.steps import Steps, length_key
from ps.columns.transform import Transform

__all__ = [
    "categorical_column_with_identity",
    "categorical_column_with_vocabulary_list",
    "categorical_column_with_vocabulary_file",
    "categorical_column_with_hash_bucket",
    "weighted_categorical_column",
    "sequence_categorical_column_with_identity",
    "sequence_categorical_column_with_vocabulary_list",
    "sequence_categorical_column_with_vocabulary_file",
    "sequence_categorical_column_with_hash_bucket",
    "embedding_column",
    "shared_embedding_columns",
    "CategoricalColumn",
    "EmbeddingColumn",
    "RawValues",
    "Steps",
    "length_key",
    "Transform",
    "ColumnConfigs",
    "configs_from_columns",
    "input_layer",
    "sequence_input_layer",
    "lookup_steps",
    "pad_to_width",
]
