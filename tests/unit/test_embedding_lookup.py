"""Lookups of whole structures, of tables in row shards, and tables that cannot be looked up."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.config import COMBINERS, Combiner, CustomCombiner, FeatureConfig, TableConfig
from ps.errors import ConfigError, IdRangeError, InputError
from ps.inputs import Bags, Dense, Ragged, Sparse
from ps.lookup import embedding_lookup, lookup
from ps.partition import div_splits, slices
from ps.ragged import F32
from ps.spec import FeatureSpec
from tests.support.exports import ROWS_VD
from tests.support.strategies import bags, frozen

FEATURE = FeatureSpec(name="f", table="t")
VIDEO, USER = (
    TableConfig(5, 2, combiner=c, name=n) for c, n in (("sum", "video"), ("mean", "user"))
)
TABLES = {VIDEO: ROWS_VD, USER: ROWS_VD[:3]}
Pair = namedtuple("Pair", ["second", "first"])
CONFIG = {
    "watched": FeatureConfig(VIDEO, max_sequence_length=2),
    "side": (FeatureConfig(VIDEO), FeatureConfig(USER)),
}


def test_answers_come_in_the_structure_of_the_inputs() -> None:
    inputs = OrderedDict(
        watched=Ragged.from_lists([[0, 1, 2]]),
        side=[Dense(np.array(4)), Sparse(np.array([[0, 0], [0, 1]]), np.array([0, 1]), (1, 2))],
    )
    found = embedding_lookup(inputs, TABLES, CONFIG)
    assert type(found) is OrderedDict
    assert list(found) == ["watched", "side"]
    assert found["watched"].tolist() == [[[1, 2], [3, 4]]]
    assert [a.tolist() for a in found["side"]] == [[9, 10], [[2, 3]]]


def test_any_subset_of_the_features_will_do() -> None:
    found = embedding_lookup({"side": {"1": Dense(np.array([2]))}}, TABLES, CONFIG)
    assert found["side"]["1"].tolist() == [[5, 6]]
    assert embedding_lookup({}, TABLES, CONFIG) == {}
    alone = embedding_lookup(Dense(np.array([2])), {VIDEO: ROWS_VD}, FeatureConfig(VIDEO))
    assert alone.tolist() == [[5, 6]]


def test_named_tuples_are_matched_by_their_fields() -> None:
    config = Pair(first=FeatureConfig(USER), second=FeatureConfig(VIDEO))
    found = embedding_lookup(Pair(Dense(np.array(4)), Dense(np.array(0))), TABLES, config)
    assert type(found) is Pair
    assert found.second.tolist() == [9, 10]


def test_an_input_without_a_feature_is_refused() -> None:
    for inputs in ({"sides": Dense(np.array(0))}, [Dense(np.array(0))], Dense(np.array(0))):
        with pytest.raises(InputError, match="Inputs are not a subset of feature_config"):
            embedding_lookup(inputs, TABLES, CONFIG)


def test_the_rows_bound_the_ids_not_the_config() -> None:
    with pytest.raises(IdRangeError, match=r"'side/1': id 3 is not in \[0, 3\) of table 'user'"):
        embedding_lookup({"side": {"1": Dense(np.array([3]))}}, TABLES, CONFIG)


def test_tables_are_found_by_identity() -> None:
    twin = TableConfig(5, 2, combiner="sum", name="video")
    with pytest.raises(KeyError, match="feature 'watched': `tables` lacks its table 'video'"):
        embedding_lookup({"watched": Ragged.from_lists([])}, {twin: ROWS_VD}, CONFIG)


def test_a_feature_must_be_a_feature_config() -> None:
    with pytest.raises(ConfigError, match="feature 'a': wanted a FeatureConfig, got 3"):
        embedding_lookup({"a": Dense(np.array(0))}, TABLES, {"a": 3})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS_VD.tolist(), r"rows must be a float32 \[V, D\] array, got \[1.0, 2.0\]"),
        (ROWS_VD.astype(np.float64), r"must be a float32 \[V, D\] array, got 'float64 \[5, 2\]'"),
        (ROWS_VD[0], r"got 'float32 \[2\]'"),
        ([ROWS_VD, ROWS_VD[:, :1]], r"row shards must have one D, got \[1, 2\]"),
        ([], r"row shards must have one D, got \[\]"),
    ],
)
def test_rows_of_another_form_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"table 'video': .*{message}"):
        embedding_lookup({"side": [Dense(np.array(0))]}, {VIDEO: rows}, CONFIG)


def shards_of(rows: F32, count: int) -> list[F32]:
    return slices(rows, div_splits(len(rows), count))


@given(bag=bags(13), count=st.integers(1, 15), combiner=st.sampled_from(COMBINERS), data=st.data())
def test_row_shards_answer_as_the_whole_table(
    bag: Ragged, count: int, combiner: Combiner, data: Any
) -> None:
    rows = np.random.default_rng(0).normal(size=(13, 3)).astype(np.float32)
    places = np.repeat(np.arange(bag.num_examples), np.diff(bag.row_splits))
    indices = np.stack([places, bag.positions], 1)
    kinds = [
        Dense(bag.ids),
        bag,
        Bags(bag),
        Sparse(indices, bag.ids, (bag.num_examples, 9), bag.weights),
    ]
    value = data.draw(st.sampled_from(kinds))
    length = 2 if bag.weights is None and not isinstance(value, Dense) else 0
    feature = FeatureSpec(
        name="f", table="t", max_sequence_length=data.draw(st.sampled_from([0, length]))
    )
    whole = lookup(feature, "t", combiner, rows, value)
    np.testing.assert_array_equal(
        lookup(feature, "t", combiner, shards_of(rows, count), value), whole
    )


def test_row_shards_check_ids_against_the_whole_table() -> None:
    shards = shards_of(ROWS_VD, 2)
    assert lookup(FEATURE, "t", "mean", shards, Dense(np.array([0, 4]))).tolist() == [
        [1, 2],
        [9, 10],
    ]
    cut = FeatureSpec(name="f", table="t", max_sequence_length=1)
    found = lookup(cut, "t", "mean", shards, Bags(Ragged.from_lists([[3, 2**40, -1]])))
    assert found.tolist() == [[[7, 8]]]  # what is cut off is not looked at
    for bad in (-1, 5, 2**40):
        with pytest.raises(IdRangeError, match=rf"id {bad} is not in \[0, 5\)"):
            lookup(FEATURE, "t", "mean", shards, Dense(np.array([0, bad])))


def test_ids_beyond_int32_find_their_rows() -> None:
    rows = np.broadcast_to(np.float32(7), (2**31 + 2, 1))
    assert lookup(FEATURE, "t", "sum", rows, Dense(np.array([2**31 + 1]))).tolist() == [[7]]
    with pytest.raises(IdRangeError, match=f"id {2**31 + 2} is not in"):
        lookup(FEATURE, "t", "sum", rows, Dense(np.array([2**31 + 2])))


@pytest.mark.parametrize("value", [Dense(np.array([4, 1])), Ragged.from_lists([[4, 0], [], [1]])])
def test_rows_may_lie_in_any_order_in_memory(value: Any) -> None:
    whole = np.arange(40, dtype=np.float32).reshape(5, 8)
    wanted = lookup(FEATURE, "t", "sum", whole[:, :4].copy(), value)
    for rows in (whole[:, :4], np.asfortranarray(whole[:, :4]), whole[::-1].copy()[::-1, :4]):
        assert not rows.flags.c_contiguous
        assert np.array_equal(lookup(FEATURE, "t", "sum", rows, value), wanted)


BAG = Ragged.from_lists([[0, 1]], [[1, 2]])
SPARSE = Sparse(np.array([[0, 0], [0, 1]]), BAG.ids, (1, 2), BAG.weights)


@pytest.mark.parametrize("value", [Dense(np.array([0])), BAG, Bags(BAG), SPARSE])
def test_a_custom_combiner_is_refused_in_lookups(value: Any) -> None:
    combiner = CustomCombiner(lambda valency, vectors: vectors[0], 3)
    with pytest.raises(ConfigError, match="table 't': a lookup combines by one of"):
        lookup(FEATURE, "t", combiner, ROWS_VD, value)


def test_what_is_not_an_input_is_refused() -> None:
    value: Any = np.array([1, 2])
    with pytest.raises(InputError, match=r"Input f is .*; Dense, Sparse or Ragged expected"):
        lookup(FEATURE, "t", "sum", ROWS_VD, value)


def test_read_only_arrays_are_enough() -> None:
    weights = None if BAG.weights is None else frozen(BAG.weights)
    bag = Ragged(frozen(BAG.ids), frozen(BAG.row_splits), weights)
    value = Sparse(frozen(SPARSE.indices), bag.ids, (1, 2), weights)
    for one in (bag, Bags(bag), value):
        assert lookup(FEATURE, "t", "sum", frozen(ROWS_VD), one).tolist() == [[7, 10]]
