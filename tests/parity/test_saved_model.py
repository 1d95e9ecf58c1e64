"""A SavedModel answers as `LookupService` and the dense model do, in stock TensorFlow alone."""

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
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.config import COMBINERS, FeatureConfig, TableConfig
from ps.errors import ConfigError, ExportError, InputError
from ps.export import Export, ExportWriter, open_export, write_rows
from ps.inputs import Bags, Dense
from ps.ragged import F32, Ragged
from ps.spec import resolve
from serving.lookup import LookupService
from serving.tf.saved_model import load_dense_variables, write_saved_model
from serving.tf.signatures import Kind, input_name
from tests.support.exports import ROWS_VD, small_export, write_export
from tests.support.models import JoinedMLP, build_keras
from tests.support.parity_size import examples
from workers.config import ModelConfig
from workers.dense import DenseStep
from workers.model import DLRM, ModelInputs, TwoTower

pytestmark = pytest.mark.parity

DIM = 3
V = 7
MAX_LENGTH = 2
SPECIES: dict[str, dict[str, Any]] = {
    "safe": {},
    "raw": {"validate_weights_and_indices": False},
    "sequence": {"max_sequence_length": MAX_LENGTH},
    "shaped": {"max_sequence_length": MAX_LENGTH, "output_shape": (4,)},
}
TAKES_WEIGHTS = ("safe", "raw")
WEIGHTS = [-2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 3.0, float("nan"), float("inf")]


@dataclass(frozen=True)
class Loaded:
    """A SavedModel as TensorFlow loads it, and the kinds of its inputs."""

    model: Any
    kinds: Mapping[str, str]

    def serve(self, inputs: Mapping[str, Any], **numbers: Any) -> dict[str, F32]:
        tensors = {}
        for feature, ids in inputs.items():
            tensors |= as_tensors(feature, ids, self.kinds.get(feature, "ragged"))
        return run(self.model.signatures["serving_default"], tensors | numbers)

    def serve_examples(self, inputs: Mapping[str, Any], **numbers: F32) -> dict[str, F32]:
        serialized = tf.constant(as_examples(inputs, numbers), tf.string)
        return run(self.model.signatures["serialized_examples"], {"examples": serialized})


def run(signature: Any, tensors: Mapping[str, Any]) -> dict[str, F32]:
    return {name: value.numpy() for name, value in signature(**tensors).items()}


def as_tensors(feature: str, ids: Any, kind: str) -> dict[str, Any]:
    """Inputs of `serving_default`."""
    name = input_name(feature)
    if kind == "dense":
        return {name: tf.constant(ids, tf.int64)}
    tensors = {name: tf.constant(ids.ids)}
    if kind.endswith("_weighted"):
        tensors[f"{name}_weights"] = tf.constant(ids.weights)
    if kind.startswith("ragged"):
        return tensors | {f"{name}_row_splits": tf.constant(ids.row_splits)}
    rows = np.repeat(np.arange(ids.num_examples), np.diff(ids.row_splits))
    longest = max([1, *np.diff(ids.row_splits)])
    return tensors | {
        f"{name}_indices": tf.constant(np.stack([rows, ids.positions], axis=1)),
        f"{name}_dense_shape": tf.constant([ids.num_examples, longest], tf.int64),
    }


def as_examples(inputs: Mapping[str, Any], numbers: Mapping[str, F32]) -> list[bytes]:
    """Serialized `tf.Example`s; an empty bag is left out."""
    found = []
    count = max(len(i) if isinstance(i, np.ndarray) else i.num_examples for i in inputs.values())
    for b in range(count):
        features = {name: _floats(np.ravel(column[b])) for name, column in numbers.items()}
        for name, ids in inputs.items():
            if isinstance(ids, np.ndarray):
                features[name] = _ints(ids[b : b + 1])
                continue
            bag = ids.slice(b, b + 1)
            if bag.ids.size:
                features[name] = _ints(bag.ids)
                if bag.weights is not None:
                    features[f"{name}_weights"] = _floats(bag.weights)
        example = tf.train.Example(features=tf.train.Features(feature=features))
        found.append(example.SerializeToString())
    return found


