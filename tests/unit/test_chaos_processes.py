"""Processes that `manta chaos` finds, stops and ends; real ones, that only sleep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.chaos.cluster import RunFolder
from workers.chaos.driver import DriverProcess
from workers.chaos.processes import (
    Process,
    descendants,
    end_marked,
    marked,
    uninterrupted,
    wait_until,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
MARK = "MANTA_TEST_MARK"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"]) as child:
        yield child
        child.kill()


def test_a_process_stops_goes_on_and_ends(sleeper: subprocess.Popen[bytes]) -> None:
    process = Process.of(sleeper.pid)
    assert process is not None
    assert process.state == "running"
    assert process.send(signal.SIGSTOP)
    assert wait_until(lambda: process.state == "stopped", 5.0)
    assert process.send(signal.SIGCONT)
    assert wait_until(lambda: process.state == "running", 5.0)
    assert process.send(signal.SIGKILL)
    assert wait_until(lambda: process.state == "gone", 5.0)  # as a zombie: nobody has waited for it
    assert Process.of(sleeper.pid) is None
    assert not process.send(signal.SIGKILL)


def test_a_later_process_of_the_same_id_is_not_hit(sleeper: subprocess.Popen[bytes]) -> None:
    process = Process.of(sleeper.pid)
    assert process is not None
    earlier = Process(process.pid, process.started - 1)
    assert earlier.state == "gone"
    assert not earlier.send(signal.SIGKILL)
    assert process.state == "running"


def test_children_are_descendants(sleeper: subprocess.Popen[bytes]) -> None:
    assert Process.of(sleeper.pid) in descendants(os.getpid())
    assert descendants(sleeper.pid) == []


def test_all_that_carry_a_mark_are_ended_even_if_they_stand_still() -> None:
    value = uuid.uuid4().hex
    script = "sleep 100 & kill -STOP $!; sleep 100"  # a stopped grandchild too
    with subprocess.Popen(["sh", "-c", script], env={**os.environ, MARK: value}) as shell:
        assert wait_until(
            lambda: (
                [p.state for p in marked(MARK, value)].count("stopped") == 1
                and len(marked(MARK, value)) == 3
            ),
            5.0,
        )
        assert end_marked(MARK, value) == 3
        assert marked(MARK, value) == []
        assert shell.wait(5.0) == -signal.SIGKILL


def test_cleaning_up_is_not_interrupted() -> None:
    # Processes that a shell starts in the background ignore Ctrl-C from the start.
    at_first = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with uninterrupted():
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
        assert signal.getsignal(signal.SIGTERM) == before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, at_first)


def test_a_wait_ends_without_success() -> None:
    now = iter(range(100))
    assert not wait_until(lambda: False, 3.0, lambda: float(next(now)))


def test_a_driver_is_started_killed_and_started_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    driver = DriverProcess([], {MARK: "driver"})
    assert driver.exit_code() is driver.process is None
    assert driver.errors() == ""
    script = (
        "import os, sys, time; print(os.environ['MANTA_TEST_MARK'], flush=True); "
        "print(sys.argv[1], file=sys.stderr, flush=True); "
        "sys.exit(3) if sys.argv[1] == 'bad' else time.sleep(100)"
    )
    driver._command = [sys.executable, "-c", script]
    driver.start(folder, ["good"])
    assert wait_until(lambda: driver.errors() == "good", 10.0)
    process = driver.process
    assert process is not None
    driver.end()
    assert driver.exit_code() == -signal.SIGKILL
    assert process.state == "gone"
    driver.start(folder, ["bad"])
    assert wait_until(lambda: driver.exit_code() == 3, 10.0)
    assert driver.errors() == "bad"  # not what the first one said
    assert folder.errors.read_text() == "good\nbad\n"
    assert folder.output.read_text() == "driver\ndriver\n"
