"""Feature columns beside TensorFlow's: ids, lookups, checks and names."""

from __future__ import annotations

import copy
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.python.feature_column import feature_column_v2

from ps import columns as ours
from ps.columns.vocabulary import hash_bucket
from ps.errors import ConfigError, InputError
from tests.support.parity_size import examples

pytestmark = pytest.mark.parity

stock = tf.feature_column
stock_embedding_column = tf.compat.v1.tpu.experimental.embedding_column
stock_shared_columns = tf.compat.v1.tpu.experimental.shared_embedding_columns

TABLE = np.array([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]], dtype=np.float32)
WORDS = ["a", "b", "", "zz", "ab", "user/7", "ü", "x" * 40, "y" * 100]
STOCK_ERRORS = (ValueError, TypeError, IndexError, tf.errors.OpError)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    level = tf.get_logger().level
    tf.get_logger().setLevel("ERROR")  # every function of tf.feature_column is deprecated
    yield
    tf.get_logger().setLevel(level)


class Tables:
    """TensorFlow's state manager: every column's weights are this table."""

    def __init__(self, table: Any) -> None:
        self.table = tf.constant(table)

    def get_variable(self, column: Any, name: str) -> Any:
        return self.table

    def has_resource(self, column: Any, name: str) -> bool:
        return False

    def add_resource(self, column: Any, name: str, resource: Any) -> None:
        pass


def stock_ids(column: Any, features: dict[str, Any]) -> Any:
    return feature_column_v2.FeatureTransformationCache(features).get(column, Tables(TABLE))


def stock_lookup(column: Any, features: dict[str, Any], table: Any) -> Any:
    cache = feature_column_v2.FeatureTransformationCache(features)
    return column.get_dense_tensor(cache, Tables(table)).numpy()


def stock_sequence(column: Any, features: dict[str, Any], table: Any) -> tuple[Any, Any]:
    cache = feature_column_v2.FeatureTransformationCache(features)
    found = column.get_sequence_dense_tensor(cache, Tables(table))
    return found.dense_tensor.numpy(), found.sequence_length.numpy()


def outcome(call: Callable[[], Any]) -> Any:
    """What the call returns, or None if it refuses."""
    try:
        return call()
    except STOCK_ERRORS:
        return None


def assert_agree(mine: Any, theirs: Any) -> None:
    assert (mine is None) == (theirs is None), (mine, theirs)
    if theirs is not None:
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


# Hashing


def test_every_length_of_string_hashes_as_in_tensorflow() -> None:
    rng = np.random.default_rng(7)
    strings = [rng.bytes(length) for length in range(301) for _ in range(4)]
    for buckets in (1, 10, 2**31, 2**62):
        theirs = tf.strings.to_hash_bucket_fast(tf.constant(strings), buckets).numpy()
        np.testing.assert_array_equal(
            hash_bucket(pa.array(strings, pa.large_binary()), buckets), theirs
        )


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5), st.integers(1, 2**40))
def test_an_integer_is_hashed_as_its_decimal_string(values: list[int], buckets: int) -> None:
    array = np.array(values, dtype=np.int64)
    text = tf.strings.as_string(tf.constant(values, tf.int64, shape=[len(values)]))
    theirs = tf.strings.to_hash_bucket_fast(text, buckets).numpy()
    np.testing.assert_array_equal(hash_bucket(array, buckets), theirs)


# Ids

CATEGORICAL: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "identity": ("int", lambda m: m.categorical_column_with_identity("k", 5)),
    "identity with default": ("int", lambda m: m.categorical_column_with_identity("k", 5, 2)),
    "hash": ("str", lambda m: m.categorical_column_with_hash_bucket("k", 5)),
    "integer hash": (
        "int",
        lambda m: m.categorical_column_with_hash_bucket("k", 5, dtype=tf.int64),
    ),
    "list": ("str", lambda m: m.categorical_column_with_vocabulary_list("k", list("abcde"))),
    "list with default": (
        "str",
        lambda m: m.categorical_column_with_vocabulary_list(
            "k", ["a", "zz", "", "d", "e"], default_value=3
        ),
    ),
    "list with buckets": (
        "str",
        lambda m: m.categorical_column_with_vocabulary_list(
            "k", ["b", "x" * 40], num_oov_buckets=3
        ),
    ),
    "integer list": (
        "int",
        lambda m: m.categorical_column_with_vocabulary_list("k", [3, -2, 2**40, 0, 1]),
    ),
    "integer list with buckets": (
        "int",
        lambda m: m.categorical_column_with_vocabulary_list("k", [3, -2, 7], num_oov_buckets=2),
    ),
}
INTEGERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 4, -2, 7, 2**40])
SAFE_INTEGERS = st.sampled_from([-1, 0, 1, 2, 3, 4])