def _ints(values: Any) -> tf.train.Feature:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def _floats(values: Any) -> tf.train.Feature:
    return tf.train.Feature(float_list=tf.train.FloatList(value=values))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Every combiner with every species of feature, and one of dense ids."""
    features, rows = {}, {}
    for seed, combiner in enumerate(COMBINERS):
        table = TableConfig(V, DIM, combiner=combiner, name=combiner)
        rows[combiner] = np.random.default_rng(seed).normal(size=(V, DIM)).astype(np.float32)
        for species, options in SPECIES.items():
            features[f"{combiner}/{species}"] = FeatureConfig(table, **options)
        features["user"] = FeatureConfig(table)
    root = tmp_path_factory.mktemp("export")
    write_export(root, features, rows)
    return open_export(root)


@pytest.fixture(scope="module")
def service(export: Export) -> LookupService:
    return LookupService(export)


@pytest.fixture(scope="module")
def loaded(export: Export, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """One SavedModel per form of bags."""
    found = {}
    for form in ("ragged", "ragged_weighted", "sparse", "sparse_weighted"):
        kinds: dict[str, Kind] = {"user": "dense"}
        for name in export.features.keys() - {"user"}:
            weighted = name.split("/")[1] in TAKES_WEIGHTS
            kinds[name] = form if weighted else form.removesuffix("_weighted")  # type: ignore[assignment]
        folder = tmp_path_factory.mktemp(form) / "saved"
        write_saved_model(export, folder, inputs=kinds)
        found[form] = Loaded(tf.saved_model.load(str(folder)), kinds)
    return found


@st.composite
def requests(draw: st.DrawFn, names: list[str], weighted: bool) -> dict[str, Any]:
    """Ids for every feature; one feature may have ids beyond its table or below 0."""
    size = draw(st.integers(0, 4))
    usual = st.integers(0, V - 1)
    edge = st.one_of(usual, st.sampled_from([-1, -(2**40), V, 2**31, 2**40]))
    odd = draw(st.sampled_from([*names, "", "", ""]))
    inputs: dict[str, Any] = {}
    for name in names:
        an_id = edge if name == odd else usual
        if name == "user":
            ids = draw(st.lists(an_id, min_size=size, max_size=size))
            inputs[name] = np.array(ids, dtype=np.int64)
            continue
        bags = draw(st.lists(st.lists(an_id, max_size=4), min_size=size, max_size=size))
        weights = None
        if weighted and name.split("/")[1] in TAKES_WEIGHTS:
            weights = [[draw(st.sampled_from(WEIGHTS)) for _ in bag] for bag in bags]
        inputs[name] = Ragged.from_lists(bags, weights)
    return inputs


@pytest.mark.parametrize("form", ["ragged", "ragged_weighted", "sparse", "sparse_weighted"])
def test_both_signatures_answer_as_the_lookup_service(
    form: str, loaded: dict[str, Loaded], service: LookupService
) -> None:
    saved, names = loaded[form], sorted(service.export.features)

    @settings(max_examples=examples(20), deadline=None)
    @given(requests(names, form.endswith("_weighted")))
    def check(inputs: dict[str, Any]) -> None:
        try:
            wanted = service.lookup(
                {n: Dense(i) if isinstance(i, np.ndarray) else Bags(i) for n, i in inputs.items()}
            )
        except InputError:
            for serve in (saved.serve, saved.serve_examples):
                with pytest.raises(tf.errors.InvalidArgumentError):
                    serve(inputs)
            return
        for serve in (saved.serve, saved.serve_examples):
            found = serve(inputs)
            assert found.keys() == wanted.keys()
            for name, activation in wanted.items():
                assert found[name].shape == activation.shape
                np.testing.assert_allclose(found[name], activation, rtol=1e-5, atol=1e-6)

    check()


def test_every_tensor_has_the_name_of_its_feature(tmp_path: Path) -> None:
    kinds: dict[str, Kind] = {"user": "dense", "genres": "ragged_weighted", "tags": "sparse"}
    write_saved_model(small_export(tmp_path / "e"), tmp_path / "saved", inputs=kinds)
    signature = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"]
    specs = signature.structured_input_signature[1]
    shapes = {name: spec.shape.as_list() for name, spec in specs.items()}
    assert shapes.pop("tags_indices") == [None, 2]
    assert shapes.pop("tags_dense_shape") == [2]
    assert sorted(shapes) == [
        *("genres", "genres_row_splits", "genres_weights", "raw", "raw_row_splits", "tags"),
        *("user", "watched", "watched_row_splits", "words", "words_row_splits"),
    ]
    assert all(shape == [None] for shape in shapes.values())
    assert all(spec.name == name for name, spec in specs.items())
    outputs = {n: spec.shape.as_list() for n, spec in signature.structured_outputs.items()}
    assert outputs.pop("watched") == [None, 2, 2]
    assert sorted(outputs) == ["genres", "raw", "tags", "user", "words"]
    assert all(shape == [None, 2] for shape in outputs.values())


def test_names_that_tensorflow_refuses_are_spelt_for_it(tmp_path: Path) -> None:
    names = ["site/ads", "user id", "größe", "class", "_x", "self", "0", "If"]
    table = TableConfig(5, 2, name="t", combiner="sum")
    write_export(tmp_path / "e", dict.fromkeys(names, FeatureConfig(table)), {"t": ROWS_VD})
    write_saved_model(open_export(tmp_path / "e"), tmp_path / "saved")
    saved = Loaded(tf.saved_model.load(str(tmp_path / "saved")), {})
    inputs = {name: Ragged.from_lists([[i % 5], []]) for i, name in enumerate(names)}
    for found in (saved.serve(inputs), saved.serve_examples(inputs)):
        for i, name in enumerate(names):
            np.testing.assert_array_equal(found[name], [ROWS_VD[i % 5], [0, 0]])
    assert input_name("größe") == "gr__e"


def test_an_example_without_one_weight_per_id_is_refused(loaded: dict[str, Loaded]) -> None:
    saved = loaded["ragged_weighted"]
    bags = {
        name: Ragged.from_lists([[1, 2]], [[1.0, 1.0]] if kind.endswith("d") else None)
        for name, kind in saved.kinds.items()
        if name != "user"
    }
    inputs = {**bags, "user": np.array([0])}
    name = next(n for n, kind in saved.kinds.items() if kind == "ragged_weighted")
    tensors = {k: v for n, i in inputs.items() for k, v in as_tensors(n, i, saved.kinds[n]).items()}
    serve = saved.model.signatures["serving_default"]
    with pytest.raises(tf.errors.InvalidArgumentError, match="one weight per id"):
        serve(**tensors | {f"{name}_weights": tf.constant([2.0])})
    inputs[name] = Ragged(inputs[name].ids, inputs[name].row_splits)
    with pytest.raises(tf.errors.InvalidArgumentError, match="one weight per id"):
        saved.serve_examples(inputs)


class OnesTimesTwo(tf.Module):
    """The reference's example: 7 numbers to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = tf.Variable(tf.ones((7, 1)), name="kernel")

    def __call__(self, activations: Any, dense: Any, training: bool) -> Any:
        return tf.matmul(tf.concat(list(activations.values()), axis=1), self.kernel) * 2.0


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the reference's example, its tables one larger after training."""
    pair = TableConfig(8, 2, combiner="sum", name="pair")
    triple = TableConfig(8, 3, combiner="mean", name="triple")
    spec = resolve(
        {
            "feature_one": FeatureConfig(pair),
            "feature_two": FeatureConfig(pair),
            "feature_three": FeatureConfig(triple),
        }
    )
    root = tmp_path_factory.mktemp("published")
    with ExportWriter(root, spec, step=1, job="example") as writer:
        for name, dim in (("pair", 2), ("triple", 3)):
            rows = np.arange(1, 8 * dim + 1, dtype=np.float32).reshape(8, dim) + 1
            write_rows(writer.row_file(name), 0, rows)
        writer.add_dense({"kernel": np.ones((7, 1), np.float32)}, {"name": "ones", "params": {}})
        writer.commit()
    return root


