"""The planner of `manta chaos`: seeded, fair, and never unfair to the job."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ps.errors import ConfigError
from workers.chaos.plan import (
    DEFAULT_KINDS,
    KINDS,
    MIN_GAP_S,
    Fault,
    Kind,
    Planner,
    Targets,
    Victim,
    parse_kinds,
)

TARGETS = Targets(shards=2, workers=3, nodes=3)


def faults(count: int = 400, *, seed: int = 0, most: int = 100, **changes: object) -> list[Fault]:
    options = {"targets": TARGETS, "kinds": KINDS, "mean_gap_s": 5.0} | changes
    planner = Planner(seed=(seed, 1), **options)  # type: ignore[arg-type]
    return [planner.next(most) for _ in range(count)]


def test_the_same_seed_gives_the_same_faults_and_another_one_others() -> None:
    assert faults(50) == faults(50)
    assert faults(50) != faults(50, seed=1)


def test_every_kind_and_moment_comes_early() -> None:
    some = faults(40, kinds=DEFAULT_KINDS)
    assert {strike.kind for fault in some for strike in fault.strikes} == set(DEFAULT_KINDS)
    assert {fault.moment for fault in some} == {"random", "snapshot", "recovery"}
    assert any(fault.num_kills == 2 for fault in some)


def test_every_victim_is_hit_but_the_first_node() -> None:
    victims = {s.victim for fault in faults() for s in fault.strikes}
    assert victims == {
        *(Victim("shard", k) for k in range(2)),
        *(Victim("worker", k) for k in range(3)),
        *(Victim("node", k) for k in (1, 2)),
        Victim("driver"),
    }


def test_two_at_once_are_two_victims_and_a_node_falls_alone() -> None:
    for fault in faults():
        victims = [strike.victim for strike in fault.strikes]
        assert len(set(victims)) == len(victims) <= 2
        assert len(victims) == 1 or all(s.kills and s.kind != "node" for s in fault.strikes)


def test_no_more_kills_than_are_wanted() -> None:
    assert all(fault.num_kills <= 1 for fault in faults(most=1))


def test_a_recovery_is_disturbed_once_and_only_after_a_kill() -> None:
    seen = faults()
    assert seen[0].moment != "recovery"
    for before, fault in pairwise(seen):
        if fault.moment == "recovery":
            assert before.num_kills
            assert before.moment != "recovery"


def test_half_of_the_second_kills_hit_what_takes_the_victims_place() -> None:
    again = [
        fault.strikes[0].victim in [strike.victim for strike in before.strikes]
        for before, fault in pairwise(faults(2000))
        if fault.moment == "recovery"
    ]
    assert 0.4 < np.mean(again) < 0.8


def test_gaps_are_exponential_but_not_shorter_than_the_least() -> None:
    gaps = [fault.wait_s for fault in faults(3000) if fault.moment != "recovery"]
    assert min(gaps) >= MIN_GAP_S
    assert 4.5 < np.mean(gaps) < 5.6
    assert 3.0 < np.median(gaps) < 4.0  # 5 ln 2


def test_some_pauses_last_longer_than_a_step_may() -> None:
    def pauses(deadline_s: float | None) -> list[float]:
        found = faults(200, kinds=("pause",), step_deadline_s=deadline_s)
        return [strike.amount for fault in found for strike in fault.strikes]

    assert max(pauses(None)) < 3.2
    assert 0.25 < np.mean([amount > 10.0 for amount in pauses(10.0)]) < 0.42
    assert max(pauses(3600.0)) < 3.2  # nobody would wait for that


@pytest.mark.parametrize("kind", ["cut", "delay", "disk"])
def test_faults_of_shards_hit_shards(kind: Kind) -> None:
    for fault in faults(50, kinds=(kind,)):
        assert [strike.victim.role for strike in fault.strikes] == ["shard"]


def test_a_disk_fails_at_a_whole_operation() -> None:
    amounts = {s.amount for fault in faults(100, kinds=("disk",)) for s in fault.strikes}
    assert amounts <= set(map(float, range(1, 21)))
    assert len(amounts) > 10


def test_kinds_are_parsed_in_any_order() -> None:
    assert parse_kinds(" driver,shard", nodes=1) == ("shard", "driver")


@pytest.mark.parametrize(
    ("text", "nodes", "message"),
    [
        ("shard,wroker", 1, "unknown kind 'wroker'; did you mean 'worker'"),
        (" , ", 1, "name at least one of"),
        ("node", 1, "needs --nodes 2"),
    ],
)
def test_wrong_kinds_are_refused(text: str, nodes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_kinds(text, nodes)


def test_a_gap_must_be_above_zero() -> None:
    with pytest.raises(ConfigError, match="mean-gap"):
        faults(1, mean_gap_s=0.0)
