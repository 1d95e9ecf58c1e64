"""Ten training steps equal a one-process TensorFlow reference, for every optimizer.

The reference keeps whole tables, looks up with `tf.nn`, takes gradients with `GradientTape` and
updates by the published formulas. Manta's side runs the real step loop over real shard states.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from ps.client import LocalTransport, ShardClient
from ps.config import (
    FTRL,
    SGD,
    Adagrad,
    AdagradMomentum,
    Adam,
    CustomCombiner,
    QuantizationConfig,
)
from ps.optimizers import Optimizer
from ps.partition import Layout
from ps.shard import ShardSpec, ShardState
from tests.support.tf_reference import ReferenceTrainer
from workers.batches import ExampleReader
from workers.config import DataConfig, FeatureEntry, JobConfig, ModelConfig, TableEntry, TrainConfig
from workers.dense import DenseStep
from workers.model import ModelInputs, model_inputs
from workers.shapes import device_lookups
from workers.step import StepLoop, StepOptions

pytestmark = pytest.mark.parity

STEPS, BATCH, DIM = 10, 32, 5
FEATURES = {
    "dense_id": FeatureEntry(table="means", column="one"),
    "means_bag": FeatureEntry(table="means", column="bag", weights="bag_weights"),
    "sum_bag": FeatureEntry(table="sums", column="bag", weights="bag_weights"),
    "sqrtn_bag": FeatureEntry(table="sqrtns", column="bag", weights="bag_weights"),
    "plain_bag": FeatureEntry(table="sqrtns", column="other"),
    "sequence": FeatureEntry(table="sums", column="other", max_sequence_length=3),
    "weighted_sequence": FeatureEntry(
        table="sums", column="bag", weights="bag_weights", max_sequence_length=2
    ),
}
# Where slots start at 0, the first steps divide g by about |g|: a gradient that is 0 but for
# rounding would move a row by the full rate. Epsilons above that keep the comparison meaningful.
OPTIMIZERS: list[Optimizer] = [
    SGD(0.1),
    SGD(0.1, weight_decay_factor=0.05, clipvalue=0.01, clip_weight_max=0.4),
    Adagrad(0.1),
    Adagrad(0.1, clipvalue=(-0.02, None), clip_weight_min=-0.3),
    AdagradMomentum(0.1, momentum=0.9, epsilon=1e-4),
    AdagradMomentum(0.1, momentum=0.9, use_nesterov=True, exponent=3, beta2=0.9, epsilon=0.1),
    Adam(0.01, epsilon=1e-2),
    Adam(0.01, epsilon=1e-2, sum_inside_sqrt=False, weight_decay_factor=0.1,
         multiply_weight_decay_factor_by_learning_rate=True),
    Adam(0.01, epsilon=1e-2, lazy_adam=False),
    FTRL(0.1),
    FTRL(0.1, l1_regularization_strength=0.01, l2_regularization_strength=0.1, beta=0.2),
    FTRL(0.1, multiply_linear_by_learning_rate=True, l2_regularization_strength=0.1),
]  # fmt: skip


def build_linear(inputs: ModelInputs) -> tf.Module:
    """A model that uses every activation, every sequence position and a dense column."""

    class Linear(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            rng = np.random.default_rng(inputs.seed)
            batch = inputs.batch_size
            sizes = [
                int(np.prod(shape)) * inputs.first_axes.get(name, batch) // batch
                for name, shape in inputs.activations.items()
            ]
            kernel = rng.normal(size=sum(sizes) + inputs.num_dense) * 0.3
            self.kernel = tf.Variable(kernel.astype(np.float32))
            self.bias = tf.Variable(np.float32(0.1))

        def __call__(self, activations, dense, training):
            flat = [tf.reshape(a, [dense.shape[0], -1]) for a in activations.values()]
            joined = tf.tanh(tf.concat([*flat, dense], 1))
            return tf.linalg.matvec(joined, self.kernel) + self.bias

    return Linear()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 examples with repeated ids, empty bags, zero and negative weights."""
    rng = np.random.default_rng(3)
    n = STEPS * BATCH

    def bags(vocabulary: int) -> list[list[int]]:
        return [rng.integers(0, vocabulary, rng.integers(0, 6)).tolist() for _ in range(n)]

    bag = bags(7)
    # Multiples of 1/4: sums are 0 exactly or far from it, so that means stay well-conditioned.
    weights = [rng.choice([-0.25, 0.0, 0.5, 1.0, 2.0], len(b)).tolist() for b in bag]
    path = tmp_path_factory.mktemp("parity") / "train.parquet"
    columns = {
        "one": rng.integers(0, 9, n),
        "bag": pa.array(bag, pa.list_(pa.int64())),
        "bag_weights": pa.array(weights, pa.list_(pa.float32())),
        "other": pa.array(bags(7), pa.list_(pa.int64())),
        "x": rng.normal(size=n).astype(np.float32),
        "label": rng.normal(size=n).astype(np.float32),
    }
    pq.write_table(pa.table(columns), path)
    return path


