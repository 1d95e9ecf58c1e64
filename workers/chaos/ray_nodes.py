"""`RayCluster`: Ray nodes of this machine that outlive drivers, and the job on them.

The only module of `manta chaos` that knows Ray. Nothing here waits for an actor: a question that
is not answered yet is looked at again at the next call.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ps.errors import JobError
from workers.chaos.cluster import RunFolder, ShardView
from workers.chaos.driver import DriverProcess
from workers.chaos.plan import Victim
from workers.chaos.processes import (
    Process,
    descendants,
    end_marked,
    uninterrupted,
    wait_until,
)

MARK = "MANTA_CHAOS"
"""Environment variable of everything that is started here: so it is found again, and ended."""
_GONE_S = 20.0
_NAMES_FREE_S = 20.0
_QUESTION_S = 10.0
_SPARE_CPUS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class JobShape:
    """What the cluster must know of the job."""

    name: str
    shards: int
    shard_resources: Mapping[str, float]
    workers: int
    worker_resources: Mapping[str, float]

    def node(self, num_nodes: int) -> dict[str, Any]:
        """Arguments of `Cluster.add_node` for each of so many nodes.

        CPUs are scarce enough that the job needs all nodes, with some to spare for processes
        that take the place of others; of everything else each node has enough for the whole job.
        """
        asked: dict[str, float] = {}
        for count, resources in (
            (self.shards, self.shard_resources),
            (self.workers, self.worker_resources),
        ):
            for name, amount in resources.items():
                asked[name] = asked.get(name, 0.0) + count * amount
        cpus = int(-(-asked.pop("CPU", 0.0) // num_nodes)) + _SPARE_CPUS
        arguments: dict[str, Any] = {"num_cpus": cpus, "num_gpus": int(asked.pop("GPU", 0.0))}
        if "memory" in asked:
            arguments["memory"] = int(asked.pop("memory"))
        return arguments | ({"resources": asked} if asked else {})


@contextmanager
def ray_cluster(
    shape: JobShape, num_nodes: int, arguments: Sequence[str], outputs: Mapping[str, str]
) -> Iterator[RayCluster]:
    """A cluster for the body of a `with`; no process and no file of it stays behind.

    In the body, `sys.stdout` leads nowhere.

    Args:
        shape: of the job.
        num_nodes: Ray nodes, all on this machine.
        arguments: of `manta`, to run the job; `--address` is added.
        outputs: configuration keys of what a run writes, by attribute of `RunFolder`.

    Raises:
        JobError: this process is connected to a Ray already, or Ray does not start.
    """
    mark = uuid.uuid4().hex
    # Ray keeps sockets in it, whose paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="manta-chaos-"))
    with (
        _environment({MARK: mark}),
        _own_token(),
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),  # Ray prints there whose end it noticed
    ):
        cluster: RayCluster | None = None
        try:
            cluster = RayCluster(shape, num_nodes, folder, arguments, outputs)
            yield cluster
        finally:
            with uninterrupted():
                try:
                    if cluster is not None:
                        cluster.close()
                    _disconnect()
                finally:
                    end_marked(MARK, mark)
                    shutil.rmtree(folder, ignore_errors=True)


class RayCluster:
    """See `workers.chaos.cluster.Cluster`."""

    def __init__(
        self,
        shape: JobShape,
        num_nodes: int,
        folder: Path,
        arguments: Sequence[str],
        outputs: Mapping[str, str],
    ) -> None:
        """Start the nodes and connect; see `ray_cluster`."""
        import logging

        import ray
        from ray.cluster_utils import Cluster

        if ray.is_initialized():
            raise JobError("manta chaos starts a Ray of its own: this process is connected to one")
        self._shape = shape
        self._outputs = dict(outputs)
        self._node_arguments = shape.node(num_nodes)
        with _ray_address_kept():
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    **self._node_arguments,
                    "include_dashboard": False,
                    "temp_dir": str(folder),
                },
            )
        self._nodes = [self._cluster.add_node(**self._node_arguments) for _ in range(num_nodes - 1)]
        address = self._cluster.address
        from ps.cluster import NAMESPACE

        self._namespace = NAMESPACE
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
        )
        self._ray = ray
        self._driver = DriverProcess([*arguments, "--address", address], {"RAY_ADDRESS": address})
        self._stats = [_Question(f"{shape.name}-shard-{k}", "stats") for k in range(shape.shards)]
        self._pids: dict[str, _Question] = {}
        self._processes: dict[str, Process] = {}

    def start_driver(self, folder: RunFolder) -> None:
        """See `Cluster`."""
        sets = [
            part
            for attribute, key in self._outputs.items()
            for part in ("--set", f"{key}={getattr(folder, attribute)}")
        ]
        self._driver.start(folder, sets)

    def driver_exit(self) -> int | None:
        """See `Cluster`."""
        return self._driver.exit_code()

    def driver_errors(self) -> str:
        """See `Cluster`."""
        return self._driver.errors()

    def shards(self) -> list[ShardView | None]:
        """See `Cluster`."""
        for question in self._stats:
            question.ask(self._handle)
        return [_view(question) for question in self._stats]

    def find(self, victim: Victim) -> Process | None:
        """See `Cluster`."""
        if victim.role == "driver":
            return self._driver.process
        name = f"{self._shape.name}-{victim.role}-{victim.index}"
        question = self._pids.setdefault(name, _Question(name, "process_id"))
        known = self._processes.get(name)
        if known is not None and known.state != "gone":
            return known
        self._processes.pop(name, None)
        if question.ask(self._handle) and question.answer is not None:
            process = Process.of(question.answer)
            if process is not None and process != known:
                self._processes[name] = process
                return process
        return None

    def kill(self, processes: list[Process]) -> None:
        """See `Cluster`."""
        driver = self._driver.process
        for process in processes:
            process.send(signal.SIGKILL)

        def all_gone() -> bool:
            if driver in processes and self._driver.exit_code() is None:
                return False
            return all(process.state == "gone" for process in processes)

        if not wait_until(all_gone, _GONE_S):
            raise JobError(f"processes do not end by SIGKILL: {processes}")

    def suspend(self, process: Process) -> None:
        """See `Cluster`."""
        process.send(signal.SIGSTOP)
        wait_until(lambda: process.state != "running", _GONE_S)

    def resume(self, process: Process) -> None:
        """See `Cluster`."""
        process.send(signal.SIGCONT)

    def inject(self, shard: int, kind: str, amount: float) -> bool:
        """See `Cluster`."""
        handle = self._handle(f"{self._shape.name}-shard-{shard}")
        if handle is None:
            return False
        call = handle.inject.remote(kind, amount)
        try:
            self._ray.get(call, timeout=_QUESTION_S)
        except self._ray.exceptions.RayTaskError:
            raise  # the shard knows no such fault
        except self._ray.exceptions.RayError:
            return False
        return True

    def replace_node(self, index: int) -> None:
        """See `Cluster`."""
        node = self._nodes[index - 1]
        raylet = node.all_processes["raylet"][0].process.pid
        doomed = descendants(raylet)
        for process in doomed:  # at once, as a machine ends: Ray alone would take its time
            process.send(signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)
        wait_until(lambda: all(process.state == "gone" for process in doomed), _GONE_S)
        self._nodes[index - 1] = self._cluster.add_node(**self._node_arguments)

    def stop_job(self) -> list[str]:
        """See `Cluster`."""
        ended_well = self._driver.exit_code() == 0
        self._driver.end()
        names = self._names()
        if ended_well:  # Ray forgets the names of actors a moment after their end
            wait_until(lambda: not self._names(), _NAMES_FREE_S / 4)
            names = self._names()
        for name in names:
            with contextlib.suppress(ValueError):
                self._ray.kill(self._ray.get_actor(name, self._namespace))
        for process in self._processes.values():
            process.send(signal.SIGKILL)  # what stands still does not hear Ray
        if not wait_until(lambda: not self._names(), _NAMES_FREE_S):
            raise JobError(f"actors of the last run do not end: {', '.join(self._names())}")
        self._processes.clear()
        self._pids.clear()
        self._stats = [_Question(question.name, question.method) for question in self._stats]
        return names

    def close(self) -> None:
        """End the job and the nodes."""
        self._driver.end()
        self._ray.shutdown()
        for node in self._cluster.list_all_nodes()[::-1]:
            self._cluster.remove_node(node, allow_graceful=False)

    def _names(self) -> list[str]:
        found = self._ray.util.list_named_actors(all_namespaces=True)
        return sorted(
            entry["name"]
            for entry in found
            if entry["namespace"] == self._namespace
            and entry["name"].startswith(f"{self._shape.name}-")
        )

    def _handle(self, name: str) -> Any:
        try:
            return self._ray.get_actor(name, self._namespace)
        except ValueError:
            return None


@dataclass(slots=True)
class _Question:
    """A method without arguments of a named actor, asked again and again; never waited for."""

    name: str
    method: str
    answer: Any = None
    """The newest one; None since the actor last failed to answer."""
    actor: str = ""
    """Id of the actor that gave it."""
    _asked: Any = None
    _call: Any = None
    _asked_at_s: float = field(default=0.0)

    def ask(self, handle_of: Any) -> bool:
        """Take the answer, if it has come, and ask again; whether it has come."""
        import ray

        if self._call is None:
            self._asked = handle_of(self.name)
            if self._asked is None:
                self.answer = None
                return False
            self._call = getattr(self._asked, self.method).remote()
            self._asked_at_s = time.monotonic()
        if not ray.wait([self._call], timeout=0)[0]:
            if time.monotonic() - self._asked_at_s > _QUESTION_S:
                self._call = self.answer = None  # perhaps another actor has the name by now
            return False
        try:
            self.answer = ray.get(self._call)
            self.actor = self._asked._actor_id.hex()
        except Exception:
            self.answer = None
        self._call = self._asked = None
        return self.answer is not None


def _view(question: _Question) -> ShardView | None:
    stats = question.answer
    if stats is None or not stats.ready:
        return None
    return ShardView(question.actor, stats.version, stats.duplicates_dropped, stats.cut_version)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the body of a `with`; children inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _own_token() -> Iterator[None]:
    """Let only those who know a new token into Ray, unless its authentication is set already."""
    if "RAY_AUTH_MODE" in os.environ:
        yield
        return
    with _environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        yield


@contextmanager
def _ray_address_kept() -> Iterator[None]:
    """Keep the note that Ray leaves for `ray.init("auto")` of others on this machine."""
    from ray._private.utils import get_ray_address_file

    note = Path(get_ray_address_file(None))
    before = note.read_bytes() if note.exists() else None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if before is None:
                note.unlink(missing_ok=True)
            else:
                note.write_bytes(before)


def _disconnect() -> None:
    import ray

    ray.shutdown()
