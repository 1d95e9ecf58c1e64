"""`serving.tf.serving_embedding_lookup` beside TensorFlow's function of that name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ps.config as ours
from ps.inputs import Dense, Ragged, Sparse
from serving.tf import serving_embedding_lookup
from tests.support.exports import ROWS_VD
from tests.support.lookup_cases import (
    DIM,
    Case,
    cases,
    check,
    outcome,
    stock,
    stock_config,
    tensorflow_inputs,
)
from tests.support.parity_size import examples
from tests.support.tf_features import call, feature, ragged, sparse

pytestmark = pytest.mark.parity

embedding = tf.tpu.experimental.embedding
stock_lookup = embedding.serving_embedding_lookup
InvalidArgument = tf.errors.InvalidArgumentError


def our_config(case: Case) -> Any:
    table = ours.TableConfig(case.num_rows, DIM, combiner=case.combiner, name="t")
    return ours.FeatureConfig(table, **case.options)


def our_input(case: Case) -> Any:
    """The ids, with their weights, as an input of ours; its constructor checks them."""
    if case.kind == "dense":
        return Dense(case.ids)
    if case.kind == "ragged":
        assert case.row_splits is not None
        return Ragged(case.ids, case.row_splits, case.weights)
    assert case.indices is not None
    assert case.dense_shape is not None
    return Sparse(case.indices, case.ids, case.dense_shape, case.weights)


def traced(case: Case, feature: Any, table: Any, *, any_batch: bool) -> Any:
    """The lookup in a graph, checked to have a static shape that fits what it returns."""
    leaves = [leaf for leaf in tensorflow_inputs(case) if leaf is not None]
    specs = [tf.type_spec_from_value(leaf) for leaf in leaves]
    if any_batch:
        specs = [anonymous(spec) for spec in specs]
    function = tf.function(
        lambda *leaves: call(feature, table, *leaves), input_signature=specs, autograph=False
    ).get_concrete_function()
    found = function(*leaves)
    assert function.structured_outputs.shape.is_compatible_with(found.shape)
    assert function.structured_outputs.shape.rank is not None
    assert found.shape[-1] == DIM
    return found


def anonymous(spec: Any) -> Any:
    """The spec with every dimension unknown."""
    shape = [None] * spec.shape.rank
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.SparseTensorSpec(shape, spec.dtype)
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(shape, spec.dtype, 1, tf.int64)
    return tf.TensorSpec(shape, spec.dtype)


def counts_match(case: Case) -> bool:
    """While tracing, TensorFlow does not compare the number of weights with that of ids."""
    return case.kind == "dense" or case.weights is None or case.weights.size == case.ids.size


@settings(max_examples=examples(150))
@given(cases())
def test_variables_answer_as_tensorflow_does(case: Case) -> None:
    feature = stock_config(case)
    table = tf.Variable(case.rows)
    check(outcome(lambda: call(feature, table, *tensorflow_inputs(case))), stock(case))


@settings(max_examples=examples(150))
@given(cases())
def test_numpy_tables_answer_as_tensorflow_does(case: Case) -> None:
    feature = our_config(case)
    check(outcome(lambda: call(feature, case.rows, *tensorflow_inputs(case))), stock(case))


@settings(max_examples=examples(75))
@given(cases())
def test_our_inputs_answer_as_tensorflow_does(case: Case) -> None:
    assume(case.kind != "dense" or case.weights is None)
    feature = our_config(case)
    for table in (tf.Variable(case.rows), case.rows):
        check(outcome(lambda table=table: call(feature, table, our_input(case))), stock(case))


@settings(max_examples=examples(75))
@given(cases(), st.booleans(), st.booleans())
def test_graphs_answer_as_tensorflow_does(case: Case, mapped: bool, any_batch: bool) -> None:
    assume(counts_match(case))
    feature = stock_config(case)
    table = case.rows if mapped else tf.Variable(case.rows)
    check(outcome(lambda: traced(case, feature, table, any_batch=any_batch)), stock(case))


@settings(max_examples=examples(50))
@given(cases())
def test_row_shards_answer_as_the_whole_table_does(case: Case) -> None:
    feature, wanted = stock_config(case), stock(case)
    arrays = np.array_split(case.rows, 3) if case.num_rows >= 3 else [case.rows]
    for shards in (arrays, [tf.Variable(part) for part in arrays]):
        found = outcome(lambda shards=shards: call(feature, shards, *tensorflow_inputs(case)))
        check(found, wanted)


def gradient(lookup: Callable[..., Any], case: Case) -> Any:
    """The gradient of a table from a different gradient of every activation; None if refused."""
    feature, table = stock_config(case), tf.Variable(case.rows)
    ids, weights = tensorflow_inputs(case, np.float32)
    weights = None if weights is None else {"f": weights}
    try:
        with tf.GradientTape() as tape:
            out = lookup({"f": ids}, weights, {feature.table: table}, {"f": feature})["f"]
            loss = tf.reduce_sum(out * tf.reshape(tf.range(float(tf.size(out))), out.shape))
    except (ValueError, InvalidArgument):
        return None
    return tape.gradient(loss, table)


@settings(max_examples=examples(100))
@given(cases())
def test_gradients_are_those_of_tensorflow(case: Case) -> None:
    wanted = gradient(stock_lookup, case)
    found = gradient(serving_embedding_lookup, case)
    assert type(found) is type(wanted)
    if wanted is not None:
        assert isinstance(found, tf.IndexedSlices)
        dense = [tf.convert_to_tensor(g).numpy() for g in (found, wanted)]
        np.testing.assert_allclose(*dense, rtol=1e-6)


def both_ways(
    feature: Any, ids: Any, weights: Any = None, dtype: Any = np.float32
) -> list[np.ndarray]:
    """From a variable, and, if it is float32, from a NumPy table."""
    tables = [tf.Variable(ROWS_VD.astype(dtype))]
    if dtype is np.float32:
        tables.append(ROWS_VD)
    return [call(feature, table, ids, weights).numpy() for table in tables]


DTYPES = [np.float64, np.float16, tf.bfloat16.as_numpy_dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("form", [sparse, ragged])
def test_tables_of_another_dtype_answer_in_it(form: Any, combiner: str, dtype: Any) -> None:
    config = feature(combiner)
    table = tf.Variable(ROWS_VD.astype(dtype))
    ids, weights = form([[0, 1], [], [2]]), form([[0.5, 2.0], [], [3.0]], tf.as_dtype(dtype))
    for given_weights in (None, weights):
        wanted = stock_lookup(
            [ids], None if weights is None else [given_weights], {config.table: table}, [config]
        )[0]
        for kind in (table, tf.constant(table), ROWS_VD.astype(dtype)):
            found = call(config, kind, ids, given_weights)
            assert found.dtype == tf.as_dtype(dtype)
            np.testing.assert_array_equal(found, wanted)


def test_half_precision_is_combined_in_float32() -> None:
    weights = sparse([[0.5, 2.0]], tf.float16)
    found = both_ways(feature("mean"), sparse([[0, 1]]), weights, np.float16)
    np.testing.assert_array_equal(found, [np.array([[2.6, 3.6]], np.float16)])


@pytest.mark.parametrize("dtype", [tf.float16, tf.float64, tf.int32, tf.int64])
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("form", [sparse, ragged])
def test_weights_of_any_numeric_dtype_are_cast(form: Any, validate: bool, dtype: Any) -> None:
    config = feature("mean", validate_weights_and_indices=validate)
    for found in both_ways(config, form([[0, 1], [2]]), form([[1, 3], [2]], dtype)):
        np.testing.assert_array_equal(found, [[2.5, 3.5], [5, 6]])


def test_sequences_come_from_tensors_arrays_and_shards_too() -> None:
    config = feature(max_sequence_length=2)
    arrays = [ROWS_VD[:3], ROWS_VD[3:]]
    wanted = [[[1, 2], [9, 10]], [[7, 8], [0, 0]]]
    tables: list[Any] = [tf.constant(ROWS_VD), ROWS_VD.astype(np.float64), ROWS_VD, arrays]
    for table in (*tables, [tf.Variable(part) for part in arrays], tuple(map(tf.constant, arrays))):
        assert call(config, table, sparse([[0, 4, 1], [3]])).numpy().tolist() == wanted
        assert call(config, table, ragged([[0, 4, 1], [3]])).numpy().tolist() == wanted


def test_weighted_ragged_shards_are_consecutive_rows() -> None:
    shards = [tf.Variable(ROWS_VD[:3]), tf.Variable(ROWS_VD[3:])]
    found = call(feature("mean"), shards, ragged([[0, 4]]), ragged([[1.0, 1.0]], tf.float32))
    assert found.numpy().tolist() == [[5, 6]]


def test_sparse_sequences_take_int16_ids_as_tensorflow_does() -> None:
    config = feature(max_sequence_length=2)
    ids = tf.SparseTensor([[0, 0]], tf.constant([1], tf.int16), [1, 1])
    for found in both_ways(config, ids):
        assert found.tolist() == [[[3, 4], [0, 0]]]


@pytest.mark.parametrize("table", [tf.Variable(ROWS_VD), ROWS_VD], ids=["variable", "NumPy"])
def test_ragged_output_shape_works_for_any_batch_of_a_graph(table: Any) -> None:
    config = feature(output_shape=[2, 2])
    spec = tf.RaggedTensorSpec([None, None], tf.int64, 1, tf.int64)
    serve = tf.function(lambda ids: call(config, table, ids), input_signature=[spec])
    assert serve.get_concrete_function().structured_outputs.shape == [2, 2, 2]
    found = serve(ragged([[0, 1], [2, 3], [], [4]]))
    assert found.numpy().tolist() == [[[4, 6], [12, 14]], [[0, 0], [9, 10]]]
    found = serve(ragged([[0, 1, 2], [4]]))
    assert found.numpy().tolist() == [[[1, 2], [3, 4]], [[9, 10], [0, 0]]]
    for rows in ([[0]] * 3, [[0]] * 5, []):
        ids = tf.RaggedTensor.from_row_splits(tf.zeros([len(rows)], tf.int64), range(len(rows) + 1))
        with pytest.raises(InvalidArgument, match="Output shape set in the FeatureConfig"):
            serve(ids)


def test_an_unknown_rank_means_what_it_means_to_tensorflow() -> None:
    spec = tf.SparseTensorSpec(None, tf.int64)
    ids = sparse([[0, 1], [3]])
    rank_3 = tf.sparse.reshape(ids, [2, 1, 2])
    raw = {"validate_weights_and_indices": False}
    for table in (tf.Variable(ROWS_VD), ROWS_VD):
        sequence, bag = (
            tf.function(
                lambda ids, config=config, table=table: call(config, table, ids),
                input_signature=[spec],
            )
            for config in (feature(max_sequence_length=2), feature(**raw))
        )
        assert sequence(ids).numpy().tolist() == [[[1, 2], [3, 4]], [[7, 8], [0, 0]]]
        with pytest.raises(InvalidArgument):
            sequence(rank_3)
        trailing = tf.sparse.reset_shape(ids, [3, 2])
        assert bag(trailing).numpy().tolist() == [[4, 6], [7, 8], [0, 0]]
        assert bag(rank_3).numpy().tolist() == [[[4, 6]], [[7, 8]]]


IDS = tf.constant([0, 1])
ONES = tf.constant([1.0, 1.0])
BAG, WEIGHTED = sparse([[0, 1]]), sparse([[1.0, 1.0]], tf.float32)


def test_the_weights_of_our_inputs_travel_inside_them() -> None:
    value = Sparse([[0, 0]], [1], (1, 1), [2.0])
    for table in (tf.Variable(ROWS_VD), ROWS_VD):
        assert call(feature(), table, value).numpy().tolist() == [[6, 8]]
        with pytest.raises(ValueError, match="but it does not match type of the"):
            call(feature(), table, value, WEIGHTED)
        with pytest.raises(ValueError, match="but this is a sequence feature"):
            call(feature(max_sequence_length=1), table, value)
        with pytest.raises(ValueError, match="but input is dense"):
            call(feature(), table, Dense([1]), ONES)


@pytest.mark.parametrize(
    ("config_keys", "inputs"),
    [
        (("", ""), [IDS, IDS]),
        (("", ""), (IDS,)),
        (("", ""), {"0": IDS, "1": IDS}),
        (("", ""), {1: IDS}),
        ({"a/b": ""}, {"a": {"b": IDS}}),
        ({"b": "", "a": [""]}, {"b": IDS, "a": (IDS,)}),
        ({0: "", 7: ""}, {7: IDS}),
        ({"a": ""}, {}),
        ("", IDS),
    ],
)
@pytest.mark.parametrize("configs", [embedding, ours], ids=["TensorFlow", "Manta"])
def test_structures_match_by_path_and_come_back_as_they_are(
    configs: Any, config_keys: Any, inputs: Any
) -> None:
    features = tf.nest.map_structure(lambda _: feature(configs=configs), config_keys)
    stock_features = tf.nest.map_structure(lambda _: feature(), config_keys)
    tables = {f.table: ROWS_VD for f in tf.nest.flatten(features)}
    stock_tables = {f.table: tf.constant(ROWS_VD) for f in tf.nest.flatten(stock_features)}
    found = serving_embedding_lookup(inputs, None, tables, features)
    wanted = stock_lookup(inputs, None, stock_tables, stock_features)
    tf.nest.assert_same_structure(found, wanted)
    assert type(found) is type(wanted)
    if isinstance(found, dict):
        assert list(found) == list(wanted)
    for one, other in zip(tf.nest.flatten(found), tf.nest.flatten(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


def test_each_weight_goes_with_its_ids() -> None:
    config = {"b": feature(), "a": feature(), "c": feature()}
    tables = {f.table: ROWS_VD for f in config.values()}
    inputs = {"b": ragged([[0]]), "c": IDS, "a": ragged([[1]])}
    weights = {"a": ragged([[2.0]], tf.float32), "b": None, "c": None}
    found = serving_embedding_lookup(inputs, weights, tables, config)
    assert list(found) == ["b", "c", "a"]
    assert [found[key].numpy().tolist() for key in "ab"] == [[[6, 8]], [[1, 2]]]


MEMORY = """
import resource, sys
import numpy as np
import tensorflow as tf
from ps.config import FeatureConfig, TableConfig
from serving.tf import serving_embedding_lookup

