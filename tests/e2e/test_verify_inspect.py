"""`manta verify` and `manta inspect` as commands: what they print, and exit codes for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ps.snapshot import export_snapshot, open_snapshot
from ps.storage import Storage
from tests.e2e.conftest import Manta
from tests.support.reference import same_bits
from tests.support.s3_server import S3Server, is_installed
from tests.support.snapshots import every_optimizer_spec, random_contents, write_snapshot

pytestmark = pytest.mark.e2e

SPEC = every_optimizer_spec()
CONTENTS = random_contents(SPEC)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("versions")
    path = write_snapshot(root / "snapshots", SPEC, CONTENTS, num_shards=2)
    export_snapshot(open_snapshot(path), root / "exports")
    return root


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server.start(tmp_path_factory.mktemp("s3"))
    try:
        yield server
    finally:
        server.kill()


def test_a_sound_version_then_a_damaged_one(manta: Manta, root: Path, tmp_path: Path) -> None:
    sound = manta("verify", root / "snapshots")
    assert (sound.returncode, sound.stderr) == (0, "")
    assert sound.stdout.splitlines()[-1] == "ok"
    damaged = write_snapshot(tmp_path, SPEC, CONTENTS)
    next(damaged.glob("users.*")).write_bytes(b"")
    result = manta("verify", tmp_path, "--json")
    assert (result.returncode, result.stderr) == (1, "")
    (finding,) = json.loads(result.stdout)["findings"]
    assert finding["where"].startswith("users.")


def test_what_cannot_be_checked_is_one_line_and_exit_code_2(manta_here: Manta, root: Path) -> None:
    for path in (root, root / "nowhere", "s3://", "ftp://x/y"):
        result = manta_here("verify", path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_inspect_answers_or_says_what_is_there(manta_here: Manta, root: Path) -> None:
    result = manta_here("inspect", root / "exports", "--json", "--row", "site/ads:96")
    assert (result.returncode, result.stderr) == (0, "")
    (row,) = json.loads(result.stdout)["rows"]
    assert same_bits(np.array(row["row"], np.float32), CONTENTS["site/ads"]["rows"][96])
    for asked, message in {
        "ads:3": "no table 'ads' here, only 'a.b c', 'one.row/', 'plain', 'site/ads', 'users'",
        "plain:50": "table 'plain': id 50 is outside [0, 50)",
        "plain": "--row plain: write TABLE:ID, for example users:17",
    }.items():
        result = manta_here("inspect", root / "snapshots", "--row", asked)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"error: {message}\n"


@pytest.mark.skipif(not is_installed(), reason="moto is not installed")
@pytest.mark.parametrize("kind", ["snapshots", "exports"])
def test_a_version_in_an_object_store(
    manta_here: Manta, root: Path, s3: S3Server, kind: str
) -> None:
    uri = s3.uri(kind, timeout_s=20)
    store = Storage.at(uri)
    for path in (root / kind).rglob("*"):
        if path.is_file():
            store.replace(str(path.relative_to(root / kind)), path.read_bytes())
    result = manta_here("verify", uri)
    assert (result.stderr, result.returncode) == ("", 0)
    assert result.stdout.splitlines()[-1] == "ok"
    assert "signs" not in result.stdout, "no credentials are shown"
    result = manta_here("inspect", uri, "--json", "--stats", "--row", "users:299")
    document = json.loads(result.stdout)
    (row,) = document["rows"]
    assert same_bits(np.array(row["row"], np.float32), CONTENTS["users"]["rows"][299])
    assert document["stats"]["plain"]["rows"]["max"] == CONTENTS["plain"]["rows"].max()
    name = document["version"]
    file = next(name for name in store.names(name) if "manifest" not in name)
    if kind == "snapshots":
        store.remove(f"{name}/{file}")
        result = manta_here("verify", uri)
        assert result.returncode == 1
        assert f"finding: file: {file}: is missing\n" in result.stdout
