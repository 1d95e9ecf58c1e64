"""Disk: whole writes, however the system takes them; chosen faults; what a crash may leave."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ps.disk import DIRECT_ALIGNMENT, Disk
from ps.faults import FaultyDisk, Operation
from tests.support.crash_disk import Crash, CrashDisk


def write_file(disk: Disk, path: Path, *pieces: bytes | memoryview) -> None:
    fd = disk.create(path)
    for piece in pieces:
        disk.write(fd, piece)
    disk.sync(fd)
    disk.close(fd)


def test_what_is_written_is_there(tmp_path: Path) -> None:
    disk, path = Disk(), tmp_path / "a" / "b" / "file"
    disk.make_folder(path.parent)
    disk.make_folder(path.parent)
    write_file(disk, path, b"abc", b"", np.arange(3, dtype=np.uint8).data)
    fd = disk.append_to(path)
    disk.write_all(fd, [b"x", np.zeros((0, 3), dtype=np.float32).data, b"yz"])
    disk.close(fd)
    assert path.read_bytes() == b"abc\x00\x01\x02xyz"
    disk.truncate(path, 4)
    disk.rename(path, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == b"abc\x00"
    write_file(disk, tmp_path / "other", b"new")
    assert (tmp_path / "other").read_bytes() == b"new"
    disk.sync_folder(tmp_path)
    for _ in range(2):
        disk.remove(tmp_path / "other")
        disk.remove_folder(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(FileExistsError):
        Disk().make_folder(tmp_path / "a")


@pytest.mark.parametrize("pieces", [1, 3, 2000])
def test_short_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    data = np.random.default_rng(0).bytes(5000)
    cuts = np.linspace(0, len(data), pieces + 1).astype(int)
    real, sizes = os.writev, itertools.cycle([1, 700, 64, 0, 3])

    def short(fd: int, buffers: Sequence[memoryview]) -> int:
        return real(fd, [b"".join(buffers)[: next(sizes)]])

    monkeypatch.setattr("os.writev", short)
    fd = Disk().create(tmp_path / "file")
    Disk().write_all(fd, [data[a:b] for a, b in itertools.pairwise(cuts)])
    Disk().close(fd)
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("folder", [None, "/dev/shm"])
@pytest.mark.parametrize("tail", [0, 1, 512, 5000])
def test_direct_writes_of_any_size(tmp_path: Path, folder: str | None, tail: int) -> None:
    pages = mmap.mmap(-1, 2 * DIRECT_ALIGNMENT)
    pages.write(np.random.default_rng(0).bytes(len(pages)))
    rest = bytes(range(256)) * 20
    path = (tmp_path if folder is None else Path(folder)) / f"manta-direct-{os.getpid()}"
    try:
        fd = Disk().create(path, direct=True)
        for piece in (pages, memoryview(rest)[:tail], pages):
            Disk().write(fd, piece)
        Disk().sync(fd)
        Disk().close(fd)
        assert path.read_bytes() == pages[:] + rest[:tail] + pages[:]
    finally:
        path.unlink()


def test_errors_are_the_systems_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Disk().create(tmp_path / "no" / "file")
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left"):
        Disk().write(fd, b"x")
    Disk().close(fd)


def all_operations(disk: Disk, folder: Path) -> None:
    disk.make_folder(folder / "sub")
    fd = disk.create(folder / "sub" / "a")
    try:
        disk.write(fd, b"0123456789")
        disk.sync(fd)
    finally:
        disk.close(fd)
    disk.close(disk.append_to(folder / "b"))
    disk.rename(folder / "sub" / "a", folder / "c")
    disk.truncate(folder / "c", 5)
    disk.sync_folder(folder)
    disk.remove(folder / "b")
    disk.remove_folder(folder / "sub")


def test_each_operation_can_fail_and_only_it(tmp_path: Path) -> None:
    disk = FaultyDisk()
    all_operations(disk, tmp_path / "all")
    assert disk.counts["write"] == 1
    assert disk.counts["close"] == 2
    open_files = len(os.listdir("/proc/self/fd"))
    for number in range(1, disk.count + 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        failing = FaultyDisk.at(number, errno.EIO)
        with pytest.raises(OSError, match="Input/output error") as info:
            all_operations(failing, folder)
        assert info.value.errno == errno.EIO
        assert failing.failed == 1
        assert failing.count >= number
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_all_operations_from_one_on_can_fail(tmp_path: Path) -> None:
    disk = FaultyDisk.since(2, errno.EROFS)
    disk.remove(tmp_path / "a")
    for _ in range(3):
        with pytest.raises(OSError, match="Read-only"):
            disk.remove(tmp_path / "a")
    assert disk.failed == 3


def test_a_failing_write_may_leave_a_part(tmp_path: Path) -> None:
    def writes_c(operation: Operation) -> bool:
        return operation.name == "write" and operation.path.name == "c"

    disk = FaultyDisk(writes_c, torn=0.5)
    write_file(disk, tmp_path / "b", b"0123456789")
    with pytest.raises(OSError, match="No space left"):
        write_file(disk, tmp_path / "c", b"0123456789")
    assert (tmp_path / "b").read_bytes() == b"0123456789"
    assert (tmp_path / "c").read_bytes() == b"01234"


def test_the_next_operation_of_a_kind_fails_once(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.fail_next("sync")
    disk.fail_next("write", errno.EDQUOT)
    with pytest.raises(OSError, match="quota"):
        write_file(disk, tmp_path / "a", b"x")
    with pytest.raises(OSError, match="No space"):
        write_file(disk, tmp_path / "a", b"x")
    write_file(disk, tmp_path / "a", b"x")
    assert disk.failed == 2


def left_by(disk: CrashDisk, scratch: Path) -> list[dict[str, bytes | None]]:
    return [
        {
            str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes()
            for p in folder.rglob("*")
        }
        for folder in disk.variants(scratch, count=40)
    ]


def test_a_crash_may_lose_what_is_not_synced(tmp_path: Path) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    (folder / "old").write_bytes(b"old")
    disk = CrashDisk(folder)
    fd = disk.create(folder / "new")
    disk.write(fd, b"0123456789")
    left = left_by(disk, tmp_path / "left")
    assert left[0] == {"old": b"old", "new": b"0123456789"}
    assert left[1] == {"old": b"old"}
    contents = {state.get("new") for state in left}
    assert {None, b"", bytes(10), b"0123456789"} < contents
    assert any(c and b"0123456789".startswith(c) for c in contents if c != b"0123456789")
    assert any(c and not b"0123456789".startswith(c) for c in contents if c != bytes(10))
    assert all(c is None or len(c) <= 10 for c in contents)
    disk.sync(fd)
    assert left_by(disk, tmp_path / "left")[1] == {"old": b"old"}, "the name is not durable"
    disk.sync_folder(folder)
    assert left_by(disk, tmp_path / "left") == [{"old": b"old", "new": b"0123456789"}]
    assert left_by(disk, tmp_path / "left") == left_by(disk, tmp_path / "left")
    disk.close(fd)


def test_a_crash_may_undo_renames_and_removes(tmp_path: Path) -> None:
    folder = tmp_path / "real"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_bytes(b"a")
    (folder / "sub" / "b").write_bytes(b"b")
    disk = CrashDisk(folder)
    disk.rename(folder / "a", folder / "c")
    disk.remove_folder(folder / "sub")
    assert [p.name for p in folder.iterdir()] == ["c"]
    left = left_by(disk, tmp_path / "left")
    assert left[0] == {"c": b"a"}
    assert left[1] == {"a": b"a", "sub": None, "sub/b": b"b"}
    assert {"c": b"a", "sub": None} in left, "the folder's removal may stop half way"
    disk.sync_folder(folder)
    assert left_by(disk, tmp_path / "left") == [{"c": b"a"}]


def test_a_file_that_is_emptied_may_be_old_or_new(tmp_path: Path) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    (folder / "a").write_bytes(b"old")
    disk = CrashDisk(folder)
    fd = disk.create(folder / "a")
    disk.write(fd, b"newer")
    contents = {state["a"] for state in left_by(disk, tmp_path / "left")}
    assert {b"old", b"newer"} < contents
    disk.sync(fd)
    disk.close(fd)
    disk.truncate(folder / "a", 3)
    assert left_by(disk, tmp_path / "left") == [{"a": b"new"}]


def test_every_operation_can_be_the_last(tmp_path: Path) -> None:
    numbers = itertools.count(1)
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        disk = CrashDisk(folder, crash_at=number)
        try:
            all_operations(disk, folder)
        except Crash:
            with pytest.raises(Crash):
                disk.remove(folder / "c")
        assert left_by(disk, tmp_path / "left")
        if not disk.crashed:
            break
    whole = {
        str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes()
        for p in folder.rglob("*")
    }
    assert left_by(disk, tmp_path / "left")[0] == whole == {"c": b"01234"}
    assert number == disk.count + 1 > 10