@st.composite
def rows(draw: st.DrawFn, kind: str, *, dense: bool) -> list[list[Any]]:
    elements = INTEGERS if kind == "int" else st.sampled_from(WORDS)
    width = draw(st.integers(1, 4))
    sizes = st.just(width) if dense else st.integers(0, width)
    return [
        draw(st.lists(elements, min_size=n, max_size=n)) for n in draw(st.lists(sizes, max_size=4))
    ]


def dense_inputs(kind: str, values: list[list[Any]]) -> tuple[Any, Any]:
    """The same dense [B, T] input for us and for TensorFlow."""
    width = len(values[0]) if values else 1
    dtype = tf.int64 if kind == "int" else tf.string
    theirs = tf.constant(values, dtype, shape=[len(values), width])
    mine = np.array(values, dtype=np.int64 if kind == "int" else object)
    return mine.reshape(len(values), width), theirs


def sparse_inputs(kind: str, values: list[list[Any]]) -> tuple[Any, Any]:
    """The same sparse input for us (CSR) and for TensorFlow."""
    flat = [value for row in values for value in row]
    splits = np.cumsum([0, *map(len, values)])
    indices = [[b, t] for b, row in enumerate(values) for t in range(len(row))]
    theirs = tf.SparseTensor(
        np.array(indices, np.int64).reshape(-1, 2),
        tf.constant(flat, tf.int64 if kind == "int" else tf.string, shape=[len(flat)]),
        [len(values), max(map(len, values), default=0)],
    )
    kinds = pa.int64() if kind == "int" else pa.string()
    return ours.RawValues(pa.array(flat, kinds), splits), theirs


@pytest.mark.parametrize("name", CATEGORICAL)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_columns_make_the_ids_of_tensorflow(name: str, dense: bool) -> None:
    kind, make = CATEGORICAL[name]
    theirs, mine = make(stock), ours.Transform.of(make(ours))
    same = ours.Transform.of(theirs)
    assert same == mine
    assert (theirs.name, theirs.num_buckets) == (make(ours).name, mine.num_buckets)

    @settings(max_examples=examples(10), deadline=None)
    @given(rows(kind, dense=dense))
    def check(values: list[list[Any]]) -> None:
        raw, tensor = (dense_inputs if dense else sparse_inputs)(kind, values)
        wanted = stock_ids(theirs, {"k": tensor})
        found = mine({"k": raw})
        np.testing.assert_array_equal(found.ids, wanted.values.numpy())
        lengths = np.bincount(wanted.indices.numpy()[:, 0], minlength=len(values))
        np.testing.assert_array_equal(np.diff(found.row_splits), lengths)
        if values and dense:
            listed = [[None if v in (-1, "") else v for v in row] for row in values]
            np.testing.assert_array_equal(mine({"k": listed}).ids, found.ids)

    check()


def test_a_vocabulary_file_is_read_as_in_tensorflow(tmp_path: Path) -> None:
    text, numbers = tmp_path / "words.txt", tmp_path / "numbers.txt"
    text.write_bytes(b"a\r\nb \nc\rd\n\xff\x00x\nlast\r")
    numbers.write_bytes(b"10\n 20\n-3\n+7\t")
    records = tmp_path / "words.tfrecord.gz"
    with tf.io.TFRecordWriter(str(records), "GZIP") as writer:
        for word in (b"a", b"", b"zz"):
            writer.write(word)
    words = [[b"a", b"a\r", b"b ", b"b", b"c\rd", b"\xff\x00x", b"last", b"last\r", b"zz"]]
    cases: list[tuple[Path, dict[str, Any], Any]] = [
        (text, {}, words),
        (text, {"vocabulary_size": 2, "num_oov_buckets": 3}, words),
        (text, {"default_value": 1}, words),
        (numbers, {"dtype": tf.int64}, [[10, 20, -3, 7, 5]]),
        (records, {}, words),
    ]
    for path, options, values in cases:
        theirs = stock.categorical_column_with_vocabulary_file("k", str(path), **options)
        mine = ours.categorical_column_with_vocabulary_file("k", str(path), **options)
        assert mine.num_buckets == theirs.num_buckets
        wanted = stock_ids(theirs, {"k": tf.constant(values)}).values.numpy()
        transform = ours.Transform.of(mine)
        np.testing.assert_array_equal(transform({"k": np.array(values, object)}).ids, wanted)
        assert ours.Transform.of(theirs) == transform
    path.unlink()
    np.testing.assert_array_equal(transform({"k": np.array(values, object)}).ids, wanted)


