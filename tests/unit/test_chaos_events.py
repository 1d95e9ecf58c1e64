"""What `manta chaos` learns from metrics files and from shards' counters."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from workers.chaos.cluster import ShardView
from workers.chaos.events import DriverEvents, Recovery, Struck, match
from workers.chaos.plan import Kind, Role, Strike, Victim
from workers.chaos.records import FaultRecord, RoundRecord
from workers.chaos.watch import Watch


def line(event: str, **values: object) -> bytes:
    return orjson.dumps({"event": event, **values}) + b"\n"


RECOVERED = line(
    "recovered", cause="shard 1 died", action="replay", step=7, steps_replayed=3,
    restart_s=1.0, restore_s=0.5, log_s=0.25, replay_s=0.125, total_s=2.0,
)  # fmt: skip


def test_events_are_read_as_they_are_written(tmp_path: Path) -> None:
    events = DriverEvents(tmp_path / "metrics.jsonl")
    events.read(1.0)  # not there yet
    with events.path.open("ab", buffering=0) as file:
        file.write(line("starting", steps=100) + RECOVERED[:20])
        events.read(2.0)
        assert events.total_steps == 100
        assert events.recoveries == []
        file.write(RECOVERED[20:] + line("snapshot", step=10) + line("snapshot_failed", step=20))
        events.read(3.0)
        events.read(4.0)
    (recovery,) = events.recoveries
    assert recovery.seen_at_s == 3.0
    assert recovery.began_at_s == 1.0
    assert (recovery.action, recovery.steps_replayed) == ("replay", 3)
    assert recovery.split == (1.0, 0.5, 0.25, 0.125)
    assert (events.snapshots, events.failed_snapshots) == (1, 1)


def test_a_line_that_a_killed_driver_left_half_spoils_no_other(tmp_path: Path) -> None:
    events = DriverEvents(tmp_path / "metrics.jsonl")
    half = line("progress", step=3)[:9]
    events.path.write_bytes(half + line("starting", steps=5) + b"[1]\n" + RECOVERED)
    events.read(1.0)
    assert len(events.recoveries) == 1


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    events = DriverEvents(tmp_path / "metrics.jsonl")
    events.path.write_bytes(line("starting", steps=100) + RECOVERED)
    events.read(1.0)
    events.path.write_bytes(line("starting", steps=7))
    events.read(2.0)
    assert events.total_steps == 7


def test_a_driver_that_resumed_makes_steps_again(tmp_path: Path) -> None:
    events = DriverEvents(tmp_path / "metrics.jsonl")
    events.path.write_bytes(line("resumed", step=30) + line("finished", duplicates_dropped=4))
    events.read(1.0, reached=42)
    assert [(r.action, r.steps_replayed) for r in events.recoveries] == [("resume", 12)]
    assert events.duplicates_dropped == 4


def recovery(seen_at_s: float, total_s: float, action: str = "replay") -> Recovery:
    return Recovery(
        seen_at_s=seen_at_s, cause="", action=action, step=1, steps_replayed=0, total_s=total_s,
        split=() if action == "resume" else (0.0,) * 4,
    )  # fmt: skip


def struck(at_s: float, role: Role, kind: Kind | None = None) -> Struck:
    return Struck(at_s, kind or role, role)


def test_recoveries_belong_to_the_strikes_nearest_to_their_begin() -> None:
    strikes = [struck(1.0, "shard"), struck(4.9, "shard")]
    one, other = recovery(5.0, 3.9), recovery(9.0, 4.0)
    assert match(strikes, [one, other]) == [one, other]


def test_what_a_recovery_did_decides_between_two_at_once() -> None:
    strikes = [struck(1.0, "worker"), struck(1.0, "shard")]
    replaced, replayed = recovery(3.0, 2.0, "replace_worker"), recovery(3.1, 2.0)
    assert match(strikes, [replayed, replaced]) == [replaced, replayed]
    assert match(strikes, [replaced, replayed]) == [replaced, replayed]


def test_one_recovery_may_be_about_two_at_once() -> None:
    both = recovery(3.0, 2.0, "rollback")
    assert match([struck(1.0, "worker"), struck(1.0, "shard")], [both]) == [both, both]


def test_a_resume_belongs_to_the_last_driver_that_was_killed() -> None:
    strikes = [struck(1.0, "driver"), struck(50.0, "driver"), struck(51.0, "shard")]
    resumed = recovery(140.0, 0.0, "resume")
    assert match(strikes, [resumed]) == [None, resumed, None]


def test_a_kill_is_more_likely_the_reason_than_a_cut() -> None:
    strikes = [struck(1.0, "shard"), struck(2.0, "shard", "cut")]
    found = recovery(4.0, 2.5)
    assert match(strikes, [found]) == [found, None]


def test_no_strike_is_blamed_for_what_was_before_it_or_long_after() -> None:
    assert match([struck(10.0, "shard")], [recovery(5.0, 1.0)]) == [None]
    assert match([struck(10.0, "shard")], [recovery(500.0, 1.0)]) == [None]
    assert match([], [recovery(5.0, 1.0)]) == []


def test_a_record_says_when_the_driver_noticed() -> None:
    record = RoundRecord(round=1, recoveries=[recovery(5.0, 3.5)])
    record.faults.append(
        FaultRecord(
            number=1, round=1, struck_at_s=1.25, at_s=1.0, version=3, moment="random",
            strike=Strike("shard", Victim("shard", 0)),
        )
    )  # fmt: skip
    assert record.faults[0].noticed_after_s is None
    record.put_down()
    assert record.faults[0].noticed_after_s == pytest.approx(0.25)


def view(
    version: int, *, process: str = "a", dropped: int = 0, cut: int | None = None
) -> ShardView:
    return ShardView(process, version, dropped, cut)


def test_a_version_is_what_all_shards_have() -> None:
    watch = Watch()
    watch.see([view(3), view(2, process="b")], 1.0)
    assert (watch.version, watch.reached, watch.stepped) == (2, 2, False)
    watch.see([view(5), None], 2.0)
    assert (watch.version, watch.reached) == (None, 2)
    watch.see([view(0), view(0, process="c")], 3.0)  # rolled back
    assert (watch.version, watch.reached, watch.advanced_at_s) == (0, 2, 1.0)
    watch.see([view(3), view(3, process="c")], 4.0)
    assert (watch.reached, watch.stepped, watch.advanced_at_s) == (3, True, 4.0)


def test_duplicates_of_all_processes_are_counted_once() -> None:
    watch = Watch()
    watch.see([view(1, dropped=2), view(1, process="b", dropped=1)], 1.0)
    watch.see([view(2, dropped=5), None], 2.0)
    watch.see([view(3, dropped=5), view(1, process="c", dropped=4)], 3.0)
    assert watch.duplicates_dropped() == 5 + 1 + 4
    assert watch.duplicates_dropped(at_end=12) == 1 + 12
    assert watch.duplicates_dropped(at_end=0) == 10


def test_a_snapshot_is_being_written_from_its_cut_on() -> None:
    watch = Watch()
    for version, cut, cutting in [(8, None, False), (9, 10, False), (10, 10, True), (12, 10, True)]:
        watch.see([view(version, cut=cut)], 1.0)
        assert watch.cutting is cutting


def test_a_boundary_between_two_looks_is_a_snapshot_too() -> None:
    watch = Watch(snapshot_every=10)
    seen = []
    for version in (8, 9, 11, 12, 31, None, 32, 41):
        watch.see([None if version is None else view(version)], 1.0)
        seen.append(watch.cutting)
    assert seen == [False, False, True, False, True, False, False, True]
