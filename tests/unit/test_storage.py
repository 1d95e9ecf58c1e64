"""Storage in a folder: whole and durable, or not there; errors that say where and why."""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ps.errors import ConfigError, StorageError
from ps.faults import FaultyDisk
from ps.storage import Storage
from ps.store_location import StoreLocation
from tests.support.crash_disk import Crash, CrashDisk

MIB = 1 << 20
DATA = np.random.default_rng(0).bytes(9 * MIB + 5)


@pytest.fixture
def small_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written in pieces of 4 KiB."""
    monkeypatch.setattr("ps.local_storage._SINK_BYTES", 4096)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("size", [0, 1, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, len(DATA)])
@pytest.mark.parametrize("piece", [MIB + 3, 10 * MIB])
def test_what_is_written_is_what_is_read(tmp_path: Path, size: int, piece: int) -> None:
    storage, data = Storage.at(tmp_path / "new" / "root"), DATA[:size]
    with storage.writer("x/y.bin") as sink:
        for first in range(0, size, piece):
            assert sink.write(data[first : first + piece]) == len(data[first : first + piece])
    assert (sink.size, sink.checksum) == (size, f"xxh3:{xxhash.xxh3_128_hexdigest(data)}")
    assert storage.read("x/y.bin") == data
    assert storage.size("x/y.bin") == size
    with storage.open("x/y.bin") as file:
        assert file.read_at(10, size // 2) == data[size // 2 :][:10]
    with storage.stream("x/y.bin") as source:
        found = bytearray(size // 2)
        assert source.fill(found) == size // 2
        assert found == data[: size // 2]
        assert source.fill(bytearray(size + 1)) == size - size // 2


@given(st.lists(st.integers(0, 9000), max_size=8))
@pytest.mark.usefixtures("small_sink")
def test_pieces_of_any_size(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    storage = Storage.at(tmp_path_factory.mktemp("pieces"), FaultyDisk())
    pieces = [DATA[k : k + size] for k, size in enumerate(sizes)]
    buffer = bytearray(9000)
    with storage.writer("x") as sink:
        for piece in pieces:
            buffer[: len(piece)] = piece
            sink.write(memoryview(buffer)[: len(piece)])
    assert storage.read("x") == b"".join(pieces)
    assert sink.checksum == f"xxh3:{xxhash.xxh3_128_hexdigest(b''.join(pieces))}"


def test_a_sink_takes_arrays(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    with Storage.at(tmp_path).writer("x") as sink:
        assert sink.write(rows) == 24
        assert sink.write(rows[:0]) == 0
    assert Storage.at(tmp_path).read("x") == rows.tobytes()


@pytest.mark.parametrize("size", [10, len(DATA)])
def test_a_failed_body_leaves_no_file(tmp_path: Path, size: int) -> None:
    storage = Storage.at(tmp_path)
    with pytest.raises(ZeroDivisionError), storage.writer("x") as sink:  # noqa: PT012
        sink.write(DATA[:size])
        raise ZeroDivisionError
    assert files(tmp_path) == []


def test_names_and_removal(tmp_path: Path) -> None:
    storage = Storage.at(tmp_path)
    assert Storage.at(tmp_path / "nowhere").names() == []
    for path in ("a/1", "a/2", "b"):
        with storage.writer(path):
            pass
    assert storage.names() == ["a", "b"]
    assert storage.names("a") == storage.below("a").names() == ["1", "2"]
    assert [storage.exists(p) for p in ("a", "a/1", "c", "b/c", "")] == [True, True, False, False,
                                                                        True]  # fmt: skip
    storage.remove("a/1")
    storage.remove("a/1")
    assert storage.names("a") == ["2"]
    storage.remove_folder("a")
    storage.remove_folder("a")
    assert storage.names() == ["b"]


def write(storage: Storage) -> None:
    with storage.writer("new/x") as sink:
        sink.write(DATA[:10_000])


def put(storage: Storage) -> None:
    storage.replace("x", b"new")


def error_of(act: Callable[[Storage], None], storage: Storage) -> str | None:
    try:
        act(storage)
    except StorageError as e:
        return str(e)
    return None


@pytest.mark.usefixtures("small_sink")
@pytest.mark.parametrize("act", [write, put])
@pytest.mark.parametrize("torn", [0.0, 0.5])
def test_any_operation_that_fails(
    tmp_path: Path, act: Callable[[Storage], None], torn: float
) -> None:
    for number in itertools.count(1):
        Storage.at(tmp_path).replace("x", b"old")
        disk = FaultyDisk.at(number, errno.ENOSPC, torn=torn)
        message = error_of(act, Storage.at(tmp_path, disk))
        if message is None:
            break
        assert re.fullmatch(r"cannot write '\S+': No space left on device", message)
        assert files(tmp_path) == ["x"], disk.counts
        assert (tmp_path / "x").read_bytes() in (b"old", b"new")
    assert disk.failed == 0
    assert number > 5


@pytest.mark.usefixtures("small_sink")
def test_a_crash_after_the_end_of_writer_loses_nothing(tmp_path: Path) -> None:
    root, last = tmp_path / "root", None
    root.mkdir()
    for number in itertools.count(1):
        disk, done = CrashDisk(root, crash_at=number), False
        try:
            write(Storage.at(root / "deep", disk))
            done = True
            disk.remove(root / "none")  # meets the crash if nothing before did
        except Crash:
            pass
        if done:
            for left in disk.variants(tmp_path / "left"):
                assert (left / "deep/new/x").read_bytes() == DATA[:10_000]
        if not disk.crashed:
            break
        last = done
        Storage.at(tmp_path).remove_folder("root")
        root.mkdir()
    assert last, "the crash came after the end once"


def test_a_crash_during_replace_leaves_old_or_new(tmp_path: Path) -> None:
    root, seen = tmp_path / "root", set()
    Storage.at(root).replace("x", b"old")
    for number in itertools.count(1):
        disk = CrashDisk(root, crash_at=number)
        with suppress(Crash):
            put(Storage.at(root, disk))
        for left in disk.variants(tmp_path / "left"):
            found = (left / "x").read_bytes()
            seen.add(found)
            assert found == b"new" or disk.crashed
        if not disk.crashed:
            break
        Storage.at(root).replace("x", b"old")
    assert seen == {b"old", b"new"}


def test_errors_name_the_file_and_the_reason(tmp_path: Path) -> None:
    storage = Storage.at(tmp_path)
    storage.replace("file", b"")
    (tmp_path / "folder").mkdir()
    for act, reason in [
        (lambda: storage.read("x"), "No such file or directory"),
        (lambda: storage.open("x"), "No such file or directory"),
        (lambda: storage.stream("x").__enter__(), "No such file or directory"),
        (lambda: storage.size("x"), "No such file or directory"),
        (lambda: storage.read("folder"), "Is a directory"),
        (lambda: storage.names("file"), "Not a directory"),
        (lambda: storage.remove("folder"), "Is a directory"),
        (lambda: storage.replace("file/x", b""), "File exists"),
        (lambda: storage.writer("file/x").__enter__(), "File exists"),
    ]:
        with pytest.raises(StorageError, match=rf"^cannot .* '{tmp_path}/\S*': {reason}$"):
            act()
    refused = Storage.at(tmp_path, FaultyDisk.at(1, errno.EACCES))
    with pytest.raises(StorageError, match=rf"cannot remove '{tmp_path}/x': Permission denied"):
        refused.remove("x")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a\0b", "\ud800"])
def test_paths_stay_below_the_root(tmp_path: Path, path: str) -> None:
    storage = Storage.at(tmp_path)
    for act in (storage.read, storage.names, storage.remove_folder, storage.below):
        with pytest.raises(StorageError, match="is no path below"):
            act(path)


def test_local_locations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for location in ("a b", tmp_path / "a b", f"file://{tmp_path}/a%20b", "./x/../a b"):
        storage = Storage.at(location)
        assert storage.is_local
        assert storage.location == storage.uri == f"{tmp_path}{os.sep}a b"
        assert storage.below("c").name("d") == f"{tmp_path}/a b/c/d"


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("ftp://host/x", "must be a folder or start with"),
        ("s3:/x", "must be a folder or start with"),
        ("s3://", "expected s3://bucket/folder"),
        ("s3:///x", "expected s3://bucket/folder"),
        ("s3://a:hush/hush@bucket/x", "must be percent-quoted"),
        ("s3://a:hush@/x", "expected s3://bucket/folder"),
        ("s3://hush@bucket/x", "key:secret@"),
        ("s3://a:hush@bucket/x?regoin=a", "no option 'regoin' for s3://; there are region"),
        ("s3://a:hush@bucket/x?region", "expected options as"),
        ("s3://bucket/x?max_attempts=0", "option 'max_attempts' cannot be '0'"),
        ("s3://bucket/x?connect_timeout=soon", "option 'connect_timeout' cannot be 'soon'"),
        ("s3://bucket/x?anonymous=perhaps", "option 'anonymous' cannot be 'perhaps'"),
        ("gs://a:hush@bucket/x", "takes only 'anonymous@'"),
        ("gs://bucket/x?region=a", "no option 'region' for gs://"),
        ("file://host/x", "expected file:///folder"),
        ("s3://a:hush@bucket/x?scheme=gopher&region=a", "scheme"),
    ],
)
def test_bad_locations(location: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        Storage.at(location)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket",
        "s3://bucket/a%20b/c",
        "s3://key:se%2Fc%40r%2Bet@bucket/x?endpoint_override=127.0.0.1:9000&scheme=http",
        "gs://anonymous@bucket/x?endpoint_override=127.0.0.1:1&scheme=http",
    ],
)
def test_locations_of_stores(uri: str) -> None:
    found = StoreLocation.parse(uri)
    assert found.uri == uri
    assert StoreLocation.parse(found.location).folder == found.folder
    assert "se" not in found.location + repr(found).replace("secret", "")
    assert found.below("y").name("z") == f"{found.name('y')}/z"


def test_a_store_that_cannot_be_reached() -> None:
    where = "bucket/x?endpoint_override=127.0.0.1:1&scheme=http"
    short = "connect_timeout=1&request_timeout=1&max_attempts=1"
    for uri in (f"s3://a:hush@{where}&{short}", f"gs://anonymous@{where}&retry_limit_seconds=1"):
        with pytest.raises(StorageError, match=r"^cannot read '..://bucket/x/y': .*$") as caught:
            Storage.at(uri).read("y")
        assert "hush" not in str(caught.value)