@pytest.mark.parametrize(
    ("content", "options", "fragment"),
    [
        (b"a\n\nb", {}, "empty line"),
        (b"a\n\r\nb", {}, "empty line"),
        (b"a\nb", {"vocabulary_size": 5}, "Invalid vocab_size"),
        (b"a\nb\na\n", {}, None),
        (b"10\n0010\n", {"dtype": tf.int64}, None),
        (b"10\nx\n", {"dtype": tf.int64}, "is not a valid int64"),
        (b"99999999999999999999\n", {"dtype": tf.int64}, "not a valid int64"),
    ],
)
def test_a_bad_vocabulary_file_is_refused_as_in_tensorflow(
    tmp_path: Path, content: bytes, options: dict[str, Any], fragment: str | None
) -> None:
    path = tmp_path / "v.txt"
    path.write_bytes(content)
    theirs = stock.categorical_column_with_vocabulary_file("k", str(path), **options)
    value = tf.constant([[1]], tf.int64) if options.get("dtype") else tf.constant([["a"]])
    with pytest.raises(tf.errors.OpError, match=fragment):
        stock_ids(theirs, {"k": value})
    with pytest.raises(ConfigError, match=fragment or "Duplicate keys in vocabulary_file"):
        ours.categorical_column_with_vocabulary_file("k", str(path), **options)


def test_a_cut_off_record_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.tfrecord.gz"
    path.write_bytes(gzip.compress(b"\x05\0\0\0\0\0\0\0\0\0\0\0ab"))
    with pytest.raises(ConfigError, match="cannot be read"):
        ours.categorical_column_with_vocabulary_file("k", str(path))


# Lookups


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn", None])
@pytest.mark.parametrize("name", ["identity", "list", "integer hash", "list with buckets"])
def test_lookups_equal_tensorflow(name: str, combiner: Any) -> None:
    kind, make = CATEGORICAL[name]

    @settings(max_examples=examples(6), deadline=None)
    @given(st.booleans().flatmap(lambda d: st.tuples(st.just(d), rows(kind, dense=d))))
    def check(case: tuple[bool, list[list[Any]]]) -> None:
        dense, values = case
        raw, tensor = (dense_inputs if dense else sparse_inputs)(kind, values)
        for safe in (True, False):
            options = {"combiner": combiner, "use_safe_embedding_lookup": safe}
            theirs = stock_embedding_column(make(stock), 2, **options)
            mine = ours.embedding_column(make(ours), 2, **options)
            wanted = outcome(lambda c=theirs: stock_lookup(c, {"k": tensor}, TABLE))
            found = outcome(lambda c=mine: ours.input_layer({"k": raw}, c, {"k": TABLE}))
            if wanted is not None and not safe:  # TensorFlow leaves out trailing empty examples
                left = len(values) - len(wanted)
                wanted = np.concatenate([wanted, np.zeros((left, 2), np.float32)])
            assert_agree(found, wanted)

    check()


WEIGHTS = st.sampled_from([0.5, 2.0, -1.0, 3.0, 1e-3])


