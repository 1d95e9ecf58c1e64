"""What `serving.tf.serving_embedding_lookup` refuses, and that TensorFlow refuses it likewise."""

from __future__ import annotations

from typing import Any

import pytest
import tensorflow as tf

import ps.config as ours
from serving.tf import serving_embedding_lookup
from tests.support.exports import ROWS_VD
from tests.support.tf_features import call, feature, ragged, sparse

pytestmark = pytest.mark.parity

embedding = tf.tpu.experimental.embedding
stock_lookup = embedding.serving_embedding_lookup
InvalidArgument = tf.errors.InvalidArgumentError

IDS = tf.constant([0, 1])
ONES = tf.constant([1.0, 1.0])
BAG, WEIGHTED = sparse([[0, 1]]), sparse([[1.0, 1.0]], tf.float32)


def raises_alike(
    error: type[Exception], fragment: str, inputs: Any, weights: Any = None, **options: Any
) -> None:
    """Ours, for every kind of table and of config, and TensorFlow's raise the same."""
    config = feature(**options)
    with pytest.raises(error, match=fragment):
        stock_lookup(inputs, weights, {config.table: tf.Variable(ROWS_VD)}, [config])
    for same in (config, feature(configs=ours, **options)):
        for table in (tf.Variable(ROWS_VD), ROWS_VD):
            with pytest.raises(error, match=fragment):
                serving_embedding_lookup(inputs, weights, {same.table: table}, [same])


@pytest.mark.parametrize(
    ("inputs", "weights", "options", "fragment"),
    [
        ([IDS] * 2, None, {}, "Inputs are not a subset of feature_config"),
        ({"a": IDS}, None, {}, "Inputs are not a subset of feature_config"),
        ([BAG], [], {}, "don't have the same nested structure"),
        ([BAG], WEIGHTED, {}, "don't have the same nested structure"),
        ([IDS.numpy()], None, {}, "Tensor, SparseTensor or RaggedTensor expected"),
        ([3], None, {}, "Tensor, SparseTensor or RaggedTensor expected"),
        ([None], None, {}, "Tensor, SparseTensor or RaggedTensor expected"),
        ([tf.Variable([0])], None, {}, "Tensor, SparseTensor or RaggedTensor expected"),
        ([IDS], [ONES], {}, "Weight specified for 0, but input is dense"),
        ([IDS], [ONES], {"max_sequence_length": 2}, "but input is dense"),
        ([BAG], [ONES], {}, "but it does not match type of the"),
        ([BAG], [ragged([[1.0, 1.0]], tf.float32)], {}, "but it does not match type of the"),
        ([IDS.numpy()], [ONES], {}, "but it does not match type of the"),
        ([BAG], [WEIGHTED], {"max_sequence_length": 2}, "but this is a sequence feature"),
        (
            [ragged([[0]])],
            [ragged([[1.0]], tf.float32)],
            {"max_sequence_length": 2, "output_shape": [1]},
            "but this is a sequence feature",
        ),
        ([IDS], None, {"max_sequence_length": 2}, "is a sequence feature but a dense tensor"),
        ([BAG], [sparse([[1.0]], tf.float32)], {}, "."),
        ([BAG], [sparse([[1.0]], tf.float32)], {"validate_weights_and_indices": False}, "."),
        ([tf.ragged.constant([[[0]]])], None, {}, "Only rank 2 ragged tensor is supported"),
        ([ragged([[0], [1]])], None, {"output_shape": [3]}, "should be the factor"),
        ([ragged([[0], [1]])], None, {"output_shape": [1]}, "should be the factor"),
        ([ragged([[0], [1]])], None, {"output_shape": [None, 2]}, "."),
    ],
)
def test_what_a_feature_does_not_take_is_a_value_error(
    inputs: Any, weights: Any, options: Any, fragment: str
) -> None:
    raises_alike(ValueError, fragment, inputs, weights, **options)


@pytest.mark.parametrize("combiner", ["sum", ours.CustomCombiner(len, 2)])
def test_errors_while_tracing_are_plain_value_errors(combiner: Any) -> None:
    config = feature(combiner, ours, max_sequence_length=2)
    serve = tf.function(lambda ids: call(config, ROWS_VD, ids))
    with pytest.raises(ValueError, match=r"is a sequence feature|serving combines by"):
        serve(IDS)


def test_weights_in_other_containers_are_a_type_error() -> None:
    raises_alike(TypeError, "don't have the same nested structure", [BAG], (WEIGHTED,))


