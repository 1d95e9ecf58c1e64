"""TensorFlow is the oracle of the lookup core: `ps.lookup` against `serving_embedding_lookup`.

Same shape, same values, an error exactly where TensorFlow errs. Where our rule is another one, the
suite encodes ours: weights of any float type are cast to float32 (`lookup_cases.stock` casts them
first, because TensorFlow documents the cast and mostly refuses), and row shards are "div" on every
path.

Tolerance: rtol 1e-5, atol 1e-6·max(1, n/50) for n ids per example. The reference itself is not
bit-stable between its paths.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ps.config import COMBINERS, Combiner
from ps.errors import InputError
from ps.inputs import Dense, Input, Ragged, Sparse
from ps.lookup import embedding_lookup, lookup, lookup_shape
from ps.partition import div_splits, slices
from ps.ragged import F32
from ps.spec import FeatureSpec
from ps.structures import check_same_structure, flatten, pack_like
from tests.support.lookup_cases import (
    DIM,
    Case,
    Refused,
    cases,
    check,
    outcome,
    stock,
    stock_config,
    tensorflow_inputs,
)
from tests.support.parity_size import examples

pytestmark = pytest.mark.parity

serving_embedding_lookup = tf.tpu.experimental.embedding.serving_embedding_lookup


def can_be_asked(case: Case) -> bool:
    """Our `Dense` has no weights to refuse; HTTP refuses them when it reads a request."""
    return case.kind != "dense" or case.weights is None


def our_input(case: Case) -> Input:
    if case.kind == "dense":
        return Dense(case.ids)
    if case.kind == "ragged":
        return Ragged(case.ids, case.row_splits, case.weights)
    return Sparse(case.indices, case.ids, case.dense_shape, case.weights)


def ours(case: Case, num_shards: int = 0) -> F32 | Refused:
    """Our answer, from the whole table or from row shards."""
    rows: Any = case.rows
    if num_shards:
        rows = slices(case.rows, div_splits(case.num_rows, num_shards))

    def call() -> F32:
        feature = FeatureSpec(name="f", table="t", **case.options)
        value = our_input(case)
        found = lookup(feature, "t", case.combiner, rows, value)
        assert found.shape == lookup_shape(feature, DIM, value)
        return found

    return outcome(call, (InputError,))


@settings(max_examples=examples(280))
@given(case=cases().filter(can_be_asked))
def test_the_core_gives_what_tensorflow_gives(case: Case) -> None:
    check(ours(case), stock(case))


@settings(max_examples=examples(20))
@given(case=cases().filter(can_be_asked), num_shards=st.integers(1, 6))
def test_row_shards_give_what_tensorflow_gives_from_the_whole_table(
    case: Case, num_shards: int
) -> None:
    check(ours(case, num_shards), stock(case))


@pytest.mark.parametrize("num_shards", [2, 5])
@pytest.mark.parametrize("kind", ["dense", "sparse", "ragged sequence"])
def test_row_shards_are_cut_where_tensorflow_cuts_them(kind: str, num_shards: int) -> None:
    ids, splits = np.arange(13), np.array([0, 4, 4, 13])
    sparse = np.stack([np.repeat([0, 1, 2], [4, 0, 9]), np.arange(13)], axis=1)
    case = {
        "dense": Case("dense", ids, 13),
        "sparse": Case("sparse", ids, 13, indices=sparse, dense_shape=(3, 13)),
        "ragged sequence": Case("ragged", ids, 13, max_sequence_length=3, row_splits=splits),
    }[kind]
    feature = stock_config(case)
    shards = [tf.constant(rows) for rows in slices(case.rows, div_splits(13, num_shards))]
    wanted = serving_embedding_lookup(
        {"f": tensorflow_inputs(case)[0]}, None, {feature.table: shards}, {"f": feature}
    )
    check(ours(case, num_shards), wanted["f"].numpy())


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("kind", ["safe", "raw", "ragged"])
@pytest.mark.parametrize("num_ids", [100, 5000])
def test_long_examples_stay_within_the_tolerance(
    combiner: Combiner, kind: str, num_ids: int
) -> None:
    rng = np.random.default_rng(num_ids)
    ids = rng.integers(0, 13, size=2 * num_ids)
    places = np.stack([np.repeat([0, 1], num_ids), np.tile(np.arange(num_ids), 2)], axis=1)
    form: dict[str, Any] = {"indices": places, "dense_shape": (2, num_ids)}
    if kind == "ragged":
        form = {"row_splits": np.array([0, num_ids, 2 * num_ids])}
    for weights in (None, rng.uniform(0.1, 1, size=ids.size).astype(np.float32)):
        case = Case(
            "ragged" if kind == "ragged" else "sparse",
            ids,
            13,
            combiner,
            validate=kind == "safe",
            weights=weights,
            **form,
        )
        found, wanted = ours(case), stock(case)
        assert not isinstance(found, Refused)
        atol = 1e-6 * max(1, num_ids / 50)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=atol)


Pair = namedtuple("Pair", ["second", "first"])
Wrap = Callable[[Sequence[Any]], Any]
SHAPES: list[tuple[int, Wrap, Wrap]] = [
    # number of features; the inputs' structure; the config's, with one feature more
    (1, lambda f: f[0], lambda f: f[0]),
    (2, lambda f: {"z": f[0], "a": f[1]}, lambda f: {"a": f[1], "b": f[2], "z": f[0]}),
    (2, lambda f: [f[0], f[1]], lambda f: (f[0], f[1], f[2])),
    (2, lambda f: OrderedDict(b={"c": f[0]}, a=[f[1]]), lambda f: {"b/c": f[0], "a": f[1:]}),
    (2, lambda f: Pair(f[0], f[1]), lambda f: {"second": f[0], "first": f[1], "x": f[2]}),
    (3, lambda f: {"b": (f[0], {"c": f[1]}), "a": f[2]},
     lambda f: defaultdict(list, {"b": (f[0], {"c": f[1]}), "a": f[2]})),
]  # fmt: skip


@settings(max_examples=examples(10))
@given(shape=st.sampled_from(SHAPES), data=st.data())
def test_structures_of_features_give_what_tensorflow_gives(
    shape: tuple[int, Wrap, Wrap], data: st.DataObject
) -> None:
    count, inputs, config = shape
    drawn = [data.draw(cases().filter(can_be_asked)) for _ in range(count)]
    sides = [tensorflow_inputs(case, np.float32) for case in drawn]
    stock_features = [stock_config(case) for case in drawn]
    features = config([*stock_features, stock_config(Case("dense", np.array(0)))])
    tables = {f.table: c.rows for f, c in zip(stock_features, drawn, strict=True)}
    variables = {table: tf.Variable(rows) for table, rows in tables.items()}
    try:
        wanted = serving_embedding_lookup(
            inputs([ids for ids, _ in sides]), inputs([w for _, w in sides]), variables, features
        )
    except (ValueError, tf.errors.InvalidArgumentError):
        with pytest.raises(InputError):
            embedding_lookup(inputs([our_input(case) for case in drawn]), tables, features)
        return
    found = embedding_lookup(inputs([our_input(case) for case in drawn]), tables, features)
    tf.nest.assert_same_structure(found, wanted)
    assert type(found) is type(wanted) or count == 1
    assert not isinstance(found, dict) or list(found) == list(wanted)
    for ours_one, theirs in zip(tf.nest.flatten(found), tf.nest.flatten(wanted), strict=True):
        check(ours_one, theirs.numpy())


class Names(list[Any]):
    """A list of another type, which `tf.nest` takes for a list."""


NESTED: st.SearchStrategy[Any] = st.recursive(
    st.integers(0, 9),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        st.dictionaries(st.sampled_from("ab"), inner, max_size=2).map(OrderedDict),
        st.lists(inner, max_size=2),
        st.lists(inner, max_size=2).map(Names),
        st.lists(inner, max_size=2).map(tuple),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=4,
)


def refusal(check_same: Callable[[Any, Any], None], first: Any, second: Any) -> type | None:
    """TypeError, ValueError or nothing."""
    try:
        check_same(first, second)
    except TypeError:
        return TypeError
    except ValueError:
        return ValueError
    return None


@settings(max_examples=examples(150))
@given(first=NESTED, second=NESTED)
@example(first={"a": [1], "b": 2}, second={"a": (1,), "c": 2})
@example(first=[[1], {"a": 2}], second=[(1,), {"b": 2}])
@example(first=[[1, 2], (3,)], second=[[1], [3]])
def test_structures_are_the_same_and_packed_as_tensorflow_has_it(first: Any, second: Any) -> None:
    leaves = [leaf for _, leaf in flatten(first)]
    assert leaves == tf.nest.flatten(first)
    numbers = list(range(len(leaves)))
    ours_packed, theirs = pack_like(first, numbers), tf.nest.pack_sequence_as(first, numbers)
    assert ours_packed == theirs
    assert type(ours_packed) is type(theirs)
    wanted = refusal(tf.nest.assert_same_structure, first, second)
    assert refusal(check_same_structure, first, second) is wanted
