"""`tf.feature_column`'s functions for categorical columns, by name, arguments and checks.

As in TensorFlow 2.21. Vocabulary files are read when a column is made, and never again.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from ps.columns.categorical import (
    FLOATS,
    INTEGERS,
    HashedColumn,
    IdentityColumn,
    SequenceColumn,
    VocabularyColumn,
    WeightedColumn,
    normal_dtype,
)
from ps.columns.stock import light_column
from ps.columns.vocabulary import Vocabulary, read_vocabulary_file, vocabulary_array
from ps.errors import ConfigError


def categorical_column_with_identity(
    key: str, num_buckets: int, default_value: int | None = None
) -> IdentityColumn:
    """Integers in [0, num_buckets) that are ids as they are.

    Args:
        key: name of the raw input.
        num_buckets: number of ids, at least 1.
        default_value: replaces integers out of range. If None, those >= num_buckets are refused in
            a lookup; those < 0 are dropped, or refused with `use_safe_embedding_lookup=False`.

    Raises:
        ConfigError: no bucket, or a default that is none of them.
    """
    if num_buckets < 1:
        raise ConfigError(f"num_buckets {num_buckets} < 1, column_name {key}")
    if default_value is not None and not 0 <= default_value < num_buckets:
        raise ConfigError(
            f"default_value {default_value} not in range [0, {num_buckets}), column_name {key}"
        )
    _check_key(key)
    default = None if default_value is None else _int(default_value, "default_value", key)
    return IdentityColumn(key, _int(num_buckets, "num_buckets", key), default)


def categorical_column_with_hash_bucket(
    key: str, hash_bucket_size: int, dtype: object = "string"
) -> HashedColumn:
    """Strings or integers, hashed to ids exactly as TensorFlow does.

    Args:
        key: name of the raw input.
        hash_bucket_size: number of ids, at least 1.
        dtype: "string" or an integer type, by name or as a NumPy or TensorFlow type.

    Raises:
        ConfigError: no bucket, or another dtype.
    """
    if hash_bucket_size is None:
        raise ConfigError(f"hash_bucket_size must be set. key: {key}")
    if hash_bucket_size < 1:
        raise ConfigError(
            f"hash_bucket_size must be at least 1. hash_bucket_size: {hash_bucket_size}, key: {key}"
        )
    _check_key(key)
    name = _string_or_int(dtype, f"column_name: {key}")
    return HashedColumn(key, _int(hash_bucket_size, "hash_bucket_size", key), name)


def categorical_column_with_vocabulary_list(
    key: str,
    vocabulary_list: Sequence[Any],
    dtype: object = None,
    default_value: int = -1,
    num_oov_buckets: int | None = 0,
) -> VocabularyColumn:
    """Strings or integers of a list; the id is the place in it.

    Args:
        key: name of the raw input.
        vocabulary_list: distinct strings (or bytes), or distinct integers; an Arrow array too.
        dtype: as in `categorical_column_with_hash_bucket`; None is that of the list.
        default_value: id of every other value; -1 is dropped in a lookup.
        num_oov_buckets: other values are hashed to that many ids behind the list instead.

    Raises:
        ConfigError: an empty list, duplicates, another dtype, both ways for other values.
    """
    if vocabulary_list is None or len(vocabulary_list) < 1:
        raise ConfigError(
            f"vocabulary_list {vocabulary_list} must be non-empty, column_name: {key}"
        )
    keys = vocabulary_array(vocabulary_list, key)
    if num_oov_buckets and default_value != -1:
        raise ConfigError(f"Can't specify both num_oov_buckets and default_value in {key}.")
    oov = _oov_buckets(num_oov_buckets, key)
    integer = bool(pa.types.is_integer(keys.type))
    wanted = str(keys.type) if dtype is None else normal_dtype(dtype)
    if dtype is not None and (wanted in INTEGERS) != integer:
        raise ConfigError(
            f"dtype {wanted} and vocabulary dtype {keys.type} do not match, column_name: {key}"
        )
    if not integer and dtype is not None:
        _string_or_int(dtype, f"column_name: {key}")
    _check_key(key)
    default = _int(default_value, "default_value", key)
    return VocabularyColumn(key, Vocabulary(keys, key, "vocabulary_list"), default, oov)


def categorical_column_with_vocabulary_file(
    key: str,
    vocabulary_file: str,
    vocabulary_size: int | None = None,
    dtype: object = "string",
    default_value: int | None = None,
    num_oov_buckets: int | None = 0,
    file_format: str | None = None,
) -> VocabularyColumn:
    """Strings or integers of a file, one per line; the id is the number of the line, from 0.

    The order of arguments is that of TensorFlow 2. The file is read now.

    Args:
        key: name of the raw input.
        vocabulary_file: its path.
        vocabulary_size: use so many lines only; None is all.
        dtype: as in `categorical_column_with_hash_bucket`.
        default_value: id of every other value; None is -1, which is dropped in a lookup.
        num_oov_buckets: other values are hashed to that many ids behind the file's instead.
        file_format: "text" or "tfrecord_gzip"; None goes by the name, which may end in
            "tfrecord.gz".

    Raises:
        ConfigError: an unreadable file, duplicates, another dtype, both ways for other values.
    """
    if not vocabulary_file:
        raise ConfigError(f"Missing vocabulary_file in {key}.")
    if not isinstance(vocabulary_file, str | os.PathLike):
        raise ConfigError(f"vocabulary_file in {key} must be a path, got {vocabulary_file!r}")
    vocabulary_file = os.fspath(vocabulary_file)
    if file_format is None:
        file_format = "tfrecord_gzip" if vocabulary_file.endswith("tfrecord.gz") else "text"
    if file_format not in ("text", "tfrecord_gzip"):
        raise ConfigError(
            f"column '{key}': `file_format` must be text or tfrecord_gzip, got {file_format!r}"
        )
    if vocabulary_size is not None and vocabulary_size < 1:
        raise ConfigError(f"Invalid vocabulary_size in {key}.")
    if num_oov_buckets and default_value is not None:
        raise ConfigError(f"Can't specify both num_oov_buckets and default_value in {key}.")
    oov = _oov_buckets(num_oov_buckets, key)
    integer = _string_or_int(dtype, f"column_name: {key}") in INTEGERS
    _check_key(key)
    keys = read_vocabulary_file(vocabulary_file, vocabulary_size, integer, key, file_format)
    default = -1 if default_value is None else _int(default_value, "default_value", key)
    return VocabularyColumn(key, Vocabulary(keys, key, "vocabulary_file"), default, oov)


def weighted_categorical_column(
    categorical_column: Any, weight_feature_key: str, dtype: object = "float32"
) -> WeightedColumn:
    """A column whose values have weights.

    Args:
        categorical_column: ours or TensorFlow's.
        weight_feature_key: name of the raw input with the weights.
        dtype: of the weights, a float or integer type; lookups use float32 in any case.

    Raises:
        ConfigError: another dtype.
    """
    name = None if dtype is None else normal_dtype(dtype)
    if name is None or name not in INTEGERS | FLOATS:
        raise ConfigError(f"dtype {name} is not convertible to float.")
    _check_key(weight_feature_key)
    return WeightedColumn(light_column(categorical_column), weight_feature_key, name)


def sequence_categorical_column_with_identity(
    key: str, num_buckets: int, default_value: int | None = None
) -> SequenceColumn:
    """`categorical_column_with_identity` for sequences."""
    return SequenceColumn(categorical_column_with_identity(key, num_buckets, default_value))


def sequence_categorical_column_with_hash_bucket(
    key: str, hash_bucket_size: int, dtype: object = "string"
) -> SequenceColumn:
    """`categorical_column_with_hash_bucket` for sequences."""
    return SequenceColumn(categorical_column_with_hash_bucket(key, hash_bucket_size, dtype))


def sequence_categorical_column_with_vocabulary_list(
    key: str,
    vocabulary_list: Sequence[Any],
    dtype: object = None,
    default_value: int = -1,
    num_oov_buckets: int | None = 0,
) -> SequenceColumn:
    """`categorical_column_with_vocabulary_list` for sequences."""
    return SequenceColumn(
        categorical_column_with_vocabulary_list(
            key, vocabulary_list, dtype, default_value, num_oov_buckets
        )
    )


def sequence_categorical_column_with_vocabulary_file(
    key: str,
    vocabulary_file: str,
    vocabulary_size: int | None = None,
    num_oov_buckets: int | None = 0,
    default_value: int | None = None,
    dtype: object = "string",
) -> SequenceColumn:
    """`categorical_column_with_vocabulary_file` for sequences; TensorFlow orders arguments so."""
    return SequenceColumn(
        categorical_column_with_vocabulary_file(
            key, vocabulary_file, vocabulary_size, dtype, default_value, num_oov_buckets
        )
    )


def _string_or_int(dtype: object, prefix: str) -> str:
    name = normal_dtype(dtype)
    if name != "string" and name not in INTEGERS:
        raise ConfigError(f"{prefix} dtype must be string or integer. dtype: {name}.")
    return name


def _oov_buckets(num_oov_buckets: int | None, key: str) -> int:
    if num_oov_buckets is not None and num_oov_buckets < 0:
        raise ConfigError(f"Invalid num_oov_buckets {num_oov_buckets} in {key}.")
    return 0 if num_oov_buckets is None else _int(num_oov_buckets, "num_oov_buckets", key)


def _check_key(key: object) -> None:
    if not isinstance(key, str):
        raise ConfigError(f"key must be a string. Got: type {type(key)}. Given key: {key}.")


def _int(value: Any, argument: str, key: str) -> int:
    """An int, of NumPy too; a table of 2.5 rows passes TensorFlow's checks, not ours."""
    try:
        return int(operator.index(value))
    except TypeError:
        raise ConfigError(f"column '{key}': `{argument}` must be an int, got {value!r}") from None
