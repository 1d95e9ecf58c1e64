"""`TrainWorker`: the Ray shell of `Ranks`, on a TPU host or wherever Ray puts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from ps.client import ShardClient
from ps.dense_variables import DenseVariable
from ps.errors import JobAborted
from ps.group import ShardAccess
from ps.partition import Layout
from ps.ragged import F32
from ps.wire.server import Endpoint
from ps.wire.transport import WireTransport
from workers.batches import ExampleReader
from workers.config import JobConfig
from workers.jobplan import start_snapshot
from workers.modes import ranks_of
from workers.ranks import Noise, Ranks
from workers.raw_inputs import column_inputs
from workers.report import StepReport
from workers.shapes import device_lookups
from workers.step import StepLoop, StepOptions

if TYPE_CHECKING:  # the driver imports this module and does without TensorFlow
    from workers.dense import DenseStep

Method = TypeVar("Method", bound=Callable[..., Any])

CONTROL = "control"
"""Concurrency group of the calls that a worker answers while it runs steps.

An actor gets its groups by `ray.remote(concurrency_groups=…)`; `.options` refuses them. With one,
all other calls run in order in one thread of their own, which is not the main one but always the
same: Keras keeps its state by thread, so the model must be built in the thread that trains it.
"""
_PUSHES = 4
_PUSHES_LOGGED = 32
"""Pushes under way per rank and shard. One that is logged is done with only when it is on disk,
some milliseconds and, with small steps, many steps later."""


def control(method: Method) -> Method:
    """A method that is called while the worker runs steps."""
    marked: Method = ray.method(concurrency_group=CONTROL)(method)
    return marked


class TrainWorker:
    """Ray actor around the steps of some ranks. It keeps no state that a shard does not have."""

    def __init__(
        self, job: JobConfig, worker: int, first_step: int | None = None, resume_step: int = 0
    ) -> None:
        """Take every `cluster.workers`-th rank, from `worker` on.

        Args:
            job: the same for all.
            worker: number of this worker.
            first_step: see `JobPlan`; None to look it up in the snapshot that the job starts from.
            resume_step: see `JobPlan`.
        """
        self._job = job
        self._worker = worker
        self._first_step = first_step
        self._resume_step = resume_step
        self._spec = job.embedding_spec()
        self._dense: DenseStep | None = None
        self._noise = Noise(())
        self._readers: dict[int, ExampleReader] = {}
        self._ranks: Ranks | None = None
        self._transports: list[WireTransport] = []
        self._aborted: JobAborted | None = None

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
        # For models that draw without a seed of their own: the same first values everywhere, for
        # nobody may notice which worker came first. What layers draw in steps is up to `Noise`.
        tf.keras.utils.set_random_seed(self._job.seed % 2**32)
        job = self._job
        lookups = device_lookups(self._spec, job.worker_batch_size)
        self._dense = DenseStep(
            job.model, job_inputs(job), job.train.loss, strategy_for_node(), lookups
        )
        self._noise = Noise(self._dense.non_trainable)
        return self._dense.initial()

    def connect(self, shards: ShardAccess, layout: Layout, steps: Mapping[int, int]) -> None:
        """Connect each rank to the shards; steps can run then.

        It may be called again, after `abort` or with other shards: whatever was under way is gone.

        Args:
            shards: how to reach them.
            layout: what lies where on them.
            steps: the next step of each of this worker's ranks.

        Raises:
            JobAborted: `abort` was called meanwhile.
        """
        self._aborted = None
        self._disconnect()
        ranks = ranks_of(self._worker, self._job.cluster.workers, self._job.num_ranks)
        assert sorted(steps) == list(ranks), "a step for each rank of this worker, and no other"
        loops = {rank: self._connected(rank, shards, layout, steps[rank]) for rank in ranks}
        self._ranks = Ranks(loops, keep_records=self._job.output.metrics_every_step)
        self._check_aborted()

    def run_to(self, step: int) -> list[StepReport]:
        """See `Ranks.run_to`."""
        return self._connected_ranks().run_to(step)

    def finish(self) -> None:
        """See `Ranks.finish`."""
        self._connected_ranks().finish()

    def evaluate(self, version: int) -> list[tuple[F32, F32]]:
        """See `Ranks.evaluate`; on the job's test data."""
        ranks, test = self._connected_ranks(), self._job.data.test
        assert test is not None, "the driver asks only with test data"
        return ranks.evaluate({rank: self._reader(test, rank) for rank in ranks.where()}, version)

    @control
    def move(self, endpoints: Sequence[Endpoint]) -> None:
        """See `WireTransport.move`; for every rank."""
        for transport in list(self._transports):
            transport.move(endpoints)

    @control
    def abort(self, reason: str) -> None:
        """Let steps under way, and every later one until `connect`, raise `JobAborted`."""
        self._aborted = JobAborted(reason)
        if self._ranks is not None:
            self._ranks.abort(self._aborted)
        for transport in list(self._transports):
            transport.abort(self._aborted)

    @control
    def where(self) -> dict[int, int]:
        """The next step of each rank; {} before the first `connect`."""
        return {} if self._ranks is None else self._ranks.where()

    @control
    def process_id(self) -> int:
        """Of the worker's process."""
        return os.getpid()

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

    def _connected_ranks(self) -> Ranks:
        self._check_aborted()
        assert self._ranks is not None, "connect comes first"
        return self._ranks

    def _check_aborted(self) -> None:
        if self._aborted is not None:
            raise self._aborted

    def _disconnect(self) -> None:
        """End threads that read ahead, and close what leads to shards."""
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.close()
        transports, self._transports = self._transports, []
        for transport in transports:
            transport.close()

    def _connected(self, rank: int, shards: ShardAccess, layout: Layout, step: int) -> StepLoop:
        job, train, recovery = self._job, self._job.train, self._job.recovery
        transport = shards.connect(
            rank,
            job.cluster.transport,
            train.lookahead > 0,
            self._timeout_s,
            reconnect_s=2 * recovery.step_deadline_s if recovery.durable else 0.0,
            max_pushes=_PUSHES_LOGGED if recovery.durability == "log" else _PUSHES,
        )
        self._transports.append(transport)
        self._check_aborted()
        if rank not in self._readers:
            self._readers[rank] = self._reader(job.data.train, rank)
        return StepLoop(
            self._spec,
            ShardClient(self._spec, layout, transport, rank, shards.format),
            self._built(),
            self._readers[rank],
            self._options(),
            worker=rank,
            first_step=self._run_began_at(),
            step=step,
            oldest=self._resume_step,
            before_step=self._noise.of_rank(rank),
        )

    def _options(self) -> StepOptions:
        job, train = self._job, self._job.train
        return StepOptions(
            batch_size=job.worker_batch_size,
            epochs=train.epochs,
            lookahead=train.lookahead,
            mode=train.mode,
            boundary_every=job.recovery.boundary_every,
            prefetch=job.data.prefetch,
            timeout_s=self._timeout_s,
            cached_rows=train.cached_rows,
            cache_max_age=train.cache_max_age,
            keep_records=job.output.metrics_every_step,
            shard_combined=job.shard_combined,
        )

    @property
    def _timeout_s(self) -> float:
        """For a shard's answer. A driver that can mend things must lose its patience first."""
        recovery = self._job.recovery
        if recovery.durable:
            return 4 * recovery.step_deadline_s
        return self._job.cluster.step_timeout_s

    def _run_began_at(self) -> int:
        if self._first_step is None:
            snapshot = start_snapshot(self._job)
            self._first_step = 0 if snapshot is None else snapshot.step
        return self._first_step

    def _reader(self, path: Path, rank: int) -> ExampleReader:
        return ExampleReader(
            path,
            self._job.data,
            self._job.features,
            column_inputs(self._job.column_configs()),
            worker=rank,
            num_workers=self._job.num_ranks,
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
