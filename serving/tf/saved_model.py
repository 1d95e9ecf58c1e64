"""An export as a SavedModel: tables, lookup and dense model in one folder of stock TensorFlow.

What reads it (TensorFlow Serving, `tf.saved_model.load`) needs no Manta. A SavedModel holds its
tables as variables: writing one takes memory of the size of all tables plus one more copy of the
largest, loading one the size of all tables, and its folder as much disk again. An export that is
served by memory mapping has no such limit. Vocabularies of raw values are constants of its graph.

The variables are `embedding_api/<table>` and the model's own below `model/`, so that
`tf.train.Checkpoint(embedding_api=TPUEmbeddingForServing(…), model=…)` reads `variables/variables`.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorflow as tf

from ps.columns import length_key
from ps.errors import ConfigError, ExportError
from ps.export import Export, ExportTable
from ps.export_file import sync
from ps.lookup import is_sequence
from serving.lookup import activation_shape
from serving.tf.model_variables import named_variables
from serving.tf.raw_ids import RawIds, raw_ids
from serving.tf.signatures import (
    FeatureInput,
    Ids,
    Kind,
    NumberColumns,
    check_names,
    feature_inputs,
    input_name,
)

MAX_BYTES = 8 << 30
"""Default limit of all tables together."""
EXAMPLES = "examples"
"""Name of the input of `serialized_examples`."""
PREDICTIONS = "predictions"
"""Name of the output with a dense model."""
PROBABILITIES = "probabilities"
"""Name of another, their sigmoid, if it was trained with `loss: bce`."""


def write_saved_model(
    export: Export,
    folder: Path,
    *,
    model: Any = None,
    inputs: Mapping[str, Kind] | None = None,
    dense: int | Sequence[str] = 0,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write a SavedModel whose answers are those of `LookupService` (and of the dense model).

    It has two signatures, both for any number B of examples:

    * `serving_default`. Inputs by `inputs[feature]`, "ragged" (or "ragged_weighted" for raw values
      with weights) if it is not named there:
      "dense" takes `<feature>` int64 [B], one id per example;
      "ragged" takes bags, `<feature>` int64 [N] and `<feature>_row_splits` int64 [B + 1];
      "sparse" takes bags, `<feature>` int64 [N], `<feature>_indices` int64 [N, 2] and
      `<feature>_dense_shape` int64 [2]; "ragged_weighted" and "sparse_weighted" also take
      `<feature>_weights` float32 [N]. Characters that TensorFlow refuses in names become `_`.
    * `serialized_examples`. One input `examples`, string [B] of serialized `tf.Example`: a list of
      int64 `<feature>` (exactly one for "dense") and, where weighted, of floats
      `<feature>_weights`. An example without them has an empty bag. The numbers of `dense`, floats
      under the names of their inputs, must be there.

    A feature with a transform takes raw values in place of ids, strings or int64, and its weights,
    if it has any, are int64 where the column says integers. Its keys of a `tf.Example` are the
    column's. In "dense" form -1 or "", or an example without the value, is an empty bag; in the
    others every value counts. Sequences take one value per step; an unknown one is a step of zeros.

    Bags follow the rules of `ps.inputs.Bags`, as over HTTP, in every form; coordinates of
    "sparse" must be in row order if the feature does not validate.

    Args:
        export: what to write.
        folder: must not exist; appears whole or not at all.
        model: the dense model, called as `model(activations, dense, training=False)`; its
            variables get the export's values. None for a SavedModel of the tables only.
        inputs: form of each feature's input, see above.
        dense: the numbers that the model reads: how many, for one input `dense` float32 [B, n], or
            their names, for one input float32 [B] each.
        max_bytes: limit of the rows of all tables, for they must fit memory.

    Returns:
        `folder`. Outputs with a model: `predictions` float32 [B], as the model gives them, and, if
        it was trained with `loss: bce`, `probabilities` float32 [B], for predictions are logits
        then. Without: one per feature, by its name, float32 [B, D], or [B, L, D] for a sequence
        feature. Sequences of raw values also have `<feature>_seq_length_` [B], steps up to the last
        one that has a value, at most L: an int64 output, or a float32 activation of the model.

    Raises:
        ConfigError: `inputs`, `dense` or the model do not fit the export.
        ExportError: the folder exists, the disk refuses, the tables exceed `max_bytes` or the
            vocabularies 1 GiB, or the model's variables are not those of the export.
    """
    folder = Path(folder).absolute()
    features = feature_inputs(export.features, export.transforms, inputs or {})
    numbers = NumberColumns(dense)
    check_names([*features.values(), numbers])
    _check(export, folder, numbers, model, max_bytes)
    raw = raw_ids(export)
    root = tf.Module()
    if model is not None:
        _build(model, export, numbers.count)
        load_dense_variables(model, export)
        root.model = _stand_in(model, {})
    root.embedding_api = _embedding(export)
    root.vocabularies = {
        name: ids.vocabulary for name, ids in raw.items() if ids.vocabulary is not None
    }
    graph = _Graph(export, root.embedding_api, features, raw, numbers, model)
    signatures = {
        "serving_default": graph.serving_default().get_concrete_function(),
        "serialized_examples": graph.serialized_examples().get_concrete_function(),
    }
    with _published(folder) as hidden:
        tf.saved_model.save(root, str(hidden), signatures=signatures)
    return folder