@settings(max_examples=examples(40), deadline=None)
@given(
    st.lists(st.lists(st.tuples(SAFE_INTEGERS, WEIGHTS), max_size=4), max_size=4),
    st.sampled_from(["sum", "mean", "sqrtn"]),
    st.booleans(),
)
def test_weighted_lookups_equal_tensorflow(pairs: Any, combiner: str, safe: bool) -> None:
    ids, ids_tensor = sparse_inputs("int", [[i for i, _ in row] for row in pairs])
    flat = np.array([w for row in pairs for _, w in row], np.float32)
    weights = ours.RawValues(flat, ids.row_splits)
    weight_tensor = tf.SparseTensor(ids_tensor.indices, flat, ids_tensor.dense_shape)
    options = {"combiner": combiner, "use_safe_embedding_lookup": safe}

    def weighted(module: Any) -> Any:
        inner = module.categorical_column_with_identity("k", 5)
        return module.weighted_categorical_column(inner, "w")

    theirs = stock_embedding_column(weighted(stock), 2, **options)
    mine = ours.embedding_column(weighted(ours), 2, **options)
    features = {"k": ids_tensor, "w": weight_tensor}
    wanted = outcome(lambda: stock_lookup(theirs, features, TABLE))
    tables = {"k_weighted_by_w": TABLE}
    found = outcome(lambda: ours.input_layer({"k": ids, "w": weights}, mine, tables))
    if wanted is not None and not safe:
        wanted = np.concatenate([wanted, np.zeros((len(pairs) - len(wanted), 2), np.float32)])
    assert_agree(found, wanted)


@settings(max_examples=examples(40), deadline=None)
@given(
    st.sampled_from([(1,), (2,), (3, 2), (1, 4), (2, 3, 2), (3, 1, 2)]),
    st.sampled_from(["sum", "mean"]),
    st.data(),
)
def test_sequences_equal_tensorflow(shape: Any, combiner: str, data: st.DataObject) -> None:
    size = int(np.prod(shape))
    values = data.draw(st.lists(SAFE_INTEGERS, min_size=size, max_size=size))
    raw = np.array(values, dtype=np.int64).reshape(shape)

    def column(module: Any) -> Any:
        return module.sequence_categorical_column_with_identity("k", 5)

    theirs = stock_embedding_column(column(stock), 2, combiner, max_sequence_length=2)
    mine = ours.embedding_column(column(ours), 2, combiner, max_sequence_length=2)
    wanted, wanted_lengths = stock_sequence(theirs, {"k": tf.constant(raw)}, TABLE)
    for form in (raw, raw.tolist()):
        found, lengths = ours.sequence_input_layer({"k": form}, mine, {"k": TABLE}, truncate=False)
        assert_agree(found, wanted)
        np.testing.assert_array_equal(lengths, wanted_lengths)
    cut, cut_lengths = ours.sequence_input_layer({"k": raw}, mine, {"k": TABLE})
    padded = np.concatenate([wanted, np.zeros((len(raw), 2, 2), np.float32)], axis=1)
    assert_agree(cut, padded[:, :2])
    np.testing.assert_array_equal(cut_lengths, np.minimum(wanted_lengths, 2))


def test_a_sparse_sequence_keeps_its_negative_ids_as_empty_steps() -> None:
    values = [[-1, 1], [], [2, -1, -1]]
    raw, tensor = sparse_inputs("int", values)
    theirs = stock_embedding_column(
        stock.sequence_categorical_column_with_identity("k", 5), 2, max_sequence_length=3
    )
    mine = ours.embedding_column(
        ours.sequence_categorical_column_with_identity("k", 5), 2, max_sequence_length=3
    )
    wanted, wanted_lengths = stock_sequence(theirs, {"k": tensor}, TABLE)
    found, lengths = ours.sequence_input_layer({"k": raw}, mine, {"k": TABLE}, truncate=False)
    assert_agree(found, wanted)
    np.testing.assert_array_equal(lengths, wanted_lengths)


def test_the_input_layer_of_tensorflow_puts_columns_in_the_same_order() -> None:
    features: dict[str, Any] = {"b": [[0, 1], [-1, 2]], "a": [["x", "y"], ["", "zz"]]}
    starts = {"a": TABLE[:3], "b": TABLE}

    def make(module: Any, embedding: Any, initializer: Callable[[str], Any]) -> list[Any]:
        b = module.categorical_column_with_identity("b", 5)
        a = module.categorical_column_with_vocabulary_list("a", ["x", "y"], num_oov_buckets=1)
        return [
            embedding(b, 2, "sqrtn", initializer=initializer("b")),
            embedding(a, 2, "sum", initializer=initializer("a")),
        ]

    def constant(name: str) -> Any:
        return tf.compat.v1.constant_initializer(starts[name])

    theirs = make(stock, stock_embedding_column, constant)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        layer = tf.compat.v1.feature_column.input_layer(features, theirs)
        session.run([tf.compat.v1.global_variables_initializer()])
        session.run([tf.compat.v1.tables_initializer()])
        wanted = session.run(layer)
    mine = make(ours, ours.embedding_column, lambda name: None)
    assert_agree(ours.input_layer(features, mine, starts), wanted)
    converted = make(stock, ours.embedding_column, constant)
    assert_agree(ours.input_layer(features, converted, starts), wanted)


