"""The plain NumPy twins of the kernels in `ps.kernels.features`, made of those in `reference`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ps.kernels.features import KEEP_ALL, KEEP_WEIGHTED
from ps.ragged import F32, I64, Ragged
from tests.support.reference import combine_rows, first_out_of_range, gather_rows


@dataclass(frozen=True)
class Lookup:
    """What one feature looks up."""

    rows_VD: F32
    bag: Ragged
    combiner: str
    keep: int


def combine_features(lookups: Sequence[Lookup]) -> F32 | None:
    """float32 [F, B, D], or None if an id that counts is outside its table."""
    outs = []
    for lookup in lookups:
        bag = counted(lookup.bag, lookup.keep)
        if first_out_of_range(bag.ids, len(lookup.rows_VD)) >= 0:
            return None
        args = bag.ids, bag.row_splits, bag.weights, lookup.combiner
        outs.append(combine_rows(lookup.rows_VD, *args))
    return np.stack(outs)


def gather_features(tables: Sequence[F32], ids_FB: I64) -> F32 | None:
    """float32 [F, B, D], or None if an id is outside its table."""
    pairs = list(zip(tables, ids_FB, strict=True))
    if any(first_out_of_range(ids_B, len(rows_VD)) >= 0 for rows_VD, ids_B in pairs):
        return None
    return np.stack([gather_rows(rows_VD, ids_B) for rows_VD, ids_B in pairs])


def counted(bag: Ragged, keep: int) -> Ragged:
    """The bag without the entries that do not count."""
    counts = [
        keep == KEEP_ALL
        or (i >= 0 and (keep != KEEP_WEIGHTED or bag.weights is None or bool(bag.weights[n] > 0)))
        for n, i in enumerate(bag.ids.tolist())
    ]
    before = np.cumsum([0, *counts])
    weights = None if bag.weights is None else bag.weights[counts]
    return Ragged(bag.ids[counts], before[bag.row_splits], weights)
