"""`LookupService`: arrays in, arrays out, over one opened export. No HTTP, no Ray.

A service is immutable: it answers from one version for ever. Serving another version means
building another service.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

import numpy as np

from ps.errors import InputError
from ps.export import Export
from ps.inputs import Bags, Dense, Input
from ps.lookup import is_sequence, lookup, lookup_shape
from ps.ragged import F32, Ragged
from ps.spec import FeatureSpec

_LONGEST_NAME = 200


class UnknownFeatureError(InputError):
    """A request names a feature that the model does not have."""


class LookupService:
    """Answers lookups from the memory-mapped tables of an export."""

    def __init__(self, export: Export) -> None:
        self.export = export
        self._warm_up()

    def lookup(self, inputs: Mapping[str, Input | Bags]) -> dict[str, F32]:
        """Activations of the given features, in their order.

        Args:
            inputs: by feature name; each form of input has its own rules, see `ps.lookup.lookup`.
                HTTP sends `Dense` and `Bags`. Any subset of the features will do.

        Returns:
            float32 arrays, of the shapes that `ps.lookup.lookup` says.

        Raises:
            UnknownFeatureError: there is no such feature.
            InputError: ids outside their table, or a form that the feature does not take.
        """
        return {name: self._lookup_one(self.feature(name), ids) for name, ids in inputs.items()}

    def num_values(self, inputs: Mapping[str, Input | Bags]) -> int:
        """How many float32 numbers `lookup` would return.

        Raises:
            UnknownFeatureError: there is no such feature.
            InputError: a `Ragged` that does not fit its feature's `output_shape`.
        """
        return sum(
            math.prod(lookup_shape(feature, self.dim(feature), ids))
            for feature, ids in ((self.feature(name), ids) for name, ids in inputs.items())
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

    def _lookup_one(self, feature: FeatureSpec, ids: Input | Bags) -> F32:
        table = self.export.tables[feature.table]
        return lookup(feature, table.name, table.combiner, table.rows_VD, ids)

    def _warm_up(self) -> None:
        """Compile or load every kernel, so that the first request does not wait for it."""
        flat = np.zeros(1, dtype=np.int64)
        bag = Ragged(flat, np.array([0, 1]))
        weighted = Ragged(flat, bag.row_splits, np.ones(1, dtype=np.float32))
        for table in list(self.export.tables.values())[:1]:
            combined = FeatureSpec(name="", table=table.name)
            sequence = FeatureSpec(name="", table=table.name, max_sequence_length=1)
            self._lookup_one(combined, Dense(flat))
            self._lookup_one(combined, bag)
            self._lookup_one(combined, weighted)
            self._lookup_one(sequence, bag)


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
