"""A feature's `Transform` as ops of a graph: raw strings or integers to ids, without Manta.

It knows neither the names of inputs nor tables of rows. All ops are TensorFlow's own, and give the
ids that `ps.columns.Transform` gives.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ps.columns import Transform, length_key
from ps.columns.categorical import HashedColumn, IdentityColumn, ValueColumn, VocabularyColumn
from ps.errors import ConfigError, ExportError
from ps.export import Export
from serving.tf.signatures import Ids, missing_value

MAX_VOCABULARY_BYTES = 1 << 30
"""Limit of all vocabularies together: they are constants, and a graph ends at 2 GiB."""


def raw_ids(export: Export) -> dict[str, RawIds]:
    """Of the features that have a transform, by name.

    Raises:
        ConfigError: a feature has the name of another one's lengths.
        ExportError: the vocabularies exceed `MAX_VOCABULARY_BYTES`.
    """
    size = 0
    for name, transform in export.transforms.items():
        if transform.sequence and length_key(name) in export.features:
            raise ConfigError(
                f"feature '{length_key(name)}' has the name of the lengths of sequence '{name}'"
            )
        size += 0 if transform.vocabulary is None else transform.vocabulary.nbytes
    if size > MAX_VOCABULARY_BYTES:
        raise ExportError(
            f"export '{export.path}': a SavedModel holds vocabularies in its graph, and their "
            f"{size} bytes exceed {MAX_VOCABULARY_BYTES}; hashed columns have none"
        )
    return {
        name: RawIds(transform, export.features[name].max_sequence_length)
        for name, transform in export.transforms.items()
    }


class RawIds:
    """The ids of one feature's raw values.

    Values of a bag all count. Of one value per example, -1 or "" means that there is none, and
    makes an empty bag. Values without an id, those < 0, are left to the lookup; but in a sequence
    they leave their step empty.
    """

    def __init__(self, transform: Transform, max_sequence_length: int) -> None:
        """Make the vocabulary's table, eagerly.

        Args:
            transform: from raw values to ids.
            max_sequence_length: of the feature, the limit of the lengths of sequences.
        """
        self._transform = transform
        self._max_length = max_sequence_length
        self.vocabulary = _vocabulary_table(transform.column)
        """A lookup table, which an object that is saved must have as an attribute; or None."""

    def __call__(self, raw: Ids) -> Ids:
        """Ids in the places of raw values, dense [B] or sparse [B, *]; they are always sparse."""
        values = raw.ids
        if not isinstance(values, tf.SparseTensor):
            values = self._bags(values)
        ids = tf.SparseTensor(values.indices, self._ids(values.values), values.dense_shape)
        if not self._transform.sequence:
            return Ids(ids, raw.weights)
        return Ids(tf.sparse.retain(ids, ids.values >= 0), lengths=self._lengths(ids))

    def _bags(self, values: Any) -> Any:
        """Dense [B] as sparse [B, 1], without missing values."""
        row = tf.where(values != missing_value(self._transform))
        shape = tf.stack([tf.size(values, tf.int64), 1])
        column = tf.zeros_like(row)
        return tf.SparseTensor(tf.concat([row, column], axis=1), tf.gather_nd(values, row), shape)

    def _ids(self, values: Any) -> Any:
        column = self._transform.column
        if isinstance(column, HashedColumn):
            text = values if values.dtype == tf.string else tf.as_string(values)
            return tf.strings.to_hash_bucket_fast(text, column.num_buckets)
        if self.vocabulary is not None:
            return self.vocabulary.lookup(values)
        assert isinstance(column, IdentityColumn), "there are three kinds"
        if column.default_value is None:
            return values
        known = (values >= 0) & (values < column.num_buckets)
        return tf.where(known, values, tf.constant(column.default_value, tf.int64))

    def _lengths(self, steps: Any) -> Any:
        """int64 [B]: steps up to the last one that has a value, at most `max_sequence_length`."""
        row, position = steps.indices[:, 0], steps.indices[:, 1]
        last = tf.math.unsorted_segment_max(position, row, steps.dense_shape[0])
        return tf.clip_by_value(last, -1, self._max_length - 1) + 1  # no step: the lowest int64


def _vocabulary_table(column: ValueColumn) -> Any:
    if not isinstance(column, VocabularyColumn):
        return None
    vocabulary = column.vocabulary
    dtype = tf.int64 if vocabulary.is_integer else tf.string
    keys = tf.constant(vocabulary.keys.to_pylist(), dtype)
    places = tf.lookup.KeyValueTensorInitializer(keys, tf.range(len(vocabulary), dtype=tf.int64))
    if column.num_oov_buckets:
        return tf.lookup.StaticVocabularyTable(places, column.num_oov_buckets)
    return tf.lookup.StaticHashTable(places, column.default_value)
