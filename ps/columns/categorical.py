"""Categorical columns: how the raw values of a feature become ids.

Frozen classes that compare by value; `ps.columns.factories` makes them. `ps.columns.raw` turns raw
inputs into the arrays of values that they take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ps.columns.vocabulary import Vocabulary, hash_bucket, is_string
from ps.config import dtype_name
from ps.errors import InputError
from ps.ragged import I64, as_ids

INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
FLOATS = frozenset(("float16", "bfloat16", "float32", "float64"))
_STRINGS = {"str": "string", "str_": "string", "bytes": "string", "bytes_": "string"}


class CategoricalColumn:
    """A feature whose values become ids in [0, num_buckets)."""

    @property
    def name(self) -> str:
        """TensorFlow's name of the column."""
        raise NotImplementedError

    @property
    def num_buckets(self) -> int:
        """Number of ids, which is the number of rows of its table."""
        raise NotImplementedError


@dataclass(frozen=True)
class ValueColumn(CategoricalColumn):
    """A column of one raw input, without weights."""

    key: str
    """Name of the raw input."""

    @property
    def name(self) -> str:
        """The key."""
        return self.key

    @property
    def dtype(self) -> str:
        """Of the raw values: "string", or an integer type, which stands for all of them."""
        raise NotImplementedError

    def check_type(self, dtype: pa.DataType) -> None:
        """Refuse values of the wrong type.

        Raises:
            InputError: neither strings nor integers, or one where the other is wanted.
        """
        integer = pa.types.is_integer(dtype)
        if integer and self.dtype != "string":
            return
        if is_string(dtype) and self.dtype == "string":
            return
        what = "dtype must be string or integer."
        if integer or is_string(dtype):
            what = "Column dtype and input dtype must be compatible."
        raise InputError(
            f"{what} key: {self.key}, column dtype: {self.dtype}, input dtype: {dtype}", self.key
        )

    def ids(self, values: Any) -> I64:
        """int64 [N]: id of each value, of an integer array or a large_binary."""
        raise NotImplementedError


@dataclass(frozen=True)
class IdentityColumn(ValueColumn):
    """`categorical_column_with_identity`: integers are ids."""

    number_buckets: int
    default_value: int | None = None

    @property
    def num_buckets(self) -> int:
        """As given."""
        return self.number_buckets

    @property
    def dtype(self) -> str:
        """Any integer will do."""
        return "int64"

    def check_type(self, dtype: pa.DataType) -> None:
        """See `ValueColumn.check_type`."""
        if not pa.types.is_integer(dtype):
            raise InputError(
                f"Invalid input, not integer. key: {self.key} dtype: {dtype}", self.key
            )

    def ids(self, values: Any) -> I64:
        """The values; those out of range are `default_value`, unless that is None."""
        ids = as_ids(values, f"values of '{self.key}'")
        if self.default_value is None:
            return ids
        return np.where((ids < 0) | (ids >= self.num_buckets), self.default_value, ids)


@dataclass(frozen=True)
class HashedColumn(ValueColumn):
    """`categorical_column_with_hash_bucket`: Fingerprint64 modulo the number of buckets."""

    hash_bucket_size: int
    value_dtype: str

    @property
    def num_buckets(self) -> int:
        """As given."""
        return self.hash_bucket_size

    @property
    def dtype(self) -> str:
        """As given."""
        return self.value_dtype

    def ids(self, values: Any) -> I64:
        """Buckets; an integer is hashed as its decimal string."""
        return hash_bucket(values, self.hash_bucket_size)


@dataclass(frozen=True)
class VocabularyColumn(ValueColumn):
    """`categorical_column_with_vocabulary_list` or `_file`: the place in a vocabulary."""

    vocabulary: Vocabulary
    default_value: int
    num_oov_buckets: int

    @property
    def num_buckets(self) -> int:
        """Size of the vocabulary and its out-of-vocabulary buckets."""
        return len(self.vocabulary) + self.num_oov_buckets

    @property
    def dtype(self) -> str:
        """Strings or integers, as the vocabulary has."""
        return "int64" if self.vocabulary.is_integer else "string"

    def ids(self, values: Any) -> I64:
        """Places; unknown values are `default_value`, or hashed to the buckets behind."""
        if self.vocabulary.is_integer:
            values = as_ids(values, f"values of '{self.key}'")
        ids = self.vocabulary.find(values)
        if self.num_oov_buckets == 0:
            return np.where(ids < 0, self.default_value, ids)
        oov = hash_bucket(values, self.num_oov_buckets) + len(self.vocabulary)
        return np.where(ids < 0, oov, ids)


@dataclass(frozen=True)
class WeightedColumn(CategoricalColumn):
    """`weighted_categorical_column`: each value has a weight, in another raw input."""

    categorical_column: CategoricalColumn
    weight_feature_key: str
    dtype: str

    @property
    def name(self) -> str:
        """`<column>_weighted_by_<weight key>`."""
        return f"{self.categorical_column.name}_weighted_by_{self.weight_feature_key}"

    @property
    def num_buckets(self) -> int:
        """Of the inner column."""
        return self.categorical_column.num_buckets


@dataclass(frozen=True)
class SequenceColumn(CategoricalColumn):
    """`sequence_categorical_column_with_*`: the values of an example are steps in time."""

    categorical_column: ValueColumn

    @property
    def name(self) -> str:
        """Of the inner column."""
        return self.categorical_column.name

    @property
    def num_buckets(self) -> int:
        """Of the inner column."""
        return self.categorical_column.num_buckets


def normal_dtype(dtype: object) -> str:
    """TensorFlow's name of a dtype given as a name, a NumPy type or TensorFlow's."""
    name = dtype_name(dtype)
    return _STRINGS.get(name, name)
