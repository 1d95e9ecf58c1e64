"""Shards and workers in processes of their own, and what the system says of them."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from ps.messages import ShardStats
from ps.wire.server import Endpoint, ShardLoop
from tests.support.wire import TIMEOUT_S, Job, contents_of, server_options


class ShardProcess:
    """A shard that can be killed, and asked about itself."""

    def __init__(self, process: Any, pipe: Any, endpoint: Endpoint) -> None:
        self.process = process
        self._pipe = pipe
        self.endpoint = endpoint

    def contents(self) -> list[bytes]:
        return cast("list[bytes]", self._ask("contents"))

    def stats(self) -> ShardStats:
        return cast("ShardStats", self._ask("stats"))

    def collect(self) -> None:
        """Let go of what only reference cycles hold."""
        self._ask("collect")

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        assert self._pipe.poll(TIMEOUT_S), f"the shard does not say its {what}"
        return self._pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(TIMEOUT_S)


@contextmanager
def shards_in_processes(job: Job, **options: Any) -> Iterator[list[ShardProcess]]:
    """One process per shard."""
    context = fast_context()
    with ExitStack() as stack:
        started = []
        for k in range(job.num_shards):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(job, k, options, theirs), name=f"shard-{k}", daemon=True
            )
            process.start()
            theirs.close()
            stack.callback(process.join, TIMEOUT_S)
            stack.callback(process.kill)
            started.append((process, ours))
        shards = []
        for process, pipe in started:
            assert pipe.poll(60.0), "the shard does not start"
            shards.append(ShardProcess(process, pipe, pipe.recv()))
        yield shards


def fast_context() -> Any:
    """Processes are forked from one that has imported what they need, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.wire_processes"])
    return context


def _serve(job: Job, k: int, options: dict[str, Any], pipe: Any) -> None:
    loop = ShardLoop(job.shard(k), server_options(job, **options))
    pipe.send(loop.endpoint)
    asked: dict[str, Callable[[], object]] = {
        "contents": lambda: contents_of(loop),
        "stats": lambda: loop.call(loop.state.stats).result(TIMEOUT_S),
        "collect": lambda: loop.call(gc.collect).result(TIMEOUT_S),
    }
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        pipe.send(asked[what]())


@contextmanager
def in_process(function: Callable[..., None], *args: Any) -> Iterator[Any]:
    """Run a function in a process of its own, which is killed at the end."""
    process = fast_context().Process(target=function, args=args, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(TIMEOUT_S)


def rss_bytes(pid: int | str = "self") -> int:
    """Memory of a process that is its own: what is shared with others does not count."""
    _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int | str = "self") -> list[str]:
    """What the descriptors of a process lead to."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(fd))
        except FileNotFoundError:  # the one that listed them
            continue
    return sorted(found)


def arena_mappings(pid: int | str = "self") -> int:
    """Segments of arenas that a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:manta-arena")
