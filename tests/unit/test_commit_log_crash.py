"""Whatever operation is the last, a commit log has all that it reported, and nothing else.

Entries have a version and a timeline: those of a restarted shard may differ from those that its
predecessor wrote and did not report. A log never has a mixture: up to some version the old ones,
behind it the new ones.
"""

from __future__ import annotations

import errno
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ps.disk import Disk
from ps.faults import FaultyDisk
from ps.log_format import encode_entry
from ps.log_reader import segment_paths
from tests.support.commit_logs import Log, all_entries, entry, read, same
from tests.support.crash_disk import Crash, CrashDisk

TRUNCATED = 3
LAST = 7


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def work(folder: Path, disk: Disk) -> Log:
    """Write versions 1 to 7 in three segments and several groups, then let the first go."""
    log = Log(folder, disk)
    log.log.begin(0)
    log.put(entry(1), entry(2))
    log.put(entry(3))
    log.log.begin(3)
    log.put(entry(4), entry(5), entry(6))
    log.log.begin(6)
    log.log.truncate(TRUNCATED)
    log.put(entry(7))
    log.close()
    return log


def check(folder: Path, durable: int, last: int = LAST) -> int:
    """See that a log has versions 1 to `durable` or some more; returns its last one."""
    reader = read(folder)
    if reader.first_version is None:
        assert durable == -1
        return 0
    assert reader.first_version == 0 or durable >= TRUNCATED == reader.first_version
    assert max(durable, 0) <= reader.end_version <= last
    first, end = reader.first_version, reader.end_version
    assert same(all_entries(reader), [entry(v) for v in range(first + 1, end + 1)])
    return end


def operations(scratch: Path) -> int:
    """How many `work` has."""
    (scratch / "count").mkdir()
    disk = CrashDisk(scratch / "count")
    assert not work(scratch / "count" / "log", disk).errors
    return disk.count


@pytest.mark.parametrize("torn", [0.0, 0.6])
@pytest.mark.parametrize("make", [FaultyDisk.at, FaultyDisk.since])
def test_after_any_failure_the_log_has_what_it_reported(
    scratch: Path, make: Callable[..., FaultyDisk], torn: float
) -> None:
    for number in itertools.count(1):
        folder = scratch / str(number)
        disk = make(number, errno.EIO, torn=torn)
        log = work(folder, disk)
        assert len(log.errors) == bool(disk.failed)
        if folder.is_dir():
            check(folder, log.durable_version)
        else:
            assert log.durable_version == -1
        if not disk.failed:
            break
        assert "Input/output error" in str(log.errors[0])
    assert log.durable_version == LAST
    assert number > 20


def test_after_any_crash_the_log_has_what_it_reported(scratch: Path) -> None:
    num_variants = 0
    for number in itertools.count(1):
        root = scratch / str(number)
        root.mkdir()
        disk = CrashDisk(root, crash_at=number)
        log = work(root / "log", disk)
        assert disk.crashed == bool(log.errors)
        for left in disk.variants(scratch / "left", count=16):
            check(left / "log", log.durable_version)
            num_variants += 1
        if not disk.crashed:
            break
    assert log.durable_version == LAST
    assert number > 20
    assert num_variants > 3 * number


def test_what_a_killed_process_did_not_sync_is_durable_once_read(scratch: Path) -> None:
    disk = CrashDisk(scratch)
    log = Log(scratch / "log", disk)
    log.log.begin(0)
    log.put(entry(1))
    log.close()
    (path,) = segment_paths(scratch / "log")
    fd = disk.append_to(path)
    disk.write_all(fd, encode_entry(entry(2), synced=1))
    disk.close(fd)
    assert read(scratch / "log", disk).end_version == 2
    for left in disk.variants(scratch / "left"):
        assert same(all_entries(read(left / "log")), [entry(1), entry(2)])


def go_on(folder: Path, disk: Disk, at: int) -> Log:
    """What a restarted shard does that has replayed up to `at`: another timeline behind it."""
    read(folder, disk)
    log = Log(folder, disk)
    log.log.begin(at)
    log.put(entry(at + 1, 1), entry(at + 2, 1))
    log.log.begin(at + 2)
    log.put(entry(at + 3, 1))
    log.close()
    return log


def check_second(folder: Path, durable: int, at: int, first_end: int) -> None:
    """See that a log has the old timeline, or its versions up to `at` and the new one behind."""
    reader = read(folder)
    if reader.first_version is None:
        assert durable == -1
        assert not 0 <= at <= first_end, "the old log was to be kept, and is gone"
        return
    first, end = reader.first_version, reader.end_version
    seen = all_entries(reader)
    assert first <= at, "there is a gap, or what leads up to it is gone"
    if durable == -1 and end <= first_end:
        assert end >= min(at, first_end) or at > first_end, "what was replayed is gone"
        if same(seen, [entry(v) for v in range(first + 1, end + 1)]):
            return
    assert end >= max(durable, at)
    assert at <= first_end or first == at
    old = [entry(v) for v in range(first + 1, at + 1)]
    assert same(seen, old + [entry(v, 1) for v in range(at + 1, end + 1)])


@pytest.mark.parametrize("behind", [0, 1, 2, 4, -2])
def test_after_a_second_crash_there_is_no_mixture(scratch: Path, behind: int) -> None:
    runs = 0
    for number in range(1 + behind % 5, operations(scratch) + 1, 5):
        root = scratch / str(number)
        root.mkdir()
        disk = CrashDisk(root, crash_at=number, seed=behind)
        work(root / "log", disk)
        for left in disk.variants(scratch / "left", count=4):
            (left / "log").mkdir(exist_ok=True)
            reader = read(left / "log", read_only=True)
            at = max(reader.first_version or 0, reader.end_version - behind)
            runs += crash_again(left, scratch, at, reader.end_version)
    assert runs > 500


def crash_again(left: Path, scratch: Path, at: int, first_end: int) -> int:
    """Go on with a log, crash at every operation, check; returns how many checks there were."""
    runs = 0
    for number in itertools.count(1):
        again = scratch / "again"
        shutil.copytree(left, again)
        disk = CrashDisk(again, crash_at=number, seed=at)
        durable = -1
        with suppress(Crash):
            durable = go_on(again / "log", disk, at).durable_version
        for last in disk.variants(scratch / "last", count=5):
            check_second(last / "log", durable, at, first_end)
            runs += 1
        shutil.rmtree(again)
        if not disk.crashed:
            assert durable == at + 3
            return runs
    raise AssertionError
