"""`ShardBags`: the bags of a batch that shards combine, cut by shard.

It takes the place of `DistinctRows` for a table whose rows stay where they are: a shard gets the
entries of every bag that it holds, repeats and all, and answers with its part of every bag's sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from ps.kernels.shard_bags import bags_by_shard
from ps.partition import Placement
from ps.ragged import F32, I64
from ps.step_message import BagsByShard


@dataclass(frozen=True, slots=True, eq=False)
class ShardBags:
    """The entries of one table's bags, ordered by shard, and in their own order within each."""

    local_rows: I64
    """int64 [N]: each entry's row on its shard."""
    shard_splits: I64
    """int64 [num_shards + 1]: shard k owns entries splits[k]:splits[k + 1]."""
    bags: BagsByShard
    """On every shard as many: the vectors of its answer, and of the gradients that it gets."""

    def of_shard(self, shard: int) -> I64:
        """Local rows of one shard."""
        return self.local_rows[self.shard_splits[shard] : self.shard_splits[shard + 1]]


def shard_bags(ids_N: I64, splits_P1: I64, weights_N: F32, placement: Placement) -> ShardBags:
    """Cut bags by shard; the ids are rows of the table. `weights_N` of size 0 for all ones."""
    local, row_splits, weights, shard_splits = bags_by_shard(
        ids_N, splits_P1, weights_N, placement.slab_rows, placement.num_shards, placement.offset
    )
    return ShardBags(local, shard_splits, BagsByShard(row_splits, weights))