num_rows, dim = 1 << 25, 64  # 8 GiB of a file with holes
table = np.memmap(sys.argv[1], np.float32, "w+", shape=(num_rows, dim))
table[num_rows - 1] = 7
table.flush()
table = np.memmap(sys.argv[1], np.float32, "r", shape=(num_rows, dim))
config = FeatureConfig(TableConfig(num_rows, dim, combiner="sum", name="t"))

def look_up(ids):
    return serving_embedding_lookup([ids], None, {config.table: table}, [config])[0]

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

forms = [
    tf.constant([num_rows - 1, 0]),
    tf.ragged.constant([[num_rows - 1, num_rows - 1], [0]], tf.int64).to_sparse(),
    tf.ragged.constant([[num_rows - 1, num_rows - 1], [0]], tf.int64),
]
for ids in forms:
    before = None
    for call in (look_up, tf.function(look_up)):
        before = before or peak()
        out = call(ids).numpy()
        assert out[0, 0] in (7, 14) and out[1, 0] == 0, out
print(peak() - before)
"""


def test_a_mapped_table_larger_than_memory_is_never_copied(tmp_path: Path) -> None:
    run = [sys.executable, "-c", MEMORY, str(tmp_path / "table")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 256 << 20


def test_an_export_opened_for_reading_is_looked_up_in_place() -> None:
    rows = ROWS_VD.copy()
    rows.flags.writeable = False
    (found,) = {tuple(call(feature(), rows, sparse([[0, 1]])).numpy().ravel())}
    assert found == (4, 6)
