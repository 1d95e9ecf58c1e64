"""Shards that end and come back from a log, and workers that train meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ps.messages import LogEntry
from ps.shard import ShardState
from ps.wire.server import Endpoint, ShardLoop
from tests.support.wire import (
    TIMEOUT_S,
    Job,
    Training,
    connected,
    contents_of,
    server_options,
)
from tests.support.wire_processes import ShardProcess, fast_context


def transport_options(kind: str) -> dict[str, Any]:
    """`arena`, `tcp`, or `background` for TCP in a thread."""
    return {"name": "arena" if kind == "arena" else "tcp", "background": kind == "background"}


def from_log(job: Job, k: int, log: Sequence[LogEntry]) -> ShardState:
    """A shard that has done what its log says."""
    state = job.shard(k)
    for entry in log:
        state.apply_entry(entry)
    return state


class LoggedShard:
    """A shard of this process. What `sync` has not seen is lost when it crashes."""

    def __init__(self, job: Job, k: int, **options: Any) -> None:
        self._job, self._k, self._options = job, k, options
        self._made: list[LogEntry] = []
        self._log: list[LogEntry] = []
        self.restart()

    @property
    def endpoint(self) -> Endpoint:
        return self.loop.endpoint

    def sync(self) -> None:
        """Make durable what has been done."""

        def mark() -> None:
            self._log = list(self._made)
            self.loop.state.mark_durable(self.loop.state.fences())

        self.loop.call(mark).result(TIMEOUT_S)

    def crash(self) -> None:
        self.loop.close()

    def restart(self) -> None:
        """In a new place, from the log."""
        self._made = list(self._log)
        state = from_log(self._job, self._k, self._log)
        state.on_version = self._made.append
        self.loop = ShardLoop(state, server_options(self._job, **self._options))


@contextmanager
def logged_shards(job: Job, **options: Any) -> Iterator[list[LoggedShard]]:
    with ExitStack() as stack:
        shards = []
        for k in range(job.num_shards):
            shards.append(LoggedShard(job, k, **options))
            stack.callback(shards[-1].crash)
        yield shards


class LoggedProcess(ShardProcess):
    """The same in a process of its own, which SIGKILL ends; this process is its disk."""

    def __init__(self, job: Job, k: int) -> None:
        self._job, self._k = job, k
        self._log: list[LogEntry] = []
        self._start()

    def _start(self) -> None:
        context = fast_context()
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(self._job, self._k, self._log, theirs), daemon=True
        )
        process.start()
        theirs.close()
        assert ours.poll(TIMEOUT_S), "the shard does not start"
        super().__init__(process, ours, ours.recv())

    def sync(self) -> None:
        self._log += self._ask("sync")

    @property
    def log_length(self) -> int:
        """Versions that are durable."""
        return len(self._log)

    def restart(self) -> None:
        self._start()

    def stop(self) -> None:
        """Let it stand still."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


@contextmanager
def logged_processes(job: Job) -> Iterator[list[LoggedProcess]]:
    with ExitStack() as stack:
        shards = []
        for k in range(job.num_shards):
            shards.append(LoggedProcess(job, k))
            stack.callback(shards[-1].kill)
        yield shards


def _serve(job: Job, k: int, log: Sequence[LogEntry], pipe: Any) -> None:
    state, made = from_log(job, k, log), []
    state.on_version = made.append
    loop = ShardLoop(state, server_options(job))

    def sync() -> list[LogEntry]:
        new = made.copy()
        made.clear()
        state.mark_durable(state.fences())
        return new

    asked = {
        "contents": lambda: contents_of(loop),
        "stats": lambda: loop.call(state.stats).result(TIMEOUT_S),
        "sync": lambda: loop.call(sync).result(TIMEOUT_S),
    }
    pipe.send(loop.endpoint)
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        pipe.send(asked[what]())


@contextmanager
def in_thread(function: Callable[[], None]) -> Iterator[threading.Event]:
    """Call a function beside the `with`; what it raises is raised at its end."""
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            function()
        except BaseException as e:
            errors.append(e)
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        thread.join(TIMEOUT_S)
    if errors:
        raise errors[0]
    assert not thread.is_alive(), "it hangs"


class Workers:
    """All workers of a job, with their transports."""

    def __init__(
        self,
        stack: ExitStack,
        job: Job,
        endpoints: Sequence[Endpoint],
        kind: str,
        lookahead: int = 0,
        worker: int | None = None,
        **options: Any,
    ) -> None:
        """Connect them, or one of them."""
        self.transports = []
        self.trainings = []
        for w in range(job.num_workers) if worker is None else [worker]:
            client, transport = stack.enter_context(
                connected(job, endpoints, worker=w, **(transport_options(kind) | options))
            )
            self.transports.append(transport)
            self.trainings.append(Training(job, client, w, lookahead))

    def move(self, endpoints: Sequence[Endpoint]) -> None:
        for transport in self.transports:
            transport.move(endpoints)

    @property
    def steps(self) -> list[int]:
        return [training.step for training in self.trainings]

    @contextmanager
    def training(self, steps: int) -> Iterator[threading.Event]:
        """All train in threads until the end of the `with`; the event says that they are done."""
        errors: list[BaseException] = []
        finished: list[Training] = []
        done = threading.Event()

        def run(training: Training) -> None:
            try:
                training.run(steps)
            except BaseException as e:
                errors.append(e)
                done.set()
            finished.append(training)
            if len(finished) == len(self.trainings):
                done.set()

        threads = [threading.Thread(target=run, args=(t,)) for t in self.trainings]
        for thread in threads:
            thread.start()
        try:
            yield done
        finally:
            end = time.monotonic() + TIMEOUT_S
            for thread in threads:
                thread.join(max(0, end - time.monotonic()))
        if errors:
            raise errors[0]
        assert not any(thread.is_alive() for thread in threads), "a worker hangs"
