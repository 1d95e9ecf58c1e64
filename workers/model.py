"""Dense models: what turns activations and number columns into one prediction per example.

A model is anything callable as `model(activations, dense, training=…)` that returns `[B]` or
`[B, 1]` and has `trainable_variables` and `non_trainable_variables` (a `tf.Module`, a Keras model).
A build function makes it: `build(inputs: ModelInputs, **params)`; `two_tower` and `dlrm` are ours,
`package.module:function` names your own. Predictions are values for `loss: mse` and logits for
`loss: bce`.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf

from ps.columns import length_key
from ps.errors import ConfigError, MantaError
from ps.spec import EmbeddingSpec
from workers.config import JobConfig, ModelConfig
from workers.shapes import activation_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """What a build function may know of its inputs."""

    activations: Mapping[str, tuple[int, ...]]
    """Shape of each feature's activation without its first axis, the batch: (D,), or (L, D) for
    sequences. Sequences of embedding columns also have their lengths here, float32 () under
    `<feature>_seq_length_`."""
    num_dense: int
    """Number of dense columns; `dense` is float32 [B, num_dense]."""
    seed: int
    """For initial values; those of worker 0's model count."""
    first_axes: Mapping[str, int] = field(default_factory=dict)
    """First axis of the activations, where it is not `batch_size` (`output_shape` may say so)."""
    batch_size: int = 1
    """Examples in a worker's batch."""


def job_inputs(job: JobConfig) -> ModelInputs:
    """The inputs of a job's model, on each worker."""
    spec, batch_size = job.embedding_spec(), job.worker_batch_size
    inputs = model_inputs(spec, batch_size, num_dense=len(job.data.dense), seed=job.seed)
    sequences = {column.feature_key for column in job.columns if column.is_sequence}
    lengths: dict[str, tuple[int, ...]] = {
        length_key(feature.name): () for feature in spec.features if feature.name in sequences
    }
    return replace(inputs, activations={**inputs.activations, **lengths})


def model_inputs(spec: EmbeddingSpec, batch_size: int, *, num_dense: int, seed: int) -> ModelInputs:
    """The inputs of a job's model, for batches of this many examples on each worker."""
    shapes = {f.name: activation_shape(spec, f, batch_size) for f in spec.features}
    return ModelInputs(
        activations={name: shape[1:] for name, shape in shapes.items()},
        num_dense=num_dense,
        seed=seed,
        first_axes={name: n for name, (n, *_) in shapes.items() if n != batch_size},
        batch_size=batch_size,
    )


Model = Any
"""`model(activations, dense, training=…)`, with its variables; TensorFlow has no types for it."""


def build_model(config: ModelConfig, inputs: ModelInputs) -> Model:
    """Build the model that a job names.

    Raises:
        ConfigError: no such function, or it does not take these params.
    """
    function = _find(config.build)
    try:
        inspect.signature(function).bind(inputs, **config.params)
    except TypeError as e:
        raise ConfigError(f"model.build {config.build}: {e}") from None
    return function(inputs, **config.params)


def built_model(config: ModelConfig, inputs: ModelInputs) -> Model:
    """Build the model and call it once: Keras models make their variables at the first call.

    Raises:
        ConfigError: see `build_model`; or one of the two fails.
    """
    try:
        model = build_model(config, inputs)
        example = {
            name: tf.zeros((inputs.first_axes.get(name, inputs.batch_size), *shape))
            for name, shape in inputs.activations.items()
        }
        model(example, tf.zeros((inputs.batch_size, inputs.num_dense)), training=False)
    except MantaError:
        raise
    except (TypeError, ValueError, AttributeError, tf.errors.OpError) as e:
        reason = (str(e).strip() or repr(e)).splitlines()[0]
        raise ConfigError(f"model.build {config.build}: {reason}") from e
    return model


def describe_model(job: JobConfig) -> dict[str, Any]:
    """What exports and snapshots say of a job's model, as JSON: `rebuild_model` needs no more."""
    inputs = job_inputs(job)
    return {
        "name": job.model.build,
        "params": job.model.params,
        "loss": job.train.loss,
        "dense": list(job.data.dense),
        "inputs": asdict(inputs),
    }


