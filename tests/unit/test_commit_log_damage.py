"""A commit log that is torn, damaged, or on a disk that fails: what comes back was appended."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ps import log_format, log_reader
from ps.commit_log import CommitLog
from ps.errors import StorageError
from ps.faults import FaultyDisk
from tests.support.commit_logs import (
    DEADLINE_S,
    IDENTITY,
    Log,
    all_entries,
    entry,
    read,
    same,
)


@pytest.fixture
def two_groups() -> Iterator[Path]:
    """Entries 1 | 2 and 3 | 4 and 5, where | is a sync; the last segment begins after 1."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        write_groups(Path(name))
        yield Path(name)


def write_groups(folder: Path) -> None:
    log = Log(folder)
    log.log.begin(0)
    log.put(entry(1))
    log.log.begin(1)
    log.put(entry(2), entry(3))
    log.put(entry(4), entry(5))
    log.close()


def sizes(path: Path) -> list[int]:
    """Offsets at which the entries of a segment start, and its size."""
    segment = log_reader.Segment(path)
    segment.find(check=True)
    return [segment.end_of(v) for v in range(segment.base, segment.end_version + 1)]


TAILS: list[Callable[[bytes], bytes]] = [
    lambda lost: b"",
    lambda lost: bytes(len(lost)),
    lambda lost: np.random.default_rng(len(lost)).bytes(len(lost) + 9),
    lambda lost: lost[:-1] + bytes([lost[-1] ^ 1]) if lost else b"",
]


@pytest.mark.parametrize("tail", range(len(TAILS)))
def test_a_torn_tail_is_cut_at_every_byte(two_groups: Path, tail: int) -> None:
    path = two_groups / f"{1:012d}.log"
    *_, start, end = sizes(path)
    data = path.read_bytes()
    assert len(data) == end
    for cut in range(start, end):
        torn = data[:cut] + TAILS[tail](data[cut:])
        path.write_bytes(torn)
        assert read(two_groups, read_only=True).end_version == 4
        assert path.read_bytes() == torn
        assert same(all_entries(read(two_groups)), [entry(v) for v in range(1, 5)])
        assert path.read_bytes() == data[:start]


def test_a_hole_in_what_was_not_durable_is_cut(two_groups: Path) -> None:
    path = two_groups / f"{1:012d}.log"
    *_, start, last, _ = sizes(path)
    data = path.read_bytes()
    for end in (start + 4, last):
        path.write_bytes(data[:start] + bytes(end - start) + data[end:])
        assert same(all_entries(read(two_groups)), [entry(v) for v in range(1, 4)])


def test_a_flipped_byte_is_never_read(two_groups: Path) -> None:
    wanted = [entry(v) for v in range(1, 6)]
    outcomes = set()
    for path in sorted(two_groups.glob("*.log")):
        data = path.read_bytes()
        last_group = sizes(path)[-3] if path.name == f"{1:012d}.log" else len(data)
        for at in range(len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
            try:
                seen = list(read(two_groups, read_only=True).entries(0))
            except StorageError as e:
                error = str(e)
            else:
                assert at >= last_group
                assert 3 <= len(seen) < 5
                assert same(seen, wanted[: len(seen)])
                outcomes.add("cut")
                continue
            assert str(path) in error
            assert at < last_group, "nothing behind the last group says that it was durable"
            outcomes.add("error")
        path.write_bytes(data)
    assert outcomes == {"error", "cut"}


def test_damage_names_file_and_byte(two_groups: Path) -> None:
    path = two_groups / f"{1:012d}.log"
    data = bytearray(path.read_bytes())
    start = sizes(path)[1]
    data[start + 90] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=rf"{path.name}', byte {start}: the entry of version 3"):
        read(two_groups)
    assert path.read_bytes() == data, "nothing is cut"


def test_a_full_disk_is_told_once(tmp_path: Path) -> None:
    disk = FaultyDisk()
    log = Log(tmp_path, disk)
    log.log.begin(0)
    log.put(entry(1))
    disk.fail_next("write")
    log.put(entry(2))
    log.put(entry(3))
    log.log.begin(3)
    log.log.append(entry(4))
    assert log.log.queued_bytes == 0
    log.close()
    log.log.close()
    (error,) = log.errors
    assert str(error) == f"cannot write '{tmp_path}/{0:012d}.log': No space left on device"
    assert isinstance(error.__cause__, OSError)
    assert log.durable == [(1, 0)]
    assert same(all_entries(read(tmp_path)), [entry(1)])


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    log = Log(tmp_path / "file" / "log")
    log.log.begin(0)
    log.log.append(entry(1))
    log.close()
    assert "cannot write" in str(log.errors[0])
    assert not log.durable


def test_an_error_may_be_answered_by_closing(tmp_path: Path) -> None:
    closed = threading.Event()
    log: CommitLog

    def close(_: StorageError) -> None:
        log.close()
        closed.set()

    log = CommitLog(tmp_path, IDENTITY, lambda _: None, close, FaultyDisk.since(1))
    log.begin(0)
    assert closed.wait(DEADLINE_S)


def test_a_callback_that_fails_is_told(tmp_path: Path) -> None:
    errors: list[StorageError] = []
    log = CommitLog(tmp_path, IDENTITY, lambda fences: fences[2], errors.append)
    log.begin(0)
    log.append(entry(1))
    log.close()
    assert "IndexError" in str(errors[0])


def test_an_entry_that_is_too_big_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_format, "MAX_ENTRY_BYTES", 100)
    log = Log(tmp_path)
    log.log.begin(0)
    log.log.append(entry(1, most_rows=50))
    log.close()
    assert "version 1 changed" in str(log.errors[0])