def test_shared_columns_look_up_one_table_as_in_tensorflow() -> None:
    features: dict[str, Any] = {"a": [[0, 1]], "b": [[4, -1]]}

    def pair(module: Any) -> list[Any]:
        return [module.categorical_column_with_identity(name, 5) for name in ("b", "a")]

    theirs = stock_shared_columns(pair(stock), 2, "sum")
    creator = theirs[0].shared_embedding_column_creator
    with tf.Graph().as_default() as graph, tf.compat.v1.Session():
        creator._embedding_weights[graph._graph_key] = tf.constant(TABLE)
        cache = feature_column_v2.FeatureTransformationCache(features)
        wanted = [column.get_dense_tensor(cache, None).eval() for column in theirs]
    mine = ours.shared_embedding_columns(pair(ours), 2, "sum")
    table = {"a_b_shared_embedding": TABLE}
    assert [column.name for column in mine] == [column.name for column in theirs]
    found = ours.input_layer(features, mine, table)
    assert_agree(found, np.concatenate([wanted[1], wanted[0]], axis=1))  # a before b


# Refusals

REFUSED_INPUTS: list[tuple[str, dict[str, Any], str]] = [
    ("identity", {"k": [["a"]]}, "Invalid input, not integer. key: k"),
    ("identity", {"k": [[1.5]]}, "Invalid input, not integer. key: k"),
    ("identity", {"k": [[True]]}, "Invalid input, not integer. key: k"),
    ("identity", {"k": 3}, "cannot have rank 0"),
    ("identity", {}, "Feature k is not in features dictionary"),
    ("hash", {"k": [[1.5]]}, "dtype must be string or integer"),
    ("hash", {"k": [[1]]}, "dtype must be compatible"),
    ("integer hash", {"k": [["a"]]}, "dtype must be compatible"),
    ("list", {"k": [[1]]}, "dtype must be compatible"),
    ("list", {"k": [[True]]}, "dtype must be string or integer"),
    ("integer list", {"k": [["1"]]}, "dtype must be compatible"),
]


@pytest.mark.parametrize(("name", "features", "fragment"), REFUSED_INPUTS)
def test_bad_inputs_are_refused_as_in_tensorflow(
    name: str, features: dict[str, Any], fragment: str
) -> None:
    _, make = CATEGORICAL[name]
    # TensorFlow says "SparseTensors dtype" where we say "input dtype".
    with pytest.raises(ValueError, match=fragment):
        stock_ids(make(stock), features)
    with pytest.raises(InputError, match=fragment) as refusal:
        ours.Transform.of(make(ours))(features)
    assert refusal.value.feature == "k"