def coordinates(indices: list[list[int]], dense_shape: list[int]) -> Any:
    return tf.SparseTensor(indices, tf.zeros([len(indices)], tf.int64), dense_shape)


RAW = {"validate_weights_and_indices": False}


@pytest.mark.parametrize(
    ("ids", "weights", "options", "fragment"),
    [
        (tf.constant([0, 5]), None, {}, r"is not in \[0, 5\)"),
        (tf.constant([2**40], tf.int64), None, {}, r"1099511627776 is not in \[0, 5\)"),
        (tf.constant([-1]), None, RAW, r"is not in \[0, 5\)"),
        (sparse([[5]]), None, {}, r"is not in \[0, 5\)"),
        (sparse([[5]]), sparse([[0.0]], tf.float32), {}, r"is not in \[0, 5\)"),
        (sparse([[-1]]), None, RAW, r"is not in \[0, 5\)"),
        (sparse([[-1]]), None, {"max_sequence_length": 1}, r"is not in \[0, 5\)"),
        (ragged([[-1]]), None, {}, r"is not in \[0, 5\)"),
        (ragged([[0, 0, 5]]), None, {"max_sequence_length": 1}, r"is not in \[0, 5\)"),
        (coordinates([[1, 0], [0, 0]], [2, 2]), None, RAW, "segment ids are not increasing"),
        (coordinates([[3, 0]], [2, 2]), None, {}, "."),
        (ragged([[0], [1]]), ragged([[1.0, 1.0], []], tf.float32), {}, "."),
    ],
)
def test_wrong_values_are_an_invalid_argument(
    ids: Any, weights: Any, options: Any, fragment: str
) -> None:
    given_weights = None if weights is None else [weights]
    raises_alike(InvalidArgument, fragment, [ids], given_weights, **options)


@pytest.mark.parametrize(
    "ids",
    [
        tf.constant([0], tf.int16),
        tf.constant([0.0]),
        sparse([[0]], tf.int16),
        sparse([[0.0]], tf.float32),
        ragged([[0]], tf.int16),
        ragged([[0.0]], tf.float32),
    ],
)
def test_variables_take_the_ids_that_tensorflow_takes(ids: Any) -> None:
    config = feature()
    errors = []
    for lookup in (stock_lookup, serving_embedding_lookup):
        with pytest.raises((ValueError, InvalidArgument)) as caught:
            lookup([ids], None, {config.table: tf.Variable(ROWS_VD)}, [config])
        errors.append(caught.type)
    assert errors[0] is errors[1]


def test_ids_that_are_no_integers_are_refused_by_numpy_tables_too() -> None:
    for ids in (tf.constant([0.0]), sparse([[0.0]], tf.float32), ragged([[0.0]], tf.float32)):
        with pytest.raises((ValueError, InvalidArgument), match="integers"):
            call(feature(), ROWS_VD, ids)


@pytest.mark.parametrize("dtype", [tf.string, tf.bool])
@pytest.mark.parametrize("form", [sparse, ragged])
def test_weights_that_are_no_numbers_are_refused(form: Any, dtype: Any) -> None:
    value: Any = "x" if dtype == tf.string else True
    for table in (tf.Variable(ROWS_VD), ROWS_VD):
        with pytest.raises((ValueError, InvalidArgument)):
            call(feature(), table, form([[0]]), form([[value]], dtype))


def test_a_missing_table_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        serving_embedding_lookup([IDS], None, {}, [feature()])


def test_a_table_is_its_object_not_its_name() -> None:
    config, twin = feature(), feature()
    with pytest.raises(KeyError):
        serving_embedding_lookup([IDS], None, {twin.table: ROWS_VD}, [config])


def test_a_numpy_table_must_have_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"rows must be a float32 \[V, D\] array"):
        call(feature(), ROWS_VD[0], IDS)


@pytest.mark.parametrize("configs", [embedding, ours], ids=["TensorFlow", "Manta"])
@pytest.mark.parametrize("ids", [BAG, ragged([[0]]), IDS])
def test_a_custom_combiner_is_refused(configs: Any, ids: Any) -> None:
    config = feature(configs.CustomCombiner(len, 2), configs)
    for table in (tf.Variable(ROWS_VD), ROWS_VD):
        with pytest.raises(ValueError, match="serving combines by mean, sum or sqrtn, not by"):
            call(config, table, ids)
