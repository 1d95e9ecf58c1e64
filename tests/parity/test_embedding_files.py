"""`EmbeddingForServing` and files: checkpoints, SavedModels and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import ps.config as ours
from ps.errors import ExportError
from ps.export import Export, open_export
from serving.tf import EmbeddingForServing
from tests.support.exports import ROWS_VD, small_export, small_features, write_export
from tests.support.tf_features import OPTIMIZERS, optimizer, ragged, rows, sparse, table

pytestmark = pytest.mark.parity

stock = tf.tpu.experimental.embedding
StockEmbedding = stock.TPUEmbeddingForServing


@pytest.fixture(params=["TensorFlow's configs", "Manta's configs"])
def configs(request: pytest.FixtureRequest) -> Any:
    return ours if request.param == "Manta's configs" else stock


IDS = [[0, 1], [], [2]]


class Dense(tf.Module):
    """The rest of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = tf.Variable([[1.0], [2.0]], name="kernel")


NAMES = ("video", "user/a b", "a.b/c")


def embedding_of(kind: Any, configs: Any, name: str | None, start: Any = rows) -> Any:
    features = {t: configs.FeatureConfig(table(configs, t, initializer=start)) for t in NAMES}
    return kind(features, optimizer(configs, name))


def keys(path: str) -> dict[str, Any]:
    return dict(tf.train.list_variables(path))


def save(embedding: Any, folder: Path, **more: Any) -> str:
    embedding.build()
    path: str = tf.train.Checkpoint(model=Dense(), embedding=embedding, **more).save(folder / "x")
    return path


def zeros(shape: Any, dtype: Any = tf.float32) -> Any:
    return tf.zeros(shape, dtype)


@pytest.mark.parametrize("name", [None, *OPTIMIZERS])
def test_checkpoint_keys_are_those_of_tensorflow(
    configs: Any, name: str | None, tmp_path: Path
) -> None:
    wanted = keys(save(embedding_of(StockEmbedding, stock, name), tmp_path / "stock"))
    found = keys(save(embedding_of(EmbeddingForServing, configs, name), tmp_path / "ours"))
    assert found == wanted
    assert "embedding/user.Sa b/.ATTRIBUTES/VARIABLE_VALUE" in found
    assert "embedding/a..b.Sc/.ATTRIBUTES/VARIABLE_VALUE" in found


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("name", [None, "Adagrad", "Adam"])
def test_checkpoints_restore_both_ways(
    configs: Any, name: str | None, lazy: bool, tmp_path: Path
) -> None:
    kinds = (StockEmbedding, stock), (EmbeddingForServing, configs)
    for writer, reader in (kinds, kinds[::-1]):
        written = embedding_of(*writer, "Adam")
        for slots in written.variables.values():
            slots["momenta"].assign_add(tf.ones([5, 2]))
        path = save(written, tmp_path / "checkpoint")
        found = embedding_of(*reader, name, zeros)
        if not lazy:
            found.build()
        status = tf.train.Checkpoint(model=Dense(), embedding=found).restore(path)
        found.build()
        for table_name, slots in found.variables.items():
            np.testing.assert_array_equal(slots["parameters"], rows([5, 2]))
            if name == "Adam":
                wanted = written.variables[table_name]["momenta"]
                np.testing.assert_array_equal(slots["momenta"], wanted)
        if name == "Adagrad":  # the file lacks its slots
            with pytest.raises(AssertionError):
                status.assert_existing_objects_matched()
            continue
        status.assert_existing_objects_matched()
        if name == "Adam":
            status.assert_consumed()


def matched(kind: Any, configs: Any, name: str | None, tables: tuple[str, ...], path: str) -> Any:
    """Which of TensorFlow's two assertions hold after a restore."""
    features = [configs.FeatureConfig(table(configs, t)) for t in tables]
    embedding = kind(features, optimizer(configs, name))
    embedding.build()
    status = tf.train.Checkpoint(model=Dense(), embedding=embedding).restore(path)
    holds = []
    for assertion in (status.assert_existing_objects_matched, status.assert_consumed):
        try:
            assertion()
        except AssertionError:
            holds.append(False)
        else:
            holds.append(True)
    return tuple(holds)


@pytest.mark.parametrize(
    ("name", "tables", "wanted"),
    [
        ("Adam", NAMES, (True, True)),
        (None, NAMES, (True, False)),
        ("FTRL", NAMES, (False, False)),
        ("Adam", NAMES[:2], (True, False)),
        ("Adam", (*NAMES, "new"), (False, False)),
    ],
)
def test_a_restore_says_of_itself_what_tensorflows_says(
    configs: Any, name: str | None, tables: tuple[str, ...], wanted: Any, tmp_path: Path
) -> None:
    path = save(embedding_of(StockEmbedding, stock, "Adam"), tmp_path)
    assert matched(StockEmbedding, stock, name, tables, path) == wanted
    assert matched(EmbeddingForServing, configs, name, tables, path) == wanted


def test_features_under_numbers_can_be_saved(configs: Any, tmp_path: Path) -> None:
    features = {7: configs.FeatureConfig(table(configs, "video"))}
    embedding = EmbeddingForServing(features, None)
    assert embedding({7: tf.constant([1])})[7].numpy().tolist() == [[3, 4]]
    assert "embedding/video/.ATTRIBUTES/VARIABLE_VALUE" in keys(save(embedding, tmp_path))


def test_saving_before_the_tables_are_built_writes_none(configs: Any, tmp_path: Path) -> None:
    embedding = embedding_of(EmbeddingForServing, configs, None)
    path = tf.train.Checkpoint(embedding=embedding).save(tmp_path / "x")
    assert not [key for key in keys(path) if key.startswith("embedding/video")]


