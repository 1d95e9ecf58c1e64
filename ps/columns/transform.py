"""`Transform`: a feature's raw inputs to ids and weights, as a value that JSON can hold.

What a column does to its input, without the table: an export keeps it and applies it to what
requests bring. A vocabulary is kept beside the JSON, as an Arrow array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ps.columns.categorical import (
    FLOATS,
    INTEGERS,
    CategoricalColumn,
    HashedColumn,
    IdentityColumn,
    SequenceColumn,
    ValueColumn,
    VocabularyColumn,
    WeightedColumn,
)
from ps.columns.factories import (
    categorical_column_with_hash_bucket,
    categorical_column_with_identity,
    categorical_column_with_vocabulary_list,
)
from ps.columns.raw import Mask, RawInput, parse, present_values, present_weights
from ps.columns.steps import Steps, kept_before, select_bags, splits_of
from ps.columns.stock import light_column
from ps.errors import ConfigError, InputError
from ps.ragged import I64, Ragged

_FIELDS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "key": (str,),
    "weight_key": (str, type(None)),
    "weight_dtype": (str, type(None)),
    "sequence": (bool,),
}
_FIELDS_OF_KIND: dict[str, dict[str, tuple[type, ...]]] = {
    "identity": _FIELDS | {"num_buckets": (int,), "default_value": (int, type(None))},
    "hash": _FIELDS | {"num_buckets": (int,), "dtype": (str,)},
    "vocabulary": _FIELDS
    | {"vocabulary_size": (int,), "dtype": (str,), "default_value": (int,)}
    | {"num_oov_buckets": (int,)},
}


@dataclass(frozen=True)
class Transform:
    """From the raw inputs of one feature to ids and weights."""

    column: ValueColumn
    """How values become ids."""
    weight_key: str | None = None
    """The raw input with the weights."""
    weight_dtype: str | None = None
    """Their type, if there are any."""
    sequence: bool = False
    """Whether the values of an example are steps in time."""

    @classmethod
    def of(cls, column: Any) -> Transform:
        """The transform of a categorical column, ours or TensorFlow's.

        Raises:
            ConfigError: it cannot be computed without TensorFlow.
        """
        light: CategoricalColumn = light_column(column)
        key = dtype = None
        if isinstance(light, WeightedColumn):
            key, dtype, light = light.weight_feature_key, light.dtype, light.categorical_column
            if isinstance(light, SequenceColumn):  # which TensorFlow then treats as no sequence
                light = light.categorical_column
        sequence = isinstance(light, SequenceColumn)
        if isinstance(light, SequenceColumn):
            light = light.categorical_column
        if not isinstance(light, ValueColumn):
            raise ConfigError(f"column '{column.name}': a weighted column cannot be weighted again")
        return cls(light, key, dtype, sequence)

    @property
    def raw_keys(self) -> tuple[str, ...]:
        """The raw inputs that it reads: values, and weights if there are any."""
        key = self.column.key
        return (key,) if self.weight_key is None else (key, self.weight_key)

    @property
    def takes_strings(self) -> bool:
        """Whether raw values are strings rather than integers."""
        return self.column.dtype == "string"

    @property
    def num_buckets(self) -> int:
        """Number of ids."""
        return self.column.num_buckets

    @property
    def vocabulary(self) -> pa.Array | None:
        """large_binary or int64 [V] that belongs to the JSON of a vocabulary column."""
        return self.column.vocabulary.keys if isinstance(self.column, VocabularyColumn) else None

    def __call__(self, features: Mapping[str, Any]) -> Ragged:
        """Ids, and weights, of B examples; of a sequence, one id per step and -1 for none.

        Args:
            features: raw inputs by name, in any of the forms of `ps.columns.raw`.

        Raises:
            InputError: an input is missing or malformed, or its weights do not pair with it.
        """
        if self.sequence:
            return self.steps(features).one_per_step(self.column.key)
        return self.bags(features)

    def bags(self, features: Mapping[str, Any]) -> Ragged:
        """Ids, and weights, of B examples; see `__call__`."""
        assert not self.sequence, "a sequence has steps"
        raw, ids, present = self._ids(features)
        if raw.rank > 2:
            raise InputError(
                f"Feature {self.column.key} has rank {raw.rank}; only sequences have rank 3",
                self.column.key,
            )
        splits = kept_before(present)[raw.row_splits()]
        if self.weight_key is None:
            return Ragged(ids, splits)
        weights = parse(_input(features, self.weight_key), self.weight_key)
        values, there = present_weights(weights, str(self.weight_dtype), self.weight_key)
        if weights.rank > 2 or not np.array_equal(kept_before(there)[weights.row_splits()], splits):
            raise InputError(
                f"Feature {self.weight_key}: {values.size} weights do not pair with the {ids.size} "
                f"values of '{self.column.key}'; every example needs as many weights as values, "
                "and a dense weight of 0 is none",
                self.weight_key,
            )
        return Ragged(ids, splits, values)

    def steps(self, features: Mapping[str, Any]) -> Steps:
        """Ids of B sequences: of shape [B, T], or [B, T, K] with several per step."""
        assert self.sequence, "not a sequence"
        raw, ids, present = self._ids(features)
        row_splits = raw.row_splits()
        values_before = kept_before(present)
        step_splits = values_before[raw.splits[1]] if raw.rank == 3 else values_before
        width = np.diff(row_splits)
        row_of_step = np.repeat(np.arange(width.size), width)
        position = np.arange(row_of_step.size) - row_splits[row_of_step]
        filled = np.diff(step_splits) > 0
        lengths = np.zeros(width.size, dtype=np.int64)
        np.maximum.at(lengths, row_of_step[filled], position[filled] + 1)
        bags = select_bags(Ragged(ids, step_splits), position < lengths[row_of_step])
        return Steps(bags, splits_of(lengths), int(width.max(initial=0)))

    def _ids(self, features: Mapping[str, Any]) -> tuple[RawInput, I64, Mask]:
        key = self.column.key
        raw = parse(_input(features, key), key)
        if not raw.is_untyped:
            self.column.check_type(raw.values.type)
        values, present = present_values(raw, self.takes_strings)
        try:
            return raw, self.column.ids(values), present
        except InputError as e:
            raise InputError(e.message, key) from None

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes, besides `vocabulary`."""
        column = self.column
        if isinstance(column, IdentityColumn):
            own: dict[str, Any] = {"kind": "identity", "default_value": column.default_value}
            own["num_buckets"] = column.num_buckets
        elif isinstance(column, HashedColumn):
            own = {"kind": "hash", "num_buckets": column.num_buckets, "dtype": column.dtype}
        else:
            assert isinstance(column, VocabularyColumn), "there are three kinds"
            own = {"kind": "vocabulary", "vocabulary_size": len(column.vocabulary)}
            own |= {"dtype": column.dtype, "default_value": column.default_value}
            own["num_oov_buckets"] = column.num_oov_buckets
        own["key"] = column.key
        own |= {"weight_key": self.weight_key, "weight_dtype": self.weight_dtype}
        return own | {"sequence": self.sequence}

    @classmethod
    def from_json(cls, document: Any, vocabulary: pa.Array | None = None) -> Transform:
        """Undo `to_json`.

        Args:
            document: what `to_json` gave.
            vocabulary: what `vocabulary` gave.

        Raises:
            ConfigError: something else; the message names the field.
        """
        _check_document(document)
        key, dtype = document["weight_key"], document["weight_dtype"]
        if (key is None) != (dtype is None) or (dtype and dtype not in INTEGERS | FLOATS):
            raise ConfigError(f"transform: `weight_dtype` {dtype!r} does not fit {key!r}")
        if key is not None and document["sequence"]:
            raise ConfigError("transform: `sequence` and `weight_key` exclude each other")
        if (vocabulary is None) == (document["kind"] == "vocabulary"):
            raise ConfigError(
                f"transform of '{document['key']}': a vocabulary belongs to the kind vocabulary, "
                f"and to no other; kind is {document['kind']!r}"
            )
        return cls(_column(document, vocabulary), key, dtype, document["sequence"])