def test_the_published_numbers(published: Path, tmp_path: Path) -> None:
    export, model = open_export(published), OnesTimesTwo()
    model.kernel.assign(tf.zeros((7, 1)))  # the export's values count
    names = ["feature_one", "feature_two", "feature_three"]
    dense: dict[str, Kind] = dict.fromkeys(names, "dense")
    write_saved_model(export, tmp_path / "dense", model=model, inputs=dense)
    saved = Loaded(tf.saved_model.load(str(tmp_path / "dense")), dense)
    ids = {name: np.array(pair) for name, pair in zip(names, ([0, 1], [1, 2], [3, 0]), strict=True)}
    assert saved.serve(ids)["predictions"].tolist() == [100.0, 62.0]
    assert saved.serve_examples(ids)["predictions"].tolist() == [100.0, 62.0]
    write_saved_model(export, tmp_path / "bags", model=model)
    saved = Loaded(tf.saved_model.load(str(tmp_path / "bags")), {})
    bags = dict.fromkeys(names, Ragged.from_lists([[0, 1]]))
    assert saved.serve(bags)["predictions"].tolist() == [83.0]


def test_stock_tensorflow_reads_the_variables(published: Path, tmp_path: Path) -> None:
    write_saved_model(open_export(published), tmp_path / "saved", model=OnesTimesTwo())
    path = str(tmp_path / "saved" / "variables" / "variables")
    shapes = dict(tf.train.list_variables(path))
    tail = "/.ATTRIBUTES/VARIABLE_VALUE"
    assert shapes.pop("_CHECKPOINTABLE_OBJECT_GRAPH") == []
    assert shapes == {
        f"embedding_api/pair{tail}": [8, 2],
        f"embedding_api/triple{tail}": [8, 3],
        f"model/kernel{tail}": [7, 1],
    }
    stock = tf.tpu.experimental.embedding
    table = stock.TableConfig(8, 2, name="pair")
    embedding = stock.TPUEmbeddingForServing({"f": stock.FeatureConfig(table)}, optimizer=None)
    rows = embedding.embedding_tables[table]
    read = tf.train.Checkpoint(embedding_api=embedding, model=OnesTimesTwo()).read(path)
    read.assert_existing_objects_matched()
    np.testing.assert_array_equal(rows, np.arange(2, 18).reshape(8, 2))