def test_a_table_of_another_shape_is_not_restored(configs: Any, tmp_path: Path) -> None:
    path = save(embedding_of(EmbeddingForServing, configs, None), tmp_path)
    other = configs.TableConfig(7, 2, name="video")
    embedding = EmbeddingForServing([configs.FeatureConfig(other)], None)
    embedding.build()
    with pytest.raises(ValueError, match=r"[sS]hape"):
        tf.train.Checkpoint(embedding=embedding).restore(path)


def test_slots_of_the_callers_making_keep_their_keys(configs: Any, tmp_path: Path) -> None:
    def create(variable: Any, names: list[str], initializers: list[Any]) -> dict[str, Any]:
        return {
            name: tf.Variable(initializer(variable.shape), name=name)
            for name, initializer in zip(names, initializers, strict=True)
        }

    def keys_with(kind: Any, configs: Any, folder: Path) -> dict[str, Any]:
        features = [configs.FeatureConfig(table(configs, "video"))]
        embedding = kind(features, configs.Adagrad(slot_variable_creation_fn=create))
        assert embedding.variables["video"]["accumulators"].numpy().max() == np.float32(0.1)
        return keys(save(embedding, folder))

    found = keys_with(EmbeddingForServing, configs, tmp_path / "ours")
    assert found == keys_with(StockEmbedding, stock, tmp_path / "stock")
    assert "embedding/_variables/video/accumulators/.ATTRIBUTES/VARIABLE_VALUE" in found


def test_a_saved_model_answers_like_the_object(configs: Any, tmp_path: Path) -> None:
    features = {
        "bag": configs.FeatureConfig(table(configs, "t", "mean")),
        "id": configs.FeatureConfig(table(configs, "u")),
    }
    model = tf.Module()
    embedding = EmbeddingForServing(features, None)
    model.embedding_api = embedding
    specs = {
        "bag": tf.RaggedTensorSpec([None, None], tf.int64, 1, tf.int64),
        "id": tf.TensorSpec([None], tf.int64, name="id"),
    }
    model.serve = tf.function(embedding.embedding_lookup, input_signature=[specs])
    inputs = {"bag": ragged(IDS, tf.int64), "id": tf.constant([4, 0, 2], tf.int64)}
    wanted = model.serve(inputs)
    tf.saved_model.save(model, str(tmp_path / "model"))
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    for name, found in loaded.serve(inputs).items():
        np.testing.assert_array_equal(found, wanted[name])
    assert "embedding_api/t/.ATTRIBUTES/VARIABLE_VALUE" in keys(
        f"{tmp_path}/model/variables/variables"
    )


@pytest.fixture
def export(tmp_path: Path) -> Export:
    return small_export(tmp_path)


def test_an_export_is_served_from_its_files(export: Export) -> None:
    embedding = EmbeddingForServing.from_export(export)
    for config, rows_VD in embedding.embedding_tables.items():
        assert np.shares_memory(rows_VD, export.tables[config.name].rows_VD)
    inputs = {
        "user": tf.constant([4, 0]),
        "genres": sparse(IDS, tf.int64),
        "words": ragged(IDS, tf.int64),
        "watched": ragged([[0, 1, 2], []], tf.int32),
    }
    wanted = {
        "user": [[9, 10], [1, 2]],
        "genres": [[2, 3], [0, 0], [5, 6]],
        "words": [[4, 6], [0, 0], [5, 6]],
        "watched": [[[1, 2], [3, 4]], [[0, 0], [0, 0]]],
    }
    for call in (embedding, tf.function(embedding.embedding_lookup)):
        found = call(inputs)
        assert {name: value.numpy().tolist() for name, value in found.items()} == wanted


def test_an_export_is_served_under_given_configs(configs: Any, tmp_path: Path) -> None:
    write_export(tmp_path, small_features(), dict.fromkeys(("sum", "mean", "sqrtn"), ROWS_VD))
    export = open_export(tmp_path)
    mine = configs.TableConfig(5, 2, combiner="mean", name="sum")
    embedding = EmbeddingForServing.from_export(export, (configs.FeatureConfig(mine),))
    found = embedding((ragged(IDS, tf.int64),))
    assert found[0].numpy().tolist() == [[2, 3], [0, 0], [5, 6]]
    assert list(embedding.embedding_tables) == [mine]
    for wrong, message in (
        (configs.TableConfig(5, 2, name="other"), "has no table 'other', only"),
        (configs.TableConfig(6, 2, name="sum"), r"is \[5, 2\], but its TableConfig says \[6, 2\]"),
    ):
        with pytest.raises(ExportError, match=message):
            EmbeddingForServing.from_export(export, [configs.FeatureConfig(wrong)])


def test_an_export_has_no_variables_and_is_never_saved_without_its_tables(
    export: Export, tmp_path: Path
) -> None:
    embedding = EmbeddingForServing.from_export(export)
    with pytest.raises(ExportError, match="has no variables"):
        _ = embedding.variables
    checkpoint = tf.train.Checkpoint(embedding=embedding)
    with pytest.raises(ExportError, match="neither restored from nor saved to a checkpoint"):
        checkpoint.save(tmp_path / "checkpoint")
    path = save(embedding_of(EmbeddingForServing, ours, None), tmp_path / "other")
    with pytest.raises(ExportError, match="neither restored from nor saved to a checkpoint"):
        checkpoint.restore(path)
    model = tf.Module()
    model.embedding_api = embedding
    with pytest.raises(ExportError, match="neither restored from nor saved to a checkpoint"):
        tf.saved_model.save(model, str(tmp_path / "model"))
