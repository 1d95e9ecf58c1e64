"""`FeatureGroup`: features of a request that one kernel call looks up.

It does what `ps.lookup.lookup` does, for the inputs that requests are made of. What it cannot do,
and what must be refused, it leaves to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ps.config import Combiner
from ps.inputs import Bags, Dense
from ps.kernels import Kernel
from ps.kernels.combine import COMBINER_CODES
from ps.kernels.features import (
    KEEP_ALL,
    KEEP_IDS,
    KEEP_WEIGHTED,
    combine_features_for,
    gather_features_for,
)
from ps.kernels.rows import QuantizedRows, RowFormat
from ps.ragged import F32, I64, Ragged
from ps.spec import FeatureSpec
from ps.threads import MIN_PART_BYTES, Threads

_Array = npt.NDArray[Any]

_NO_WEIGHTS: F32 = np.zeros(0, dtype=np.float32)
_NO_TYPE = {type(None)}


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A feature and the table that it reads."""

    feature: FeatureSpec
    combiner: Combiner
    rows: F32 | QuantizedRows
    """[V, D], C-contiguous."""

    @property
    def kind(self) -> tuple[RowFormat, int]:
        """Row format and length D of a row, which the sources of a group have in common."""
        if isinstance(self.rows, QuantizedRows):
            return self.rows.format, self.rows.dim
        return "float32", self.rows.shape[1]

    @property
    def records(self) -> _Array:
        """One record per row; see `ps.kernels.rows`."""
        return self.rows.records if isinstance(self.rows, QuantizedRows) else self.rows

    def takes(self, form: type) -> bool:
        """Whether inputs of a type can be looked up in a group, if they are not refused."""
        if form not in (Dense, Bags, Ragged) or self.feature.max_sequence_length > 0:
            return False
        return form is not Ragged or self.feature.output_shape is None


class FeatureGroup:
    """Features whose tables have one row format and dim, for inputs of one form; immutable.

    Its kernels read tables at their addresses, which are valid because the group refers to the
    arrays.
    """

    def __init__(self, form: type, sources: Sequence[Source], threads: Threads) -> None:
        """Prepare lookups.

        Args:
            form: type of all inputs, which every source takes.
            sources: one or more of one kind.
            threads: that big lookups are cut between.
        """
        self.names = tuple(source.feature.name for source in sources)
        self._form = form
        self._threads = threads
        self._format, self._dim = sources[0].kind
        self._tables = [source.records for source in sources]
        assert {source.kind for source in sources} == {sources[0].kind}
        assert all(table.flags.c_contiguous for table in self._tables)
        address_F = np.array([table.ctypes.data for table in self._tables])
        num_rows_F = np.array([len(table) for table in self._tables])
        combiner_F = np.array([COMBINER_CODES[source.combiner] for source in sources])
        keep_F = np.array([_keep(source, form) for source in sources])
        self._gathered = address_F, num_rows_F
        self._combined = address_F, num_rows_F, combiner_F, keep_F

    def lookup(self, inputs: Mapping[str, Any]) -> F32 | None:
        """float32 [F, B, D]: what `ps.lookup.lookup` returns for each of `names`.

        None if that would refuse one of the inputs, or they are not all of one B, or dense ones
        are not [B].
        """
        values = list(map(inputs.__getitem__, self.names))
        if self._form is Dense:
            return self._gather([value.ids for value in values])
        return self._combine([value.entries for value in values] if self._form is Bags else values)

    def _gather(self, ids: list[I64]) -> F32 | None:
        if len({part.shape for part in ids}) > 1 or ids[0].ndim != 1:
            return None
        num_examples = ids[0].size
        out_FBD = np.empty((len(ids), num_examples, self._dim), dtype=np.float32)
        in_range = self._run(
            gather_features_for(self._format, self._dim),
            (np.concatenate(ids),),
            (*self._gathered, out_FBD),
            num_examples,
        )
        return out_FBD if in_range else None

    def _combine(self, bags: list[Ragged]) -> F32 | None:
        splits = [bag.row_splits for bag in bags]
        if len(set(map(len, splits))) > 1:
            return None
        splits_FS = np.concatenate(splits).reshape(len(bags), -1)
        out_FBD = np.empty((len(bags), splits[0].size - 1, self._dim), dtype=np.float32)
        in_range = self._run(
            combine_features_for(self._format, self._dim),
            (np.concatenate([bag.ids for bag in bags]), _weights(bags)),
            (splits_FS, *self._combined, out_FBD),
            splits_FS[:, -1],
        )
        return out_FBD if in_range else None

    def _run(
        self,
        kernel: Kernel[..., bool],
        by_entry: tuple[_Array, ...],
        by_feature: tuple[_Array, ...],
        counts: I64 | int,
    ) -> bool:
        """Call a kernel, or several at a time for features that have many entries together."""
        num_entries, least = by_entry[0].size, MIN_PART_BYTES // (4 * self._dim) + 1
        if self._threads.count == 1 or num_entries < 2 * least:
            return kernel(*by_entry, *by_feature)
        bounds = np.cumsum([0, *np.broadcast_to(counts, len(self.names))])
        starts = [part.start for part in self._threads.parts(num_entries, least)]
        cuts = [*np.searchsorted(bounds, starts), len(self.names)]
        answers: list[bool] = []

        def run(first: int, last: int) -> None:
            features, entries = slice(first, last), slice(bounds[first], bounds[last])
            parts = *(a[entries] for a in by_entry), *(a[features] for a in by_feature)
            answers.append(kernel(*parts))

        self._threads.run([partial(run, first, last) for first, last in pairwise(cuts)])
        return all(answers)


def groups_of(
    sources: Mapping[str, Source], threads: Threads, names: Sequence[str], forms: Sequence[type]
) -> tuple[FeatureGroup, ...]:
    """Groups for the inputs of one request, as far as they are better looked up in groups.

    Fewer features than threads are not: one by one, they are cut between examples.

    Raises:
        KeyError: a name without a source.
    """
    alike: dict[tuple[Any, ...], list[Source]] = {}
    for name, form in zip(names, forms, strict=True):
        source = sources[name]
        if source.takes(form):
            alike.setdefault((form, *source.kind), []).append(source)
    return tuple(
        FeatureGroup(key[0], found, threads)
        for key, found in alike.items()
        if len(found) >= threads.count
    )


def _weights(bags: Sequence[Ragged]) -> F32:
    """Weights of all bags; of size 0 if none has any."""
    weights = [bag.weights for bag in bags]
    if set(map(type, weights)) == _NO_TYPE:
        return _NO_WEIGHTS
    pairs = zip(weights, bags, strict=True)
    return np.concatenate([np.ones(b.ids.size, np.float32) if w is None else w for w, b in pairs])


def _keep(source: Source, form: type) -> int:
    if form is not Bags or not source.feature.validate_weights_and_indices:
        return KEEP_ALL
    return KEEP_IDS if source.combiner == "sum" else KEEP_WEIGHTED
