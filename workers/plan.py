"""From a batch's ids to distinct rows, from rows to activations, and gradients all the way back.

The host side of a training step, without TensorFlow, Ray or a shard: `plan_batch` says which rows
a batch needs, `activations` combines the pulled rows, `row_gradients` turns the gradients of the
activations into one gradient per distinct row. For features that the compiled step combines,
`device_inputs` ships rows and padded indices instead. Training follows TensorFlow's training
classes: ids are all checked, none is dropped, and weights are used as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ps.config import CustomCombiner, QuantizationConfig
from ps.errors import IdRangeError
from ps.kernels.combine import COMBINER_CODES, combine_rows
from ps.kernels.dedup import first_out_of_range
from ps.kernels.gradients import combine_gradients, entry_gradients
from ps.memory import empty, zeros
from ps.partition import DistinctRows, Layout, distinct_rows
from ps.ragged import F32, I64, Ragged
from ps.spec import EmbeddingSpec, FeatureSpec, TableSpec
from workers.raw_inputs import Positions, lengths
from workers.shapes import activation_shape, lookup_width, num_positions, uses_weights

I32 = npt.NDArray[np.int32]

_NO_WEIGHTS = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class FeaturePlan:
    """Where the entries of a feature find their rows; the feature is combined here."""

    spec: FeatureSpec
    combiner: int
    index: I64
    """int64 [N]: place among the table's distinct rows."""
    row_splits: I64
    """int64 [P + 1]: the entries of each vector. P is B, or B times the positions of an example,
    each of which is a bag of one entry or none."""
    weights: F32
    """float32 [N], or empty for all ones."""


@dataclass(frozen=True, slots=True, eq=False)
class DevicePlan:
    """Where the compiled step finds the rows of the features of one table that it combines."""

    places: I64
    """int64 [K]: the rows that it gets, by place among the table's distinct rows."""
    num_rows: int
    """Rows that it is given: K and padding, the same number in every batch."""
    indices: dict[str, I32]
    """int32 [B, W] per feature, into those rows; 0 behind the end of an example."""
    valency: dict[str, I32]
    """int32 [B] per feature: ids of each example that count."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchPlan:
    """Which rows a batch needs, and how its features use them."""

    distinct: dict[str, DistinctRows]
    features: tuple[FeaturePlan, ...]
    device: dict[str, DevicePlan]
    """By table."""
    num_examples: int
    num_ids: int
    """Ids that are looked up."""
    lengths: dict[str, F32]
    """float32 [B] by `length_key`, of sequences of embedding columns."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceInputs:
    """What the compiled step combines itself."""

    rows: dict[str, F32]
    """float32 [number of rows, D] per table."""
    indices: dict[str, I32]
    """int32 [B, W] per feature."""
    valency: dict[str, I32]
    """int32 [B] per feature."""


NO_DEVICE_INPUTS = DeviceInputs({}, {}, {})


def plan_batch(
    spec: EmbeddingSpec, layout: Layout, bags: Mapping[str, Ragged | Positions]
) -> BatchPlan:
    """Check the ids of a batch and find its distinct rows, table by table.

    Raises:
        IdRangeError: an id outside its table; names feature, id and range.
    """
    distinct: dict[str, DistinctRows] = {}
    host: dict[str, FeaturePlan] = {}
    device: dict[str, DevicePlan] = {}
    batch, num_ids = next(iter(bags.values())).num_examples, 0
    for table in spec.tables:
        features = spec.features_of(table.name)
        used = [_used(table, feature, bags[feature.name]) for feature in features]
        ids = np.concatenate([bag.ids for bag in used])
        distinct[table.name], index = distinct_rows(ids, layout.placements[table.name])
        parts = np.split(index, np.cumsum([bag.ids.size for bag in used])[:-1])
        num_ids += ids.size
        on_device = []
        for feature, bag, part in zip(features, used, parts, strict=True):
            width = lookup_width(table, feature, batch)
            if isinstance(bags[feature.name], Positions):
                host[feature.name] = _feature_plan(table, feature, bag, part, bag.row_splits)
            elif width is None:
                host[feature.name] = _host_plan(table, feature, bag, part)
            else:
                on_device.append((feature.name, width, bag, part))
        if on_device:
            num_distinct = distinct[table.name].ids.size
            device[table.name] = _device_plan(table, num_distinct, on_device)
    ordered = tuple(host[f.name] for f in spec.features if f.name in host)
    return BatchPlan(distinct, ordered, device, batch, num_ids, lengths(bags))


