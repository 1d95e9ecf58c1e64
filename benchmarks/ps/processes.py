"""Processes that never outlive the one that started them, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_SPAWN = multiprocessing.get_context("spawn")
_PR_SET_PDEATHSIG = 1
_END_S = 10.0
VERBOSE = "BENCHMARK_VERBOSE"
"""Environment variable: what the libraries write to standard error is shown."""


class ChildError(Exception):
    """What a process died of."""


class Child:
    """A process that runs `target(pipe, *args)`; both sides talk through the pipe."""

    def __init__(self, target: Callable[..., None], *args: object, leaf: bool = True) -> None:
        """Start it; a `leaf` starts none of its own."""
        self._pipe, theirs = _SPAWN.Pipe()
        arguments = (os.getpid(), theirs, target, args)
        self._process = _SPAWN.Process(target=_run, args=arguments, daemon=leaf)
        self._process.start()
        theirs.close()

    def send(self, message: object) -> None:
        self._pipe.send(message)

    def receive(self, timeout_s: float = 120.0) -> Any:
        """The next message.

        Raises:
            ChildError: the process has died, or says nothing.
        """
        if not self._pipe.poll(timeout_s):
            raise ChildError(f"process {self._process.pid}: no answer within {timeout_s:g} s")
        try:
            message = self._pipe.recv()
        except EOFError:
            raise ChildError(f"process {self._process.pid} died") from None
        if isinstance(message, ChildError):
            raise message
        return message

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.join()

    def stop(self) -> None:
        """Let it clean up, which it does when the pipe is closed; then end it."""
        self._pipe.close()
        self._process.join(_END_S)
        self.kill()


def _run(
    parent: int, pipe: Connection, target: Callable[..., None], args: tuple[object, ...]
) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops us
    if VERBOSE not in os.environ:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if os.getppid() != parent:
        return
    try:
        target(pipe, *args)
    except Exception:
        with contextlib.suppress(OSError):
            pipe.send(ChildError(traceback.format_exc()))


def memory_gib() -> float:
    """Memory of this process and all below it; what several share counts once."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    waiting, total = [os.getpid()], 0
    while waiting:
        pid = waiting.pop()
        waiting += parents.get(pid, [])
        with contextlib.suppress(OSError):
            found = re.search(r"Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())
            total += int(found[1]) if found else 0
    return total / 2**20


def wait_for_end(pipe: Connection) -> None:
    """Return when the other side is gone."""
    with contextlib.suppress(EOFError):
        pipe.recv()


def keep_to_cpu(shard: int) -> None:
    """Keep this process to one CPU of its own among a contender's servers, as `pin_shards` does."""
    cpus = sorted(os.sched_getaffinity(0), reverse=True)
    os.sched_setaffinity(0, {cpus[shard % len(cpus)]})
