"""What the inputs of a SavedModel are called, and how their tensors become ids and weights.

An input knows one feature (or the dense columns) and both ways in: as tensors of their own, and as
entries of a serialized `tf.Example`. It knows no table, and hands on the raw values of a feature
with a `Transform` as they are. Every tensor has a name of its own, because
TensorFlow would call the parts of a `RaggedTensorSpec` after the function's argument: x, x_1, ….

Bags always become a `SparseTensor`, whose rules are those of bags over HTTP: ids < 0 are dropped if
the feature validates, the result has a row for every example. (A ragged tensor would follow other
rules.)
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import tensorflow as tf

from ps.columns import Transform
from ps.columns.categorical import INTEGERS
from ps.errors import ConfigError
from ps.spec import FeatureSpec

Kind = Literal["dense", "ragged", "ragged_weighted", "sparse", "sparse_weighted"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Tensors = Mapping[str, Any]
"""Tensors by input name, or by key of the `tf.Example`."""


class Ids(NamedTuple):
    """What one feature looks up."""

    ids: Any
    """int64 ids, or raw values: a dense [B] or a sparse tensor [B, *]."""
    weights: Any = None
    """float32, sparse too, or None."""
    lengths: Any = None
    """int64 [B], of a sequence of raw values; else None."""


@dataclass(frozen=True, slots=True)
class Source:
    """Names and types of one feature's values and weights."""

    feature: str
    key: str
    """Of the values in a `tf.Example`."""
    weight_key: str | None
    """Of the weights there; None for no weights."""
    dtype: Any = tf.int64
    weight_dtype: Any = tf.float32
    missing: str | int | None = None
    """Stands for no value where there is one per example; None if every example needs one."""

    @property
    def name(self) -> str:
        """Of the input of values."""
        return input_name(self.feature)

    @classmethod
    def of(cls, feature: str, weighted: bool, transform: Transform | None) -> Source:
        """Ids, unless there is a transform, which has its own weights or none."""
        if transform is None:
            return cls(feature, feature, f"{feature}_weights" if weighted else None)
        return cls(
            feature,
            transform.column.key,
            transform.weight_key,
            tf.string if transform.takes_strings else tf.int64,
            tf.int64 if transform.weight_dtype in INTEGERS else tf.float32,
            missing_value(transform),
        )


class FeatureInput(Protocol):
    """The ids, or raw values, of one feature."""

    def specs(self) -> dict[str, Any]:
        """A `TensorSpec` for each of its inputs, by name."""
        ...

    def read(self, tensors: Tensors) -> Ids:
        """Ids and weights from the inputs."""
        ...

    def example_specs(self) -> dict[str, Any]:
        """What to parse from a `tf.Example`, by key."""
        ...

    def read_examples(self, parsed: Tensors) -> Ids:
        """Ids and weights from parsed examples."""
        ...


