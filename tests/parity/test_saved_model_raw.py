"""A SavedModel takes the raw values of columns and answers as `LookupService` does."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ps import columns
from ps.columns import EmbeddingColumn, RawValues, Transform, configs_from_columns, embedding_column
from ps.config import FeatureConfig, TableConfig
from ps.errors import ConfigError, ExportError, InputError
from ps.export import Export, ExportWriter, open_export, write_rows
from ps.inputs import Bags
from ps.ragged import F32, Ragged
from ps.spec import resolve
from serving.lookup import LookupService, Raw
from serving.tf import raw_ids
from serving.tf.saved_model import write_saved_model
from tests.support.parity_size import examples

pytestmark = pytest.mark.parity

DIM = 2
MAX_LENGTH = 2
WORDS = ["a", "b", "", "zz", "ab", "ü", "line\nof\r two", "x" * 40]
NUMBERS = [3, -2, 2**40, -1, 0]
Values = dict[str, list[list[Any]]]
"""Raw values of each feature: of every example, of every step."""


def some_columns() -> list[EmbeddingColumn]:
    """Every kind, safe and not, weighted, and as a sequence; their names say which."""
    single = [
        columns.categorical_column_with_identity("identity", 5),
        columns.categorical_column_with_identity("identity/default", 5, 2),
        columns.categorical_column_with_hash_bucket("hash", 7),
        columns.categorical_column_with_hash_bucket("hash of int", 7, dtype="int64"),
        columns.categorical_column_with_vocabulary_list("words", WORDS),
        columns.categorical_column_with_vocabulary_list("words/default", WORDS, default_value=3),
        columns.categorical_column_with_vocabulary_list("words/oov", WORDS, num_oov_buckets=3),
        columns.categorical_column_with_vocabulary_list("numbers", NUMBERS),
        columns.categorical_column_with_vocabulary_list("numbers/oov", NUMBERS, num_oov_buckets=2),
    ]
    unsafe = [
        columns.categorical_column_with_identity("unsafe identity", 5),
        columns.categorical_column_with_vocabulary_list("unsafe words", WORDS),
    ]
    words = columns.categorical_column_with_vocabulary_list("weighted words", WORDS)
    hashed = columns.categorical_column_with_hash_bucket("counted hash", 5)
    weighted = [
        columns.weighted_categorical_column(words, "weights of words"),
        columns.weighted_categorical_column(hashed, "counts", dtype="int64"),
    ]
    sequences = [
        columns.sequence_categorical_column_with_identity("seq identity", 5),
        columns.sequence_categorical_column_with_vocabulary_list("seq words", WORDS),
        columns.sequence_categorical_column_with_vocabulary_list(
            "seq numbers", NUMBERS, num_oov_buckets=1
        ),
    ]
    return [
        *(embedding_column(c, DIM, combiner="sum") for c in single),
        *(embedding_column(c, DIM, use_safe_embedding_lookup=False) for c in unsafe),
        *(embedding_column(c, DIM, combiner="sqrtn") for c in weighted),
        *(embedding_column(c, DIM, max_sequence_length=MAX_LENGTH) for c in sequences),
    ]


def write_export(
    root: Path,
    embedding_columns: list[EmbeddingColumn],
    plain: Mapping[str, FeatureConfig] | None = None,
    model: Mapping[str, Any] | None = None,
) -> Export:
    """An export of columns, of features without one, and of a dense model without variables."""
    configs = configs_from_columns(embedding_columns)
    spec = resolve({**configs.feature_config, **(plain or {})})
    with ExportWriter(root, spec, step=1, job="test", transforms=configs.transforms) as writer:
        for seed, table in enumerate(spec.tables):
            rows = np.random.default_rng(seed).normal(size=(table.vocabulary_size, table.dim))
            write_rows(writer.row_file(table.name), 0, rows.astype(np.float32))
        if model is not None:
            writer.add_dense({"scale": np.array(2.0, np.float32)}, dict(model))
        writer.commit()
    return open_export(root)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    plain = {"plain": FeatureConfig(TableConfig(5, DIM, combiner="sum", name="plain"))}
    return write_export(tmp_path_factory.mktemp("export"), some_columns(), plain)


@pytest.fixture(scope="module")
def service(export: Export) -> LookupService:
    return LookupService(export)


@dataclass(frozen=True)
class Saved:
    """A SavedModel as TensorFlow loads it, and the kinds of its inputs."""

    model: Any
    export: Export
    kinds: Mapping[str, str]

    @classmethod
    def of(cls, export: Export, folder: Path, kinds: Any, **options: Any) -> Saved:
        write_saved_model(export, folder, inputs=kinds, **options)
        return cls(tf.saved_model.load(str(folder)), export, kinds)

    def kind(self, name: str) -> str:
        weighted = name in self.export.transforms and self.export.transforms[name].weight_key
        return self.kinds.get(name, "ragged_weighted" if weighted else "ragged")

    def serve(self, values: Values, weights: Values) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for name in values:
            tensors |= self._tensors(name, values[name], weights.get(name))
        return run(self.model.signatures["serving_default"], tensors)

    def serve_examples(self, values: Values, weights: Values) -> dict[str, Any]:
        count = len(next(iter(values.values())))
        serialized = [
            self._example(
                {n: v[b] for n, v in values.items()}, {n: w[b] for n, w in weights.items()}
            )
            for b in range(count)
        ]
        examples = tf.constant(serialized, tf.string, shape=[count])
        return run(self.model.signatures["serialized_examples"], {"examples": examples})

    def _tensors(self, name: str, rows: Any, weights: Any) -> dict[str, Any]:
        key, kind = name.replace(" ", "_"), self.kind(name)
        transform = self.export.transforms.get(name)
        flat = [value for row in rows for value in row if value is not None]
        dtype = tf.string if transform is not None and transform.takes_strings else tf.int64
        tensors = {key: tf.constant(flat, dtype, shape=[len(flat)])}
        if kind.endswith("_weighted"):
            flat = [weight for row in weights for weight in row]
            tensors[f"{key}_weights"] = tf.constant(flat, weight_type(transform), shape=[len(flat)])
        if kind.startswith("ragged"):
            tensors[f"{key}_row_splits"] = tf.constant(splits_of(rows))
        elif kind.startswith("sparse"):
            places = [
                (b, t) for b, row in enumerate(rows) for t, v in enumerate(row) if v is not None
            ]
            tensors[f"{key}_indices"] = tf.constant(places, tf.int64, shape=[len(places), 2])
            shape = [len(rows), max(map(len, rows), default=0)]
            tensors[f"{key}_dense_shape"] = tf.constant(shape, tf.int64)
        return tensors

    def _example(self, values: Mapping[str, list[Any]], weights: Mapping[str, list[Any]]) -> bytes:
        features: dict[str, tf.train.Feature] = {}
        for name, row in values.items():
            transform = self.export.transforms.get(name)
            strings = transform is not None and transform.takes_strings
            if self.kind(name) == "dense" and row[0] == ("" if strings else -1):
                continue
            features[name] = bytes_list(row) if strings else int64_list(row)
            if name in weights:
                floats = weight_type(transform) == tf.float32
                one = (float_list if floats else int64_list)(weights[name])
                features[transform.weight_key] = one
        return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def run(signature: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in signature(**tensors).items()}


def splits_of(rows: list[list[Any]]) -> Any:
    return np.cumsum([0, *map(len, rows)], dtype=np.int64)


def weight_type(transform: Transform | None) -> Any:
    assert transform is not None, "plain features have no weights here"
    return tf.int64 if transform.weight_dtype == "int64" else tf.float32


def bytes_list(row: list[Any]) -> tf.train.Feature:
    values = [value if isinstance(value, bytes) else value.encode() for value in row]
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))


def int64_list(row: list[int]) -> tf.train.Feature:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=row))


def float_list(row: list[float]) -> tf.train.Feature:
    return tf.train.Feature(float_list=tf.train.FloatList(value=row))


def service_inputs(saved: Saved, values: Values, weights: Values) -> dict[str, Any]:
    """The same for `LookupService`; sparse sequences may have steps without a value."""
    inputs: dict[str, Any] = {}
    for name, rows in values.items():
        transform = saved.export.transforms.get(name)
        if transform is None:
            inputs[name] = Bags(Ragged.from_lists(rows))
            continue
        kind = pa.binary() if transform.takes_strings else pa.int64()
        steps = [value for row in rows for value in row]
        flat = pa.array([value for value in steps if value is not None], kind)
        if saved.kind(name) == "dense":
            inputs[name] = Raw(flat)
            continue
        step_splits = np.cumsum([0, *(value is not None for value in steps)], dtype=np.int64)
        gaps = {"step_splits": step_splits} if transform.sequence else {}
        given = RawValues(flat, splits_of(rows), **gaps)
        its_weights = None
        if name in weights:
            dtype = weight_type(transform).as_numpy_dtype
            numbers = np.array([w for row in weights[name] for w in row], dtype)
            its_weights = RawValues(numbers, splits_of(rows))
        inputs[name] = Raw(given, its_weights)
    return inputs


STRINGS = st.one_of(st.sampled_from(WORDS), st.binary(max_size=5))
INTEGERS = st.one_of(st.sampled_from([*NUMBERS, 1, 4, 5]), st.integers(-(2**63), 2**63 - 1))
USUAL: dict[bool, Any] = {True: st.sampled_from(WORDS), False: st.integers(0, 4)}
FLOATS = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0, float("nan")])


@st.composite
def requests(draw: st.DrawFn, saved: Saved) -> tuple[Values, Values]:
    """Values and weights; features that refuse values have only good ones, but for one of them."""
    size = draw(st.integers(0, 3))
    strict = [n for n in saved.export.features if "identity" in n or "unsafe" in n or n == "plain"]
    odd = draw(st.sampled_from([*strict, *[""] * len(strict)]))
    values: Values = {}
    weights: Values = {}
    for name in saved.export.features:
        transform = saved.export.transforms.get(name)
        strings = transform is not None and transform.takes_strings
        good = name in strict and name not in (odd, "identity/default")
        element = USUAL[strings] if good else STRINGS if strings else INTEGERS
        longest = 1 if (dense := saved.kind(name) == "dense") else 4
        if transform is not None and transform.sequence and saved.kind(name) == "sparse":
            element = st.one_of(st.none(), element)
        a_row = st.lists(element, min_size=int(dense), max_size=longest)
        values[name] = draw(st.lists(a_row, min_size=size, max_size=size))
        if transform is not None and transform.weight_key is not None:
            one = FLOATS if weight_type(transform) == tf.float32 else st.integers(-1, 3)
            weights[name] = [[draw(one) for _ in row] for row in values[name]]
    return values, weights


@pytest.mark.parametrize("form", ["dense", "ragged", "sparse"])
def test_raw_values_are_answered_as_by_the_lookup_service(
    form: str, export: Export, service: LookupService, tmp_path: Path
) -> None:
    kinds = {
        name: form
        for name, feature in export.features.items()
        if (form != "dense" or not feature.max_sequence_length)
        and name not in ("weighted words", "counted hash", "plain")
    }
    if form == "sparse":
        kinds |= {"weighted words": "sparse_weighted", "counted hash": "sparse_weighted"}
    saved = Saved.of(export, tmp_path / "saved", kinds)

    @settings(max_examples=examples(25), deadline=None)
    @given(requests(saved))
    def check(drawn: tuple[Values, Values]) -> None:
        values, weights = drawn
        ways = [saved.serve]
        if not any(None in row for rows in values.values() for row in rows):
            ways.append(saved.serve_examples)
        try:
            wanted, lengths = service.lookup_with_lengths(service_inputs(saved, values, weights))
        except InputError:
            for serve in ways:
                with pytest.raises(tf.errors.InvalidArgumentError):
                    serve(values, weights)
            return
        for serve in ways:
            found = serve(values, weights)
            for name, length in lengths.items():
                np.testing.assert_array_equal(found.pop(f"{name}_seq_length_"), length, strict=True)
            assert found.keys() == wanted.keys()
            for name, activation in wanted.items():
                assert found[name].shape == activation.shape
                np.testing.assert_allclose(found[name], activation, 1e-5, 1e-6, err_msg=name)

    check()


def test_inputs_have_the_types_of_their_columns(export: Export, tmp_path: Path) -> None:
    saved = Saved.of(export, tmp_path / "saved", {"words": "dense", "hash of int": "sparse"})
    signature = saved.model.signatures["serving_default"]
    specs = signature.structured_input_signature[1]
    assert {name for name, spec in specs.items() if spec.dtype == tf.string} == {
        *("hash", "words", "words_default", "words_oov"),
        *("unsafe_words", "weighted_words", "counted_hash", "seq_words"),
    }
    assert specs["weighted_words_weights"].dtype == tf.float32
    assert specs["counted_hash_weights"].dtype == tf.int64
    assert "words_row_splits" not in specs
    assert "hash_of_int_indices" in specs
    lengths = signature.structured_outputs["seq words_seq_length_"]
    assert (lengths.shape.as_list(), lengths.dtype) == ([None], tf.int64)


class Steps(tf.Module):
    """The mean over the filled steps of a sequence, plus one feature, times `scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = tf.Variable(0.0, name="scale")

    def __call__(self, activations: Mapping[str, Any], dense: Any, training: bool) -> Any:
        lengths = activations["seq_seq_length_"]
        total = tf.reduce_sum(activations["seq"], axis=[1, 2]) / tf.maximum(lengths, 1.0)
        return self.scale * (total + 10.0 * lengths + tf.reduce_sum(activations["user"], axis=1))


def sequence_export(root: Path, **described: Any) -> Export:
    sequence = columns.sequence_categorical_column_with_vocabulary_list("seq", ["a", "b"])
    user = columns.categorical_column_with_hash_bucket("user", 5)
    pair = [embedding_column(sequence, DIM, max_sequence_length=2), embedding_column(user, DIM)]
    return write_export(root, pair, model={"name": "steps", "params": {}, **described})


SEQUENCES = [["a", "zz", "b"], [], ["b"], ["zz"]]
USERS = [["x"], ["y"], [""], ["x"]]
KINDS = {"user": "dense"}


def predictions(export: Export) -> F32:
    service = LookupService(export)
    raw = RawValues(pa.array([v for row in SEQUENCES for v in row]), splits_of(SEQUENCES))
    users = Raw(np.array([row[0] for row in USERS]))
    found, lengths = service.lookup_with_lengths({"seq": Raw(raw), "user": users})
    assert lengths["seq"].tolist() == [2, 0, 1, 1]
    length = lengths["seq"].astype(np.float32)
    total = found["seq"].sum((1, 2)) / np.maximum(length, 1)
    answer: F32 = 2 * (total + 10 * length + found["user"].sum(1))
    return answer


@pytest.mark.parametrize("loss", ["bce", "mse", None])
def test_a_model_gets_lengths_and_logits_become_probabilities(
    loss: str | None, tmp_path: Path
) -> None:
    export = sequence_export(tmp_path / "export", **({"loss": loss} if loss else {}))
    saved = Saved.of(export, tmp_path / "saved", KINDS, model=Steps())
    values = {"seq": SEQUENCES, "user": USERS}
    wanted = predictions(export)
    for found in (saved.serve(values, {}), saved.serve_examples(values, {})):
        np.testing.assert_allclose(found.pop("predictions"), wanted, rtol=1e-5)
        if loss == "bce":
            np.testing.assert_allclose(
                found.pop("probabilities"), 1 / (1 + np.exp(-wanted)), rtol=1e-5
            )
        assert found == {}


WITHOUT_MANTA = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
import tensorflow as tf
serve = tf.saved_model.load(sys.argv[2]).signatures["serving_default"]
given = {n: tf.constant(v) for n, v in json.loads(sys.argv[3]).items()}
given["seq_row_splits"] = tf.cast(given["seq_row_splits"], tf.int64)
print(json.dumps(serve(**given)["predictions"].numpy().tolist()))
ours = ("ps", "serving", "workers", "manta")
assert not any(name.split(".")[0] in ours for name in sys.modules)
assert not any(importlib.util.find_spec(name) for name in ours)
"""


def test_it_takes_raw_values_where_manta_is_not_installed(tmp_path: Path) -> None:
    export = sequence_export(tmp_path / "export")
    write_saved_model(export, tmp_path / "saved", model=Steps(), inputs={"user": "dense"})
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    given = {
        "seq": [value for row in SEQUENCES for value in row],
        "seq_row_splits": splits_of(SEQUENCES).tolist(),
        "user": [row[0] for row in USERS],
    }
    # Without `site`, for its .pth files would put an editable Manta on the path.
    packages = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-I", "-S", "-c", WITHOUT_MANTA, packages, str(moved)]
    done = subprocess.run(
        [*command, json.dumps(given)],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), predictions(export), rtol=1e-5)


def test_two_columns_may_share_their_weights(tmp_path: Path) -> None:
    inner = [columns.categorical_column_with_identity(key, 5) for key in ("one", "two")]
    both = [columns.weighted_categorical_column(column, "w") for column in inner]
    export = write_export(tmp_path / "export", [embedding_column(c, DIM, "sum") for c in both])
    saved = Saved.of(export, tmp_path / "saved", {})
    values, weights = {"one": [[1, 2], []], "two": [[3, 4], []]}, [[2.0, 3.0], []]
    found = saved.serve_examples(values, dict.fromkeys(values, weights))
    for name, (first, second) in {"one": (1, 2), "two": (3, 4)}.items():
        rows = export.tables[export.features[name].table].rows_VD
        wanted = [2 * rows[first] + 3 * rows[second], np.zeros(DIM)]
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        ({"weighted words": "ragged"}, r"raw values with weights: .* got 'ragged'"),
        ({"weighted words": "dense"}, r"raw values with weights: .* got 'dense'"),
        ({"words": "sparse_weighted"}, r"raw values without weights: .* got 'sparse_weighted'"),
        ({"seq words": "dense"}, "'seq words' is a sequence feature"),
    ],
)
def test_a_form_that_a_column_does_not_take_is_refused(
    kinds: Any, reason: str, export: Export, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        write_saved_model(export, tmp_path / "saved", inputs=kinds)


def test_a_feature_named_as_lengths_is_refused(tmp_path: Path) -> None:
    sequence = columns.sequence_categorical_column_with_identity("seq", 5)
    column = embedding_column(sequence, DIM, max_sequence_length=1)
    plain = {"seq_seq_length_": FeatureConfig(TableConfig(5, DIM, combiner="sum", name="t"))}
    export = write_export(tmp_path / "export", [column], plain)
    with pytest.raises(ConfigError, match="'seq_seq_length_' has the name of the lengths of"):
        write_saved_model(export, tmp_path / "saved")


def test_vocabularies_too_large_for_a_graph_are_refused(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_ids, "MAX_VOCABULARY_BYTES", 100)
    with pytest.raises(ExportError, match=r"their \d+ bytes exceed 100; hashed columns have none"):
        write_saved_model(export, tmp_path / "saved")
