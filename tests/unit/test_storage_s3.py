"""Object stores, on a real server that speaks S3: the same promises as for local folders."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from ps.config import Adagrad, FeatureConfig, TableConfig
from ps.errors import SnapshotError, StorageError
from ps.part_reader import PartRows, load_parts
from ps.partition import Placement
from ps.spec import resolve
from ps.storage import Storage
from ps.table_parts import PartTarget, PartWriter
from tests.support.s3_server import S3Server, is_installed

pytestmark = pytest.mark.skipif(not is_installed(), reason="moto is not installed")
DATA = np.random.default_rng(0).bytes(12 << 20)
"""More than one piece of an upload."""
BOUND_S = 20.0
"""For what should take about a second: the machine may be busy."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server.start(tmp_path_factory.mktemp("s3"))
    yield server
    server.kill()


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[S3Server]:
    """A server of the test's own."""
    server = S3Server.start(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def storage(server: S3Server, request: pytest.FixtureRequest) -> Storage:
    return Storage.at(server.uri(f"tests/{request.node.name}/a b"))


def fails(*operations: object) -> list[str]:
    """The messages of operations that must all end in a one-line StorageError, soon."""
    messages = []
    for operation in operations:
        start = time.monotonic()
        with pytest.raises(StorageError) as caught:
            operation()  # type: ignore[operator]
        assert time.monotonic() - start < BOUND_S
        messages.append(str(caught.value))
    assert not any("secret" in m or "a-key" in m or "\n" in m for m in messages), messages
    return messages


def write(storage: Storage, path: str, data: bytes) -> None:
    with storage.writer(path) as sink:
        sink.write(data)


@pytest.mark.parametrize("size", [0, 1000, len(DATA)])
def test_what_is_written_is_what_is_read(storage: Storage, size: int) -> None:
    data = DATA[:size]
    with storage.writer("x/y.bin") as sink:
        for first in range(0, size, 1 << 20):
            sink.write(data[first : first + (1 << 20)])
    assert (sink.size, sink.checksum) == (size, f"xxh3:{xxhash.xxh3_128_hexdigest(data)}")
    assert storage.read("x/y.bin") == data
    assert storage.size("x/y.bin") == size
    with storage.stream("x/y.bin") as source:
        found = bytearray(size + 1)
        assert source.fill(found) == size
    assert found[:size] == data


def test_names_and_removal(storage: Storage) -> None:
    assert storage.names() == []
    assert not storage.exists("a")
    for path in ("a/1", "a/2", "b"):
        write(storage, path, b"x")
    assert storage.names() == ["a", "b"]
    assert storage.names("a") == ["1", "2"]
    assert storage.below("a").names() == ["1", "2"]
    assert storage.exists("a")
    assert storage.exists("a/1")
    storage.remove("a/1")
    storage.remove("a/1")
    assert storage.names("a") == ["2"]
    storage.remove_folder("a")
    storage.remove_folder("a")
    assert storage.names() == ["b"]


def test_replace_is_one_request(server: S3Server, storage: Storage) -> None:
    for data in (b"old", b"new"):
        storage.replace("LATEST", data)
        assert storage.read("LATEST") == data
    writes = [r for r in server.requests() if "LATEST" in r and r.split()[0] in ("PUT", "POST")]
    assert len(writes) == 2
    assert all(r.startswith("PUT ") and "?" not in r for r in writes)


@pytest.mark.parametrize("size", [10, len(DATA)])
def test_a_failed_body_leaves_no_object(storage: Storage, size: int) -> None:
    with pytest.raises(ZeroDivisionError), storage.writer("x") as sink:  # noqa: PT012
        sink.write(DATA[:size])
        raise ZeroDivisionError
    assert not storage.exists("x")


def test_what_is_not_there(server: S3Server, storage: Storage) -> None:
    for message in fails(lambda: storage.read("x"), lambda: storage.size("x")):
        assert f"'{storage.name('x')}'" in message
    elsewhere = Storage.at(server.uri("x", "no-such-bucket"))
    for message in fails(
        lambda: elsewhere.replace("a", b""),
        lambda: write(elsewhere, "a", DATA),
    ):
        assert "NO_SUCH_BUCKET" in message or "no-such-bucket" in message


def test_credentials_are_in_the_uri_alone(server: S3Server) -> None:
    storage = Storage.at(server.uri("x")).below("y")
    write(storage, "a", b"1")
    again = Storage.at(storage.uri)
    assert again.read("a") == b"1"
    assert again.uri == storage.uri
    assert "secret" in storage.uri
    assert "secret" not in storage.location + storage.name("a") + repr(storage)
    assert storage.name("a") == "s3://bucket/x/y/a"


def test_a_killed_server_is_an_error(mortal: S3Server) -> None:
    storage = Storage.at(mortal.uri("x"))
    write(storage, "a", DATA)

    def write_on() -> None:
        with storage.writer("b") as sink:
            sink.write(DATA)
            mortal.kill()
            for _ in range(6):
                sink.write(DATA)

    messages = fails(
        write_on,
        lambda: storage.replace("a", b""),
        lambda: storage.read("a"),
        storage.names,
        lambda: storage.exists("a"),
        lambda: storage.remove("a"),
        lambda: storage.remove_folder("x"),
    )
    assert all("s3://bucket/x" in message for message in messages)


def test_a_stalled_server_is_an_error(server: S3Server, storage: Storage) -> None:
    storage.replace("a", b"1")
    with server.stalled():
        fails(lambda: storage.read("a"), lambda: write(storage, "b", DATA))
    assert storage.read("a") == b"1"


def test_parts_are_the_same_as_in_a_folder(server: S3Server, tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(30_000, 16)).astype(np.float32)
    table = TableConfig(*rows.shape, optimizer=Adagrad(), name="t")
    spec = resolve({"f": FeatureConfig(table)}).tables[0]
    slot = {"accumulators": rows + 1}
    shape = {"dim": 16, "slots": ("accumulators",)}
    placement = Placement(len(rows), 1024, 1, 0)
    sealed = []
    for location in (server.uri("parts"), str(tmp_path)):
        storage = Storage.at(location)
        writer = PartWriter(PartTarget(storage.uri, "s", "a", 0, 1), spec, storage)
        writer.append(rows, slot)
        sealed.append(writer.close())
        found = np.zeros_like(rows)
        for first, piece, slots in load_parts(
            storage.below("s"), sealed[-1:], placement, placement, 0, **shape
        ):
            found[first : first + len(piece)] = piece
            np.testing.assert_array_equal(slots["accumulators"], piece + 1)
        np.testing.assert_array_equal(found, rows)
        with PartRows(storage.below("s"), sealed[-1], **shape, slot="accumulators") as some:
            out = np.zeros((9000, 16), dtype=np.float32)
            some.read(12_345, out)
        np.testing.assert_array_equal(out, rows[12_345 : 12_345 + 9000] + 1)
    assert sealed[0] == sealed[1]

    storage = Storage.at(server.uri("parts/s"))
    data = storage.read(sealed[0].file)
    storage.replace(sealed[0].file, data[:-1])
    with pytest.raises(
        SnapshotError, match=r"'s3://bucket/parts/s/t\.0-of-1\.a\.arrow' is damaged"
    ):
        list(load_parts(storage, sealed[:1], placement, placement, 0, **shape))
