"""`LookupService`: arrays in, arrays out, over one opened export. No HTTP, no Ray.

A service is immutable: it answers from one version for ever. Serving another version means
building another service.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np

from ps.columns import RawValues, Steps, Transform, lookup_steps
from ps.errors import InputError
from ps.export import Export
from ps.feature_group import FeatureGroup, Source, groups_of
from ps.inputs import Bags, Dense, Input
from ps.lookup import is_sequence, lookup, lookup_shape
from ps.ragged import F32, I64, Ragged
from ps.spec import FeatureSpec
from ps.threads import ONE_THREAD, Threads

_LONGEST_NAME = 200
_KEPT_PLANS = 256
"""How many kinds of request are remembered: the features, their order and the forms of input."""


@dataclass(frozen=True, slots=True, eq=False)
class Raw:
    """Raw values of B examples, for a feature with a transform."""

    values: Any
    """Strings or integers, in any form of `ps.columns.raw`: flat is one value per example, nested
    is any number of them; a list, a NumPy or Arrow array, or `RawValues`."""
    weights: Any = None
    """Weights in such a form: needed by a weighted column, refused by any other."""


AnyInput = Input | Bags | Raw
"""What a service takes: raw values, or ids."""


class UnknownFeatureError(InputError):
    """A request names a feature that the model does not have."""


class LookupService:
    """Answers lookups from the memory-mapped tables of an export."""

    def __init__(self, export: Export, threads: Threads = ONE_THREAD) -> None:
        """Open for lookups.

        Args:
            export: what to serve.
            threads: that big lookups are cut between.
        """
        self.export = export
        self._threads = threads
        tables = {name: export.tables[f.table] for name, f in export.features.items()}
        sources = {
            name: Source(export.features[name], table.combiner, table.rows_VD)
            for name, table in tables.items()
        }
        self._groups = lru_cache(_KEPT_PLANS)(partial(groups_of, sources, threads))
        self._warm_up()

    def lookup(self, inputs: Mapping[str, AnyInput]) -> dict[str, F32]:
        """Activations of the given features, in their order.

        Args:
            inputs: by feature name; each form of input has its own rules, see `ps.lookup.lookup`.
                `Raw` is for features with a transform, which take ids as well. HTTP sends `Dense`,
                `Bags` and `Raw`. Any subset of the features will do.

        Returns:
            float32 arrays, of the shapes that `ps.lookup.lookup` says. Of `Raw` [B, D], or
            [B, L, D] for sequences. Several may be parts of one buffer, which lives as long as any
            of them.

        Raises:
            UnknownFeatureError: there is no such feature.
            InputError: ids outside their table, or a form that the feature does not take.
        """
        return self.lookup_with_lengths(inputs)[0]

    def lookup_with_lengths(
        self, inputs: Mapping[str, AnyInput]
    ) -> tuple[dict[str, F32], dict[str, I64]]:
        """`lookup`, and the lengths of sequences of raw values.

        Returns:
            (what `lookup` returns, int64 [B] by feature, only of those that are sequences of raw
            values: steps up to the last one with a value, at most L).

        Raises:
            as `lookup`.
        """
        grouped = self._lookup_groups(inputs)
        outputs: dict[str, F32] = {}
        lengths: dict[str, I64] = {}
        for name, value in inputs.items():
            if name in grouped:
                outputs[name] = grouped[name]
                continue
            feature = self.feature(name)
            if not isinstance(value, Raw):
                outputs[name] = self._lookup_ids(feature, value)
                continue
            found = self._transformed(feature, value)
            if isinstance(found, Steps):
                outputs[name] = self._lookup_steps(feature, found)
                lengths[name] = np.minimum(found.lengths, feature.max_sequence_length)
            else:
                outputs[name] = self._lookup_ids(feature, found)
        return outputs, lengths

    def num_values(self, inputs: Mapping[str, AnyInput]) -> int:
        """How many float32 numbers `lookup` would return, if it returned.

        Raises:
            UnknownFeatureError: there is no such feature.
            InputError: a `Ragged` that does not fit its feature's `output_shape`, or a `Raw` that
                is no array.
        """
        return sum(
            math.prod(self._shape(self.feature(name), value)) for name, value in inputs.items()
        )

    def feature(self, name: str) -> FeatureSpec:
        """The feature of that name.

        Raises:
            UnknownFeatureError: with the nearest names.
        """
        feature = self.export.features.get(name)
        if feature is None:
            raise UnknownFeatureError(_unknown(name, sorted(self.export.features)), name)
        return feature

    def dim(self, feature: FeatureSpec) -> int:
        """Length D of the feature's rows."""
        return self.export.tables[feature.table].dim

    def _shape(self, feature: FeatureSpec, value: AnyInput) -> tuple[int, ...]:
        dim = self.dim(feature)
        if not isinstance(value, Raw):
            return lookup_shape(feature, dim, value)
        return (
            _num_examples(feature, value),
            *cast("list[int]", activation_shape(feature, dim)[1:]),
        )

    def _lookup_groups(self, inputs: Mapping[str, AnyInput]) -> dict[str, F32]:
        """Activations of the features that are looked up in groups: none that is refused."""
        try:
            groups = self._groups(tuple(inputs), tuple(map(type, inputs.values())))
        except KeyError:
            return {}  # for an unknown feature; what is wrong with one before it is said first
        outputs: dict[str, F32] = {}
        for group in groups:
            found_FBD = group.lookup(inputs)
            if found_FBD is not None:
                outputs.update(zip(group.names, found_FBD, strict=True))
        return outputs

    def _lookup_ids(self, feature: FeatureSpec, ids: Input | Bags) -> F32:
        table = self.export.tables[feature.table]
        return lookup(feature, table.name, table.combiner, table.rows_VD, ids, self._threads)

    def _lookup_steps(self, feature: FeatureSpec, steps: Steps) -> F32:
        table = self.export.tables[feature.table]
        length = feature.max_sequence_length
        return lookup_steps(feature, table.combiner, table.rows_VD, steps, length)

    def _transformed(self, feature: FeatureSpec, raw: Raw) -> Bags | Steps:
        """The ids of raw values.

        Raises:
            InputError: the feature has no transform, or what its transform refuses.
        """
        transform = self.export.transforms.get(feature.name)
        if transform is None:
            raise _refusal(feature, "takes ids: it has no column that raw values could go through")
        features = {transform.column.key: raw.values}
        if raw.weights is not None:
            if transform.weight_key is None:
                raise _refusal(feature, "was given weights, but its column is not a weighted one")
            features[transform.weight_key] = raw.weights
        try:
            return transform.steps(features) if transform.sequence else Bags(transform(features))
        except InputError as e:
            raise _refusal(feature, f"cannot be transformed: {e.message}") from None

    def _warm_up(self) -> None:
        """Compile or load every kernel, so that the first request does not wait for it."""
        flat = np.zeros(1, dtype=np.int64)
        bag = Ragged(flat, np.array([0, 1]))
        weighted = Ragged(flat, bag.row_splits, np.ones(1, dtype=np.float32))
        for table in {table.dim: table for table in self.export.tables.values()}.values():
            combined = FeatureSpec(name="", table=table.name)
            sequence = FeatureSpec(name="", table=table.name, max_sequence_length=1)
            source = Source(combined, table.combiner, table.rows_VD)
            for value in (Dense(flat), bag):
                FeatureGroup(type(value), [source], ONE_THREAD).lookup({"": value})
            self._lookup_ids(combined, Dense(flat))
            self._lookup_ids(combined, bag)
            self._lookup_ids(combined, weighted)
            self._lookup_ids(sequence, bag)
        for name, transform in self.export.transforms.items():
            self.lookup({name: example_input(transform)})