BAD_ARGUMENTS: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("categorical_column_with_identity", ("k", 0), {}, "num_buckets 0 < 1, column_name k"),
    ("categorical_column_with_identity", ("k", None), {}, "not supported between instances"),
    ("categorical_column_with_identity", ("k", "3"), {}, "not supported between instances"),
    ("categorical_column_with_identity", ("k", 3, 3), {}, "default_value 3 not in range"),
    ("categorical_column_with_identity", ("k", 3, -1), {}, "default_value -1 not in range"),
    ("categorical_column_with_identity", (1, 3), {}, "key must be a string"),
    ("categorical_column_with_hash_bucket", ("k", None), {}, "hash_bucket_size must be set"),
    ("categorical_column_with_hash_bucket", ("k", 0), {}, "hash_bucket_size must be at least 1"),
    ("categorical_column_with_hash_bucket", (1, 2), {}, "key must be a string"),
    ("categorical_column_with_hash_bucket", ("k", 2, tf.float32), {}, "must be string or integer"),
    ("categorical_column_with_vocabulary_list", ("k", []), {}, "must be non-empty"),
    ("categorical_column_with_vocabulary_list", ("k", None), {}, "must be non-empty"),
    ("categorical_column_with_vocabulary_list", ("k", ["a", "a"]), {}, "Duplicate keys in"),
    ("categorical_column_with_vocabulary_list", ("k", [2, 2]), {}, "Duplicate keys in"),
    ("categorical_column_with_vocabulary_list", ("k", [1.5]), {}, "must be string or integer"),
    ("categorical_column_with_vocabulary_list", ("k", [True]), {}, "must be string or integer"),
    ("categorical_column_with_vocabulary_list", ("k", ["a"], None, 0, 1), {}, "specify both"),
    ("categorical_column_with_vocabulary_list", ("k", ["a"], None, -1, -1), {}, "Invalid num_oov"),
    ("categorical_column_with_vocabulary_list", ("k", ["a"], tf.int64), {}, "do not match"),
    ("categorical_column_with_vocabulary_list", ("k", [1], tf.string), {}, "do not match"),
    ("categorical_column_with_vocabulary_list", ("k", [1], tf.float32), {}, "do not match"),
    ("categorical_column_with_vocabulary_list", ("k", ["a"], tf.float32), {}, "string or integer"),
    ("categorical_column_with_vocabulary_list", (3, ["a"]), {}, "key must be a string"),
    ("categorical_column_with_vocabulary_file", ("k", ""), {}, "Missing vocabulary_file in k"),
    ("categorical_column_with_vocabulary_file", ("k", "no such file"), {}, "does not exist"),
    ("categorical_column_with_vocabulary_file", ("k", "f", 0), {}, "Invalid vocabulary_size in k"),
    (
        "categorical_column_with_vocabulary_file",
        ("k", "f", 1),
        {"num_oov_buckets": 1, "default_value": -1},
        "specify both",
    ),
    (
        "categorical_column_with_vocabulary_file",
        ("k", "f", 1),
        {"num_oov_buckets": -1},
        "Invalid num_oov_buckets",
    ),
    (
        "categorical_column_with_vocabulary_file",
        ("k", "f", 1, tf.float32),
        {},
        "must be string or integer",
    ),
    ("sequence_categorical_column_with_identity", ("k", 0), {}, "num_buckets 0 < 1"),
    ("sequence_categorical_column_with_hash_bucket", ("k", 0), {}, "must be at least 1"),
    ("sequence_categorical_column_with_vocabulary_list", ("k", []), {}, "must be non-empty"),
    (
        "sequence_categorical_column_with_vocabulary_file",
        ("k", "f", 1, 1, -1),
        {},
        "specify both",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "options", "fragment"), BAD_ARGUMENTS)
def test_bad_arguments_of_categorical_columns_are_refused_as_in_tensorflow(
    function: str, arguments: tuple[Any, ...], options: dict[str, Any], fragment: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=fragment) as theirs:
        getattr(stock, function)(*arguments, **options)
    with pytest.raises(theirs.type, match=fragment):
        getattr(ours, function)(*arguments, **options)


@pytest.mark.parametrize("dtype", [tf.string, None, tf.bool], ids=str)
def test_weights_that_are_no_numbers_are_refused_as_in_tensorflow(dtype: Any) -> None:
    for module in (stock, ours):
        inner = module.categorical_column_with_identity("k", 5)
        with pytest.raises(ValueError, match="is not convertible to float"):
            module.weighted_categorical_column(inner, "w", dtype)


def identity(name: str = "k", buckets: int = 5) -> Any:
    return stock.categorical_column_with_identity(name, buckets)


def sequence(name: str = "s", buckets: int = 5) -> Any:
    return stock.sequence_categorical_column_with_identity(name, buckets)


