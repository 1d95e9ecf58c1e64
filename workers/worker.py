"""`TrainWorker`: the Ray shell of `StepLoop`, on a TPU host or wherever Ray puts it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import ray

from ps.client import ShardClient
from ps.dense_variables import DenseVariable
from ps.group import ShardAccess
from ps.partition import Layout
from ps.ragged import F32
from workers.batches import ExampleReader
from workers.config import JobConfig
from workers.raw_inputs import column_inputs
from workers.report import StepReport
from workers.shapes import device_lookups
from workers.step import StepLoop, StepOptions

if TYPE_CHECKING:  # the driver imports this module and does without TensorFlow
    from workers.dense import DenseStep


class TrainWorker:
    """Ray actor around one worker's steps. It keeps no state that a shard does not have."""

    def __init__(self, job: JobConfig, worker: int) -> None:
        self._job = job
        self._worker = worker
        self._spec = job.embedding_spec()
        self._dense: DenseStep | None = None
        self._loop: StepLoop | None = None

    def setup(self) -> tuple[F32, F32]:
        """Build the dense model; returns its first flat values (trainable, non-trainable).

        Apart from the constructor, so that what goes wrong reaches the driver as it was raised.
        """
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        from workers.dense import DenseStep
        from workers.model import job_inputs

        threads = self._job.cluster.threads_per_worker
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        tf.config.experimental.enable_op_determinism()
        # For models that draw without a seed of their own. Worker 0's first values count, and
        # noise such as dropout should differ between workers.
        tf.keras.utils.set_random_seed((self._job.seed + self._worker) % 2**32)
        job = self._job
        lookups = device_lookups(self._spec, job.worker_batch_size)
        self._dense = DenseStep(
            job.model, job_inputs(job), job.train.loss, strategy_for_node(), lookups
        )
        return self._dense.initial()

    def connect(self, shards: ShardAccess, layout: Layout, first_step: int) -> None:
        """Connect to the shards, which are at version `first_step`; steps can run then."""
        train, cluster = self._job.train, self._job.cluster
        background = train.lookahead > 0
        transport = shards.connect(
            self._worker, cluster.transport, background, cluster.step_timeout_s
        )
        options = StepOptions(
            batch_size=self._job.worker_batch_size,
            epochs=train.epochs,
            lookahead=train.lookahead,
            mode=train.mode,
            prefetch=self._job.data.prefetch,
            timeout_s=cluster.step_timeout_s,
            cached_rows=train.cached_rows,
            cache_max_age=train.cache_max_age,
            keep_records=self._job.output.metrics_every_step,
            shard_combined=self._job.shard_combined,
        )
        self._loop = StepLoop(
            self._spec,
            ShardClient(self._spec, layout, transport, self._worker, shards.format),
            self._built(),
            self._reader(self._job.data.train),
            options,
            worker=self._worker,
            first_step=first_step,
        )

    def run(self, num_steps: int) -> StepReport:
        """See `StepLoop.run`."""
        assert self._loop is not None, "connect comes first"
        return self._loop.run(num_steps)

    def finish(self) -> None:
        """See `StepLoop.finish`."""
        assert self._loop is not None, "connect comes first"
        self._loop.finish()

    def evaluate(self, version: int) -> tuple[F32, F32]:
        """See `StepLoop.evaluate`; on the job's test data."""
        assert self._loop is not None, "connect comes first"
        assert self._job.data.test is not None, "the driver asks only with test data"
        return self._loop.evaluate(self._reader(self._job.data.test), version)

    def model(self) -> dict[str, Any]:
        """See `workers.model.describe_model`."""
        from workers.model import describe_model

        return describe_model(self._job)

    def described(self) -> list[DenseVariable]:
        """See `DenseStep.described`."""
        return self._built().described()

    def variables(self, dense: F32, state: F32) -> dict[str, F32]:
        """See `DenseStep.variables`."""
        return self._built().variables(dense, state)

    def _built(self) -> DenseStep:
        assert self._dense is not None, "setup comes first"
        return self._dense

    def _reader(self, path: Any) -> ExampleReader:
        return ExampleReader(
            path,
            self._job.data,
            self._job.features,
            column_inputs(self._job.column_configs()),
            worker=self._worker,
            num_workers=self._job.cluster.workers,
            seed=self._job.seed,
            ahead=min(1, self._job.data.prefetch),
        )


def strategy_for_node() -> Any:
    """TPUStrategy where Ray gave this worker TPU chips; None, TensorFlow's default, elsewhere."""
    if not ray.get_runtime_context().get_accelerator_ids().get("TPU"):
        return None
    import tensorflow as tf

    resolver = tf.distribute.cluster_resolver.TPUClusterResolver("local")
    tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)