def rebuild_model(described: Mapping[str, Any], trusted: str | None = None) -> Model:
    """The model that an export or a snapshot describes, with first values.

    Args:
        described: from `describe_model`.
        trusted: a build function `package.module:function` that may be run if it is the one
            described; two_tower and dlrm always may.

    Raises:
        ConfigError: it does not say enough, or names a function that is not trusted.
    """
    name = described.get("name")
    if not isinstance(name, str) or (name not in MODELS and name != trusted):
        raise ConfigError(
            f"the dense model is made by {name!r}, which only runs if you name it: --model {name}"
        )
    try:
        inputs = dict(described["inputs"])
        inputs["activations"] = {n: tuple(shape) for n, shape in inputs["activations"].items()}
        config = ModelConfig(build=described["name"], params=described["params"])
        wanted = ModelInputs(**inputs)
        if [type(column) for column in described["dense"]] != [str] * wanted.num_dense:
            raise TypeError(f"`dense` is {described['dense']!r:.80}")
    except (KeyError, TypeError, AttributeError) as e:
        raise ConfigError(
            f"the dense model is described by {sorted(described)}, not enough to build it: {e}"
        ) from e
    return built_model(config, wanted)


def _find(name: str) -> Callable[..., Model]:
    if name in MODELS:
        return MODELS[name]
    if ":" not in name:
        raise ConfigError(
            f"model.build: no model '{name}'; known: {', '.join(sorted(MODELS))}, "
            "or package.module:function"
        )
    return find_function(name, "model.build")


def find_function(name: str, key: str) -> Callable[..., Any]:
    """The function `package.module:function`; `key` is what names it in the configuration.

    Raises:
        ConfigError: no such module or function.
    """
    module_name, _, attribute = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"{key} {name}: {e}") from None
    return found


class MLP(tf.Module):
    """Fully connected layers with ReLU between them; the last one is linear."""

    def __init__(self, sizes: Sequence[int], rng: np.random.Generator, name: str) -> None:
        super().__init__(name=name)
        self._layers = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            # Glorot uniform, as Keras' Dense.
            limit = np.sqrt(6.0 / (fan_in + fan_out))
            kernel = rng.uniform(-limit, limit, (fan_in, fan_out)).astype(np.float32)
            bias = np.zeros(fan_out, dtype=np.float32)
            self._layers.append(
                (tf.Variable(kernel, name="kernel"), tf.Variable(bias, name="bias"))
            )

    def __call__(self, x: Any) -> Any:
        """[B, first size] to [B, last size]."""
        for i, (kernel, bias) in enumerate(self._layers):
            x = tf.matmul(x, kernel) + bias
            if i < len(self._layers) - 1:
                x = tf.nn.relu(x)
        return x


class TwoTower(tf.Module):
    """user vector · item vector + biases: matrix factorisation if the towers have no layers."""

    def __init__(
        self,
        inputs: ModelInputs,
        user: Sequence[str],
        item: Sequence[str],
        biases: Sequence[str] = (),
        hidden: Sequence[int] = (),
        mean: float = 0.0,
    ) -> None:
        """Build the towers.

        Args:
            inputs: what comes in.
            user: features of the user tower.
            item: features of the item tower.
            biases: features of tables with dim 1 that are added to the score.
            hidden: layer sizes of each tower's MLP over its joined activations; without any, a
                tower's vector is the sum of its activations.
            mean: first value of the trained constant that is added to every score.

        Raises:
            ConfigError: a feature is not there, or shapes do not fit.
        """
        super().__init__(name="two_tower")
        rng = np.random.default_rng(inputs.seed)
        self._user, self._item, self._biases = list(user), list(item), list(biases)
        unused = set(inputs.activations) - {*user, *item, *biases}
        if unused:
            raise ConfigError(f"two_tower: feature '{min(unused)}' is in no tower and no bias")
        if inputs.num_dense:
            raise ConfigError("two_tower: takes no dense columns; leave out `data.dense`")
        user_dim = _joint_dim(inputs, "user", self._user, joined=bool(hidden))
        item_dim = _joint_dim(inputs, "item", self._item, joined=bool(hidden))
        if not hidden and user_dim != item_dim:
            raise ConfigError(f"two_tower: user dim {user_dim} and item dim {item_dim} differ")
        for name in self._biases:
            if inputs.activations.get(name) != (1,):
                raise ConfigError(f"two_tower: bias '{name}' must be a feature of a dim-1 table")
        self._user_mlp = MLP([user_dim, *hidden], rng, "user") if hidden else None
        self._item_mlp = MLP([item_dim, *hidden], rng, "item") if hidden else None
        self._mean = tf.Variable(np.float32(mean), name="mean")

    def __call__(self, activations: Mapping[str, Any], dense: Any, training: bool) -> Any:
        """Scores [B]."""
        user = self._tower(self._user, self._user_mlp, activations)
        item = self._tower(self._item, self._item_mlp, activations)
        score = tf.reduce_sum(user * item, axis=1) + self._mean
        for name in self._biases:
            score += activations[name][:, 0]
        return score

    @staticmethod
    def _tower(names: Sequence[str], mlp: MLP | None, activations: Mapping[str, Any]) -> Any:
        parts = [activations[name] for name in names]
        return tf.add_n(parts) if mlp is None else mlp(tf.concat(parts, axis=1))


