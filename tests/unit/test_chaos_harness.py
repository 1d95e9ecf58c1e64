"""The harness of `manta chaos` against a made-up cluster, in made-up time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.chaos import EVERY, RESTART_S, START_S, STEPS, FakeCluster, Heard
from workers.chaos.cluster import RunFolder
from workers.chaos.harness import JobRun, Limits
from workers.chaos.plan import Fault, Kind, Moment, Strike, Victim
from workers.chaos.records import RoundRecord

LONG = Limits(run_s=1000.0)


@dataclass
class Deal:
    """A planner with the faults given."""

    faults: list[Fault]
    kills: bool = True

    def next(self, most: int) -> Fault:
        assert most > 0
        return self.faults.pop(0) if self.faults else fault("worker", wait_s=1e9)


def fault(
    kind: Kind, index: int = 0, *more: Strike, wait_s: float = 1.0, moment: Moment = "random",
    amount: float = 0.0, role: str | None = None,
) -> Fault:  # fmt: skip
    victim = Victim(role or (kind if kind in ("worker", "driver", "node") else "shard"), index)
    return Fault(moment, wait_s, (Strike(kind, victim, amount), *more))


def run(cluster: FakeCluster, tmp_path: Path, *faults: Fault, kills: int = 99,
        limits: Limits = LONG, planner: object = None) -> RoundRecord:  # fmt: skip
    return JobRun(
        cluster=cluster,
        folder=RunFolder(tmp_path),
        limits=limits,
        listener=Heard(),
        round=1,
        planner=planner or Deal(list(faults)),
        kills=kills,
        snapshot_every=EVERY,
        clock=cluster.clock,
        sleep=cluster.sleep,
    ).run()


def test_a_run_without_faults_ends_as_it_is(tmp_path: Path) -> None:
    cluster = FakeCluster()
    record = run(cluster, tmp_path)
    assert record.failure is None
    assert (record.faults, record.steps, record.driver_starts) == ([], STEPS, 1)
    assert record.seconds == pytest.approx(START_S + STEPS / 10, abs=0.2)


def test_a_killed_shard_recovers_when_a_new_version_is_made(tmp_path: Path) -> None:
    record = run(FakeCluster(), tmp_path, fault("shard", 1, wait_s=5.0))
    (killed,) = record.faults
    assert killed.at_s == pytest.approx(START_S + 5.0, abs=0.5)
    assert killed.recovered_after_s is not None
    replayed_s = killed.version % EVERY / 10
    assert killed.recovered_after_s == pytest.approx(RESTART_S + replayed_s, abs=0.3)
    assert record.steps_replayed == 3
    assert killed.recovery is not None
    assert killed.noticed_after_s == pytest.approx(0.0, abs=0.15)


def test_a_killed_driver_is_submitted_again_after_a_while(tmp_path: Path) -> None:
    cluster = FakeCluster()
    record = run(cluster, tmp_path, fault("driver", amount=1.5), fault("driver", wait_s=4.0))
    assert record.driver_starts == cluster.starts == 3
    assert record.driver_failures == []
    assert record.failure is None


def test_two_at_once_are_killed_at_once(tmp_path: Path) -> None:
    both = fault("shard", 0, Strike("worker", Victim("worker", 1)))
    first, second = run(FakeCluster(), tmp_path, both).faults
    assert first.number == second.number == 1
    assert first.struck_at_s == second.struck_at_s


def test_a_second_kill_hits_what_takes_the_place_of_the_first_victim(tmp_path: Path) -> None:
    again = fault("shard", wait_s=0.1, moment="recovery")
    first, second = run(FakeCluster(), tmp_path, fault("shard"), again).faults
    assert second.moment == "recovery"
    assert second.at_s - first.at_s == pytest.approx(RESTART_S, abs=0.2)  # as soon as it was there


def test_a_snapshot_is_awaited(tmp_path: Path) -> None:
    record = run(FakeCluster(), tmp_path, fault("worker", wait_s=0.5, moment="snapshot"))
    (killed,) = record.faults
    assert killed.moment == "snapshot"
    assert killed.version == EVERY


def test_without_a_snapshot_the_moment_is_random(tmp_path: Path) -> None:
    cluster = FakeCluster(speed=1.0, steps=70)
    planner = Deal([fault("worker", moment="snapshot", wait_s=1.0)])
    run_ = JobRun(
        cluster=cluster, folder=RunFolder(tmp_path), limits=Limits(run_s=1000.0), listener=Heard(),
        planner=planner, kills=1, snapshot_every=0, clock=cluster.clock, sleep=cluster.sleep,
    )  # fmt: skip
    (killed,) = run_.run().faults
    assert killed.moment == "random"
    assert 25 < killed.at_s < 45


def test_no_fault_comes_before_the_first_step(tmp_path: Path) -> None:
    (killed,) = run(FakeCluster(), tmp_path, fault("worker", wait_s=0.0)).faults
    assert killed.version >= 1


def test_faults_without_a_step_between_them_wait_for_one(tmp_path: Path) -> None:
    faults = [fault("worker", k % 2, wait_s=0.3) for k in range(12)]
    record = run(FakeCluster(), tmp_path, *faults)
    versions = [f.version for f in record.faults]
    assert len(versions) == 12
    assert max(versions.count(v) for v in versions) <= 4
    assert record.failure is None


def test_as_many_are_killed_as_wanted(tmp_path: Path) -> None:
    faults = [fault("cut"), fault("worker"), fault("cut"), fault("worker"), fault("cut")]
    record = run(FakeCluster(), tmp_path, *faults, kills=2)
    assert [f.strike.kind for f in record.faults] == ["cut", "worker", "cut", "worker"]


def test_without_kinds_that_kill_all_faults_count(tmp_path: Path) -> None:
    deal = Deal([fault("cut") for _ in range(5)], kills=False)
    record = run(FakeCluster(), tmp_path, kills=3, planner=deal)
    assert len(record.faults) == 3
    assert record.duplicates_dropped == 3


def test_a_paused_process_goes_on_and_a_faulty_one_is_told(tmp_path: Path) -> None:
    cluster = FakeCluster()
    paused = fault("pause", 1, role="worker", amount=2.5)
    record = run(cluster, tmp_path, paused, fault("disk", 1, amount=7.0, wait_s=4.0))
    assert record.faults[0].recovered_after_s == pytest.approx(2.5, abs=0.3)
    assert cluster.injected == [(1, "disk", 7.0)]
    assert cluster.stopped == set()


def test_nothing_stays_paused_when_a_run_ends(tmp_path: Path) -> None:
    cluster = FakeCluster()
    driver = fault("pause", role="driver", amount=1e6)
    record = run(cluster, tmp_path, driver, limits=Limits(run_s=20.0))
    assert record.failure is not None
    assert cluster.stopped == set()
    assert record.left_behind == []


def test_a_node_is_replaced(tmp_path: Path) -> None:
    cluster = FakeCluster()
    (killed,) = run(cluster, tmp_path, fault("node", 2)).faults
    assert cluster.replaced_nodes == [2]
    assert killed.strike.kills


def test_a_victim_that_never_comes_is_missed(tmp_path: Path) -> None:
    cluster = FakeCluster(steps=600)
    record = run(cluster, tmp_path, fault("shard", 7), fault("worker"))
    assert record.missed == 1
    assert [f.strike.kind for f in record.faults] == ["worker"]


def test_a_driver_that_fails_without_a_fault_is_given_up(tmp_path: Path) -> None:
    record = run(FakeCluster(fails=[5.0]), tmp_path)
    assert record.failure == "the driver failed, undisturbed:\nerror: it hurts"


def test_a_driver_that_fails_after_a_fault_is_submitted_again(tmp_path: Path) -> None:
    record = run(FakeCluster(fails=[60.0]), tmp_path, fault("worker"))
    assert record.failure is None
    assert record.driver_failures == ["error: it hurts"]
    assert record.driver_starts == 2


def test_a_driver_that_fails_again_and_again_is_given_up(tmp_path: Path) -> None:
    record = run(FakeCluster(fails=[60.0] * 9), tmp_path, fault("worker"))
    assert record.failure is not None
    assert "failed 3 times at version 60" in record.failure
    assert record.driver_starts == 3


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(run_s=20.0), "it had not ended after 20 s"),
        (Limits(run_s=10.0, per_fault_s=5.0), "it had not ended after 15 s"),
        (Limits(run_s=1000.0, stall_s=30.0), "no step was made for 30 s"),
    ],
)
def test_a_run_that_stands_still_is_given_up(tmp_path: Path, limits: Limits, message: str) -> None:
    cluster = FakeCluster()
    cluster.inject = lambda *_: bool(setattr(cluster, "speed", 0.0)) or True
    record = run(cluster, tmp_path, fault("delay"), limits=limits)
    assert record.failure is not None
    assert record.failure.startswith(message)
    assert record.faults[0].recovered_after_s is None
