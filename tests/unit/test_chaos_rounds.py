"""Rounds of `manta chaos` against a made-up cluster, in made-up time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ps.errors import JobError, SnapshotError
from tests.support.chaos import EVERY, STEPS, FakeCluster, Heard
from workers.chaos.compare import Comparison, Difference
from workers.chaos.plan import DEFAULT_KINDS, Targets
from workers.chaos.records import ChaosRecord
from workers.chaos.rounds import ChaosPlan, run_chaos

SAME = Comparison(step=STEPS, tables=2, slots=1, dense=3, numbers=9, differences=())
OTHER = Comparison(
    step=STEPS, tables=2, slots=1, dense=3, numbers=9, differences=(Difference("table 'a'", "x"),)
)
PLAN = ChaosPlan(
    job="fake", durability="log", targets=Targets(shards=2, workers=2), kills=30,
    kinds=DEFAULT_KINDS, mean_gap_s=2.0, snapshot_every=EVERY, step_deadline_s=3.0,
)  # fmt: skip


def chaos(
    cluster: FakeCluster, folder: Path, plan: ChaosPlan = PLAN, keep: bool = False,
    comparisons: tuple[Comparison | Exception, ...] = (SAME,) * 100,
) -> tuple[ChaosRecord, list[tuple[Path, Path]]]:  # fmt: skip
    compared: list[tuple[Path, Path]] = []

    def compare(one: Path, other: Path) -> Comparison:
        found = comparisons[len(compared)]
        compared.append((one, other))
        if isinstance(found, Exception):
            raise found
        return found

    record = run_chaos(
        plan, cluster, folder, Heard(), compare, keep=keep, clock=cluster.clock,
        sleep=cluster.sleep,
    )  # fmt: skip
    return record, compared


@pytest.mark.parametrize("seed", range(5))
def test_rounds_go_on_until_enough_was_killed(tmp_path: Path, seed: int) -> None:
    plan = replace(PLAN, seed=seed)
    record, compared = chaos(FakeCluster(), tmp_path, plan)
    assert record.good
    assert record.kills == plan.kills
    assert len(compared) == len(record.rounds) > 1
    assert {one for one, _ in compared} == {tmp_path / "undisturbed" / "snapshots"}
    assert len({other for _, other in compared}) == len(compared)
    assert {fault.strike.kind for fault in record.faults} == set(DEFAULT_KINDS)
    assert all(fault.recovered_after_s is not None for fault in record.faults)
    assert [p.name for p in tmp_path.iterdir()] == ["undisturbed"]


def test_the_same_seed_strikes_at_the_same_moments(tmp_path: Path) -> None:
    runs = [chaos(FakeCluster(), tmp_path / name)[0] for name in ("a", "b")]
    first, second = ([(f.at_s, f.strike) for f in record.faults] for record in runs)
    assert first == second


def test_one_bit_ends_it_badly(tmp_path: Path) -> None:
    record, compared = chaos(FakeCluster(), tmp_path, comparisons=(SAME, OTHER), keep=True)
    assert not record.good
    assert len(compared) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"undisturbed", "round-1", "round-2"}


def test_a_round_without_a_snapshot_ends_it_badly(tmp_path: Path) -> None:
    record, _ = chaos(FakeCluster(), tmp_path, comparisons=(SnapshotError("no such folder"),))
    assert not record.good
    assert record.rounds[0].failure == "the last snapshot cannot be compared: no such folder"


def test_an_undisturbed_run_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"undisturbed run did not end well.*\n.*it hurts"):
        chaos(FakeCluster(fails=[3.0]), tmp_path)


def test_a_job_too_short_for_any_fault_ends_it_badly(tmp_path: Path) -> None:
    record, compared = chaos(FakeCluster(steps=3), tmp_path)
    assert not record.good
    assert len(compared) == 3
    assert "give it more epochs, or a smaller --mean-gap" in str(record.rounds[-1].failure)


def test_a_round_that_does_not_end_in_time_ends_it_badly(tmp_path: Path) -> None:
    plan = replace(PLAN, deadline_s=33.0)
    record, compared = chaos(FakeCluster(), tmp_path, plan)
    assert not record.good
    assert compared == []
    assert "it had not ended after 33 s" in str(record.rounds[0].failure)
