"""Processes of this machine by their ids: what state they are in, and signals to them.

Read from /proc, which only Linux has. A process id is used again some time after its process, so a
`Process` carries the start time too, and no signal goes to another process than the one meant.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["running", "stopped", "gone"]
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Process:
    """One process, while it lives and after."""

    pid: int
    started: int
    """In clock ticks since the machine started."""

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this id now; None if there is none, or it is dead already."""
        stat = _stat(pid)
        return None if stat is None or stat.state in "ZX" else cls(pid, stat.started)

    @property
    def state(self) -> State:
        """Gone are all its threads; a zombie only waits for its parent to look."""
        stat = _stat(self.pid)
        if stat is None or stat.started != self.started:
            return "gone"
        if stat.state in "ZX":  # the first thread; others may still hold sockets and memory
            return "running" if stat.threads > 1 else "gone"
        return "stopped" if stat.state in "Tt" else "running"

    def send(self, number: signal.Signals) -> bool:
        """Send a signal; False if the process is gone."""
        if self.state == "gone":
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


def wait_until(
    done: Callable[[], bool], timeout_s: float, clock: Callable[[], float] = time.monotonic
) -> bool:
    """Look again and again until `done()`; False if it is not within the time."""
    deadline = clock() + timeout_s
    while not done():
        if clock() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def descendants(pid: int) -> list[Process]:
    """The living children of a process, theirs, and so on."""
    children: dict[int, list[int]] = {}
    for found in _pids():
        stat = _stat(found)
        if stat is not None:
            children.setdefault(stat.parent, []).append(found)
    family, rest = [], list(children.get(pid, ()))
    while rest:
        family.append(rest.pop())
        rest += children.get(family[-1], ())
    return [process for child in family if (process := Process.of(child)) is not None]


def marked(variable: str, value: str) -> list[Process]:
    """The living processes that were started with this environment variable, but this one."""
    mark = f"{variable}={value}".encode()
    found = []
    for pid in _pids():
        if pid == os.getpid():
            continue
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it ended, or is another user's
            continue
        if mark in environment and (process := Process.of(pid)) is not None:
            found.append(process)
    return found


def end_marked(variable: str, value: str, timeout_s: float = 15.0) -> int:
    """SIGKILL all processes that `marked` finds until there are none; returns how many."""
    ended: set[Process] = set()

    def none_left() -> bool:
        left = marked(variable, value)
        for process in left:
            process.send(signal.SIGKILL)
        ended.update(left)
        return not left

    wait_until(none_left, timeout_s)
    return len(ended)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM in the body of a `with`, which cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    parent: int
    threads: int
    started: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold anything
    return _Stat(fields[0], int(fields[1]), int(fields[17]), int(fields[19]))


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
