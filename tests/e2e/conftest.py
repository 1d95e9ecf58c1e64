"""Running the `manta` command as a user does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from manta import main

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


@pytest.fixture
def manta_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Manta:
    """`manta`, in this process: for what ends before anything is started, and is asked often."""

    def run(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = ["manta", *map(str, args)]
        if cwd is not None:
            monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", command)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(command, int(ended.value.code or 0), out, err)

    return run
