"""`EmbeddingForServing` beside TensorFlow's `TPUEmbeddingForServing`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.distribute import distribute_lib
from tensorflow.python.tpu import tpu_embedding_for_serving

import ps.config as ours
from ps.initializers import RandomNormal, RowIdInitializer
from serving.tf import EmbeddingForServing
from tests.support.tf_features import OPTIMIZERS, optimizer, ragged, sparse, table

pytestmark = pytest.mark.parity

stock = tf.tpu.experimental.embedding
StockEmbedding = stock.TPUEmbeddingForServing


@pytest.fixture(params=["TensorFlow's configs", "Manta's configs"])
def configs(request: pytest.FixtureRequest) -> Any:
    return ours if request.param == "Manta's configs" else stock


def lookup(
    configs: Any, ids: Any, weights: Any = None, combiner: str = "sum", **options: Any
) -> Any:
    """The activations of one feature, as an array."""
    feature = configs.FeatureConfig(table(configs, "t", combiner), **options)
    embedding = EmbeddingForServing({"f": feature}, None)
    return embedding({"f": ids}, None if weights is None else {"f": weights})["f"].numpy()


IDS = [[0, 1], [], [2]]
WEIGHTS = [[0.5, 2.0], [], [3.0]]


def test_dense_ids_give_their_rows(configs: Any) -> None:
    for dtype in (tf.int32, tf.int64):
        found = lookup(configs, tf.constant([[0], [4]], dtype))
        np.testing.assert_array_equal(found, [[[1, 2]], [[9, 10]]])
    assert lookup(configs, tf.constant(3)).tolist() == [7, 8]
    assert lookup(configs, tf.zeros([0], tf.int64)).shape == (0, 2)


@pytest.mark.parametrize("form", [sparse, ragged])
@pytest.mark.parametrize(
    ("combiner", "plain", "weighted"),
    [
        ("sum", [[4, 6], [0, 0], [5, 6]], [[6.5, 9], [0, 0], [15, 18]]),
        ("mean", [[2, 3], [0, 0], [5, 6]], [[2.6, 3.6], [0, 0], [5, 6]]),
        (
            "sqrtn",
            [[2.828427, 4.242641], [0, 0], [5, 6]],
            [[3.152963, 4.365642], [0, 0], [5, 6]],
        ),
    ],
)
def test_bags_are_combined_and_empty_ones_are_zero(
    configs: Any, form: Callable[..., Any], combiner: str, plain: Any, weighted: Any
) -> None:
    found = lookup(configs, form(IDS, tf.int64), None, combiner)
    np.testing.assert_allclose(found, plain, rtol=1e-6)
    found = lookup(configs, form(IDS, tf.int32), form(WEIGHTS, tf.float32), combiner)
    np.testing.assert_allclose(found, weighted, rtol=1e-6)


@pytest.mark.parametrize("form", [sparse, ragged])
def test_sequences_are_padded_and_cut(configs: Any, form: Callable[..., Any]) -> None:
    found = lookup(configs, form([[0, 1, 2], [], [3]], tf.int64), max_sequence_length=2)
    assert found.tolist() == [[[1, 2], [3, 4]], [[0, 0], [0, 0]], [[7, 8], [0, 0]]]


@pytest.mark.parametrize(
    ("shape", "ids", "wanted"),
    [
        ([2, 2], [[0, 1], [2, 3], [], [4]], [[[4, 6], [12, 14]], [[0, 0], [9, 10]]]),
        ([2, 1], [[0, 1, 2]], [[[1, 2]], [[3, 4]]]),
        ([], [[0, 1]], [4, 6]),
    ],
)
def test_ragged_output_shape_combines_or_spreads(
    configs: Any, shape: list[int], ids: Any, wanted: Any
) -> None:
    assert lookup(configs, ragged(ids, tf.int64), output_shape=shape).tolist() == wanted


def test_a_batch_that_does_not_divide_the_output_shape_is_refused(configs: Any) -> None:
    with pytest.raises(ValueError, match="Output shape set in the FeatureConfig should be the fac"):
        lookup(configs, ragged(IDS, tf.int64), output_shape=[4])


@pytest.mark.parametrize("form", [sparse, ragged, lambda ids, dtype: tf.constant(ids[0], dtype)])
def test_an_id_outside_its_table_is_an_invalid_argument(
    configs: Any, form: Callable[..., Any]
) -> None:
    for bad in (5, 2**40):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"is not in \[0, 5\)"):
            lookup(configs, form([[bad]], tf.int64))


def test_a_subset_of_the_features_can_be_looked_up(configs: Any) -> None:
    one, two = table(configs, "one"), table(configs, "two")
    features = {
        "a": configs.FeatureConfig(one),
        "b": [configs.FeatureConfig(t) for t in (one, two)],
    }
    embedding = EmbeddingForServing(features, None)
    found = embedding.embedding_lookup({"b": (tf.constant([1]),)})
    assert found["b"][0].numpy().tolist() == [[3, 4]]
    assert isinstance(found["b"], tuple)
    with pytest.raises(ValueError, match="Inputs are not a subset of feature_config"):
        embedding({"c": tf.constant([1])})


def test_the_tables_are_keyed_by_the_given_objects(configs: Any) -> None:
    one, two = table(configs, "one"), table(configs, "two", "mean")
    features = [configs.FeatureConfig(t) for t in (two, one, two)]
    embedding = EmbeddingForServing(features, None)
    assert list(embedding.embedding_tables) == [two, one]
    assert all(isinstance(v, tf.Variable) for v in embedding.embedding_tables.values())
    assert embedding.embedding_tables[one] is embedding.variables["one"]["parameters"]


@pytest.mark.parametrize("first", ["__call__", "embedding_lookup", "build"])
def test_the_first_use_may_be_inside_a_tf_function(configs: Any, first: str) -> None:
    embedding = EmbeddingForServing({"f": configs.FeatureConfig(table(configs, "t"))}, None)
    assert not embedding._built

    @tf.function
    def serve(ids: Any) -> Any:
        if first == "build":
            embedding.build()
            return embedding({"f": ids})
        return getattr(embedding, first)({"f": ids})

    assert serve(tf.constant([1]))["f"].numpy().tolist() == [[3, 4]]
    embedding.variables["t"]["parameters"].assign(tf.zeros([5, 2]))
    assert serve(tf.constant([1]))["f"].numpy().tolist() == [[0, 0]]


def test_stock_configs_are_named_and_given_the_optimizer_for_good() -> None:
    tables = [table(stock, None), table(stock, "zz"), table(stock, None)]
    features = [stock.FeatureConfig(t) for t in tables]
    EmbeddingForServing(features, optimizer(stock, "Adam"))
    assert [t.name for t in tables] == ["table_0", "zz", "table_2"]
    later = EmbeddingForServing(features, optimizer(stock, "Adagrad"))
    assert set(later.variables["zz"]) == {"parameters", "momenta", "velocities"}


def test_our_configs_get_the_same_names_and_stay_as_they_are() -> None:
    tables = [table(ours, None), table(ours, "zz"), table(ours, None)]
    features = [ours.FeatureConfig(t) for t in tables]
    embedding = EmbeddingForServing(features, ours.Adam())
    assert list(embedding.variables) == ["table_0", "zz", "table_2"]
    assert [(t.name, t.optimizer) for t in tables] == [(None, None), ("zz", None), (None, None)]
    later = EmbeddingForServing(features, ours.Adagrad())
    assert set(later.variables["zz"]) == {"parameters", "accumulators"}


def test_tables_of_both_kinds_go_together() -> None:
    tables = table(ours, "ours"), table(stock, "stock")
    features = {"a": ours.FeatureConfig(tables[0]), "b": stock.FeatureConfig(tables[1])}
    embedding = EmbeddingForServing(features, ours.Adagrad())
    assert [set(v) for v in embedding.variables.values()] == [{"parameters", "accumulators"}] * 2
    assert set(embedding.embedding_tables) == set(tables)


def test_one_name_for_two_tables_is_refused(configs: Any) -> None:
    for names in (("t", "t"), ("table_1", None)):
        features = [configs.FeatureConfig(table(configs, name)) for name in names]
        with pytest.raises(ValueError, match="Tables must have a unique name"):
            EmbeddingForServing(features, None)


@pytest.mark.parametrize("bad", ["sgd", 3, tf.keras.optimizers.SGD()])
def test_an_unknown_optimizer_is_refused(configs: Any, bad: Any) -> None:
    features = [configs.FeatureConfig(table(configs, "t"))]
    with pytest.raises(ValueError, match="is an unsupported optimizer class"):
        EmbeddingForServing(features, bad)
    features = [configs.FeatureConfig(table(configs, "t", optimizer=bad))]
    with pytest.raises(ValueError, match="is an unsupported optimizer class"):
        EmbeddingForServing(features, None)


def test_no_features_are_no_tables() -> None:
    embedding = EmbeddingForServing({}, None)
    assert (embedding.embedding_tables, embedding.variables, embedding({})) == ({}, {}, {})


def test_the_optimizer_is_required_and_other_objects_are_no_features() -> None:
    with pytest.raises(TypeError, match="optimizer"):
        EmbeddingForServing({})  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        EmbeddingForServing({"f": 3}, None)


def test_under_a_tpu_strategy_it_is_refused(configs: Any) -> None:
    features = [configs.FeatureConfig(table(configs, "t"))]
    for kind in (tf.distribute.TPUStrategy, tf.distribute.experimental.TPUStrategy):
        strategy = object.__new__(kind)
        get = mock.patch.object(distribute_lib, "get_strategy", lambda found=strategy: found)
        public = mock.patch.object(tf.distribute, "get_strategy", lambda found=strategy: found)
        with get, public, pytest.raises(RuntimeError, match="Serving on TPU is not yet supported"):
            EmbeddingForServing(features, None)


def test_restore_info_of_the_sparse_cores_is_accepted(configs: Any) -> None:
    features = [configs.FeatureConfig(table(configs, "t"))]
    info = {"num_tpu_devices": 8}
    EmbeddingForServing(features, None, experimental_sparsecore_restore_info=info).build()


def test_it_works_where_its_name_replaces_tensorflows() -> None:
    features = [stock.FeatureConfig(table(stock, "t"))]
    module: ModuleType = tpu_embedding_for_serving
    with mock.patch.object(module, "TPUEmbeddingForServing", EmbeddingForServing):
        embedding = module.TPUEmbeddingForServing(features, None)
        assert embedding([tf.constant([1])])[0].numpy().tolist() == [[3, 4]]
    assert isinstance(embedding, StockEmbedding)


def described(embedding: Any) -> Any:
    return {
        name: {
            slot: (v.name, v.dtype, v.trainable, v.numpy().tolist()) for slot, v in slots.items()
        }
        for name, slots in embedding.variables.items()
    }


@pytest.mark.parametrize("name", [None, *OPTIMIZERS])
def test_variables_are_those_of_tensorflow(configs: Any, name: str | None) -> None:
    features = [configs.FeatureConfig(table(configs, "video"))]
    found = EmbeddingForServing(features, optimizer(configs, name))
    wanted = StockEmbedding([stock.FeatureConfig(table(stock, "video"))], optimizer(stock, name))
    assert described(found) == described(wanted)


def test_a_custom_optimizers_slots_are_made() -> None:
    custom = {"slot_names": ["a"], "slot_initializers": [tf.constant_initializer(0.5)]}
    wanted = StockEmbedding(
        [stock.FeatureConfig(table(stock, "t"))], stock.CustomOptimizer(len, 0.1, **custom)
    )
    features = [ours.FeatureConfig(table(ours, "t"))]
    found = EmbeddingForServing(features, ours.CustomOptimizer(len, 0.1, **custom))
    assert described(found) == described(wanted)


def test_our_initializers_fill_tables_and_no_two_alike() -> None:
    first = table(ours, "first", initializer=RowIdInitializer(3))
    others = [table(ours, name, initializer=RandomNormal()) for name in ("b", "c")]
    embedding = EmbeddingForServing([ours.FeatureConfig(t) for t in (first, *others)], None)
    found = [embedding.embedding_tables[t].numpy() for t in (first, *others)]
    assert found[0].tolist() == [[i + 3] * 2 for i in range(5)]
    assert not np.array_equal(found[1], found[2])


def test_a_custom_combiner_can_be_kept_but_not_served(configs: Any) -> None:
    combiner = configs.CustomCombiner(len, 4)
    feature = configs.FeatureConfig(table(configs, "t", combiner))
    embedding = EmbeddingForServing({"f": feature}, None)
    assert embedding.variables["t"]["parameters"].shape == (5, 2)
    for ids in (sparse(IDS, tf.int64), ragged(IDS, tf.int64), tf.constant([0])):
        with pytest.raises(ValueError, match="serving combines by mean, sum or sqrtn"):
            embedding({"f": ids})


def test_the_package_alone_does_not_import_tensorflow() -> None:
    code = "import sys, serving.tf; assert 'tensorflow' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
