"""A commit log: what is appended comes back, bit for bit; what is damaged never does."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ps import log_format, log_reader
from ps.commit_log import LogEntry, read_log
from ps.disk import Disk
from ps.errors import StorageError
from tests.support.commit_logs import (
    DEADLINE_S,
    IDENTITY,
    Log,
    all_entries,
    entry,
    read,
    same,
    written,
)


def ends(folder: Path) -> list[int]:
    """Last version in each segment."""
    segments = [log_reader.Segment(path) for path in log_reader.segment_paths(folder)]
    for segment in segments:
        segment.find(check=True)
    return [segment.end_version for segment in segments]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "lock")


# Round trips


def floats(*shape: int) -> st.SearchStrategy[np.ndarray]:
    whole = npst.arrays(np.uint32, shape, elements=st.integers(0, (1 << 32) - 1))
    return whole.map(lambda bits: bits.view(np.float32))


@st.composite
def contents(draw: st.DrawFn, version: int, widths: list[int], dense: tuple[int, int]) -> LogEntry:
    tables = []
    for width in widths:
        count = draw(st.integers(0, 4))
        rows = npst.arrays(np.int64, count, elements=st.integers(0, (1 << 63) - 1))
        tables.append((draw(rows), draw(floats(count, width))))
    fences = draw(st.lists(st.integers(0, (1 << 63) - 1), min_size=1, max_size=3))
    return LogEntry(
        version=version,
        fences=tuple(fences),
        tables=tuple(tables),
        dense=draw(floats(*dense)),
        state=draw(floats(draw(st.integers(0, 3)))),
    )


@settings(max_examples=40)
@given(st.data())
def test_any_entries_come_back(data: st.DataObject) -> None:
    first = data.draw(st.sampled_from([0, 7, 10**12]))
    widths = data.draw(st.lists(st.integers(1, 5), max_size=3))
    dense = data.draw(st.tuples(st.integers(1, 3), st.integers(0, 5)))
    count = data.draw(st.integers(1, 4))
    entries = [data.draw(contents(first + 1 + k, widths, dense)) for k in range(count)]
    begins = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        log = Log(Path(name))
        log.log.begin(first)
        for each, is_last in zip(entries, begins, strict=True):
            log.log.append(each)
            if is_last:
                log.log.begin(each.version)
        log.close()
        reader = read(Path(name))
        assert (reader.first_version, reader.end_version) == (first, first + count)
        assert log.durable[-1] == entries[-1].fences
        for after in range(count):
            assert same(list(reader.entries(first + after)), entries[after:])


def test_entries_are_views_that_may_be_written(tmp_path: Path) -> None:
    written(tmp_path, [[1, 2]])
    (seen,) = read(tmp_path).entries(1)
    seen.dense[:] = 0
    assert seen.dense.flags.writeable
    assert same(list(read(tmp_path).entries(0)), [entry(1), entry(2)]), "the file is as it was"


def test_a_range_is_replayed(tmp_path: Path) -> None:
    written(tmp_path, [[4, 5], [6], [7, 8, 9]])
    reader = read(tmp_path)
    assert (reader.first_version, reader.end_version) == (3, 9)
    for after in range(3, 10):
        for upto in range(after, 10):
            seen = list(reader.entries(after, upto))
            assert same(seen, [entry(v) for v in range(after + 1, upto + 1)])
    assert not list(reader.entries(20))
    for after, upto in [(2, 4), (0, None), (8, 10), (20, 21)]:
        with pytest.raises(StorageError, match=r"cannot replay versions .* it has 3 to 9"):
            reader.entries(after, upto)


def test_no_log_replays_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        reader = read(folder)
        assert (reader.first_version, reader.end_version) == (None, -1)
        assert not list(reader.entries(5))
        with pytest.raises(StorageError, match="it has none"):
            reader.entries(5, 6)
    log = Log(tmp_path)
    log.log.begin(5)
    log.close()
    reader = read(tmp_path)
    assert (reader.first_version, reader.end_version) == (5, 5)
    assert not list(reader.entries(5))


def test_another_shards_log_is_refused(tmp_path: Path) -> None:
    written(tmp_path, [[1]])
    with pytest.raises(StorageError, match=r"another job or shard: num_shards 3 instead of 2, x"):
        read_log(tmp_path, {**IDENTITY, "num_shards": 2, "x": 1})
    log = Log(tmp_path, identity={**IDENTITY, "shard": 2})
    log.log.begin(0)
    log.close()
    assert "shard 1 instead of 2" in str(log.errors[0])
    assert same(all_entries(read(tmp_path)), [entry(1)])


def test_a_log_of_a_newer_manta_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(log_format, "FORMAT", 2)
        written(tmp_path, [[1]])
    with pytest.raises(StorageError, match=r"format 2 .* is newer than this version of manta"):
        read(tmp_path)
    log = Log(tmp_path)
    log.log.begin(5)
    log.close()
    assert "newer" in str(log.errors[0])
    assert names(tmp_path) == [f"{0:012d}.log"]


# Segments


def test_segments_that_no_later_state_needs_go(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.log.begin(0)
    log.put(entry(1), entry(2))
    log.log.begin(2)
    log.put(entry(3))
    for needed in (0, 1):
        log.log.truncate(needed)
    log.log.begin(3)
    log.put(entry(4))
    assert len(names(tmp_path)) == 3
    log.log.truncate(2)
    log.put(entry(5))
    assert names(tmp_path) == [f"{v:012d}.log" for v in (2, 3)]
    log.log.truncate(100)
    log.close()
    assert names(tmp_path) == [f"{3:012d}.log"], "the one that is written stays"
    assert same(list(read(tmp_path).entries(3)), [entry(4), entry(5)])


@pytest.mark.parametrize("at", range(9))
def test_a_log_is_continued_from_any_version_it_has(tmp_path: Path, at: int) -> None:
    written(tmp_path, [[1, 2], [3], [4, 5, 6]])
    log = Log(tmp_path)
    log.log.begin(at)
    log.put(entry(at + 1, 1), entry(at + 2, 1))
    log.close()
    reader = read(tmp_path)
    first = 0 if at <= 6 else at
    assert (reader.first_version, reader.end_version) == (first, at + 2)
    old = [entry(v) for v in range(first + 1, at + 1)]
    assert same(all_entries(reader), [*old, entry(at + 1, 1), entry(at + 2, 1)])
    assert all(end <= at for end in ends(tmp_path)[:-1]), "nothing is left of what was given up"


def test_a_running_log_can_go_back(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.log.begin(0)
    log.put(entry(1), entry(2), entry(3))
    log.log.begin(2)
    log.put(entry(3, 1))
    log.log.begin(3)
    log.log.begin(3)
    log.put(entry(4, 1))
    log.log.begin(3)
    log.put(entry(4, 2))
    log.close()
    assert same(all_entries(read(tmp_path)), [entry(1), entry(2), entry(3, 1), entry(4, 2)])


def test_a_gap_is_an_error_only_in_the_way(tmp_path: Path) -> None:
    written(tmp_path, [[1, 2], [3], [4, 5]])
    (tmp_path / f"{2:012d}.log").unlink()
    reader = read(tmp_path)
    assert (reader.first_version, reader.end_version) == (3, 5)
    assert same(list(reader.entries(3)), [entry(4), entry(5)])
    assert same(list(reader.entries(0, 2)), [entry(1), entry(2)])
    for after, upto in [(0, None), (2, None), (1, 3), (2, 4)]:
        with pytest.raises(StorageError, match="3 to 3 are missing"):
            reader.entries(after, upto)
    log = Log(tmp_path)
    log.log.begin(3)
    log.put(entry(4, 1))
    log.close()
    assert same(all_entries(read(tmp_path)), [entry(4, 1)])


def test_damage_does_not_stop_a_new_start(tmp_path: Path) -> None:
    written(tmp_path, [[1, 2], [3]])
    path = tmp_path / f"{0:012d}.log"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(StorageError, match="byte 0: the header is damaged"):
        read(tmp_path)
    log = Log(tmp_path)
    log.log.begin(1)
    log.put(entry(2, 1))
    log.close()
    assert same(all_entries(read(tmp_path)), [entry(2, 1)])


# Groups


class SlowDisk(Disk):
    """Counts syncs; each waits to be let through."""

    def __init__(self) -> None:
        self.syncing = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)
        self.syncs = 0

    def sync(self, fd: int) -> None:
        self.syncing.release()
        assert self.allowed.acquire(timeout=DEADLINE_S)
        self.syncs += 1
        super().sync(fd)


def test_many_entries_are_synced_at_once(tmp_path: Path) -> None:
    disk = SlowDisk()
    log = Log(tmp_path, disk)
    log.log.begin(0)
    log.log.append(entry(1))
    for _ in range(2):  # the segment's header, the first entry
        assert disk.syncing.acquire(timeout=DEADLINE_S)
        disk.allowed.release()
    for version in range(2, 1002):
        log.log.append(entry(version))
    queued = log.log.queued_bytes
    for _ in range(3):
        disk.allowed.release()
    log.close()
    assert 3 <= disk.syncs <= 4, "1000 entries that came during a sync take one or two more"
    assert log.durable_version == 1001
    assert [f[0] for f in log.durable] == sorted(f[0] for f in log.durable)
    assert queued > 10_000
    assert log.log.queued_bytes == 0
    assert read(tmp_path).end_version == 1001


def test_appending_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    disk = SlowDisk()
    log = Log(tmp_path, disk)
    log.log.begin(0)
    assert disk.syncing.acquire(timeout=DEADLINE_S)
    for version in range(1, 11):
        log.log.append(entry(version))
    log.log.begin(10)
    log.log.truncate(10)
    assert not log.durable
    assert log.log.queued_bytes > 0
    log.log.close(timeout_s=0.01)
    assert log.log._thread.is_alive(), "the disk does not answer"
    for _ in range(10):
        disk.allowed.release()
    log.close()
    assert log.durable_version == 10


# Other processes


def test_the_log_of_a_living_process_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_reader, "LOCK_WAIT_S", 0.05)
    log = Log(tmp_path)
    log.log.begin(0)
    log.put(entry(1))
    with pytest.raises(StorageError, match="is being written by another process"):
        read(tmp_path)
    other = Log(tmp_path)
    other.log.begin(0)
    other.close()
    assert "another process" in str(other.errors[0])
    assert same(all_entries(read(tmp_path, read_only=True)), [entry(1)])
    log.put(entry(2))
    log.close()
    assert same(all_entries(read(tmp_path)), [entry(1), entry(2)])


KILLED = """
import pathlib, sys
from tests.support.commit_logs import IDENTITY, entry
from ps.commit_log import CommitLog
log = CommitLog(pathlib.Path(sys.argv[1]), IDENTITY, lambda f: print(f[0], flush=True), print)
log.begin(0)
version = 0
while True:
    if log.queued_bytes < 1 << 16:
        version += 1
        log.append(entry(version))
"""


def test_a_killed_process_loses_nothing_it_reported(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 300:
                break
        process.kill()
        rest = process.stdout.read().splitlines(keepends=True)
    reported = max([int(line), *(int(r) for r in rest if r.endswith("\n"))])
    seen = all_entries(read(tmp_path))
    assert len(seen) >= reported >= 300
    assert same(seen, [entry(v) for v in range(1, len(seen) + 1)])
