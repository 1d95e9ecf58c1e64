"""Bags that shards combine: what a worker asks for, and what it makes of the parts of the sums.

For tables of long bags. A table's features lie one after the other: P = features × examples bags.
Every shard sums the rows that it holds of every bag; the worker adds the parts in the order of the
shards and divides by the combiner's divisor.

What is exact, against rows that the worker combines itself:

- Activations: the same bits on one shard. On K shards a bag of n entries is summed in another
  order: its sum is within (n + K) · 2⁻²⁴ · Σ|w · row| of that in real numbers, and the division is
  the same. The result depends on the number of shards, unlike that of rows; it does not depend on
  the order in which they answer, nor does it change from run to run.
- Gradients of rows: the same bits on any number of shards, for the same gradients of activations.
  An entry's is (w / divisor) · gradient. The quotient is taken here, so that a shard only
  multiplies: it becomes the entry's weight, or, where all weights are one, a factor of its bag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ps.bags import ShardBags, shard_bags
from ps.config import CustomCombiner
from ps.errors import ConfigError
from ps.kernels.combine import COMBINER_CODES
from ps.kernels.shard_bags import bag_divisors, divide_weights
from ps.memory import empty
from ps.messages import no_weights
from ps.partition import Placement
from ps.ragged import F32, I64, Ragged
from ps.spec import FeatureSpec, TableSpec

_ID_BYTES = _SPLIT_BYTES = 8
_WEIGHT_BYTES = 4


@dataclass(frozen=True, slots=True, eq=False)
class BagsPlan:
    """The bags of one table in a batch, P of them."""

    features: tuple[str, ...]
    """In the order of their bags."""
    entries: ShardBags
    divisors: F32
    """float32 [P], or empty for all ones."""


def check_combined_on_shards(table: TableSpec, features: Sequence[FeatureSpec]) -> None:
    """Refuse a table whose bags shards cannot combine.

    Raises:
        ConfigError: names the table or feature, and the option that is in the way.
    """
    refusal = f"table '{table.name}': `combine_on: shard` does not go with"
    if isinstance(table.combiner, CustomCombiner):
        raise ConfigError(f"{refusal} a custom `combiner`, which needs the rows themselves")
    if table.quantization_config is not None:
        raise ConfigError(f"{refusal} `quantization_config`, which changes row by row")
    if not table.optimizer.use_gradient_accumulation:
        raise ConfigError(
            f"{refusal} `use_gradient_accumulation: false`: shards sum the gradients of a row"
        )
    for feature in features:
        options = {
            "max_sequence_length": feature.max_sequence_length > 0,
            "output_shape": feature.output_shape is not None,
            "tensor_core_shape": feature.tensor_core_width is not None,
        }
        for option in (name for name, is_set in options.items() if is_set):
            raise ConfigError(
                f"{refusal} `{option}` of feature '{feature.name}': it takes bags that become one "
                "vector per example on the host"
            )


def plan_bags(
    table: TableSpec, features: Sequence[FeatureSpec], bags: Sequence[Ragged], placement: Placement
) -> BagsPlan:
    """Lay the features' bags one after the other and cut them by shard; the ids are checked."""
    assert not isinstance(table.combiner, CustomCombiner)
    assert len({bag.num_examples for bag in bags}) == 1, "one bag per example"
    ids, splits, weights = _laid(bags)
    divisors = no_weights()
    if table.combiner != "sum":
        divisors = np.empty(splits.size - 1, dtype=np.float32)
        bag_divisors(splits, weights, COMBINER_CODES[table.combiner], divisors)
    entries = shard_bags(ids, splits, weights, placement)
    return BagsPlan(tuple(feature.name for feature in features), entries, divisors)


def bag_activations(plan: BagsPlan, parts_KPD: F32) -> dict[str, F32]:
    """float32 [B, D] per feature, from every shard's part of the sums: float32 [K, P, D].

    Parts are added in the order of the shards; 0 for an empty bag and where the divisor is 0.
    """
    sums: F32 = empty(parts_KPD.shape[1:])
    with np.errstate(all="ignore"):  # infinities and NaN are results like any other
        np.copyto(sums, parts_KPD[0])
        for part in parts_KPD[1:]:
            sums += part
        if plan.divisors.size:
            sums /= plan.divisors[:, None]
            sums[plan.divisors == 0] = 0
    return dict(zip(plan.features, np.split(sums, len(plan.features)), strict=True))


def bag_gradients(plan: BagsPlan, grads: Mapping[str, F32]) -> tuple[ShardBags, F32]:
    """What to push for the gradients of activations, float32 [B, D] per feature.

    Returns:
        The entries with the weights of a push, and float32 [P, D], all of which every shard gets:
        the gradient of an entry is its weight times that of its bag.
    """
    parts = [grads[name] for name in plan.features]
    upstream = parts[0] if len(parts) == 1 else np.concatenate(parts)
    entries, divisors = plan.entries, plan.divisors
    if not divisors.size:
        return entries, upstream
    if entries.bags.weights.size:
        bags = replace(entries.bags, weights=_divided(entries, divisors))
        return replace(entries, bags=bags), upstream
    with np.errstate(all="ignore"):
        shares = np.where(divisors == 0, np.float32(0), np.float32(1) / divisors)
        return entries, upstream * shares[:, None]


def rows_bytes(num_distinct: int, dim: int, *, number_bytes: int = 4) -> int:
    """Bytes of a pull of distinct rows, and of the push of their gradients."""
    return num_distinct * (_ID_BYTES + dim * number_bytes)


def bags_bytes(
    num_entries: int,
    num_bags: int,
    dim: int,
    *,
    num_shards: int,
    weighted: bool = False,
    number_bytes: int = 4,
) -> int:
    """Bytes of a pull of bags that shards combine, and of the push of their gradients.

    An entry goes to one shard; all bags go to, and come from, every shard. `number_bytes` are those
    of a row's number on the wire.

    >>> bags_bytes(4096 * 100, 4096, 64, num_shards=2) < rows_bytes(150_000, 64)
    True
    """
    entries = num_entries * (_ID_BYTES + weighted * _WEIGHT_BYTES)
    splits = (num_bags + 1) * _SPLIT_BYTES
    return entries + num_shards * (splits + num_bags * dim * number_bytes)


def _laid(bags: Sequence[Ragged]) -> tuple[I64, I64, F32]:
    """(ids, row splits, weights) of all bags; all have weights as soon as some have."""
    ids = np.concatenate([bag.ids for bag in bags])
    sizes = np.concatenate([np.diff(bag.row_splits) for bag in bags])
    splits = np.concatenate([[0], np.cumsum(sizes)])
    if all(bag.weights is None for bag in bags):
        return ids, splits, no_weights()
    return ids, splits, np.concatenate([_weights(bag) for bag in bags])


def _weights(bag: Ragged) -> F32:
    return np.ones(bag.ids.size, dtype=np.float32) if bag.weights is None else bag.weights


def _divided(entries: ShardBags, divisors_P: F32) -> F32:
    """float32 [N]: every entry's weight by its bag's divisor."""
    out = np.empty_like(entries.bags.weights)
    for shard, (start, stop) in enumerate(pairwise(entries.shard_splits)):
        weights, splits = entries.bags.weights[start:stop], entries.bags.row_splits[shard]
        divide_weights(splits, weights, divisors_P, out[start:stop])
    return out
