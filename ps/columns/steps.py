"""`Steps`: the ids of sequences whose steps have no id, one, or several.

`Ragged` alone cannot hold a step without an id. The module knows no column and no table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ps.columns.raw import Mask
from ps.errors import InputError
from ps.ragged import I64, Ragged


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """Ids of B sequences; a step has no id, one, or several that become one vector."""

    bags: Ragged
    """The ids of all S steps, one bag per step."""
    row_splits: I64
    """int64 [B + 1]: example b owns steps `row_splits[b]` to `row_splits[b + 1]`. Its last step has
    an id; steps before may have none."""
    width: int
    """T, the length of the longest sequence of the input, steps without ids included."""

    @property
    def lengths(self) -> I64:
        """int64 [B]: number of steps, the last one that is filled included."""
        return np.diff(self.row_splits)

    def cut(self, length: int) -> Steps:
        """The first `length` steps of each example."""
        position = np.arange(self.bags.num_examples) - np.repeat(self.row_splits[:-1], self.lengths)
        return Steps(
            select_bags(self.bags, position < length),
            splits_of(np.minimum(self.lengths, length)),
            min(self.width, length),
        )

    def one_per_step(self, feature: str) -> Ragged:
        """One id per step, as features with a `max_sequence_length` have them; -1 for no id.

        Raises:
            InputError: a step has several ids.
        """
        sizes = np.diff(self.bags.row_splits)
        if np.any(sizes > 1):
            raise InputError(
                f"feature '{feature}': a step of a sequence has {sizes.max()} values, wanted one",
                feature,
            )
        ids = np.full(sizes.size, -1, dtype=np.int64)
        ids[sizes == 1] = self.bags.ids
        return Ragged(ids, self.row_splits)


def length_key(feature: str) -> str:
    """Where a model finds the lengths of a sequence, as TensorFlow names them."""
    return f"{feature}_seq_length_"


def kept_before(present: Mask) -> I64:
    """int64 [N + 1]: how many of the first n values are there."""
    kept = np.zeros(present.size + 1, dtype=np.int64)
    np.cumsum(present, out=kept[1:])
    return kept


def splits_of(sizes: I64) -> I64:
    """int64 [N + 1]: row splits of rows of these sizes."""
    splits = np.zeros(sizes.size + 1, dtype=np.int64)
    np.cumsum(sizes, out=splits[1:])
    return splits


def select_bags(bags: Ragged, keep: Mask) -> Ragged:
    """Some of the bags, without weights."""
    if keep.all():
        return bags
    sizes = np.diff(bags.row_splits)
    return Ragged(bags.ids[np.repeat(keep, sizes)], splits_of(sizes[keep]))