def make_job(data: Path, optimizer: Optimizer, num_workers: int = 1) -> JobConfig:
    from workers.config import ClusterConfig

    def table(vocabulary_size: int, combiner: str) -> TableEntry:
        return TableEntry(
            vocabulary_size=vocabulary_size, dim=DIM, combiner=combiner, optimizer=optimizer
        )

    return JobConfig(
        name="parity",
        seed=5,
        data=DataConfig(train=data, label="label", dense=("x",)),
        tables={"means": table(9, "mean"), "sums": table(7, "sum"), "sqrtns": table(11, "sqrtn")},
        features=FEATURES,
        model=ModelConfig(build=f"{__name__}:build_linear"),
        train=TrainConfig(batch_size=BATCH, dense_optimizer=Adagrad(0.05)),
        cluster=ClusterConfig(shards=2, workers=num_workers),
    )


def readers(job: JobConfig) -> list[ExampleReader]:
    workers = job.cluster.workers
    return [
        ExampleReader(
            job.data.train, job.data, job.features, worker=w, num_workers=workers, seed=job.seed
        )
        for w in range(workers)
    ]


def inputs_of(job: JobConfig) -> ModelInputs:
    return model_inputs(job.embedding_spec(), job.worker_batch_size, num_dense=1, seed=job.seed)


def train_with_manta(job: JobConfig, num_shards: int, steps: int = STEPS) -> list[ShardState]:
    spec = job.embedding_spec()
    workers = job.cluster.workers
    shards = [
        ShardState(
            ShardSpec(
                shard_id=k,
                num_shards=num_shards,
                num_workers=workers,
                embedding=spec,
                dense_optimizer=job.train.dense_optimizer,
                seed=job.seed,
            )
        )
        for k in range(num_shards)
    ]
    lookups = device_lookups(spec, job.worker_batch_size)
    dense = DenseStep(job.model, inputs_of(job), "mse", lookups=lookups)
    values, state = dense.initial()
    layout = Layout.of(spec, num_shards, values.size, state.size)
    for k, shard in enumerate(shards):
        shard.set_dense(values[slice(*layout.dense_splits[k : k + 2])], state)
    loops = [
        StepLoop(
            spec,
            ShardClient(spec, layout, LocalTransport(shards), w),
            dense,
            reader,
            StepOptions(batch_size=job.worker_batch_size, timeout_s=1.0),
            worker=w,
        )
        for w, reader in enumerate(readers(job))
    ]
    for _ in range(steps):
        for loop in loops:
            assert loop.run(1).steps == 1
    return shards