class DenseIds:
    """One id per example: `<feature>` int64 [B], or string."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def specs(self) -> dict[str, Any]:
        """See `FeatureInput`."""
        return _named({self._source.name: ([None], self._source.dtype)})

    def read(self, tensors: Tensors) -> Ids:
        """See `FeatureInput`."""
        return Ids(tensors[self._source.name])

    def example_specs(self) -> dict[str, Any]:
        """Exactly one id, and an example without it is an error; or at most one raw value."""
        source = self._source
        return {source.key: tf.io.FixedLenFeature([], source.dtype, source.missing)}

    def read_examples(self, parsed: Tensors) -> Ids:
        """See `FeatureInput`."""
        return Ids(parsed[self._source.key])


class RaggedBags:
    """Bags as columns: example b owns `<feature>[row_splits[b]:row_splits[b + 1]]`.

    Inputs `<feature>` int64 [N], or string, `<feature>_row_splits` int64 [B + 1] and, if weighted,
    `<feature>_weights` float32 [N], or int64.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def specs(self) -> dict[str, Any]:
        """See `FeatureInput`."""
        name, dtype = self._source.name, self._source.dtype
        ids = _named({name: ([None], dtype), f"{name}_row_splits": ([None], tf.int64)})
        return ids | self._weight_spec()

    def read(self, tensors: Tensors) -> Ids:
        """See `FeatureInput`."""
        name = self._source.name
        bags = tf.RaggedTensor.from_row_splits(tensors[name], tensors[f"{name}_row_splits"])
        return self._pair(bags.to_sparse(), tensors.get(f"{name}_weights"))

    def example_specs(self) -> dict[str, Any]:
        """Any number of ids, and as many weights; an example without them has an empty bag."""
        source = self._source
        keys = {source.key: source.dtype}
        if source.weight_key is not None:
            keys[source.weight_key] = source.weight_dtype
        return {
            key: tf.io.RaggedFeature(dtype, row_splits_dtype=tf.int64)
            for key, dtype in keys.items()
        }

    def read_examples(self, parsed: Tensors) -> Ids:
        """See `FeatureInput`."""
        bags, weight_key = parsed[self._source.key], self._source.weight_key
        if weight_key is None:
            return Ids(bags.to_sparse())
        weights = parsed[weight_key]
        with self._one_per_id(weights.row_splits, bags.row_splits):
            return self._pair(bags.to_sparse(), tf.identity(weights.values))

    def _weight_spec(self) -> dict[str, Any]:
        source = self._source
        if source.weight_key is None:
            return {}
        return _named({f"{source.name}_weights": ([None], source.weight_dtype)})

    def _pair(self, ids: Any, weights: Any) -> Ids:
        if weights is None:
            return Ids(ids)
        with self._one_per_id(tf.size(weights), tf.size(ids.values)):
            weights = tf.identity(tf.cast(weights, tf.float32))
            return Ids(ids, tf.SparseTensor(ids.indices, weights, ids.dense_shape))

    def _one_per_id(self, found: Any, wanted: Any) -> Any:
        """What is made inside waits for the check: one weight for many ids would be broadcast."""
        message = f"feature '{self._source.feature}': wanted one weight per id"
        return tf.control_dependencies([tf.debugging.assert_equal(found, wanted, message)])


class SparseBags(RaggedBags):
    """Bags as TensorFlow's coordinates.

    Inputs `<feature>` int64 [N], or string, `<feature>_indices` int64 [N, 2],
    `<feature>_dense_shape` int64 [2], whose first entry is B, and, if weighted,
    `<feature>_weights` float32 [N], or int64.
    """

    def specs(self) -> dict[str, Any]:
        """See `FeatureInput`."""
        name = self._source.name
        ids = _named(
            {
                name: ([None], self._source.dtype),
                f"{name}_indices": ([None, 2], tf.int64),
                f"{name}_dense_shape": ([2], tf.int64),
            }
        )
        return ids | self._weight_spec()

    def read(self, tensors: Tensors) -> Ids:
        """See `FeatureInput`."""
        name = self._source.name
        parts = tensors[f"{name}_indices"], tensors[name], tensors[f"{name}_dense_shape"]
        return self._pair(tf.SparseTensor(*parts), tensors.get(f"{name}_weights"))


class NumberColumns:
    """The numbers that a dense model reads beside the activations.

    A count n makes one input, `dense` float32 [B, n]; names make one input float32 [B] each.
    """

    def __init__(self, columns: int | Sequence[str]) -> None:
        if isinstance(columns, int) and columns < 0:
            raise ConfigError(f"`dense` must be a number of columns >= 0 or names, got {columns}")
        self.count = columns if isinstance(columns, int) else len(columns)
        self._columns = None if isinstance(columns, int) else tuple(columns)

    def specs(self) -> dict[str, Any]:
        """A `TensorSpec` for each input, by name."""
        if self._columns is not None:
            return _named({input_name(c): ([None], tf.float32) for c in self._columns})
        return _named({"dense": ([None, self.count], tf.float32)} if self.count else {})

    def example_specs(self) -> dict[str, Any]:
        """What to parse from a `tf.Example`, by key; an example without it is an error."""
        if self._columns is not None:
            return {c: tf.io.FixedLenFeature([], tf.float32) for c in self._columns}
        wanted = tf.io.FixedLenFeature([self.count], tf.float32)
        return {"dense": wanted} if self.count else {}

    def read(self, tensors: Tensors, num_examples: Any) -> Any:
        """float32 [B, n], from the inputs."""
        return self._join([tensors[name] for name in self.specs()], num_examples)

    def read_examples(self, parsed: Tensors, num_examples: Any) -> Any:
        """float32 [B, n], from parsed examples."""
        return self._join([parsed[key] for key in self.example_specs()], num_examples)

    def _join(self, columns: list[Any], num_examples: Any) -> Any:
        if not columns:
            return tf.zeros([num_examples, 0])
        return columns[0] if self._columns is None else tf.stack(columns, axis=1)


