"""Structures of features: paths, subsets, packing, sameness. Leaves may be anything."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.errors import InputError
from ps.structures import check_same_structure, flatten, pack_like, select

Point = namedtuple("Point", ["y", "x"])
Other = namedtuple("Other", ["y", "x"])
KEYS = st.sampled_from("abc")
NESTED: st.SearchStrategy[Any] = st.recursive(
    st.integers() | st.none() | st.text(max_size=2),
    lambda inner: (
        st.dictionaries(KEYS, inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(Point, inner, inner)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("structure", "wanted"),
    [
        (7, [("", 7)]),
        ({}, []),
        ({"b": 1, "a": [2, (3,)]}, [("a/0", 2), ("a/1/0", 3), ("b", 1)]),
        ({10: 1, 9: 2}, [("9", 2), ("10", 1)]),
        ({10: 1, "9": 2}, [("10", 1), ("9", 2)]),
        (Point(y=1, x=[2]), [("y", 1), ("x/0", 2)]),
        ({"a": "text", "b": None, "c": range(3)}, [("a", "text"), ("b", None), ("c", range(3))]),
        (MappingProxyType({"a": 1}), [("a", 1)]),
    ],
)
def test_leaves_come_with_their_paths(structure: object, wanted: object) -> None:
    assert list(flatten(structure)) == wanted


@given(structure=NESTED)
def test_packing_the_leaves_gives_the_structure_back(structure: Any) -> None:
    leaves = [leaf for _, leaf in flatten(structure)]
    packed = pack_like(structure, leaves)
    assert packed == structure
    assert type(packed) is type(structure)
    check_same_structure(structure, pack_like(structure, [None] * len(leaves)))


def test_packing_keeps_types_and_key_order() -> None:
    made = pack_like(OrderedDict(z=0, a=0), [1, 2])
    assert made == OrderedDict(z=2, a=1)
    assert type(made) is OrderedDict
    made = pack_like(defaultdict(int, z=0, a=0), [1, 2])
    assert (list(made.items()), made["new"]) == ([("z", 2), ("a", 1)], 0)
    assert list(pack_like({"z": 0, "a": [0, 0]}, [1, 2, 3]).items()) == [("z", 3), ("a", [1, 2])]
    assert pack_like(Point(0, 0), [1, 2]) == Point(y=1, x=2)
    assert type(pack_like(MappingProxyType({"a": 0}), [1])) is MappingProxyType


@pytest.mark.parametrize(
    ("inputs", "config"),
    [
        ({"a": 1}, {"a": 10, "b": 20}),
        ([1], (10, 20)),
        ({"0": 1}, (10, 20)),
        ({"a": {"b": 1}}, {"a/b": 10}),
        ({3: 1}, {"3": 10}),
        (1, 10),
    ],
)
def test_only_joined_paths_decide_which_config_an_input_has(inputs: Any, config: Any) -> None:
    assert [pair[1:] for pair in select(inputs, config)] == [(1, 10)]


@pytest.mark.parametrize(
    ("inputs", "config"),
    [({"c": 1}, {"a": 10}), ((1, 2), (10,)), (1, {"a": 10}), ({"a": {"b": 1}}, {"a": 10})],
)
def test_inputs_without_a_config_are_refused(inputs: Any, config: Any) -> None:
    with pytest.raises(ValueError, match="Inputs are not a subset of feature_config"):
        select(inputs, config)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": 1}, OrderedDict(a=None)),
        ({"a": [1, 2]}, defaultdict(int, {"a": [None, 2]})),
        (Point(1, 2), namedtuple("Point", ["y", "x"])(3, None)),
        ([], []),
        (1, None),
    ],
)
def test_equal_nesting_is_the_same_structure(first: Any, second: Any) -> None:
    check_same_structure(first, second)


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        ({"a": 1}, {"b": 1}, InputError, "the first has 'a', the second has 'b'"),
        ({1: 0}, {"1": 0}, InputError, "the first has '1', the second has '1'"),
        ({"a": 1}, {}, InputError, "the first has 'a', the second has nothing"),
        ([1, 2], [1], InputError, "the first has '0', '1', the second has '0'"),
        ({"a": 1}, 1, InputError, "the first is a dict, the second is a leaf"),
        ({"a": {"b": 1}}, {"a": {"b": {}}}, InputError, "at 'a/b': the first is a leaf"),
        ([1], (1,), TypeError, "the first is a list, the second is a tuple"),
        ({"a": [1]}, {"a": {"0": 1}}, TypeError, "at 'a': the first is a list"),
        (Point(1, 2), Other(1, 2), TypeError, "the first is a Point, the second is a Other"),
        (Point(1, 2), (1, 2), TypeError, "the first is a Point, the second is a tuple"),
    ],
)
def test_other_nesting_is_refused_by_keys_or_by_type(
    first: Any, second: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"don't have the same nested structure.*{message}"):
        check_same_structure(first, second)