def quantized(spec: EmbeddingSpec, rows: Mapping[str, F32]) -> dict[str, F32]:
    """The pulled rows as the features see them: with simulated quantization where it is set."""
    return {t.name: _quantized(t.quantization_config, rows[t.name]) for t in spec.tables}


def activations(spec: EmbeddingSpec, plan: BatchPlan, rows: Mapping[str, F32]) -> dict[str, F32]:
    """float32, `activation_shape` per feature combined here, from the distinct rows [U, D]."""
    out = {}
    for f in plan.features:
        table = rows[f.spec.table]
        result: F32 = empty((f.row_splits.size - 1, table.shape[1]))
        combine_rows(table, f.index, f.row_splits, f.weights, f.combiner, result)
        out[f.spec.name] = result.reshape(activation_shape(spec, f.spec, plan.num_examples))
    return out


def device_inputs(plan: BatchPlan, rows: Mapping[str, F32]) -> DeviceInputs:
    """What the compiled step needs for the other features, from the distinct rows [U, D]."""
    shipped = {}
    for name, device in plan.device.items():
        dim = rows[name].shape[1]
        shipped[name] = np.zeros((device.num_rows, dim), dtype=np.float32)
        shipped[name][: device.places.size] = rows[name][device.places]
    indices = {f: ids for device in plan.device.values() for f, ids in device.indices.items()}
    valency = {f: n for device in plan.device.values() for f, n in device.valency.items()}
    return DeviceInputs(shipped, indices, valency)


def row_gradients(
    spec: EmbeddingSpec,
    plan: BatchPlan,
    grads: Mapping[str, F32],
    device_grads: Mapping[str, F32],
) -> tuple[dict[str, DistinctRows], dict[str, F32]]:
    """Gradients of rows from gradients of activations, and of the rows that the device was given.

    Returns:
        Per table the rows a push names and float32 [U, D], one summed gradient per distinct row;
        for a table without gradient accumulation one entry per contribution.
    """
    rows, out = {}, {}
    for table in spec.tables:
        plans = [f for f in plan.features if f.spec.table == table.name]
        if not table.optimizer.use_gradient_accumulation:
            rows[table.name], out[table.name] = _contributions(table, plan, plans, grads)
            continue
        rows[table.name] = plan.distinct[table.name]
        out[table.name] = _summed(table, plan, plans, grads)
        device = plan.device.get(table.name)
        if device is not None:
            out[table.name][device.places] += device_grads[table.name][: device.places.size]
    return rows, out


def _used(table: TableSpec, feature: FeatureSpec, given: Ragged | Positions) -> Ragged:
    """The ids and weights that count, after a check of all ids."""
    bag = given.bags if isinstance(given, Positions) else given
    bad = first_out_of_range(bag.ids, table.vocabulary_size)
    if bad >= 0:
        raise IdRangeError(feature.name, table.name, int(bag.ids[bad]), table.vocabulary_size)
    if isinstance(given, Positions):
        return bag
    batch = bag.num_examples
    weights = bag.weights if uses_weights(table, feature, batch) else None
    length = lookup_width(table, feature, batch) or num_positions(feature, batch)
    counts = np.diff(bag.row_splits)
    if length == 0 or counts.max(initial=0) <= length:
        return bag if weights is bag.weights else Ragged(bag.ids, bag.row_splits)
    kept = bag.positions < length
    splits = np.concatenate([[0], np.cumsum(np.minimum(counts, length))])
    return Ragged(bag.ids[kept], splits, None if weights is None else weights[kept])