CORE = {"embedding_lookup_device": "tpu_tensor_core"}
BAD_COLUMNS: list[tuple[Callable[[], Any], dict[str, Any], str]] = [
    (lambda: "k", {}, "must be type CategoricalColumn"),
    (lambda: None, {}, "must be type CategoricalColumn"),
    (lambda: stock.numeric_column("k"), {}, "must be type CategoricalColumn"),
    (lambda: stock.indicator_column(identity()), {}, "must be type CategoricalColumn"),
    (identity, {"dimension": None}, "Invalid dimension None"),
    (identity, {"dimension": 0, "tensor_core_shape": [1]}, "Invalid dimension 0"),
    (identity, {"dimension": "2"}, "not supported between instances"),
    (identity, {"tensor_core_shape": [1], "initializer": 3}, "tensor_core_shape must be size 2"),
    (
        identity,
        {"initializer": 3, "embedding_lookup_device": "gpu"},
        "initializer must be callable",
    ),
    (identity, {"embedding_lookup_device": "gpu"}, "embedding_lookup_device must be in"),
    (identity, CORE, "requires tensor_core_shape"),
    (identity, {**CORE, "tensor_core_shape": []}, "requires tensor_core_shape"),
    (sequence, {**CORE, "tensor_core_shape": [None, 2]}, "not support sequence columns"),
    (sequence, {}, "must be greater than 0"),
    (sequence, {"max_sequence_length": None}, "not supported between instances"),
    (identity, {"max_sequence_length": 1}, "Non zero max_seq_length"),
    (identity, {"max_sequence_length": None}, "Non zero max_seq_length"),
    (
        lambda: stock.weighted_categorical_column(sequence(), "w"),
        {"max_sequence_length": 1},
        "Non zero max_seq_length",
    ),
]


@pytest.mark.parametrize(("make", "options", "fragment"), BAD_COLUMNS)
def test_bad_embedding_columns_are_refused_as_in_tensorflow(
    make: Callable[[], Any], options: dict[str, Any], fragment: str
) -> None:
    arguments = {"dimension": 2, **options}
    with pytest.raises((ValueError, TypeError), match=fragment) as theirs:
        stock_embedding_column(make(), **arguments)
    with pytest.raises(theirs.type, match=fragment):
        ours.embedding_column(make(), **arguments)
    length = arguments.pop("max_sequence_length", 0)
    arguments["max_sequence_lengths"] = [length]
    with pytest.raises((ValueError, TypeError), match=fragment) as shared:
        stock_shared_columns([make()], **arguments)
    with pytest.raises(shared.type, match=fragment):
        ours.shared_embedding_columns([make()], **arguments)


@pytest.mark.parametrize(
    ("columns", "options", "fragment"),
    [
        (lambda: [identity(), sequence()], {"max_sequence_lengths": [0]}, "of the same length"),
        (lambda: [identity(), sequence()], {"max_sequence_lengths": []}, "greater than 0"),
        (lambda: [identity(), identity("b", 4)], {}, "same number of buckets"),
        (list, {}, "list index out of range"),
        (lambda: [identity()], {"max_norm": 1.0}, "unexpected keyword argument"),
    ],
)
def test_bad_shared_columns_are_refused_as_in_tensorflow(
    columns: Callable[[], list[Any]], options: dict[str, Any], fragment: str
) -> None:
    with pytest.raises((ValueError, TypeError, IndexError), match=fragment) as theirs:
        stock_shared_columns(columns(), 2, **options)
    with pytest.raises(theirs.type, match=fragment):
        ours.shared_embedding_columns(columns(), 2, **options)


def test_layers_refuse_the_wrong_kind_of_column_as_in_tensorflow() -> None:
    for embedding, look_up, look_up_sequence in (
        (
            stock_embedding_column,
            lambda column: stock_lookup(column, {"k": [[0]]}, TABLE),
            lambda column: stock_sequence(column, {"k": [[0]]}, TABLE),
        ),
        (
            ours.embedding_column,
            lambda column: ours.input_layer({"k": [[0]]}, column, {"k": TABLE}),
            lambda column: ours.sequence_input_layer({"k": [[0]]}, column, {"k": TABLE}),
        ),
    ):
        with pytest.raises(ValueError, match="must not be of type SequenceCategoricalColumn"):
            look_up(embedding(sequence("k"), 2, max_sequence_length=1))
        for column in (identity("k"), stock.weighted_categorical_column(sequence("k"), "w")):
            with pytest.raises(ValueError, match="must be of type SequenceCategoricalColumn"):
                look_up_sequence(embedding(column, 2))


@pytest.mark.parametrize(
    ("columns", "fragment"),
    [
        (lambda e: [], "feature_columns must not be empty"),
        (lambda e: {"k": e(identity(), 2)}, "found dict"),
        (lambda e: [identity()], "Items of feature_columns must be"),
        (lambda e: [e(identity(), 2), e(identity(), 3)], "Duplicate feature column name"),
        (lambda e: [e(identity("k"), 2), e(identity("b"), 2)], "Batch size"),
        (lambda e: [e(identity(), 2, combiner="max")], None),
    ],
)
def test_bad_lists_of_columns_are_refused_as_in_tensorflow(
    columns: Callable[[Any], Any], fragment: str | None
) -> None:
    features: dict[str, Any] = {"k": [[0, 1]], "b": [[0], [1]]}
    with pytest.raises(ValueError, match=fragment), tf.Graph().as_default():
        tf.compat.v1.feature_column.input_layer(features, columns(stock_embedding_column))
    with pytest.raises(ValueError, match=fragment):
        ours.input_layer(features, columns(ours.embedding_column), {"k": TABLE, "b": TABLE})


