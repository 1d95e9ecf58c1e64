"""From a batch's ids to distinct rows, from rows to activations, and gradients all the way back.

The host side of a training step, without TensorFlow, Ray or a shard: `plan_batch` says which rows
a batch needs, `activations` combines the pulled rows, `row_gradients` turns the gradients of the
activations into one gradient per distinct row. For features that the compiled step combines,
`device_inputs` ships rows and padded indices instead. Training follows TensorFlow's training
classes: ids are all checked, none is dropped, and weights are used as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from ps.bags import ShardBags
from ps.config import CustomCombiner, QuantizationConfig
from ps.kernels.combine import COMBINER_CODES, combine_rows
from ps.kernels.gradients import combine_gradients, entry_gradients
from ps.memory import CACHE_LINE, empty
from ps.partition import DistinctRows, Layout
from ps.ragged import F32, I64, Ragged
from ps.spec import EmbeddingSpec, FeatureSpec, TableSpec
from workers.columns import splits_of
from workers.distinct import distinct_of_tables, used_ids
from workers.raw_inputs import Positions, lengths
from workers.shapes import activation_shape, lookup_width, num_positions
from workers.shard_bags import BagsPlan, bag_activations, bag_gradients, plan_bags

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

    distinct: dict[str, DistinctRows | ShardBags]
    """What is pulled, by table."""
    features: tuple[FeaturePlan, ...]
    device: dict[str, DevicePlan]
    """By table."""
    bags: dict[str, BagsPlan]
    """By table, of those whose bags the shards combine."""
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
    spec: EmbeddingSpec,
    layout: Layout,
    bags: Mapping[str, Ragged | Positions],
    on_shards: Collection[str] = (),
) -> BatchPlan:
    """Check the ids of a batch and find its distinct rows, table by table.

    Args:
        spec: the tables and features.
        layout: where rows live.
        bags: ids of every feature.
        on_shards: tables whose bags the shards combine.

    Raises:
        IdRangeError: an id outside its table; names feature, id and range.
    """
    tables = {table.name: table for table in spec.tables}
    used = {
        f.name: used_ids(tables[f.table], f, bags[f.name], checked=f.table in on_shards)
        for f in spec.features
    }
    here = [table for table in spec.tables if table.name not in on_shards]
    rows, places = distinct_of_tables(spec, here, layout, used)
    by_bags = {
        table.name: _bags_plan(spec, table, layout, used)
        for table in spec.tables
        if table.name in on_shards
    }
    host: list[FeaturePlan] = []
    device: dict[str, list[tuple[str, int, Ragged, I64]]] = {}
    batch = next(iter(bags.values())).num_examples
    for f in (f for f in spec.features if f.name in places):
        table, bag, index = tables[f.table], used[f.name], places[f.name]
        width = lookup_width(table, f, batch)
        if width is None or isinstance(bags[f.name], Positions):
            host.append(_host_plan(table, f, bags[f.name], bag, index))
        else:
            device.setdefault(f.table, []).append((f.name, width, bag, index))
    return BatchPlan(
        distinct=rows | {name: plan.entries for name, plan in by_bags.items()},
        features=tuple(host),
        device={t: _device_plan(tables[t], rows[t].ids.size, fs) for t, fs in device.items()},
        bags=by_bags,
        num_examples=batch,
        num_ids=sum(bag.ids.size for bag in used.values()),
        lengths=lengths(bags),
    )


def quantized(spec: EmbeddingSpec, rows: Mapping[str, F32]) -> dict[str, F32]:
    """The pulled rows as the features see them: with simulated quantization where it is set."""
    return {t.name: _quantized(t.quantization_config, rows[t.name]) for t in spec.tables}


def activations(spec: EmbeddingSpec, plan: BatchPlan, rows: Mapping[str, F32]) -> dict[str, F32]:
    """float32, `activation_shape` per feature combined here, from the distinct rows [U, D].

    For tables whose bags the shards combine, `rows` has their parts of the sums.
    """
    out: dict[str, F32] = {}
    for name, of_table in plan.bags.items():
        out |= bag_activations(of_table, rows[name])
    shapes = [(f.row_splits.size - 1, rows[f.spec.table].shape[1]) for f in plan.features]
    for f, result in zip(plan.features, _in_one_block(shapes), strict=True):
        table = rows[f.spec.table]
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
    memory: Callable[[tuple[int, ...]], F32] = empty,
) -> tuple[dict[str, DistinctRows | ShardBags], dict[str, F32]]:
    """Gradients of rows from gradients of activations, and of the rows that the device was given.

    Args:
        spec: the tables and features.
        plan: of the batch.
        grads: float32, shaped like the activations, by feature.
        device_grads: float32 [number of rows, D] by table.
        memory: gives arrays of any content for the gradients, once per table.

    Returns:
        Per table the rows a push names and float32 [U, D], one summed gradient per distinct row;
        for a table without gradient accumulation one entry per contribution, and for one whose bags
        the shards combine one per bag.
    """
    rows: dict[str, DistinctRows | ShardBags] = {}
    out: dict[str, F32] = {}
    features: dict[str, list[FeaturePlan]] = {table.name: [] for table in spec.tables}
    for f in plan.features:
        features[f.spec.table].append(f)
    for table in spec.tables:
        if table.name in plan.bags:
            rows[table.name], out[table.name] = bag_gradients(plan.bags[table.name], grads)
            continue
        plans = features[table.name]
        if not table.optimizer.use_gradient_accumulation:
            rows[table.name], out[table.name] = _contributions(table, plan, plans, grads, memory)
            continue
        rows[table.name] = plan.distinct[table.name]
        out[table.name] = _summed(table, plan, plans, grads, memory)
        device = plan.device.get(table.name)
        if device is not None:
            out[table.name][device.places] += device_grads[table.name][: device.places.size]
    return rows, out


def _in_one_block(shapes: Sequence[tuple[int, int]]) -> list[F32]:
    """Arrays of any content, each from a cache line on.

    The system clears the memory of many middling arrays page by page, every time; one big one gets
    huge pages.
    """
    line = CACHE_LINE // 4
    starts = [0, *accumulate(-(-rows * dim // line) * line for rows, dim in shapes)]
    block: F32 = empty((starts[-1],))
    return [
        block[start : start + rows * dim].reshape(rows, dim)
        for start, (rows, dim) in zip(starts, shapes, strict=False)
    ]


def _bags_plan(
    spec: EmbeddingSpec, table: TableSpec, layout: Layout, used: Mapping[str, Ragged]
) -> BagsPlan:
    features = spec.features_of(table.name)
    bags = [used[f.name] for f in features]
    return plan_bags(table, features, bags, layout.placements[table.name])


def _host_plan(
    table: TableSpec, feature: FeatureSpec, given: Ragged | Positions, bag: Ragged, index: I64
) -> FeaturePlan:
    splits = bag.row_splits
    if isinstance(given, Ragged) and (positions := num_positions(feature, bag.num_examples)):
        splits = splits_of(np.arange(positions) < np.diff(splits)[:, None])
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
    table: TableSpec,
    plan: BatchPlan,
    plans: Sequence[FeaturePlan],
    grads: Mapping[str, F32],
    memory: Callable[[tuple[int, ...]], F32],
) -> F32:
    out = memory((plan.distinct[table.name].local_rows.size, table.dim))
    out.fill(0)
    for f in plans:
        upstream = grads[f.spec.name].reshape(-1, table.dim)
        combine_gradients(upstream, f.index, f.row_splits, f.weights, f.combiner, out)
    return out


def _contributions(
    table: TableSpec,
    plan: BatchPlan,
    plans: Sequence[FeaturePlan],
    grads: Mapping[str, F32],
    memory: Callable[[tuple[int, ...]], F32],
) -> tuple[DistinctRows, F32]:
    """Every entry's own gradient, entries ordered by shard (and in batch order within one)."""
    parts = []
    for f in plans:
        parts.append(np.empty((f.index.size, table.dim), dtype=np.float32))
        upstream = grads[f.spec.name].reshape(-1, table.dim)
        entry_gradients(upstream, f.row_splits, f.weights, f.combiner, parts[-1])
    distinct = plan.distinct[table.name]
    assert isinstance(distinct, DistinctRows), "contributions are of rows"
    index = np.concatenate([f.index for f in plans])
    shard = np.searchsorted(distinct.shard_splits, index, side="right") - 1
    order = np.argsort(shard, kind="stable")
    splits = np.searchsorted(shard[order], np.arange(distinct.shard_splits.size))
    index = index[order]
    rows = DistinctRows(distinct.ids[index], distinct.local_rows[index], splits)
    out = memory((order.size, table.dim))
    np.concatenate(parts).take(order, axis=0, out=out, mode="clip")  # raise would copy
    return rows, out