def whole_table(shards: list[ShardState], table: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    spec = shards[0].spec.embedding.table(table)
    rows = np.full((spec.vocabulary_size, spec.dim), np.nan, np.float32)
    slots = {name: rows.copy() for name in spec.optimizer.slot_names}
    for shard in shards:
        for slab, part, slot_parts in shard.slabs(table):
            span = slice(slab.first_id, slab.first_id + slab.num_rows)
            rows[span] = part
            for name, values in slot_parts.items():
                slots[name][span] = values
    return rows, slots


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_ten_steps_equal_a_one_process_tensorflow_run(
    data: Path, optimizer: Optimizer, num_workers: int
) -> None:
    job = make_job(data, optimizer, num_workers)
    shards = train_with_manta(job, num_shards=2)

    reference = ReferenceTrainer(job, build_linear(inputs_of(job)))
    epochs = [reader.epoch(0, job.worker_batch_size) for reader in readers(job)]
    for batches in zip(*epochs, strict=True):
        reference.step(list(batches))
    assert shards[0].version == STEPS == reference.steps

    for table in ("means", "sums", "sqrtns"):
        rows, slots = whole_table(shards, table)
        np.testing.assert_allclose(rows, reference.rows[table], rtol=1e-5, atol=1e-6)
        for name, values in slots.items():
            np.testing.assert_allclose(
                values, reference.slots[table][name], rtol=1e-5, atol=1e-6, err_msg=name
            )
    dense = np.concatenate([shard.dense()[0] for shard in shards])
    np.testing.assert_allclose(dense, reference.dense_values(), rtol=1e-5, atol=1e-6)


CUSTOM = CustomCombiner("tests.support.combiners:attention", 3)
OPTION_TABLES = {
    "sums": TableEntry(vocabulary_size=7, dim=DIM, combiner="sum"),
    "means": TableEntry(vocabulary_size=9, dim=DIM),
    "customs": TableEntry(vocabulary_size=7, dim=DIM, combiner=CUSTOM),
    "coarse": TableEntry(
        vocabulary_size=7, dim=DIM, quantization_config=QuantizationConfig(9, -0.5, 0.5)
    ),
}
OPTION_FEATURES = {
    "core_sum": FeatureEntry(table="sums", column="bag", tensor_core_shape=(None, 3)),
    "core_again": FeatureEntry(table="sums", column="other", tensor_core_shape=(-1, 2)),
    "host_sum": FeatureEntry(table="sums", column="other"),
    "core_mean": FeatureEntry(
        table="means", column="bag", tensor_core_shape=(None, 2), output_shape=(8, BATCH // 8)
    ),
    "shaped": FeatureEntry(table="means", column="bag", output_shape=(BATCH // 2, 4)),
    "attended": FeatureEntry(table="customs", column="bag"),
    "custom_sequence": FeatureEntry(table="customs", column="other", max_sequence_length=2),
    "coarse_bag": FeatureEntry(table="coarse", column="bag", weights="bag_weights"),
    "coarse_core": FeatureEntry(table="coarse", column="other", tensor_core_shape=(None, 4)),
}


def options_job(data: Path) -> JobConfig:
    """Every lookup option of training in one job."""
    return replace(
        make_job(data, Adagrad(0.1)),
        tables={n: replace(t, optimizer=Adagrad(0.1)) for n, t in OPTION_TABLES.items()},
        features=OPTION_FEATURES,
    )


def test_lookup_options_equal_their_formulas_in_plain_tensorflow(data: Path) -> None:
    job = options_job(data)
    shards = train_with_manta(job, num_shards=2, steps=3)
    reference = ReferenceTrainer(job, build_linear(inputs_of(job)))
    for batch in itertools.islice(readers(job)[0].epoch(0, job.worker_batch_size), 3):
        reference.step([batch])
    for table in job.tables:
        rows, slots = whole_table(shards, table)
        np.testing.assert_allclose(rows, reference.rows[table], rtol=1e-5, atol=1e-6)
        want = reference.slots[table]["accumulators"]
        np.testing.assert_allclose(slots["accumulators"], want, rtol=1e-5, atol=1e-6)


def test_lookup_options_give_the_same_bits_on_any_number_of_shards(data: Path) -> None:
    job = options_job(data)
    one, three = (train_with_manta(job, n, steps=4) for n in (1, 3))
    for table in job.tables:
        (rows, slots), (other_rows, other_slots) = (
            whole_table(one, table),
            whole_table(three, table),
        )
        assert rows.tobytes() == other_rows.tobytes()
        assert slots["accumulators"].tobytes() == other_slots["accumulators"].tobytes()
