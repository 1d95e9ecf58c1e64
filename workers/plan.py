"""From a batch's ids to distinct rows, from rows to activations, and gradients all the way back.

The host side of a training step, without TensorFlow, Ray or a shard: `plan_batch` says which rows
a batch needs, `activations` combines the pulled rows, `row_gradients` turns the gradients of the
activations into one gradient per distinct row. Training follows TensorFlow's training classes: ids
are all checked, none is dropped, and weights are used as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ps.errors import ConfigError, IdRangeError
from ps.kernels.combine import (
    COMBINER_CODES,
    combine_gradients,
    combine_rows,
    entry_gradients,
    scatter_sequences,
    sequence_gradients,
)
from ps.kernels.dedup import first_out_of_range
from ps.partition import DistinctRows, Layout, distinct_rows
from ps.ragged import F32, I64, Ragged
from ps.spec import EmbeddingSpec, FeatureSpec, TableSpec

_NO_WEIGHTS = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class FeaturePlan:
    """Where the entries of one feature find their rows."""

    spec: FeatureSpec
    combiner: int
    index: I64
    """int64 [N]: place among the table's distinct rows."""
    row_splits: I64
    """int64 [B + 1]."""
    weights: F32
    """float32 [N], or empty for all ones."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchPlan:
    """Which rows a batch needs, and how its features use them."""

    distinct: dict[str, DistinctRows]
    features: tuple[FeaturePlan, ...]
    num_examples: int


def plan_batch(spec: EmbeddingSpec, layout: Layout, bags: Mapping[str, Ragged]) -> BatchPlan:
    """Check the ids of a batch and find its distinct rows, table by table.

    Raises:
        IdRangeError: an id outside its table; names feature, id and range.
    """
    distinct: dict[str, DistinctRows] = {}
    plans: dict[str, FeaturePlan] = {}
    for table in spec.tables:
        features = spec.features_of(table.name)
        used = [_checked(feature, table, bags[feature.name]) for feature in features]
        ids = np.concatenate([bag.ids for bag in used])
        distinct[table.name], index = distinct_rows(ids, layout.placements[table.name])
        bounds = np.cumsum([0, *(bag.ids.size for bag in used)])
        for feature, bag, start, stop in zip(features, used, bounds[:-1], bounds[1:], strict=True):
            plans[feature.name] = FeaturePlan(
                feature,
                COMBINER_CODES[table.combiner],
                index[start:stop],
                bag.row_splits,
                _NO_WEIGHTS if bag.weights is None else bag.weights,
            )
    num_examples = next(iter(bags.values())).num_examples
    return BatchPlan(distinct, tuple(plans[f.name] for f in spec.features), num_examples)


def activations(spec: EmbeddingSpec, plan: BatchPlan, rows: Mapping[str, F32]) -> dict[str, F32]:
    """float32 [B, D] per feature, [B, L, D] for sequences, from the distinct rows [U, D]."""
    out = {}
    for f in plan.features:
        table = rows[f.spec.table]
        out[f.spec.name] = result = np.empty(
            activation_shape(spec, f.spec, plan.num_examples), dtype=np.float32
        )
        if f.spec.max_sequence_length > 0:
            scatter_sequences(table, f.index, f.row_splits, result)
        else:
            combine_rows(table, f.index, f.row_splits, f.weights, f.combiner, result)
    return out


def activation_shape(spec: EmbeddingSpec, feature: FeatureSpec, batch: int) -> tuple[int, ...]:
    """[B, D], or [B, L, D] for a sequence feature.

    Raises:
        ConfigError: the feature has an `output_shape`, which training does not do yet.
    """
    if feature.output_shape is not None:
        raise ConfigError(
            f"feature '{feature.name}': `output_shape` is not implemented in training"
        )
    dim = spec.table(feature.table).dim
    if feature.max_sequence_length > 0:
        return (batch, feature.max_sequence_length, dim)
    return (batch, dim)


def row_gradients(
    spec: EmbeddingSpec, plan: BatchPlan, grads: Mapping[str, F32]
) -> tuple[dict[str, DistinctRows], dict[str, F32]]:
    """Gradients of rows from gradients of activations.

    Returns:
        Per table the rows a push names and float32 [U, D], one summed gradient per distinct row;
        for a table without gradient accumulation one entry per contribution.
    """
    rows, out = {}, {}
    for table in spec.tables:
        plans = [f for f in plan.features if f.spec.table == table.name]
        if table.optimizer.use_gradient_accumulation:
            rows[table.name] = plan.distinct[table.name]
            out[table.name] = _summed(table, plan, plans, grads)
        else:
            rows[table.name], out[table.name] = _contributions(table, plan, plans, grads)
    return rows, out


def _checked(feature: FeatureSpec, table: TableSpec, bag: Ragged) -> Ragged:
    bad = first_out_of_range(bag.ids, table.vocabulary_size)
    if bad >= 0:
        raise IdRangeError(feature.name, table.name, int(bag.ids[bad]), table.vocabulary_size)
    length = feature.max_sequence_length
    if length == 0 or bag.num_examples == 0 or np.diff(bag.row_splits).max() <= length:
        return bag
    counts = np.minimum(np.diff(bag.row_splits), length)
    splits = np.concatenate([[0], np.cumsum(counts)])
    return Ragged(bag.ids[bag.positions < length], splits)


def _summed(
    table: TableSpec, plan: BatchPlan, plans: list[FeaturePlan], grads: Mapping[str, F32]
) -> F32:
    out = np.zeros((plan.distinct[table.name].ids.size, table.dim), dtype=np.float32)
    for f in plans:
        if f.spec.max_sequence_length > 0:
            sequence_gradients(grads[f.spec.name], f.index, f.row_splits, out)
        else:
            combine_gradients(grads[f.spec.name], f.index, f.row_splits, f.weights, f.combiner, out)
    return out


def _contributions(
    table: TableSpec, plan: BatchPlan, plans: list[FeaturePlan], grads: Mapping[str, F32]
) -> tuple[DistinctRows, F32]:
    """Every entry's own gradient, entries ordered by shard (and in batch order within one)."""
    parts = []
    for f in plans:
        part = np.empty((f.index.size, table.dim), dtype=np.float32)
        upstream = grads[f.spec.name]
        if f.spec.max_sequence_length > 0:
            example = np.repeat(np.arange(plan.num_examples), np.diff(f.row_splits))
            part[:] = upstream[example, Ragged(f.index, f.row_splits).positions]
        else:
            entry_gradients(upstream, f.row_splits, f.weights, f.combiner, part)
        parts.append(part)
    distinct = plan.distinct[table.name]
    index = np.concatenate([f.index for f in plans])
    shard = np.searchsorted(distinct.shard_splits, index, side="right") - 1
    order = np.argsort(shard, kind="stable")
    splits = np.searchsorted(shard[order], np.arange(distinct.shard_splits.size))
    index = index[order]
    rows = DistinctRows(distinct.ids[index], distinct.local_rows[index], splits)
    return rows, np.concatenate(parts)[order]