def _check_document(document: Any) -> None:
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in _FIELDS_OF_KIND:
        raise ConfigError(f"transform: `kind` must be one of {[*_FIELDS_OF_KIND]}, got {kind!r}")
    fields = _FIELDS_OF_KIND[kind]
    if document.keys() != fields.keys():
        raise ConfigError(
            f"transform of kind {kind}: wanted the fields {sorted(fields)}, got {sorted(document)}"
        )
    for name, types in fields.items():
        value = document[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ConfigError(
                f"transform: `{name}` must be {' or '.join(t.__name__ for t in types)}, "
                f"got {value!r}"
            )


def _column(document: dict[str, Any], vocabulary: pa.Array | None) -> ValueColumn:
    key = document["key"]
    if document["kind"] == "identity":
        return categorical_column_with_identity(
            key, document["num_buckets"], document["default_value"]
        )
    if document["kind"] == "hash":
        return categorical_column_with_hash_bucket(key, document["num_buckets"], document["dtype"])
    assert vocabulary is not None, "checked before"
    if len(vocabulary) != document["vocabulary_size"]:
        raise ConfigError(
            f"transform of '{key}': `vocabulary_size` is {document['vocabulary_size']}, but the "
            f"vocabulary has {len(vocabulary)} keys"
        )
    return categorical_column_with_vocabulary_list(
        key,
        vocabulary,
        document["dtype"],
        document["default_value"],
        document["num_oov_buckets"],
    )


def _input(features: Mapping[str, Any], key: str) -> Any:
    if key not in features:
        raise InputError(f"Feature {key} is not in features dictionary.", key)
    return features[key]
