"""`Run`: the actors of a job, and what the driver does with them.

`workers.supervisor` decides when; this module knows how: start, restore, replace, evaluate, export.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from ps.actor import Lifetime
from ps.cluster import actor_options, named
from ps.dense_variables import DenseValues, DenseVariable
from ps.disk import Disk
from ps.errors import ShardLostError, StorageError
from ps.export import ExportWriter
from ps.group import ShardAccess, ShardGroup
from ps.partition import Layout
from ps.ragged import F32
from ps.shard import ShardSpec
from ps.snapshot import Snapshot, export_snapshot
from ps.start import check_dense
from workers.config import JobConfig
from workers.jobplan import JobPlan, about, start_snapshot
from workers.metrics import evaluate
from workers.modes import in_rank_order
from workers.recovery import first_steps
from workers.remote import gather, succeeded
from workers.resume import own_snapshot
from workers.worker import CONTROL, TrainWorker

_CONTROL_CALLS = 4
_ANSWER_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What it took to give shards their state."""

    step: int
    """Where they are."""
    replayed: int = 0
    """Versions that came from logs."""
    restart_s: float = 0.0
    restore_s: float = 0.0
    log_s: float = 0.0


class Run:
    """The actors of a running job."""

    def __init__(self, job: JobConfig) -> None:
        self.job = job = job.with_absolute_paths()
        self.recovery = job.recovery
        durable = self.recovery.durable
        own = own_snapshot(job)
        start = start_snapshot(job)
        self._base = own or start
        self._began = 0 if start is None else start.step
        self._oldest = 0 if self._base is None else self._base.step
        """No version before this one can be read."""
        self._own = own is not None
        """Whether the base is a snapshot of this very job."""
        self._initial: DenseValues | None = None
        self._layout: Layout | None = None
        self._access: ShardAccess | None = None
        self.variables: list[DenseVariable] = []
        """Of the dense model, trainable ones first; known once the workers are set up."""
        self.resumed_step = 0
        """Where the run began, or went on."""
        self.model: dict[str, Any] = {}
        """Its description."""
        self.workers: list[Any] = []
        self.shards = ShardGroup(
            ShardSpec(
                shard_id=0,
                num_shards=job.cluster.shards,
                num_workers=job.num_ranks,
                embedding=job.embedding_spec(),
                dense_optimizer=job.train.dense_optimizer,
                reduction=job.train.reduction,
                seed=job.seed,
                mode=job.train.mode,
                max_staleness=job.train.max_staleness or 0,
                combined=job.shard_combined,
                threads=job.cluster.threads_per_shard,
                history=2 * job.train.lookahead + 2 if durable else 0,
            ),
            job.cluster.shard_resources,
            job.name,
            job.train.wire_dtype,
            job.cluster.pin_shards,
            Lifetime(
                job=job_fingerprint(job),
                orphan_s=self.recovery.orphan_timeout_s if durable else 0.0,
                faults=bool(os.environ.get("MANTA_CHAOS")),
            ),
        )

    @property
    def log_root(self) -> Path | None:
        """Where shards keep their commit logs, None if they keep none."""
        return self.recovery.log_folder(self.job.output) if self._logs else None

    @property
    def base(self) -> Snapshot | None:
        """The snapshot that lost state is restored from; None for the first values."""
        return self._base

    @property
    def owns_base(self) -> bool:
        """Whether that is a snapshot of this very job."""
        return self._own

    @property
    def access(self) -> ShardAccess:
        """How the shards are reached."""
        assert self._access is not None, "the run is started"
        return self._access

    def committed(self, snapshot: Snapshot) -> None:
        """There is a newer one."""
        self._base, self._own = snapshot, True

    def start(self) -> None:
        """Start workers, give the shards their state, and connect both.

        With durability, what dies meanwhile is started anew, a bounded number of times.
        """
        retries = 0 if not self.recovery.durable else self.recovery.retries
        for attempt in range(retries + 1):
            try:
                self.resumed_step = self._start().step
                return
            except (ray.exceptions.RayActorError, ShardLostError):
                if attempt == retries:
                    raise
                for worker in self.workers:
                    ray.kill(worker)
                self.shards.start_anew()

    def _start(self) -> Restored:
        started = time.monotonic()
        everyone = range(self.job.cluster.workers)
        self.workers = [self._new_worker(worker) for worker in everyone]
        timeout_s = self.job.cluster.start_timeout_s
        self.shards.wait_ready(timeout_s)
        initial = self._set_up(everyone)[0]
        restart_s = time.monotonic() - started
        self._initial = DenseValues(trainable=initial[0], slots={}, state=initial[1])
        self.variables = self._ask(self.workers[0].described.remote())
        self.model = self._ask(self.workers[0].model.remote())
        self._layout = self.shards.layout(self._initial)
        if self.shards.taken_over:
            self.shards.disarm()
            restored = Restored(step=min(s.version for s in self.shards.stats()))
        else:
            restored = self.restore()
        self._access = self.shards.access()
        self.connect(everyone)
        return replace(restored, restart_s=restart_s)

    def restore(self, shards: Sequence[int] | None = None) -> Restored:
        """Give shards that have no state theirs: from the last snapshot, and from the logs.

        Args:
            shards: those that are new while the others go on: each gets all that its log has.
                None for all of them, which then are at one version.

        Raises:
            SnapshotError: the snapshot is damaged, or does not fit the model.
            StorageError: a log is damaged.
        """
        assert self._initial is not None, "workers are set up before shards are restored"
        began, base, values = time.monotonic(), self._base, self._initial
        if base is not None:
            with about("train.start_from"):
                check_dense(base, self.variables, self.job.train.dense_optimizer)
            self.shards.load_tables(base.uri, shards)
            values = values if base.dense is None else base.dense.values()
        step = 0 if base is None else base.step
        self.shards.set_dense(values, step, shards)
        restored, replayed = time.monotonic(), 0
        if self.log_root is not None:
            upto = None if shards is not None else self._common_version(self.log_root, step)
            replayed = self.shards.start_logs(self.log_root, upto, shards)
        return Restored(
            step=step + replayed,
            replayed=replayed,
            restore_s=restored - began,
            log_s=time.monotonic() - restored,
        )

    def _common_version(self, root: Path, step: int) -> int:
        """The last version that every shard's log has; logs that are of no use are removed."""
        ends: list[int | None] = []
        if self._own:
            try:
                ends = self.shards.log_ends(root)
            except StorageError:  # of another job, or damaged: the snapshot is what counts
                ends = []
        if self.job.train.mode == "sync" and ends and all(end is not None for end in ends):
            return max(step, min(end for end in ends if end is not None))
        # Versions of async shards are not comparable, and without a snapshot nobody knows what
        # the logs begin with.
        Disk().remove_folder(root)
        return step

    @property
    def _logs(self) -> bool:
        return self.recovery.durability == "log"

    def replace_shards(self, shards: Sequence[int]) -> Restored:
        """New processes for these shards, while the others go on; workers are told."""
        began = time.monotonic()
        self.shards.replace(shards)
        self.shards.wait_ready(self.job.cluster.start_timeout_s, shards)
        restart_s = time.monotonic() - began
        restored = self.restore(shards)
        self._access = self.shards.access()
        endpoints = self._access.endpoints
        self.control([w.move.remote(endpoints) for w in self.workers])
        return replace(restored, restart_s=restart_s)

    def start_over(self, dead_workers: Collection[int], reason: str) -> Restored:
        """All shards anew, from what is on disk; workers go on from there."""
        began = time.monotonic()
        dead = set(dead_workers)
        for worker in range(len(self.workers)):
            if worker not in dead and not self._stopped(worker, reason):
                dead.add(worker)
        self.shards.replace(range(self.shards.spec.num_shards))
        self._replace_workers(sorted(dead))
        self.shards.wait_ready(self.job.cluster.start_timeout_s)
        restart_s = time.monotonic() - began
        restored = self.restore()
        self._access = self.shards.access()
        self._set_up(sorted(dead))
        self.connect(range(len(self.workers)))
        return replace(restored, restart_s=restart_s)

    def replace_workers(self, workers: Collection[int]) -> float:
        """New processes for these workers, which go on where the shards are; returns seconds."""
        began = time.monotonic()
        self._replace_workers(sorted(workers))
        self._set_up(sorted(workers))
        restart_s = time.monotonic() - began
        self.connect(sorted(workers))
        return restart_s

    def connect(self, workers: Iterable[int]) -> None:
        """Connect workers to the shards; each of their ranks goes on with its next step."""
        steps, count = first_steps(self.shards.stats()), len(self.workers)
        gather(
            [
                self.workers[w].connect.remote(
                    self.access,
                    self._layout,
                    {rank: steps[rank] for rank in range(w, len(steps), count)},
                )
                for w in workers
            ],
            self.job.cluster.start_timeout_s,
            "connected",
        )

    def control(self, refs: Sequence[Any]) -> None:
        """Wait for calls that are answered at once."""
        ray.get(list(refs), timeout=_ANSWER_S)

    def unanswering(self) -> tuple[frozenset[int], frozenset[int]]:
        """Shards and workers that are dead, or do not answer within a few seconds."""
        shards = {h.process_id.remote(): k for k, h in enumerate(self.shards.handles)}
        workers = {w.process_id.remote(): k for k, w in enumerate(self.workers)}
        waiting = [*shards, *workers]
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=_ANSWER_S)
        fine = {ref for ref in ready if succeeded(ref)}
        return (
            frozenset(k for ref, k in shards.items() if ref not in fine),
            frozenset(k for ref, k in workers.items() if ref not in fine),
        )

    def evaluation_timeout_s(self, plan: JobPlan) -> float:
        """How long the test data may take."""
        batches = plan.test_rows // self.job.train.batch_size + 2  # a rank's share, rounded up
        return batches * self.job.cluster.step_timeout_s

    def metrics(self, parts: Sequence[Sequence[tuple[F32, F32]]]) -> dict[str, float]:
        """Of the labels and predictions that each worker found, rank by rank."""
        ranked = in_rank_order(parts)
        labels, predictions = (np.concatenate(arrays) for arrays in zip(*ranked, strict=True))
        train = self.job.train
        return evaluate(train.loss, labels, predictions, train.clip_predictions)

    def export(self, step: int) -> Path | None:
        """Write the tables and the dense model as a new export version."""
        root = self.job.output.export
        if root is None:
            return None
        if self._own and self._base is not None and self._base.step == step:
            return export_snapshot(self._base, root)
        dense, _, state = self.shards.read_dense(step)
        with ExportWriter(
            root,
            self.shards.embedding,
            step=step,
            job=self.job.name,
            transforms=self.job.transforms(),
        ) as writer:
            self.shards.write_tables(writer, step)
            named_values = self._ask(self.workers[0].variables.remote(dense, state))
            writer.add_dense(named_values, self.model)
            return writer.commit()

    def stop(self) -> None:
        """Kill all actors."""
        for worker in self.workers:
            ray.kill(worker)
        self.shards.stop()

    def _set_up(self, workers: Iterable[int]) -> list[tuple[F32, F32]]:
        resources = self.job.cluster.worker_resources
        return gather(
            [self.workers[w].setup.remote() for w in workers],
            self.job.cluster.start_timeout_s,
            "set up",
            asking=resources,
        )

    def _new_worker(self, worker: int) -> Any:
        options = actor_options(self.job.cluster.worker_resources)
        actor = ray.remote(concurrency_groups={CONTROL: _CONTROL_CALLS})(TrainWorker)
        return named(
            f"{self.job.name}-worker-{worker}",
            lambda **name: actor.options(**options, **name).remote(
                self.job, worker, self._began, self._oldest
            ),
        )

    def _replace_workers(self, workers: Sequence[int]) -> None:
        for worker in workers:
            ray.kill(self.workers[worker])
        for worker in workers:
            self.workers[worker] = self._new_worker(worker)

    def _stopped(self, worker: int, reason: str) -> bool:
        """Let a worker leave its steps; False if it does not answer."""
        try:
            self.control([self.workers[worker].abort.remote(reason)])
        except ray.exceptions.RayError:
            return False
        return True

    def _ask(self, ref: Any) -> Any:
        return ray.get(ref, timeout=self.job.cluster.step_timeout_s)


def job_fingerprint(job: JobConfig) -> str:
    """What shards of two drivers must have in common to be of one job: all that makes its numbers.

    Where functions lie in memory differs from process to process and is left out.
    """
    told = repr((job.name, job.seed, job.data, job.tables, job.features, job.columns, job.model,
                 job.train, job.cluster.shards, job.recovery.durability,
                 job.recovery.snapshot_every))  # fmt: skip
    return hashlib.blake2b(re.sub(r" at 0x[0-9a-f]+", "", told).encode(), digest_size=8).hexdigest()