WITHOUT_MANTA = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
import tensorflow as tf
serve = tf.saved_model.load(sys.argv[2]).signatures["serving_default"]
ids = {n: tf.constant(v, tf.int64) for n, v in json.loads(sys.argv[3]).items()}
print(json.dumps(serve(**ids)["predictions"].numpy().tolist()))
ours = ("ps", "serving", "workers", "manta")
assert not any(name.split(".")[0] in ours for name in sys.modules)
assert not any(importlib.util.find_spec(name) for name in ours)
"""


def test_it_loads_where_manta_is_not_installed(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    write_saved_model(open_export(published), folder, model=OnesTimesTwo())
    columns = {"": [0, 1], "_row_splits": [0, 2]}
    names = ["feature_one", "feature_two", "feature_three"]
    ids = json.dumps({name + part: v for name in names for part, v in columns.items()})
    # Without `site`, for its .pth files would put an editable Manta on the path.
    packages = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-I", "-S", "-c", WITHOUT_MANTA, packages, str(folder), ids]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [83.0]


MODELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "two_tower": (TwoTower, {"user": ["a"], "item": ["b"], "hidden": [4]}, 0),
    "dlrm": (DLRM, {"bottom": [5], "top": [6]}, 2),
    "tests.support.models:build_mlp": (JoinedMLP, {}, 2),
    "tests.support.models:build_keras": (build_keras, {"units": 3}, 2),
}


@pytest.mark.parametrize(("name", "columns"), [*((name, False) for name in MODELS), ("dlrm", True)])
def test_a_trained_model_predicts_what_it_did(name: str, columns: bool, tmp_path: Path) -> None:
    build, params, num_dense = MODELS[name]
    inputs = ModelInputs(activations={"a": (2,), "b": (2,)}, num_dense=num_dense, seed=3)
    rng = np.random.default_rng(5)
    tf.keras.backend.clear_session()  # as in a new process: Keras numbers layers
    step = DenseStep(ModelConfig(build=name, params=params), inputs, "bce")
    values = [rng.uniform(0.1, 1, v.shape).astype(np.float32) for v in step.initial()]
    export = with_dense(tmp_path, step.variables(*values), {"name": name, "params": params})
    tf.keras.backend.clear_session()
    numbers = [f"n{i}" for i in range(num_dense)]
    model = build(inputs, **params)
    write_saved_model(
        export, tmp_path / "saved", model=model, dense=numbers if columns else num_dense
    )
    bags = {"a": Ragged.from_lists([[1], [], [3, 4]]), "b": Ragged.from_lists([[0, 2], [4], []])}
    dense = rng.normal(size=(3, num_dense)).astype(np.float32)
    activations = {n: tf.constant(a) for n, a in LookupService(export).lookup(bags).items()}
    wanted = tf.reshape(model(activations, tf.constant(dense), training=False), [-1])
    assert np.ptp(wanted) > 0.01
    saved = Loaded(tf.saved_model.load(str(tmp_path / "saved")), {})
    given = {"dense": dense} if num_dense else {}
    if columns:
        given = {number: dense[:, i] for i, number in enumerate(numbers)}
    tensors = {key: tf.constant(value) for key, value in given.items()}
    for found in (saved.serve(bags, **tensors), saved.serve_examples(bags, **given)):
        assert list(found) == ["predictions"]
        np.testing.assert_allclose(found["predictions"], wanted, rtol=1e-5, atol=1e-6)
    again = build(inputs, **params)
    again({name: a[:1] for name, a in activations.items()}, tf.constant(dense[:1]), training=False)
    checkpoint = tf.train.Checkpoint(model=again)
    path = tmp_path / "saved" / "variables" / "variables"
    checkpoint.read(str(path)).assert_existing_objects_matched()
    for variable, value in zip(again.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(variable, value)


def with_dense(root: Path, values: dict[str, F32], model: dict[str, Any]) -> Export:
    """An export of features a and b, with a dense model."""
    table = TableConfig(5, 2, combiner="sum", name="t")
    spec = resolve({"a": FeatureConfig(table), "b": FeatureConfig(table)})
    with ExportWriter(root / "export", spec, step=1, job="test") as writer:
        write_rows(writer.row_file("t"), 0, ROWS_VD / 10)
        writer.add_dense(values, model)
        writer.commit()
    return open_export(root / "export")


def test_values_of_another_model_are_refused(published: Path, tmp_path: Path) -> None:
    export = open_export(published)
    model = OnesTimesTwo()
    model.kernel = tf.Variable(tf.zeros((6, 1)), name="kernel")
    with pytest.raises(ExportError, match=r"'kernel' has shape \[7, 1\], the model's has \[6, 1\]"):
        load_dense_variables(model, export)
    model.bias = tf.Variable(tf.zeros(1), name="bias")
    with pytest.raises(ExportError, match=r"export lacks \['bias'\], the model lacks \[\]"):
        load_dense_variables(model, export)
    with pytest.raises(ExportError, match=r"export lacks \[\], the model lacks \['kernel'\]"):
        load_dense_variables(tf.Module(), export)
    assert not np.any(model.kernel)


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"inputs": {"usr": "dense"}}, ConfigError, "no feature 'usr', only"),
        ({"inputs": {"user": "bags"}}, ConfigError, "'user' must be one of .* got 'bags'"),
        ({"inputs": {"watched": "dense"}}, ConfigError, "'watched' is a sequence feature"),
        ({"inputs": {"watched": "ragged_weighted"}}, ConfigError, "'watched' is a sequence"),
        ({"dense": 3}, ConfigError, "3 columns, but no model"),
        ({"dense": -1}, ConfigError, "`dense` must be .* got -1"),
        ({"dense": ["user"]}, ConfigError, "'user' and 'user' have one name|'user' would stand"),
        ({"dense": ["Raw"]}, ConfigError, "'raw' and 'Raw' have one name"),
        ({"max_bytes": 119}, ExportError, "120 bytes exceed max_bytes=119; the largest is"),
        ({"model": OnesTimesTwo()}, ConfigError, "the model does not take activations"),
        ({"model": len}, ConfigError, "must be a tf.Module or a Keras model, .* got builtin"),
    ],
)
def test_a_request_that_does_not_fit_names_what_is_wrong(
    options: dict[str, Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    export = small_export(tmp_path / "e")
    with pytest.raises(error, match=reason):
        write_saved_model(export, tmp_path / "saved", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_model_is_refused_where_training_shaped_activations(
    export: Export, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"its `output_shape` \[4\] fits"):
        write_saved_model(export, tmp_path / "saved", model=OnesTimesTwo())


def test_it_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export, folder = small_export(tmp_path / "e"), tmp_path / "served" / "1"

    def half_written(root: Any, path: str, **options: Any) -> None:
        (Path(path) / "variables").mkdir(parents=True)
        raise tf.errors.ResourceExhaustedError(None, None, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(tf.saved_model, "save", half_written)
        with pytest.raises(ExportError, match=r"cannot write SavedModel .* no space left"):
            write_saved_model(export, folder)
    assert list(folder.parent.iterdir()) == []
    assert write_saved_model(export, folder) == folder
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    with pytest.raises(ExportError, match="the folder exists already"):
        write_saved_model(export, folder)
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*")) == before
    assert list(folder.parent.iterdir()) == [folder]
    with pytest.raises(ExportError, match="cannot write SavedModel"):
        write_saved_model(export, folder / "saved_model.pb" / "2")
