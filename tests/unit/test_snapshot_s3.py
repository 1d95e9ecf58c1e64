"""Snapshots in an object store: the same promises as in a folder, on a server that speaks S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ps.errors import SnapshotError, StorageError
from ps.export import open_export
from ps.partition import Layout
from ps.snapshot import (
    complete_snapshots,
    export_snapshot,
    load_shard,
    open_snapshot,
    retain,
    snapshot_location,
)
from ps.snapshot_writer import SnapshotWriter
from ps.storage import Storage
from tests.support.reference import same_bits
from tests.support.s3_server import S3Server, is_installed
from tests.support.snapshots import (
    VARIABLES,
    contents_of,
    dense_values,
    every_optimizer_spec,
    part_of,
    random_contents,
    small,
    small_spec,
    write_snapshot,
)

pytestmark = pytest.mark.skipif(not is_installed(), reason="moto is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server.start(tmp_path_factory.mktemp("s3"))
    yield server
    server.kill()


@pytest.fixture
def root(server: S3Server, request: pytest.FixtureRequest) -> str:
    """With credentials, which no message may show."""
    uri = server.uri(f"snapshots/{request.node.name}")
    assert "secret" in uri
    return uri


def test_what_is_written_to_a_bucket_comes_back_on_other_shards(root: str, tmp_path: Path) -> None:
    spec, dense = every_optimizer_spec(), dense_values("momenta", "velocities")
    contents = random_contents(spec)
    write_snapshot(root, spec, contents, dense=dense, num_shards=3, fences=[6, 6])
    snapshot = open_snapshot(root, verify=True)
    assert (snapshot.step, snapshot.fences, snapshot.num_shards) == (6, (6, 6), 3)
    assert "secret" not in snapshot.location + repr(snapshot)
    found = contents_of(open_snapshot(snapshot.uri))
    for table, arrays in contents.items():
        assert all(same_bits(found[table][name], values) for name, values in arrays.items())
    placement = Layout.of(spec, 2).placements["users"]
    for shard in range(2):
        wanted = part_of(contents["users"]["rows"], placement, shard)
        rows = np.full_like(wanted, np.nan)
        for first, piece, _ in load_shard(snapshot, "users", placement, shard):
            rows[first : first + len(piece)] = piece
        assert same_bits(rows, wanted)
    assert snapshot.dense is not None
    assert same_bits(snapshot.dense.values().slots["momenta"], dense.slots["momenta"])
    export = open_export(export_snapshot(snapshot, tmp_path / "export"), verify=True)
    assert same_bits(export.tables["site/ads"].rows_VD, contents["site/ads"]["rows"])


def test_attempts_replace_each_other_and_old_snapshots_go(root: str) -> None:
    for step in (1, 2, 3, 4):
        small(root, step=step)
    first = names(root, 4)
    small(root, step=4, num_shards=2)  # the same job again
    assert not set(first) & set(names(root, 4)) - {"manifest.json"}
    assert len(names(root, 4)) == 6
    with pytest.raises(SnapshotError, match="there is one already, of job 'test'") as e:
        small(root, step=4, job="other")
    assert "secret" not in str(e.value)
    Storage.at(root).remove("step-000000002/manifest.json")
    assert complete_snapshots(root) == [1, 3, 4]
    assert retain(root, 2) == [1]
    assert Storage.at(root).names() == ["LATEST", "step-000000003", "step-000000004"]
    assert open_snapshot(root, verify=True).num_shards == 2


def test_an_attempt_that_fails_leaves_the_snapshot_before(root: str) -> None:
    small(root, step=1)
    with SnapshotWriter(root, small_spec(), step=2, seed=0, job="test", num_shards=1) as writer:
        writer.add_dense(VARIABLES, dense_values(), model={}, optimizer=None)
        assert len(names(root, 2)) == 1
        with pytest.raises(SnapshotError, match="shard 0 wrote 0 rows"):
            writer.commit()
    assert names(root, 2) == []
    assert open_snapshot(root, verify=True).step == 1


def test_a_damaged_object_is_named_and_so_is_the_snapshot_before(root: str) -> None:
    small(root, step=3)
    folder = Storage.at(small(root).uri)
    (file,) = (name for name in folder.names() if name.startswith("t."))
    data = folder.read(file)
    folder.replace(file, data[:-9] + b"x" + data[-8:])
    damaged = open_snapshot(root)
    hint = r"; 's3://bucket/.*' has other snapshots, of steps 3: .*/step-000000003"
    with pytest.raises(SnapshotError, match=rf"{file}' is damaged: xxh3 .*{hint}") as e:
        open_snapshot(root, verify=True)
    assert "secret" not in str(e.value)
    with pytest.raises(SnapshotError, match=rf"{file}' is damaged"):
        list(load_shard(damaged, "t", Layout.of(small_spec(), 1).placements["t"], 0))
    folder.remove(file)
    with pytest.raises(SnapshotError, match=rf"{file}': there is no such file{hint}"):
        open_snapshot(folder.uri)
    assert open_snapshot(snapshot_location(root, 3), verify=True).step == 3


def test_what_is_not_there_says_so(root: str) -> None:
    assert complete_snapshots(root) == []
    assert retain(root, 1) == []
    with pytest.raises(SnapshotError, match="is no snapshot: it has neither LATEST nor manifest"):
        open_snapshot(root)
    with pytest.raises(StorageError, match="no-such-bucket"):
        small(root.replace("bucket/", "no-such-bucket/"))


def names(root: str, step: int) -> list[str]:
    return Storage.at(snapshot_location(root, step)).names()
