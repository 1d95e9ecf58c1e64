"""Lookups over columns on the CPU: TensorFlow's input layers, in NumPy.

Combining is `ps.lookup`'s. `embedding_lookup_device` makes no difference here, "cpu" included, and
an input layer takes shared columns too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from ps.columns.embedding import EmbeddingColumn
from ps.columns.steps import Steps
from ps.errors import ConfigError, InputError
from ps.inputs import Bags
from ps.lookup import lookup
from ps.ragged import F32, I64, Ragged
from ps.reader import Rows, checked_rows
from ps.spec import FeatureSpec


def input_layer(
    features: Mapping[str, Any],
    columns: EmbeddingColumn | Iterable[EmbeddingColumn],
    tables: Mapping[str, Rows],
) -> F32:
    """One vector per example: `tf.compat.v1.feature_column.input_layer`, or `DenseFeatures`.

    With `use_safe_embedding_lookup=False`, where TensorFlow leaves out trailing examples without
    ids, they are zeros as those before them: there are always B rows.

    Args:
        features: raw inputs by name, in any of the forms of `ps.columns.raw`.
        columns: embedding columns that are no sequences.
        tables: float32 [V, D], or row shards, by table name.

    Returns:
        float32 [B, ΣD], the columns side by side in the order of their names.

    Raises:
        ConfigError: no column, two of one name, a sequence column, an unknown combiner.
        InputError: an input or a table is missing or malformed; an id outside its table.
    """
    outputs: list[F32] = []
    for column in _in_order(columns):
        if column.is_sequence:
            raise ConfigError(
                f"In embedding_column: {column.name}. categorical_column must not be of type "
                "SequenceCategoricalColumn. Use sequence_input_layer for it."
            )
        bags = column.transform.bags(features)
        feature = FeatureSpec(
            name=column.feature_key,
            table=column.table_name,
            validate_weights_and_indices=bool(column.use_safe_embedding_lookup),
        )
        outputs.append(_lookup(feature, column.combiner, _rows(tables, column), bags))
    if len({len(output) for output in outputs}) > 1:
        raise InputError(
            "Batch size (first dimension) of each feature must be same, got "
            f"{[len(output) for output in outputs]}"
        )
    return np.concatenate(outputs, axis=1)


def sequence_input_layer(
    features: Mapping[str, Any],
    columns: EmbeddingColumn | Iterable[EmbeddingColumn],
    tables: Mapping[str, Rows],
    *,
    truncate: bool = True,
) -> tuple[F32, I64]:
    """One vector per step: TensorFlow's `SequenceFeatures`.

    Args:
        features: see `input_layer`.
        columns: embedding columns of sequences.
        tables: see there.
        truncate: cut or pad to the `max_sequence_length` L of the columns, as is documented. False
            does as TensorFlow does on the CPU: T is the longest sequence, and nothing is cut.

    Returns:
        (float32 [B, L or T, ΣD], int64 [B]: lengths, the last step with an id included).

    Raises:
        ConfigError: no column, two of one name, one that is no sequence, columns of different L.
        InputError: as `input_layer`, and sequences of different lengths.
    """
    ordered = _in_order(columns)
    for column in ordered:
        if not column.is_sequence:
            raise ConfigError(
                f"In embedding_column: {column.name}. categorical_column must be of type "
                "SequenceCategoricalColumn to use sequence_input_layer. Use one of "
                "sequence_categorical_column_with_*."
            )
    limits = sorted({column.max_sequence_length for column in ordered})
    if truncate and len(limits) > 1:
        raise ConfigError(f"columns of one layer must have one max_sequence_length, got {limits}")
    outputs, lengths = [], []
    for column in ordered:
        steps = column.transform.steps(features)
        width = limits[0] if truncate else steps.width
        feature = FeatureSpec(name=column.feature_key, table=column.table_name)
        rows = _rows(tables, column)
        outputs.append(lookup_steps(feature, column.combiner, rows, steps, width))
        lengths.append(np.minimum(steps.lengths, width))
    shapes = [output.shape[:2] for output in outputs]
    if len(set(shapes)) > 1 or any(not np.array_equal(lengths[0], other) for other in lengths):
        names = [column.name for column in ordered]
        raise InputError(f"sequences of one layer must have the same lengths: {names}, {shapes}")
    return np.concatenate(outputs, axis=2), lengths[0]


def lookup_steps(
    feature: FeatureSpec, combiner: object, rows: Rows, steps: Steps, length: int
) -> F32:
    """float32 [B, length, D]: each step combined, ids < 0 dropped; no ids and padding are zeros.

    Args:
        feature: gives the names for errors; that it is a sequence makes no difference.
        combiner: of the table.
        rows: float32 [V, D], or row shards.
        steps: the ids. Those beyond `length` are not looked at.
        length: positions of the result.

    Raises:
        IdRangeError: an id >= V.
        ConfigError: an unknown combiner.
    """
    steps = steps.cut(length)
    step = FeatureSpec(name=feature.name, table=feature.table)
    vectors_SD = _lookup(step, combiner, rows, steps.bags)
    lengths = steps.lengths
    example = np.repeat(np.arange(lengths.size), lengths)
    position = np.arange(example.size) - steps.row_splits[example]
    out_BLD = np.zeros((lengths.size, length, vectors_SD.shape[1]), dtype=np.float32)
    out_BLD[example, position] = vectors_SD
    return out_BLD


def pad_to_width(bags: Ragged, width: int) -> tuple[I64, F32]:
    """The inputs of a lookup on the tensor core, without weights.

    Args:
        bags: ids of B examples.
        width: W, the second size of `tensor_core_shape`, at least 1.

    Returns:
        (int64 [B, W]: the first W ids of each example, then 0; float32 [B, W]: 1 for an id).
    """
    keep = bags.positions < width
    example = np.repeat(np.arange(bags.num_examples), np.diff(bags.row_splits))[keep]
    place = example, bags.positions[keep]
    ids_BW = np.zeros((bags.num_examples, width), dtype=np.int64)
    mask_BW = np.zeros((bags.num_examples, width), dtype=np.float32)
    ids_BW[place] = bags.ids[keep]
    mask_BW[place] = 1.0
    return ids_BW, mask_BW


def _lookup(feature: FeatureSpec, combiner: object, rows: Rows, bags: Ragged) -> F32:
    combiner = "mean" if combiner is None else combiner
    return lookup(feature, feature.table, combiner, rows, Bags(bags))


def _rows(tables: Mapping[str, Rows], column: EmbeddingColumn) -> Rows:
    name = column.table_name
    if name not in tables:
        raise InputError(f"column '{column.name}': no table '{name}' among {sorted(tables)}")
    return checked_rows(name, tables[name])


def _in_order(columns: EmbeddingColumn | Iterable[EmbeddingColumn]) -> list[EmbeddingColumn]:
    """By name, as TensorFlow puts them side by side."""
    ordered = sorted(embedding_columns(columns), key=lambda column: column.name)
    for one, other in pairwise(ordered):
        if one.name == other.name:
            raise ConfigError(f"Duplicate feature column name found for columns: {one} and {other}")
    return ordered


def embedding_columns(
    columns: EmbeddingColumn | Iterable[EmbeddingColumn],
) -> list[EmbeddingColumn]:
    """One or several columns as a list.

    Raises:
        ConfigError: a dict, nothing, or something that is no embedding column.
    """
    if isinstance(columns, EmbeddingColumn):
        return [columns]
    if isinstance(columns, dict):
        raise ConfigError("Expected feature_columns to be iterable, found dict.")
    found: list[Any] = list(_each(columns))
    if not found:
        raise ConfigError("feature_columns must not be empty.")
    return found


def _each(columns: Iterable[Any]) -> Iterator[EmbeddingColumn]:
    for column in columns:
        if not isinstance(column, EmbeddingColumn):
            raise ConfigError(
                "Items of feature_columns must be embedding columns. You can wrap a categorical "
                f"column with embedding_column. Given (type {type(column)}): {column}."
            )
        yield column
