"""Embedding columns: tables, features, lookups. Numbers are TensorFlow's (its parity test)."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import ps.columns as fc
from ps.errors import ConfigError, IdRangeError, InputError
from ps.initializers import Constant, TruncatedNormal
from ps.inputs import Bags
from ps.lookup import lookup
from ps.optimizers import SGD, Adagrad
from ps.ragged import Ragged
from ps.spec import resolve

TABLE = np.array([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]], dtype=np.float32)


def identity(key: str = "k", buckets: int = 5) -> Any:
    return fc.categorical_column_with_identity(key, buckets)


def sequence(key: str = "s", buckets: int = 5) -> Any:
    return fc.sequence_categorical_column_with_identity(key, buckets)


def weighted(key: str = "k", weight_key: str = "w") -> Any:
    return fc.weighted_categorical_column(identity(key), weight_key)


def look_up(column: Any, features: dict[str, Any], table: Any = TABLE) -> Any:
    return fc.input_layer(features, column, {column.table_name: table}).tolist()


# Lookups: the examples of the specification


@pytest.mark.parametrize(
    ("combiner", "safe", "wanted"),
    [
        ("sum", True, [[11, 16], [0, 0], [-5, -6]]),
        ("mean", True, [[2.2, 3.2], [0, 0], [0, 0]]),
        ("sqrtn", True, [[3.050851, 4.437602], [0, 0], [0, 0]]),
        ("mean", False, [[2.2, 3.2], [0, 0], [5, 6]]),
    ],
)
def test_weights_count_as_in_tensorflow(combiner: str, safe: bool, wanted: Any) -> None:
    column = fc.embedding_column(weighted(), 2, combiner, use_safe_embedding_lookup=safe)
    ids = fc.RawValues([0, 1, 2], np.array([0, 2, 2, 3]))
    weights = fc.RawValues([2.0, 3.0, -1.0], np.array([0, 2, 2, 3]))
    np.testing.assert_allclose(look_up(column, {"k": ids, "w": weights}), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("num_oov_buckets", "table", "of_unknown"), [(0, TABLE[:2], [0, 0]), (1, TABLE[:3], [5, 6])]
)
def test_an_unknown_word_is_nothing_or_has_a_bucket(
    num_oov_buckets: int, table: Any, of_unknown: list[float]
) -> None:
    words = fc.categorical_column_with_vocabulary_list(
        "k", ["a", "b"], num_oov_buckets=num_oov_buckets
    )
    column = fc.embedding_column(words, 2, "sum")
    assert look_up(column, {"k": [["a", "b"], ["zz", ""]]}, table) == [[4, 6], of_unknown]


def test_an_unknown_word_is_refused_without_safety() -> None:
    words = fc.categorical_column_with_vocabulary_list("k", ["a", "b"])
    column = fc.embedding_column(words, 2, use_safe_embedding_lookup=False)
    with pytest.raises(IdRangeError, match="feature 'k': id -1 is not in"):
        look_up(column, {"k": [["zz"]]}, TABLE[:2])


def test_identity_refuses_what_is_too_large_unless_it_has_a_default() -> None:
    with pytest.raises(IdRangeError, match=r"id 5 is not in \[0, 5\)"):
        look_up(fc.embedding_column(identity(), 2), {"k": [5]})
    column = fc.embedding_column(fc.categorical_column_with_identity("k", 5, 2), 2)
    assert look_up(column, {"k": fc.RawValues([5, -7, 0], [0, 1, 2, 3])}) == [
        [5, 6],
        [5, 6],
        [1, 2],
    ]


def test_without_safety_there_is_still_one_row_per_example() -> None:
    column = fc.embedding_column(identity(), 2, "sum", use_safe_embedding_lookup=False)
    assert look_up(column, {"k": [[0, 1], [-1, -1]]}) == [[4, 6], [0, 0]]


def test_columns_stand_side_by_side_in_the_order_of_their_names() -> None:
    columns = [fc.embedding_column(identity("b"), 2), fc.embedding_column(identity("a"), 1)]
    tables = {"a": TABLE[:, :1].copy(), "b": TABLE}
    found = fc.input_layer({"a": [0, 1], "b": [[2], [3]]}, columns, tables)
    assert found.tolist() == [[1, 5, 6], [3, 7, 8]]
    with pytest.raises(InputError, match="no table 'b' among"):
        fc.input_layer({"a": [0], "b": [0]}, columns, {"a": TABLE})
    with pytest.raises(InputError, match="rank 3"):
        fc.input_layer({"a": [0], "b": [[[0]]]}, columns, tables)


def test_sequences_are_cut_and_padded_to_max_sequence_length() -> None:
    column = fc.embedding_column(sequence(), 2, max_sequence_length=2)
    values = fc.RawValues([0, 1, 2, 3], np.array([0, 3, 3, 4]))
    found, lengths = fc.sequence_input_layer({"s": values}, column, {"s": TABLE})
    assert found.tolist() == [[[1, 2], [3, 4]], [[0, 0], [0, 0]], [[7, 8], [0, 0]]]
    assert lengths.tolist() == [2, 0, 1]
    found, lengths = fc.sequence_input_layer({"s": values}, column, {"s": TABLE}, truncate=False)
    assert found.shape == (3, 3, 2)
    assert lengths.tolist() == [3, 0, 1]


def test_a_gap_in_a_sequence_counts_and_a_cut_off_id_is_not_looked_at() -> None:
    column = fc.embedding_column(sequence(), 2, max_sequence_length=3)
    found, lengths = fc.sequence_input_layer({"s": [[-1, -1, 2]]}, column, {"s": TABLE})
    assert found.tolist() == [[[0, 0], [0, 0], [5, 6]]]
    assert lengths.tolist() == [3]
    long = fc.RawValues([0, 0, 0, 99], np.array([0, 4]))
    fc.sequence_input_layer({"s": long}, column, {"s": TABLE})
    with pytest.raises(IdRangeError, match="id 99"):
        fc.sequence_input_layer({"s": long}, column, {"s": TABLE}, truncate=False)


def test_a_step_with_several_ids_is_combined() -> None:
    column = fc.embedding_column(sequence(), 2, "mean", max_sequence_length=2)
    flat = fc.RawValues([0, 1, 2, 3], np.array([0, 2, 4]), np.array([0, 2, 3, 3, 4]))
    for raw in ([[[0, 1], [2, -1]], [[-1, -1], [-1, 3]]], flat):
        found, lengths = fc.sequence_input_layer({"s": raw}, column, {"s": TABLE})
        assert found.tolist() == [[[2, 3], [5, 6]], [[0, 0], [7, 8]]]
        assert lengths.tolist() == [2, 2]
    with pytest.raises(InputError, match="a step of a sequence has 2 values, wanted one"):
        column.transform({"s": flat})
    assert column.transform({"s": [[-1, 3], [-1, -1]]}).to_lists() == [[-1, 3], []]


def test_sequences_of_one_layer_must_agree() -> None:
    pair = [fc.embedding_column(sequence(key), 2, max_sequence_length=2) for key in ("s", "t")]
    tables = {"s": TABLE, "t": TABLE}
    found, _ = fc.sequence_input_layer({"s": [[0, 1]], "t": [[2, 3]]}, pair, tables)
    assert found.tolist() == [[[1, 2, 5, 6], [3, 4, 7, 8]]]
    with pytest.raises(InputError, match="the same lengths"):
        fc.sequence_input_layer({"s": [[0, 1]], "t": [[2, -1]]}, pair, tables)
    with pytest.raises(InputError, match="the same lengths"):
        fc.sequence_input_layer({"s": [[0]], "t": [[2, -1]]}, pair, tables, truncate=False)
    other = fc.embedding_column(sequence("t"), 2, max_sequence_length=3)
    with pytest.raises(ConfigError, match="one max_sequence_length"):
        fc.sequence_input_layer({"s": [[0]], "t": [[2]]}, [pair[0], other], tables)


def test_ids_are_padded_to_the_width_of_the_tensor_core() -> None:
    ids, mask = fc.pad_to_width(Ragged.from_lists([[0, 1, 2], [], [3]]), 2)
    assert ids.tolist() == [[0, 1], [0, 0], [3, 0]]
    assert mask.tolist() == [[1, 1], [0, 0], [1, 0]]
    total = (TABLE[ids] * mask[..., None]).sum(axis=1)
    assert total.tolist() == [[4, 6], [0, 0], [7, 8]]
    mean = total / np.maximum(mask.sum(axis=1), 1)[:, None]
    assert mean.tolist() == [[2, 3], [0, 0], [7, 8]]


# Columns


def test_shared_columns_hold_one_table_in_the_order_given() -> None:
    columns = fc.shared_embedding_columns([identity("b"), weighted("a")], 2)
    assert [column.name for column in columns] == [
        "b_shared_embedding",
        "a_weighted_by_w_shared_embedding",
    ]
    assert {column.table_name for column in columns} == {"a_weighted_by_w_b_shared_embedding"}
    assert columns[0].collection is columns[1].collection
    assert columns[1].feature_key == "a"
    assert columns[1].weight_key == "w"
    named = fc.shared_embedding_columns(
        [identity("b")], 2, shared_embedding_collection_name="words"
    )
    assert named[0].table_name == "words"


def test_a_copy_of_a_column_keeps_everything() -> None:
    words = fc.categorical_column_with_vocabulary_list("w", ["a", "b"])
    single = fc.embedding_column(words, 2, use_safe_embedding_lookup=False)
    shared = fc.shared_embedding_columns(
        [identity("a"), identity("b")], 2, use_safe_embedding_lookup=False
    )
    for again in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        assert again(single) == single
        one, other = again(shared)
        assert one.collection is other.collection
        assert not one.use_safe_embedding_lookup
        assert again(single).transform({"w": [["b"]]}).to_lists() == [[1]]


# Tables and features


def test_columns_become_tables_and_features() -> None:
    def rate(step: int) -> float:
        return 0.1

    shared = fc.shared_embedding_columns(
        [sequence("t", 9), identity("u", 9)],
        4,
        "sum",
        max_sequence_lengths=[3, 0],
        learning_rate_fn=rate,
        initializer=Constant(1.0),
    )
    core = fc.embedding_column(
        identity("c"), 2, embedding_lookup_device="tpu_tensor_core", tensor_core_shape=[-1, 8]
    )
    loose = fc.embedding_column(
        weighted(), 2, None, learning_rate_fn=rate, use_safe_embedding_lookup=False
    )
    configs = fc.configs_from_columns([*shared, core, loose], Adagrad(0.5))
    spec = resolve(configs.feature_config)
    tables = {table.name: table for table in spec.tables}
    assert list(configs.feature_config) == ["t", "u", "c", "k"]
    collection = tables["t_u_shared_embedding"]
    assert (collection.vocabulary_size, collection.dim, collection.combiner) == (9, 4, "sum")
    assert collection.initializer == Constant(1.0)
    assert collection.optimizer == Adagrad(rate)
    assert collection.optimizer.learning_rate is rate
    assert tables["k_weighted_by_w"].optimizer.learning_rate is rate
    assert tables["k_weighted_by_w"].combiner == "mean"
    assert tables["c"].optimizer == Adagrad(0.5)
    assert tables["c"].initializer == TruncatedNormal(0.0, 1 / np.sqrt(2))
    features = {feature.name: feature for feature in spec.features}
    assert features["t"].max_sequence_length == 3
    assert features["t"].table == features["u"].table == "t_u_shared_embedding"
    assert features["c"].tensor_core_width == 8
    assert not features["k"].validate_weights_and_indices
    assert configs.transforms["k"].raw_keys == ("k", "w")
    assert configs.devices == {"t": None, "u": None, "c": "tpu_tensor_core", "k": None}


def test_a_feature_of_these_configs_looks_up_what_the_input_layer_does() -> None:
    words = fc.categorical_column_with_vocabulary_list("k", ["a", "b", "c", "d", "e"])
    column = fc.embedding_column(fc.weighted_categorical_column(words, "w"), 2)
    configs = fc.configs_from_columns(column)
    raw = {"k": [["a", "zz"], ["c"]], "w": [[1, 2], [3]]}
    spec = resolve(configs.feature_config)
    feature, table = spec.features[0], spec.tables[0]
    bags = Bags(configs.transforms["k"](raw))
    found = lookup(feature, table.name, table.combiner, TABLE, bags)
    assert found.tolist() == look_up(column, raw) == [[1, 2], [5, 6]]


def test_columns_without_an_optimizer_leave_it_to_the_job() -> None:
    configs = fc.configs_from_columns(fc.embedding_column(identity(), 2))
    assert resolve(configs.feature_config, SGD(0.25)).tables[0].optimizer == SGD(0.25)


@pytest.mark.parametrize(
    ("columns", "fragment"),
    [
        (list, "must not be empty"),
        (lambda: {"k": identity()}, "found dict"),
        (lambda: [identity()], "Items of feature_columns must be embedding columns"),
        (
            lambda: [fc.embedding_column(identity(), 2), fc.embedding_column(weighted(), 2)],
            "Feature column k is used with multiple embeddings",
        ),
        (
            lambda: [
                fc.embedding_column(identity("a"), 2),
                *fc.shared_embedding_columns(
                    [identity("b")], 2, shared_embedding_collection_name="a"
                ),
            ],
            "Tables must have a unique name",
        ),
        (
            lambda: fc.embedding_column(identity(), 2, learning_rate_fn=lambda step: 0.1),
            "column 'k_embedding' has a `learning_rate_fn`, which needs an `optimizer`",
        ),
        (
            lambda: fc.embedding_column(identity(), 2, "max"),
            "column 'k_embedding': TableConfig: `combiner`",
        ),
        (lambda: fc.embedding_column(identity(), 2.5), "column 'k_embedding': .* `dim`"),
        (
            lambda: fc.embedding_column(
                identity(),
                2,
                embedding_lookup_device="tpu_tensor_core",
                tensor_core_shape=[8, None],
            ),
            "column 'k_embedding': .*tensor_core_shape",
        ),
    ],
)
def test_columns_that_do_not_fit_a_job_are_refused(columns: Any, fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        fc.configs_from_columns(columns())