def load_dense_variables(model: Any, export: Export) -> None:
    """Give the variables of a built model the values that training left in an export.

    Matched by name as training names them: trainable ones first, then the others that are floats;
    the second of one name is `<name>_1`.

    Args:
        model: has `trainable_variables` and `non_trainable_variables`, a Keras model after its
            first call.
        export: with the variables of the same model.

    Raises:
        ExportError: names or shapes differ; no value is changed.
    """
    values, variables = export.dense_variables(), named_variables(model)
    where = f"export '{export.path}'"
    if values.keys() != variables.keys():
        missing, unknown = sorted(variables - values.keys()), sorted(values.keys() - variables)
        raise ExportError(
            f"{where}: the model's variables are not those that were trained: the export lacks "
            f"{missing}, the model lacks {unknown}; Keras numbers the layers of a process, so "
            "build the model as training does and first, or give its layers names"
        )
    for name, variable in variables.items():
        if tuple(variable.shape) != values[name].shape:
            raise ExportError(
                f"{where}: dense variable '{name}' has shape {list(values[name].shape)}, "
                f"the model's has {list(variable.shape)}"
            )
    for name, variable in variables.items():
        variable.assign(values[name])


class _Graph:
    """The functions behind the signatures."""

    def __init__(
        self,
        export: Export,
        embedding: Any,
        features: Mapping[str, FeatureInput],
        raw: Mapping[str, RawIds],
        numbers: NumberColumns,
        model: Any,
    ) -> None:
        self._export = export
        self._embedding = embedding
        self._features = features
        self._raw = raw
        self._numbers = numbers
        self._model = model

    def serving_default(self) -> Any:
        """Named tensors to named tensors."""
        specs = {name: spec for f in self._features.values() for name, spec in f.specs().items()}

        def serve(inputs: Mapping[str, Any]) -> dict[str, Any]:
            ids = {name: feature.read(inputs) for name, feature in self._features.items()}
            return self._answer(ids, lambda batch: self._numbers.read(inputs, batch))

        return tf.function(serve, input_signature=[specs | self._numbers.specs()])

    def serialized_examples(self) -> Any:
        """Serialized `tf.Example`s to the same."""
        specs = self._numbers.example_specs()
        for feature in self._features.values():
            specs |= feature.example_specs()

        def serve(examples: Any) -> dict[str, Any]:
            parsed = tf.io.parse_example(examples, specs)
            ids = {name: f.read_examples(parsed) for name, f in self._features.items()}
            return self._answer(ids, lambda batch: self._numbers.read_examples(parsed, batch))

        return tf.function(serve, input_signature=[tf.TensorSpec([None], tf.string, name=EXAMPLES)])

    def _answer(self, given: Mapping[str, Ids], numbers: Callable[[Any], Any]) -> dict[str, Any]:
        ids = {**given, **{name: to_ids(given[name]) for name, to_ids in self._raw.items()}}
        found = self._lookup(ids)
        lengths = {
            length_key(name): ids[name].lengths
            for name in self._features
            if ids[name].lengths is not None
        }
        if self._model is None:
            return found | lengths
        batch = tf.shape(next(iter(found.values())))[0]
        found |= {name: tf.cast(length, tf.float32) for name, length in lengths.items()}
        predictions = tf.reshape(self._model(found, numbers(batch), training=False), [-1])
        if (self._export.dense_model or {}).get("loss") != "bce":
            return {PREDICTIONS: predictions}
        return {PREDICTIONS: predictions, PROBABILITIES: tf.sigmoid(predictions)}

    def _lookup(self, ids: Mapping[str, Ids]) -> dict[str, Any]:
        found = self._embedding.embedding_lookup(
            {name: found.ids for name, found in ids.items()},
            {name: found.weights for name, found in ids.items()},
        )
        activations = {}
        for name, feature in self._export.features.items():
            out = found[name]
            if isinstance(ids[name].ids, tf.SparseTensor) and not is_sequence(feature):
                # Without validation TensorFlow forgets the empty examples at the end.
                missing = ids[name].ids.dense_shape[0] - tf.shape(out, tf.int64)[0]
                out = tf.pad(out, [[0, missing], [0, 0]])
            dim = self._export.tables[feature.table].dim
            activations[name] = tf.ensure_shape(out, activation_shape(feature, dim))
        return activations