def example_input(transform: Transform) -> Raw:
    """One example with one value that JSON can hold: the first of a vocabulary, else any."""
    keys = transform.vocabulary
    value: object = "a" if transform.takes_strings else 0
    if keys is not None:
        first = keys[0].as_py()
        value = first.decode(errors="replace") if isinstance(first, bytes) else first
    return Raw([[value]], None if transform.weight_key is None else [[1]])


def activation_shape(feature: FeatureSpec, dim: int) -> list[int | None]:
    """Shape of a feature's answer to `Bags`, None for the number of examples."""
    return [None, feature.max_sequence_length, dim] if is_sequence(feature) else [None, dim]


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3) if len(name) <= _LONGEST_NAME else []
    shown = name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…"
    names = near or known[:10]
    more = f" and {len(known) - len(names)} more" if not near and len(known) > len(names) else ""
    listed = ", ".join(f"'{n}'" for n in names) + more
    hint = f"did you mean {listed}?" if near else f"the model has {listed or 'no features'}"
    return f"unknown feature '{shown}'; {hint}"


def _num_examples(feature: FeatureSpec, raw: Raw) -> int:
    values = raw.values
    try:
        return len(values.row_splits) - 1 if isinstance(values, RawValues) else len(values)
    except TypeError:
        shown = type(values).__name__
        raise _refusal(feature, f"must have values for each example, got a {shown}") from None


def _refusal(feature: FeatureSpec, what: str) -> InputError:
    return InputError(f"feature '{feature.name}' {what}", feature.name)