def feature_inputs(
    features: Mapping[str, FeatureSpec],
    transforms: Mapping[str, Transform],
    kinds: Mapping[str, str],
) -> dict[str, FeatureInput]:
    """An input per feature; "ragged", or "ragged_weighted", where `kinds` says nothing.

    Raises:
        ConfigError: no such feature or kind, or a kind that a feature does not take.
    """
    for name, kind in kinds.items():
        if name not in features:
            raise ConfigError(f"inputs: no feature '{name}', only {sorted(features)}")
        if kind not in KINDS:
            raise ConfigError(f"inputs: '{name}' must be one of {list(KINDS)}, got {kind!r}")
    return {
        name: _feature_input(feature, transforms.get(name), kinds.get(name))
        for name, feature in features.items()
    }


def _feature_input(
    feature: FeatureSpec, transform: Transform | None, kind: str | None
) -> FeatureInput:
    has_weights = transform is not None and transform.weight_key is not None
    kind = kind or ("ragged_weighted" if has_weights else "ragged")
    weighted = kind.endswith("_weighted")
    if feature.max_sequence_length > 0 and (weighted or kind == "dense"):
        raise ConfigError(
            f"inputs: '{feature.name}' is a sequence feature, which takes neither one id per "
            f"example nor weights: 'ragged' or 'sparse', got '{kind}'"
        )
    if transform is not None and weighted != has_weights:
        wanted = [k for k in KINDS if k.endswith("_weighted") == has_weights]
        raise ConfigError(
            f"inputs: '{feature.name}' has raw values {'with' if has_weights else 'without'} "
            f"weights: one of {wanted}, got '{kind}'"
        )
    source = Source.of(feature.name, weighted, transform)
    if kind == "dense":
        return DenseIds(source)
    bags = RaggedBags if kind.startswith("ragged") else SparseBags
    return bags(source)


def check_names(inputs: Iterable[FeatureInput | NumberColumns]) -> None:
    """Refuse two inputs of one name, and two keys of a `tf.Example` that want different values.

    Columns may share a key, as two weighted columns their weights.

    Raises:
        ConfigError: with both names.
    """
    names: dict[str, str] = {}
    keys: dict[str, Any] = {}
    for one in inputs:
        for name in one.specs():
            # TensorFlow makes identifiers of names and compares them in lower case.
            other = names.setdefault(re.sub(r"\W", "_", name.lower(), flags=re.ASCII), name)
            if other is not name:
                raise ConfigError(f"inputs '{other}' and '{name}' have one name in TensorFlow")
        for key, spec in one.example_specs().items():
            if keys.setdefault(key, spec) != spec:
                raise ConfigError(f"tf.Example: '{key}' would stand for two inputs")


def missing_value(transform: Transform) -> str | int:
    """Stands for no value among dense ones."""
    return "" if transform.takes_strings else -1


def input_name(name: str) -> str:
    """The name itself, unless TensorFlow refuses it as the name of an input.

    >>> input_name("user"), input_name("site/ads"), input_name("user id"), input_name("class")
    ('user', 'site/ads', 'user_id', 'feature_class')
    """
    allowed = re.sub(r"[^A-Za-z0-9._/-]", "_", name)
    if keyword.iskeyword(allowed) or allowed == "self" or not re.match("[A-Za-z0-9]", allowed):
        return f"feature_{allowed}"
    return allowed


def _named(inputs: Mapping[str, tuple[Sequence[int | None], Any]]) -> dict[str, Any]:
    return {name: tf.TensorSpec(shape, dtype, name=name) for name, (shape, dtype) in inputs.items()}