# Names

COLUMNS: list[tuple[Callable[[Any], Any], dict[str, Any]]] = [
    (lambda m: m.categorical_column_with_identity("k", 5), {}),
    (
        lambda m: m.weighted_categorical_column(m.categorical_column_with_identity("k", 5), "w"),
        {"embedding_lookup_device": "cpu"},
    ),
    (
        lambda m: m.sequence_categorical_column_with_hash_bucket("k", 7),
        {"max_sequence_length": 4, "use_safe_embedding_lookup": False},
    ),
    (
        lambda m: m.weighted_categorical_column(
            m.sequence_categorical_column_with_identity("k", 5), "w"
        ),
        {"combiner": "sqrtn", **CORE, "tensor_core_shape": [None, 3]},
    ),
]


def properties_of_stock(column: Any) -> dict[str, Any]:
    device = getattr(column, "_embedding_lookup_device", None)
    return {
        "name": column.name,
        "table_name": column.get_embedding_var_name(),
        "table_size": column.get_embedding_table_size(),
        "feature_key": column.get_feature_key_name(),
        "weight_key": column.get_weight_key_name(),
        "sequence_length_key": column.get_sequence_length_feature_key_name(),
        "is_sequence": column.is_sequence_column(),
        "is_weighted": column.is_categorical_column_weighted(),
        "max_sequence_length": column.get_max_sequence_length(),
        "learning_rate_fn": column.get_learning_rate_fn(),
        "combiner": column.get_combiner(),
        "use_safe_embedding_lookup": column.use_safe_embedding_lookup,
        "embedding_lookup_device": device and device.name.lower(),
    }


@pytest.mark.parametrize(("make", "options"), COLUMNS)
def test_properties_equal_tensorflow(make: Callable[[Any], Any], options: dict[str, Any]) -> None:
    def rate(step: int) -> float:
        return 0.1

    options = {**options, "learning_rate_fn": rate}
    wanted = properties_of_stock(stock_embedding_column(make(stock), 2, **options))
    for module in (stock, ours):
        mine = ours.embedding_column(make(module), 2, **options)
        assert {name: getattr(mine, name) for name in wanted} == wanted
        assert mine.initializer.stddev == pytest.approx(1 / np.sqrt(2))
        assert copy.deepcopy(mine).name == mine.name
    length = options.pop("max_sequence_length", 0)
    options["max_sequence_lengths"] = [length]
    wanted = properties_of_stock(stock_shared_columns([make(stock)], 2, **options)[0])
    (shared,) = ours.shared_embedding_columns([make(ours)], 2, **options)
    assert {name: getattr(shared, name) for name in wanted} == wanted


def test_kinds_that_need_tensorflow_are_accepted_but_not_computed() -> None:
    bucketized = stock.bucketized_column(stock.numeric_column("x"), [1.0, 2.0])
    crossed = stock.crossed_column(["x", "y"], 10)
    for column, kind in ((bucketized, "BucketizedColumn"), (crossed, "CrossedColumn")):
        mine = ours.embedding_column(column, 2)
        assert mine.name == stock_embedding_column(column, 2).name
        assert mine.table_size == (column.num_buckets, 2)
        with pytest.raises(ConfigError, match=f"'{column.name}': a {kind} cannot be computed"):
            mine.transform  # noqa: B018


def test_equal_columns_are_equal_as_in_tensorflow() -> None:
    for _, make in CATEGORICAL.values():
        assert (make(stock) == make(stock)) is (make(ours) == make(ours)) is True
        assert hash(make(ours)) == hash(make(ours))
    for module in (stock, ours):
        five = module.categorical_column_with_identity("k", 5)
        assert five != module.categorical_column_with_identity("k", 4)
        assert five != module.sequence_categorical_column_with_identity("k", 5)
