"""Raw Parquet values of embedding columns become what a training step looks up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ps.columns import (
    EmbeddingColumn,
    categorical_column_with_identity,
    categorical_column_with_vocabulary_list,
    configs_from_columns,
    embedding_column,
    length_key,
    sequence_categorical_column_with_identity,
    sequence_categorical_column_with_vocabulary_list,
    weighted_categorical_column,
)
from ps.errors import DataError, IdRangeError, InputError
from ps.optimizers import SGD
from ps.partition import Layout
from ps.ragged import F32, Ragged
from ps.spec import resolve
from workers.batches import ExampleReader
from workers.config import DataConfig
from workers.plan import activations, plan_batch, row_gradients
from workers.raw_inputs import Positions, column_inputs

ROWS = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
WORDS = ["a", "b", "c", "d", "e"]
WORD = categorical_column_with_vocabulary_list("word", WORDS)
STEPS = sequence_categorical_column_with_vocabulary_list("step", WORDS)


def planned(column: EmbeddingColumn, raw: dict[str, pa.Array]) -> tuple[F32, F32, dict[str, F32]]:
    """(activations, gradient of the table for an upstream of ones, lengths) of one feature."""
    configs = configs_from_columns([column], SGD())
    spec = resolve(configs.feature_config)
    (feature,) = spec.features
    bags = {feature.name: column_inputs(configs)[feature.name].read(pa.table(raw))}
    plan = plan_batch(spec, Layout.of(spec, 2), bags)
    (table,) = spec.tables
    distinct = plan.distinct[table.name]
    found = activations(spec, plan, {table.name: ROWS[distinct.ids]})[feature.name]
    ones = {feature.name: np.ones_like(found)}
    pushed, grads = row_gradients(spec, plan, ones, {})
    total = np.zeros_like(ROWS)
    np.add.at(total, pushed[table.name].ids, grads[table.name])
    return found, total, plan.lengths


def test_unknown_words_are_dropped_before_the_mean() -> None:
    raw = {"word": pa.array([["a", "zz", "c"], ["zz"], None, ["e"]])}
    found, grads, lengths = planned(embedding_column(WORD, 2), raw)
    np.testing.assert_array_equal(found, [[3, 4], [0, 0], [0, 0], [9, 10]])
    np.testing.assert_array_equal(grads[:, 0], [0.5, 0, 0.5, 0, 1])
    assert lengths == {}


def test_without_safe_lookup_an_unknown_word_is_an_error() -> None:
    column = embedding_column(WORD, 2, use_safe_embedding_lookup=False)
    with pytest.raises(IdRangeError, match="feature 'word': id -1 is not in"):
        planned(column, {"word": pa.array([["a", "zz"]])})


def test_weights_that_are_not_positive_are_dropped_for_mean_but_not_for_sum() -> None:
    weighted = weighted_categorical_column(WORD, "w")
    raw = {
        "word": pa.array([["a", "b"], ["c"]]),
        "w": pa.array([[2.0, -1.0], [-3.0]], pa.list_(pa.float32())),
    }
    mean, _, _ = planned(embedding_column(weighted, 2), raw)
    np.testing.assert_array_equal(mean, [[1, 2], [0, 0]])
    total, grads, _ = planned(embedding_column(weighted, 2, "sum"), raw)
    np.testing.assert_array_equal(total, [[-1, 0], [-15, -18]])
    np.testing.assert_array_equal(grads[:, 0], [2, -1, -3, 0, 0])


def test_a_sequence_is_cut_and_padded_and_holes_touch_no_row() -> None:
    column = embedding_column(STEPS, 2, "sum", max_sequence_length=3)
    raw = {"step": pa.array([["a", "zz", "b", "c"], [], ["zz", "e"], ["d"]])}
    found, grads, lengths = planned(column, raw)
    np.testing.assert_array_equal(found[:, :, 0], [[1, 0, 3], [0, 0, 0], [0, 9, 0], [7, 0, 0]])
    np.testing.assert_array_equal(grads[:, 0], [1, 1, 0, 1, 1])  # "c" was cut off
    assert lengths.keys() == {length_key("step")}
    np.testing.assert_array_equal(lengths["step_seq_length_"], np.float32([3, 0, 2, 1]))


def test_a_step_may_have_several_values() -> None:
    column = embedding_column(
        sequence_categorical_column_with_identity("step", 5), 2, "mean", max_sequence_length=2
    )
    raw = {"step": pa.array([[[0, 2], []], [[], [1]], [[4], [3], [3]]])}
    found, grads, lengths = planned(column, raw)
    np.testing.assert_array_equal(found[:, :, 0], [[3, 0], [0, 3], [9, 7]])
    np.testing.assert_array_equal(grads[:, 0], [0.5, 1, 0.5, 1, 1])
    np.testing.assert_array_equal(lengths["step_seq_length_"], np.float32([1, 2, 2]))


def test_the_last_batch_of_an_evaluation_is_padded_with_empty_examples(tmp_path: Path) -> None:
    columns = [
        embedding_column(WORD, 2),
        embedding_column(STEPS, 2, max_sequence_length=2),
    ]
    path = write(tmp_path, word=["a", "b", "c"], step=[["a"], ["b", "c"], []], label=[0.0, 1, 2])
    inputs = column_inputs(configs_from_columns(columns, SGD()))
    data = DataConfig(train=path, label="label")
    (batch,) = ExampleReader(path, data, {}, inputs).in_order(5)
    word, step = batch.bags["word"], batch.bags["step"]
    assert isinstance(word, Ragged)
    assert word.to_lists() == [[0], [1], [2], [], []]
    assert isinstance(step, Positions)
    assert step.lengths.tolist() == [1, 2, 0, 0, 0]
    assert step.bags.num_examples == 10
    assert step.num_examples == 5


@pytest.mark.parametrize(
    ("column", "contents", "reason"),
    [
        (embedding_column(WORD, 2), {"other": ["a"]}, r"has no column 'word'; it has other, label"),
        (embedding_column(WORD, 2), {"word": [1]}, r"column 'word': .*must be compatible"),
        (
            embedding_column(categorical_column_with_identity("n", 3), 2),
            {"n": ["x"]},
            "column 'n': Invalid input, not integer",
        ),
        (
            embedding_column(weighted_categorical_column(WORD, "w"), 2),
            {"word": ["a"]},
            "has no column 'w'",
        ),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused_at_once(
    tmp_path: Path, column: EmbeddingColumn, contents: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path, **contents, label=[1.0])
    inputs = column_inputs(configs_from_columns([column], SGD()))
    with pytest.raises(DataError, match=reason):
        ExampleReader(path, DataConfig(train=path, label="label"), {}, inputs)


def test_weights_that_do_not_pair_are_an_error_of_their_batch(tmp_path: Path) -> None:
    path = write(tmp_path, word=[["a", "b"]], w=[[1.0]], label=[1.0])
    column = embedding_column(weighted_categorical_column(WORD, "w", "float64"), 2)
    inputs = column_inputs(configs_from_columns([column], SGD()))
    reader = ExampleReader(path, DataConfig(train=path, label="label"), {}, inputs)
    with pytest.raises(InputError, match="weights do not pair with the 2 values of 'word'"):
        list(reader.in_order(1))


def write(folder: Path, **columns: Any) -> Path:
    path = folder / "examples.parquet"
    pq.write_table(pa.table(columns), path)
    return path
