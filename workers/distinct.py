"""The ids of a batch that count, checked, and the distinct rows of all tables.

All tables in one call each of three kernels: calls and small arrays for each of many tables would
cost as much as the work, and the thread that prepares batches shares the interpreter.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np

from ps.errors import IdRangeError
from ps.kernels.dedup import first_out_of_range, first_out_of_tables
from ps.partition import DistinctRows, Layout, distinct_rows_of_tables
from ps.ragged import I64, Ragged
from ps.spec import EmbeddingSpec, FeatureSpec, TableSpec
from workers.columns import splits_of
from workers.raw_inputs import Positions
from workers.shapes import lookup_width, num_positions, uses_weights


def used_ids(
    table: TableSpec, feature: FeatureSpec, given: Ragged | Positions, checked: bool
) -> Ragged:
    """The ids and weights that count; the ids are checked if asked for, or where some are cut."""
    bag = given.bags if isinstance(given, Positions) else given
    if checked:
        _check_ids(table, feature, bag.ids)
    if isinstance(given, Positions):
        return bag
    batch = bag.num_examples
    weights = bag.weights if uses_weights(table, feature, batch) else None
    length = lookup_width(table, feature, batch) or num_positions(feature, batch)
    if length == 0 or np.diff(bag.row_splits).max(initial=0) <= length:
        return bag if weights is bag.weights else Ragged(bag.ids, bag.row_splits)
    _check_ids(table, feature, bag.ids)
    kept = bag.positions < length
    splits = splits_of(np.minimum(np.diff(bag.row_splits), length))
    return Ragged(bag.ids[kept], splits, None if weights is None else weights[kept])


def distinct_of_tables(
    spec: EmbeddingSpec, tables: Sequence[TableSpec], layout: Layout, used: Mapping[str, Ragged]
) -> tuple[dict[str, DistinctRows], dict[str, I64]]:
    """Check ids; the distinct rows by table, and the place of every id among them by feature.

    Raises:
        IdRangeError: an id outside its table.
    """
    if not tables:
        return {}, {}
    features: dict[str, list[FeatureSpec]] = {table.name: [] for table in tables}
    for f in spec.features:
        if f.table in features:
            features[f.table].append(f)
    ordered = [f for of_table in features.values() for f in of_table]
    ids = np.concatenate([used[f.name].ids for f in ordered])
    ends = list(accumulate(used[f.name].ids.size for f in ordered))
    num_features = accumulate(len(of_table) for of_table in features.values())
    bounds = np.array([0, *(ends[count - 1] for count in num_features)])
    bad = first_out_of_tables(ids, bounds, np.array([t.vocabulary_size for t in tables]))
    if bad >= 0:
        f = ordered[bisect_right(ends, bad)]
        size = layout.placements[f.table].vocabulary_size
        raise IdRangeError(f.name, f.table, int(ids[bad]), size)
    placements = [layout.placements[table.name] for table in tables]
    rows, index = distinct_rows_of_tables(ids, bounds, placements)
    places = {f.name: index[a:b] for f, (a, b) in zip(ordered, pairwise([0, *ends]), strict=True)}
    return dict(zip(features, rows, strict=True)), places


def _check_ids(table: TableSpec, feature: FeatureSpec, ids: I64) -> None:
    bad = first_out_of_range(ids, table.vocabulary_size)
    if bad >= 0:
        raise IdRangeError(feature.name, table.name, int(ids[bad]), table.vocabulary_size)
