"""An S3-compatible server (moto's) in a process of its own."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pyarrow import fs

KEY, SECRET = "a-key", "a+secret/with@signs"
START_TIMEOUT_S = 60.0


def is_installed() -> bool:
    """Whether there is a server to start."""
    return importlib.util.find_spec("moto") is not None


class S3Server:
    """A running server with the bucket `bucket`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, port: int) -> None:
        self._process = process
        self._log = log
        self.endpoint = f"127.0.0.1:{port}"

    @classmethod
    def start(cls, folder: Path) -> Self:
        """Start one that logs to a file in `folder`; it answers when this returns."""
        log = folder / f"s3-{time.monotonic_ns()}.log"
        with log.open("wb") as out:
            # Werkzeug finds a free port and prints it when it listens.
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
            process = subprocess.Popen(command, stdout=out, stderr=out)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
            assert process.poll() is None, f"the server ended: {log.read_text()}"
            assert time.monotonic() < deadline, f"the server does not start: {log.read_text()}"
            time.sleep(0.02)
        server = cls(process, log, int(found[1]))
        server.arrow().create_dir("bucket")
        return server

    def arrow(self) -> fs.S3FileSystem:
        """Arrow's own view of the server."""
        return fs.S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            region="us-east-1",
            scheme="http",
            endpoint_override=self.endpoint,
            allow_bucket_creation=True,
        )

    def uri(self, folder: str, bucket: str = "bucket", *, timeout_s: float = 1.0) -> str:
        """The location of a folder, with credentials and short time limits."""
        return (
            f"s3://{KEY}:a%2Bsecret%2Fwith%40signs@{bucket}/{folder}?scheme=http"
            f"&endpoint_override={self.endpoint}&connect_timeout={timeout_s}"
            f"&request_timeout={timeout_s}&max_attempts=1"
        )

    def requests(self) -> list[str]:
        """All requests so far: method and path."""
        return re.findall(r'"([A-Z]+ [^ ]+) HTTP', self._log.read_text())

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Connections are accepted and get no answers."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once; fine if it has ended."""
        self._process.kill()
        self._process.wait()