def _check(
    export: Export, folder: Path, numbers: NumberColumns, model: Any, max_bytes: int
) -> None:
    if folder.exists():
        raise ExportError(f"SavedModel '{folder}': the folder exists already")
    if not export.features:
        raise ExportError(f"export '{export.path}' has no features to look up")
    sizes = {name: table.rows_VD.nbytes for name, table in export.tables.items()}
    if sum(sizes.values()) > max_bytes:
        largest = max(sizes, key=sizes.__getitem__)
        raise ExportError(
            f"export '{export.path}': a SavedModel holds its tables in memory, and their "
            f"{sum(sizes.values())} bytes exceed max_bytes={max_bytes}; "
            f"the largest is '{largest}' with {sizes[largest]}"
        )
    if model is not None and not isinstance(model, (tf.Module, tf.keras.layers.Layer)):
        raise ConfigError(
            f"`model` must be a tf.Module or a Keras model, for TensorFlow to save its variables, "
            f"got {type(model).__name__}"
        )
    if model is None and numbers.count:
        raise ConfigError(f"`dense`: {numbers.count} columns, but no model that reads them")
    for feature in export.features.values():
        if model is not None and feature.output_shape is not None:
            raise ConfigError(
                f"feature '{feature.name}': its `output_shape` {list(feature.output_shape)} fits "
                "the batches of training, but a SavedModel takes any; leave out the model"
            )


def _embedding(export: Export) -> Any:
    """TensorFlow's embedding object with the export's rows, without slots."""
    stock = tf.tpu.experimental.embedding
    tables = {
        table.name: stock.TableConfig(
            table.vocabulary_size,
            table.dim,
            initializer=_rows_of(table),
            combiner=table.combiner,
            name=table.name,
        )
        for table in export.tables.values()
    }
    embedding = stock.TPUEmbeddingForServing(
        {
            name: stock.FeatureConfig(
                tables[f.table],
                max_sequence_length=f.max_sequence_length,
                validate_weights_and_indices=f.validate_weights_and_indices,
                output_shape=f.output_shape,
            )
            for name, f in export.features.items()
        },
        optimizer=None,
    )
    with tf.device("CPU"), tf.variable_creator_scope(_with_allowed_name):
        embedding.build()
    return embedding


def _with_allowed_name(create: Callable[..., Any], **options: Any) -> Any:
    """TensorFlow saves no variable with a blank in its name; keys in the files are the tables'."""
    return create(**{**options, "name": input_name(options["name"])})


def _rows_of(table: ExportTable) -> Callable[..., Any]:
    def rows(shape: Any, dtype: Any = None) -> Any:
        return tf.constant(table.rows_VD)

    return rows


def _build(model: Any, export: Export, num_dense: int) -> None:
    """Call the model once: a Keras model makes its variables then."""
    shapes = {
        name: activation_shape(feature, export.tables[feature.table].dim)
        for name, feature in export.features.items()
    }
    for name, transform in export.transforms.items():
        if transform.sequence:
            shapes[length_key(name)] = [None]
    example = {name: tf.zeros([1, *shape[1:]]) for name, shape in shapes.items()}
    try:
        model(example, tf.zeros([1, num_dense]), training=False)
    except (ValueError, KeyError, tf.errors.InvalidArgumentError) as e:
        raise ConfigError(
            f"the model does not take activations {shapes} and {num_dense} dense columns: {e}"
        ) from e


def _stand_in(trackable: Any, made: dict[int, tuple[Any, Any]]) -> Any:
    """The variables of a model in the places where it has them, without its functions.

    Keras would save a function of its own beside ours, and fails to make it for a model that is
    called with two arguments. `made` holds what is done already, by `id`.
    """
    children = tf.train.TrackableView.children(trackable)
    if not children:
        return trackable
    if id(trackable) not in made:
        made[id(trackable)] = trackable, tf.Module()
        for name, child in children.items():
            setattr(made[id(trackable)][1], name, _stand_in(child, made))
    return made[id(trackable)][1]


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """A hidden folder to write to, which becomes `folder` when the block ends well."""
    hidden = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield hidden
        for path in (*hidden.rglob("*"), hidden):
            sync(path)
        hidden.rename(folder)
        sync(folder.parent)
    except (OSError, tf.errors.OpError) as e:
        raise ExportError(f"cannot write SavedModel '{folder}': {e}") from e
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