def _host_plan(table: TableSpec, feature: FeatureSpec, bag: Ragged, index: I64) -> FeaturePlan:
    positions = num_positions(feature, bag.num_examples)
    splits = bag.row_splits
    if positions:
        filled = np.arange(positions) < np.diff(splits)[:, None]
        splits = np.concatenate([[0], np.cumsum(filled)])
    return _feature_plan(table, feature, bag, index, splits)


def _feature_plan(
    table: TableSpec, feature: FeatureSpec, bag: Ragged, index: I64, splits: I64
) -> FeaturePlan:
    # A custom combiner combines bags, on the device; positions of one id are rows as they are.
    code = "sum" if isinstance(table.combiner, CustomCombiner) else table.combiner
    weights = _NO_WEIGHTS if bag.weights is None else bag.weights
    return FeaturePlan(feature, COMBINER_CODES[code], index, splits, weights)


def _device_plan(
    table: TableSpec, num_distinct: int, features: Sequence[tuple[str, int, Ragged, I64]]
) -> DevicePlan:
    """Features as (name, W, bag, place of each id among the table's distinct rows)."""
    used = np.zeros(num_distinct, dtype=bool)
    for *_, index in features:
        used[index] = True
    places, row_of_place = np.flatnonzero(used), np.cumsum(used) - 1
    indices, valency, most = {}, {}, 0
    for name, width, bag, index in features:
        counts = np.diff(bag.row_splits)
        example = np.repeat(np.arange(bag.num_examples), counts)
        indices[name] = np.zeros((bag.num_examples, width), dtype=np.int32)
        indices[name][example, bag.positions] = row_of_place[index]
        valency[name] = counts.astype(np.int32)
        most += bag.num_examples * width
    return DevicePlan(places, min(most, table.vocabulary_size), indices, valency)


def _quantized(config: QuantizationConfig | None, rows_UD: F32) -> F32:
    if config is None:
        return rows_UD
    low, high = np.float32(config.lower), np.float32(config.upper)
    quantum = (high - low) / np.float32(config.num_buckets - 1)
    bucket = np.floor((np.clip(rows_UD, low, high) - low) / quantum + np.float32(0.5))
    result: F32 = bucket * quantum + low
    return result


def _summed(
    table: TableSpec, plan: BatchPlan, plans: Sequence[FeaturePlan], grads: Mapping[str, F32]
) -> F32:
    out: F32 = zeros((plan.distinct[table.name].ids.size, table.dim))
    for f in plans:
        upstream = grads[f.spec.name].reshape(-1, table.dim)
        combine_gradients(upstream, f.index, f.row_splits, f.weights, f.combiner, out)
    return out


def _contributions(
    table: TableSpec, plan: BatchPlan, plans: Sequence[FeaturePlan], grads: Mapping[str, F32]
) -> tuple[DistinctRows, F32]:
    """Every entry's own gradient, entries ordered by shard (and in batch order within one)."""
    parts = []
    for f in plans:
        parts.append(np.empty((f.index.size, table.dim), dtype=np.float32))
        upstream = grads[f.spec.name].reshape(-1, table.dim)
        entry_gradients(upstream, f.row_splits, f.weights, f.combiner, parts[-1])
    distinct = plan.distinct[table.name]
    index = np.concatenate([f.index for f in plans])
    shard = np.searchsorted(distinct.shard_splits, index, side="right") - 1
    order = np.argsort(shard, kind="stable")
    splits = np.searchsorted(shard[order], np.arange(distinct.shard_splits.size))
    index = index[order]
    rows = DistinctRows(distinct.ids[index], distinct.local_rows[index], splits)
    return rows, np.concatenate(parts)[order]
