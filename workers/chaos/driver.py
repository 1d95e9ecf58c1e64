"""The driver of the job as a process of its own: `manta train`, started and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from workers.chaos.cluster import RunFolder
from workers.chaos.processes import Process

_TAIL_BYTES = 4000
_TAIL_LINES = 25


class DriverProcess:
    """At most one driver at a time."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Name the command.

        Args:
            arguments: of `manta`.
            environment: more variables than this process has.
        """
        self._command = [sys.executable, "-m", "manta", *arguments]
        self._environment = {**os.environ, **environment}
        self._running: subprocess.Popen[bytes] | None = None
        self._folder: RunFolder | None = None
        self._errors_from = 0

    def start(self, folder: RunFolder, arguments: Sequence[str]) -> None:
        """Start it, with more arguments; its output is appended to the run's files."""
        assert self.exit_code() is not None or self._running is None, "one driver at a time"
        self._folder = folder
        with folder.output.open("ab") as output, folder.errors.open("ab") as errors:
            self._errors_from = errors.tell()
            self._running = subprocess.Popen(
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is ours
            )

    def exit_code(self) -> int | None:
        """None while it runs, and before the first start."""
        return None if self._running is None else self._running.poll()

    @property
    def process(self) -> Process | None:
        """The living driver."""
        if self._running is None or self._running.poll() is not None:
            return None
        return Process.of(self._running.pid)

    def errors(self) -> str:
        """The end of what it printed to stderr since its start."""
        if self._folder is None:
            return ""
        try:
            with self._folder.errors.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._errors_from, size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-_TAIL_LINES:])

    def end(self) -> None:
        """SIGKILL, if it runs."""
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._running.pid, signal.SIGKILL)
            self._running.wait()
