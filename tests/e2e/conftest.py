"""Running the `manta` command as a user does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Manta = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def manta() -> Manta:
    """`manta(*args, cwd=…)`: run the command, return what it printed; never raises."""

    def run(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "manta", *map(str, args)],
            cwd=cwd,
            env=None,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def configs() -> Path:
    return ROOT / "configs"
