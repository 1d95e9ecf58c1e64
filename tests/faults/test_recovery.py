"""Jobs that lose processes and end with the bits of a run that did not."""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from ps.errors import JobError, SnapshotError
from ps.snapshot import complete_snapshots
from tests.support.jobs import every_optimizer_job, write_examples
from tests.support.runs import AtSnapshot, AtStep, bits, kill
from workers.config import JobConfig
from workers.job import TrainResult, train
from workers.recovery_config import Durability, RecoveryConfig

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("examples"))


def job(
    data: Path,
    folder: Path,
    durability: Durability = "snapshot",
    shards: int = 2,
    workers: int = 2,
    **recovery: Any,
) -> JobConfig:
    """150 steps, a snapshot every 50."""
    made = every_optimizer_job(data, shards=shards, workers=workers)
    return replace(
        made,
        name=f"recovers-{folder.name}"[:60],
        data=replace(made.data, test=None),
        train=replace(made.train, epochs=15, lookahead=1, report_every=5, ranks=2),
        output=replace(made.output, snapshot=folder / "snapshots", export=None),
        recovery=RecoveryConfig(durability=durability, snapshot_every=50, **recovery),
    )


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Any:
    result = train(job(data, tmp_path_factory.mktemp("undisturbed")))
    assert result.snapshot is not None
    assert result.steps == 150
    return bits(result.snapshot)


def final_bits(result: TrainResult) -> dict[str, bytes]:
    assert result.snapshot is not None
    return bits(result.snapshot)


@pytest.mark.parametrize(
    ("durability", "victims", "action"),
    [
        ("snapshot", ("worker-1",), "replace_worker"),
        ("snapshot", ("shard-1",), "rollback"),
        ("log", ("shard-0",), "replay"),
        ("log", ("shard-0", "worker-0"), "rollback"),
    ],
)
def test_killed_processes_are_replaced_and_no_bit_differs(
    data: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    durability: Durability,
    victims: tuple[str, ...],
    action: str,
) -> None:
    disturbed = job(data, tmp_path, durability)
    seen = AtStep(75, kill(*(f"{disturbed.name}-{victim}" for victim in victims)))
    result = train(disturbed, [seen])
    (recovery,) = seen.recoveries
    assert recovery.action == action
    assert recovery.total_s < 60
    assert final_bits(result) == undisturbed
    assert complete_snapshots(tmp_path / "snapshots")[-1] == 150
    assert ray.util.list_named_actors(all_namespaces=True) == []


def test_a_worker_that_hangs_is_replaced_after_the_step_deadline(
    data: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    disturbed = job(data, tmp_path, step_deadline_s=8.0)
    seen = AtStep(75, kill(f"{disturbed.name}-worker-0", with_signal=signal.SIGSTOP))
    result = train(disturbed, [seen])
    (recovery,) = seen.recoveries
    assert recovery.action == "replace_worker"
    assert "worker 0 did not answer" in recovery.cause
    assert final_bits(result) == undisturbed


class LeaveError(Exception):
    """A driver that ends in the middle."""


def leave() -> None:
    raise LeaveError


@pytest.fixture(scope="module")
def interrupted(data: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """What a run on three shards left behind that ended after its second snapshot."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(LeaveError):
        train(job(data, folder, shards=3), [AtSnapshot(100, leave)])
    assert complete_snapshots(folder / "snapshots") == [50, 100]
    return folder


def left_by(interrupted: Path, folder: Path) -> Path:
    """The same in a folder of one's own; its name is that of the job."""
    return Path(shutil.copytree(interrupted, folder / interrupted.name))


@pytest.mark.parametrize(("shards", "workers"), [(2, 1), (5, 2), (1, 2)])
def test_a_run_that_ended_goes_on_with_other_numbers_of_shards_and_workers(
    data: Path,
    interrupted: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    shards: int,
    workers: int,
) -> None:
    folder = left_by(interrupted, tmp_path)
    result = train(job(data, folder, shards=shards, workers=workers), [])
    assert result.resumed_step == 100
    assert final_bits(result) == undisturbed


def test_a_snapshot_that_fails_leaves_the_one_before_and_training_goes_on(
    data: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_CHAOS", "1")
    disturbed = job(data, tmp_path)

    def full_disk() -> None:
        shard = ray.get_actor(f"{disturbed.name}-shard-1", "manta")
        ray.get(shard.inject.remote("disk", 2), timeout=60)

    seen = AtSnapshot(50, full_disk)
    result = train(disturbed, [seen])
    assert len(seen.failed_snapshots) == 1
    assert "No space left on device" in seen.failed_snapshots[0]
    assert complete_snapshots(tmp_path / "snapshots") == [50, 150]
    assert final_bits(result) == undisturbed


def test_a_worker_that_dies_again_and_again_ends_the_job_with_the_cause(
    data: Path, tmp_path: Path
) -> None:
    deadly = job(data, tmp_path, retries=2)
    deadly = replace(
        deadly, model=replace(deadly.model, build="tests.support.models:build_deadly", params={})
    )
    began = time.monotonic()
    with pytest.raises(JobError, match=r"gave up after 2 recoveries .* worker [01]"):
        train(deadly, [])
    assert time.monotonic() - began < 120
    assert ray.util.list_named_actors(all_namespaces=True) == []


def test_a_damaged_snapshot_is_named(data: Path, interrupted: Path, tmp_path: Path) -> None:
    folder = left_by(interrupted, tmp_path)
    newest = folder / "snapshots" / "step-000000100"
    damaged = max(newest.glob("*.arrow"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    with pytest.raises(SnapshotError, match=damaged.name):
        train(job(data, folder), [])