class DLRM(tf.Module):
    """Deep learning recommendation model (Naumov et al., arXiv:1906.00091).

    A bottom MLP turns the dense columns into one more vector of the tables' dim; the products of
    all pairs of vectors and that vector go through the top MLP to a logit.
    """

    def __init__(
        self, inputs: ModelInputs, bottom: Sequence[int] = (64,), top: Sequence[int] = (64, 32)
    ) -> None:
        """Build both MLPs; `bottom` and `top` are the sizes of their hidden layers.

        Raises:
            ConfigError: features of different dims, or a sequence feature.
        """
        super().__init__(name="dlrm")
        shapes = set(inputs.activations.values())
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ConfigError(f"dlrm: all features must have one dim, got {sorted(shapes)}")
        (dim,) = shapes.pop()
        rng = np.random.default_rng(inputs.seed)
        self._names = list(inputs.activations)
        self._bottom = (
            MLP([inputs.num_dense, *bottom, dim], rng, "bottom") if inputs.num_dense else None
        )
        num_vectors = len(self._names) + (self._bottom is not None)
        pairs = num_vectors * (num_vectors - 1) // 2
        self._top = MLP([pairs + (dim if self._bottom else 0), *top, 1], rng, "top")
        self._products = PairProducts(num_vectors)

    def __call__(self, activations: Mapping[str, Any], dense: Any, training: bool) -> Any:
        """Logits [B, 1]."""
        vectors = [activations[name] for name in self._names]
        joined = []
        if self._bottom is not None:
            bottom = tf.nn.relu(self._bottom(dense))
            vectors.append(bottom)
            joined.append(bottom)
        joined.append(self._products(tf.stack(vectors, axis=1), training))
        return self._top(tf.concat(joined, axis=1))


class PairProducts:
    """x_i · x_j for all i > j of N vectors, with a gradient of its own.

    TensorFlow's would scatter the gradients of the pairs, which XLA does one by one, and multiply
    by them once for i and once for j. Here they are gathered into the symmetric G, where
    G_ij = G_ji is that of the pair, and the gradient of all vectors is one product, G · x.
    """

    def __init__(self, num_vectors: int) -> None:
        n, (rows, columns) = num_vectors, np.tril_indices(num_vectors, -1)
        self._n = n
        self._places = (rows * n + columns).astype(np.int32)
        self._pair_of = np.full((n, n), rows.size, dtype=np.int32)  # the diagonal: behind the last
        self._pair_of[rows, columns] = self._pair_of[columns, rows] = np.arange(rows.size)

    def __call__(self, stacked: Any, training: bool) -> Any:
        """float32 [B, N, D] to [B, N(N - 1)/2], row by row of the lower triangle."""
        if not training:  # saved models are spared a function for the gradient
            return self._forward(stacked)

        def products(x: Any) -> Any:
            return self._forward(x), lambda grads: self._backward(grads, x)

        return tf.custom_gradient(products)(stacked)

    def _forward(self, stacked: Any) -> Any:
        products = tf.matmul(stacked, stacked, transpose_b=True)
        return tf.gather(tf.reshape(products, [-1, self._n**2]), self._places, axis=1)

    def _backward(self, grads: Any, stacked: Any) -> Any:
        padded = tf.pad(grads, [[0, 0], [0, 1]])
        symmetric = tf.gather(padded, self._pair_of.reshape(-1), axis=1)
        return tf.matmul(tf.reshape(symmetric, [-1, self._n, self._n]), stacked)


MODELS: dict[str, Callable[..., Model]] = {"two_tower": TwoTower, "dlrm": DLRM}


def _joint_dim(inputs: ModelInputs, tower: str, names: Sequence[str], joined: bool) -> int:
    shapes = []
    for name in names:
        if name not in inputs.activations:
            raise ConfigError(
                f"two_tower: {tower} feature '{name}' is unknown; "
                f"known: {', '.join(sorted(inputs.activations))}"
            )
        shapes.append(inputs.activations[name])
    if not shapes or any(len(shape) != 1 for shape in shapes):
        raise ConfigError(f"two_tower: {tower} needs features that are not sequences, got {names}")
    dims = [shape[0] for shape in shapes]
    if joined:
        return sum(dims)
    if len(set(dims)) != 1:
        raise ConfigError(f"two_tower: {tower} features must have one dim, got {dims}")
    return dims[0]
