"""Raw inputs of columns: every form, every refusal, and transforms as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ps.columns as fc
from ps.columns.vocabulary import Vocabulary
from ps.errors import ConfigError, InputError
from ps.kernels.fingerprint import fingerprint64


def transform(column: Any) -> fc.Transform:
    return fc.Transform.of(column)


INTEGERS = transform(fc.categorical_column_with_identity("k", 9))
STRINGS = transform(fc.categorical_column_with_vocabulary_list("k", ["a", "b", "é"]))
WEIGHTED = transform(
    fc.weighted_categorical_column(fc.categorical_column_with_identity("k", 9), "w")
)
HASHED = transform(fc.categorical_column_with_hash_bucket("k", 10, dtype="uint64"))
SEQUENCE = transform(fc.sequence_categorical_column_with_identity("k", 9))

FINGERPRINTS = {  # of TensorFlow: tf.strings.to_hash_bucket_fast, and its parity test
    "": 11160318154034397263,
    "abc": 2640714258260161385,
}


def test_strings_have_the_fingerprints_of_farmhash() -> None:
    data = np.frombuffer("".join(FINGERPRINTS).encode(), dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, FINGERPRINTS)])
    assert fingerprint64(data, offsets).tolist() == list(FINGERPRINTS.values())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.binary(max_size=3), min_size=1, unique=True),
    st.lists(st.binary(max_size=3)),
)
def test_a_vocabulary_finds_what_a_dict_finds(words: list[bytes], queries: list[bytes]) -> None:
    places = {word: n for n, word in enumerate(words)}
    vocabulary = Vocabulary(pa.array(words, pa.large_binary()), "k", "list")
    queries += words
    found = vocabulary.find(pa.array(queries, pa.large_binary()))
    assert found.tolist() == [places.get(query, -1) for query in queries]


ONE_TWO_EMPTY = [
    [[1, 2], []],
    [[1, 2], None],
    [[1, None, 2], [-1]],
    np.array([[1, 2], [-1, -1]]),
    np.array([[1, 2], [-1, -1]], dtype=np.int8),
    np.array([[1, 2], []], dtype=object),
    pa.array([[1, 2], []]),
    pa.array([[1, None, 2], None], pa.large_list(pa.int32())),
    pa.array([[9, 9], [1, 2], []]).slice(1),
    pa.array([[1, 2], [-1, None]], pa.list_(pa.int64(), 2)),
    pa.chunked_array([[[1, 2]], [[]]], pa.list_(pa.int64())),
    fc.RawValues([1, 2], np.array([0, 2, 2])),
    fc.RawValues(np.array([1, 2]), np.array([0, 2, 2])),
    fc.RawValues(pa.array([1, 2]), np.array([0, 2, 2])),
]


@pytest.mark.parametrize("raw", ONE_TWO_EMPTY)
def test_every_form_of_integers_is_read(raw: Any) -> None:
    assert INTEGERS({"k": raw}).to_lists() == [[1, 2], []]


@pytest.mark.parametrize(
    "raw",
    [
        [["b", "é"], []],
        [[b"b", "é".encode()], []],
        np.array([["b", "é"], ["", ""]]),
        np.array([["b", "é"], ["", ""]], dtype=object),
        np.array([[b"b", "é".encode()], [b"", b""]]),
        pa.array([["b", "é"], []]),
        pa.array([["b", "é"], []], pa.list_(pa.string_view())),
        pa.array([["b", "é"], None], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        fc.RawValues(["b", "é"], np.array([0, 2, 2])),
        fc.RawValues(pa.array(["x", "b", "é"]).slice(1), np.array([0, 2, 2])),
    ],
)
def test_every_form_of_strings_is_read(raw: Any) -> None:
    assert STRINGS({"k": raw}).to_lists() == [[1, 2], []]


@pytest.mark.parametrize("raw", [[1, -1], np.array([1, -1]), pa.array([1, None])])
def test_rank_one_is_one_value_per_example(raw: Any) -> None:
    assert INTEGERS({"k": raw}).to_lists() == [[1], []]


@pytest.mark.parametrize("raw", [[], np.zeros(0), np.zeros((0, 3)), pa.array([])])
def test_no_examples_are_no_examples(raw: Any) -> None:
    assert INTEGERS({"k": raw}).num_examples == 0
    assert SEQUENCE.steps({"k": raw}).row_splits.tolist() == [0]


@pytest.mark.parametrize("raw", [[[], []], [None, None], pa.nulls(2)])
def test_examples_without_values_have_no_type(raw: Any) -> None:
    for one in (INTEGERS, STRINGS):
        assert one({"k": raw}).to_lists() == [[], []]
    assert SEQUENCE({"k": raw}).to_lists() == [[], []]


def test_in_a_sparse_input_every_value_counts() -> None:
    known = transform(fc.categorical_column_with_vocabulary_list("k", ["a", ""]))
    assert known({"k": pa.array([["", "a"]])}).to_lists() == [[1, 0]]
    assert known({"k": [["", "a"]]}).to_lists() == [[0]]
    assert INTEGERS({"k": pa.array([[-1, 1]])}).to_lists() == [[-1, 1]]


def test_unsigned_integers_of_64_bits_can_be_hashed_but_are_no_ids() -> None:
    large = np.array([2**64 - 1], dtype=np.uint64)
    text = transform(fc.categorical_column_with_hash_bucket("k", 10))
    assert HASHED({"k": large}).to_lists() == text({"k": [str(2**64 - 1)]}).to_lists()
    with pytest.raises(InputError, match="values of 'k' must fit int64"):
        INTEGERS({"k": large})


@pytest.mark.parametrize(
    ("raw", "fragment"),
    [
        (3, "cannot have rank 0"),
        ("abc", "cannot have rank 0"),
        (None, "cannot have rank 0"),
        ({"a": 1}, "cannot have rank 0"),
        ([[[1]]], "rank 3"),
        ([[[[1]]]], "rank 4"),
        ([[[[[[1]]]]]], "lists nest deeper than 3"),
        (np.zeros((1, 1, 1, 1), int), "rank 4"),
        ([1, "a"], "cannot be read"),
        ([[1], 2], "or stand beside values"),
        ([[1, [2]]], "or stand beside values"),
        ([2**70], "cannot be read"),
        ([["\ud800"]], "cannot be read"),
        ([[1.0]], "not integer"),
        ([[True]], "not integer"),
        ([{"a": 1}], "not integer"),
        ([["1"]], "not integer"),
        (np.array(["2020-01-01"], "datetime64[D]"), "not integer"),
        (np.array([1j]), "cannot be read"),
        (fc.RawValues([1, 2], np.array([0, 1])), "row_splits must start at 0"),
        (fc.RawValues([1, 2], np.array([0, 3, 2])), "row_splits must start at 0"),
        (fc.RawValues([[1], [2]], np.array([0, 2])), "must be flat"),
        (fc.RawValues([1, 2], np.array([0, 1]), np.array([0, 1])), "step_splits must start"),
        (fc.RawValues([1, 2], np.array([0.5, 2])), "row_splits must be integers"),
    ],
)
def test_a_bad_input_is_refused_by_name(raw: Any, fragment: str) -> None:
    with pytest.raises(InputError, match=fragment) as refusal:
        INTEGERS({"k": raw})
    assert refusal.value.feature == "k"
    assert "k" in str(refusal.value)


def test_weights_pair_with_values_example_by_example() -> None:
    for weights in (
        [[1.5, 0], [2]],
        np.array([[1.5, 0], [2, 0]], dtype=np.float32),
        pa.array([[1.5], [2]], pa.list_(pa.float32())),
        fc.RawValues([1.5, 2], np.array([0, 1, 2])),
    ):
        bags = WEIGHTED({"k": [[3, -1], [4, -1]], "w": weights})
        assert bags.to_lists() == [[3], [4]]
        assert bags.weights is not None
        assert bags.weights.tolist() == [1.5, 2]
    for weights in ([[1.5], [0]], [[1.5], [2, 3]], [[1.5, 2], [0]], [[[1.5]], [[2]]], [1.5]):
        with pytest.raises(InputError, match="weights do not pair") as refusal:
            WEIGHTED({"k": [[3, -1], [4, -1]], "w": weights})
        assert refusal.value.feature == "w"
    with pytest.raises(InputError, match="Feature w is not in features dictionary"):
        WEIGHTED({"k": [[3]]})


def test_typed_weights_must_be_of_the_declared_dtype() -> None:
    def weighted(dtype: str) -> fc.Transform:
        inner = fc.categorical_column_with_identity("k", 9)
        return transform(fc.weighted_categorical_column(inner, "w", dtype))

    for dtype, weights in (
        ("float32", np.array([[1.0]])),
        ("float32", pa.array([[1.0]])),
        ("float32", np.array([[1]])),
        ("float64", np.array([[1.0]], dtype=np.float32)),
        ("int32", [[1.5]]),
        ("float32", [["a"]]),
        ("float32", [[True]]),
    ):
        with pytest.raises(InputError, match=f"Bad dtype, expected {dtype}, but got"):
            weighted(dtype)({"k": [[3]], "w": weights})
    for dtype, weights in (
        ("float32", [[2]]),
        ("int32", [[2]]),
        ("int32", np.array([[2]], dtype=np.int32)),
        ("float64", np.array([[2.0]])),
        ("float16", np.array([[2.0]], dtype=np.float16)),
    ):
        found = weighted(dtype)({"k": [[3]], "w": weights}).weights
        assert found is not None
        assert (found.dtype, found.tolist()) == (np.float32, [2.0])


def test_a_weighted_sequence_is_no_sequence() -> None:
    inner = fc.sequence_categorical_column_with_identity("k", 9)
    weighted = transform(fc.weighted_categorical_column(inner, "w"))
    assert not weighted.sequence
    assert weighted({"k": [[1, 2]], "w": [[3, 4]]}).to_lists() == [[1, 2]]


# Columns


def test_a_vocabulary_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("a\nb\nc\n")
    column = fc.categorical_column_with_vocabulary_file("k", str(path), 2)
    path.unlink()
    assert column.num_buckets == 2
    assert column == fc.categorical_column_with_vocabulary_list("k", ["a", "b"])
    assert transform(column)({"k": [["b", "c"]]}).to_lists() == [[1, -1]]


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: fc.categorical_column_with_identity("k", 2.5), "`num_buckets` must be an int"),
        (lambda: fc.categorical_column_with_hash_bucket("k", 2, "str64"), "string or integer"),
        (lambda: fc.weighted_categorical_column("k", "w"), "wanted a CategoricalColumn"),
        (
            lambda: transform(
                fc.weighted_categorical_column(
                    fc.weighted_categorical_column(
                        fc.categorical_column_with_identity("k", 2), "w"
                    ),
                    "v",
                )
            ),
            "cannot be weighted again",
        ),
        (
            lambda: fc.categorical_column_with_vocabulary_file("k", "f", file_format="csv"),
            "`file_format` must be text or tfrecord_gzip, got 'csv'",
        ),
        (
            lambda: fc.categorical_column_with_vocabulary_list("k", pa.array(["a", None])),
            "vocabulary_list holds 1 nulls",
        ),
        (lambda: fc.categorical_column_with_vocabulary_list("k", [2**70]), "vocabulary dtype|bad"),
    ],
)
def test_a_bad_column_is_refused(make: Any, fragment: str) -> None:
    with pytest.raises((ConfigError, TypeError), match=fragment):
        make()


# JSON

TRANSFORMS = [
    INTEGERS,
    STRINGS,
    WEIGHTED,
    HASHED,
    SEQUENCE,
    transform(fc.categorical_column_with_identity("k", 9, 3)),
    transform(fc.categorical_column_with_vocabulary_list("k", [7, 5], num_oov_buckets=2)),
    transform(fc.categorical_column_with_vocabulary_list("k", [7, 5], default_value=1)),
]


@pytest.mark.parametrize("one", TRANSFORMS, ids=lambda one: str(one.to_json()))
def test_a_transform_comes_back_from_json(one: fc.Transform) -> None:
    document = json.loads(json.dumps(one.to_json()))
    assert fc.Transform.from_json(document, one.vocabulary) == one


def test_the_json_of_a_transform_is_small_and_flat() -> None:
    assert WEIGHTED.to_json() == {
        "kind": "identity",
        "key": "k",
        "num_buckets": 9,
        "default_value": None,
        "weight_key": "w",
        "weight_dtype": "float32",
        "sequence": False,
    }
    assert STRINGS.to_json() == {
        "kind": "vocabulary",
        "key": "k",
        "vocabulary_size": 3,
        "dtype": "string",
        "default_value": -1,
        "num_oov_buckets": 0,
        "weight_key": None,
        "weight_dtype": None,
        "sequence": False,
    }


@pytest.mark.parametrize(
    ("one", "change", "fragment"),
    [
        (INTEGERS, {"kind": "magic"}, "`kind` must be one of"),
        (INTEGERS, {"kind": ["identity"]}, "`kind` must be one of"),
        (INTEGERS, {"extra": 1}, "wanted the fields"),
        (INTEGERS, {"num_buckets": "9"}, "`num_buckets` must be int, got '9'"),
        (INTEGERS, {"num_buckets": True}, "`num_buckets` must be int, got True"),
        (INTEGERS, {"num_buckets": 0}, "num_buckets 0 < 1"),
        (INTEGERS, {"default_value": 9}, "not in range"),
        (INTEGERS, {"key": None}, "`key` must be str"),
        (INTEGERS, {"sequence": 0}, "`sequence` must be bool, got 0"),
        (INTEGERS, {"weight_key": "w"}, "`weight_dtype` None does not fit 'w'"),
        (WEIGHTED, {"weight_dtype": "string"}, "`weight_dtype` 'string' does not fit"),
        (WEIGHTED, {"sequence": True}, "exclude each other"),
        (HASHED, {"dtype": "float32"}, "must be string or integer"),
        (STRINGS, {"vocabulary_size": 4}, "`vocabulary_size` is 4, but the vocabulary has 3"),
        (STRINGS, {"dtype": "int64"}, "do not match"),
        (STRINGS, {"num_oov_buckets": -1}, "Invalid num_oov_buckets"),
    ],
)
def test_a_bad_document_is_refused(
    one: fc.Transform, change: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(ConfigError, match=fragment):
        fc.Transform.from_json(one.to_json() | change, one.vocabulary)


def test_a_vocabulary_belongs_to_a_vocabulary_column_only() -> None:
    with pytest.raises(ConfigError, match="belongs to the kind vocabulary"):
        fc.Transform.from_json(STRINGS.to_json())
    with pytest.raises(ConfigError, match="belongs to the kind vocabulary"):
        fc.Transform.from_json(INTEGERS.to_json(), pa.array([1]))
    with pytest.raises(ConfigError, match="Duplicate keys in vocabulary_list"):
        fc.Transform.from_json(STRINGS.to_json(), pa.array(["a", "a", "b"]))
    for document in (None, [], "identity", {}):
        with pytest.raises(ConfigError, match="`kind` must be one of"):
            fc.Transform.from_json(document)
