"""What `manta chaos` prints, and what it refuses."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from ps.errors import ConfigError
from tests.support.jobs import every_optimizer_job
from workers.chaos.commands import plan_of, shape_of, train_arguments
from workers.chaos.compare import Comparison, Difference
from workers.chaos.events import Recovery
from workers.chaos.plan import DEFAULT_KINDS, Strike, Targets, Victim
from workers.chaos.records import ChaosRecord, FaultRecord, RoundRecord
from workers.chaos.report import Lines, show, to_json
from workers.config import JobConfig
from workers.recovery_config import RecoveryConfig

SAME = Comparison(step=300, tables=5, slots=7, dense=40, numbers=9000, differences=())
OTHER = replace(SAME, differences=(Difference("table 'users', rows", "id 3, column 0", 2, 160),))


def fault(strike: Strike, at_s: float, after_s: float | None, **changes: object) -> FaultRecord:
    options = {"number": 1, "round": 1, "moment": "random", "version": 42} | changes
    return FaultRecord(
        strike=strike, struck_at_s=at_s, at_s=at_s, recovered_after_s=after_s, **options
    )


def record(comparison: Comparison | None = SAME, **changes: object) -> ChaosRecord:
    recovery = Recovery(
        seen_at_s=13.5, cause="shard 1 died", action="replay", step=42, steps_replayed=6,
        total_s=3.0, split=(1.0, 0.5, 0.25, 1.25),
    )  # fmt: skip
    one = RoundRecord(
        round=1, seconds=60.0, steps=300, duplicates_dropped=4, driver_starts=2, snapshots=9,
        recoveries=[recovery], comparison=comparison, **changes,
    )  # fmt: skip
    one.faults = [
        fault(Strike("shard", Victim("shard", 1)), 10.0, 3.75, moment="snapshot"),
        fault(Strike("pause", Victim("worker", 0), 1.5), 30.0, 1.75),
        fault(Strike("driver", Victim("driver"), 0.5), 40.0, None),
    ]
    one.put_down()
    return ChaosRecord(
        job="demo", durability="log", seed=3, kills_wanted=2, counts_kills=True,
        reference=RoundRecord(round=0, seconds=30.0, steps=300), rounds=[one],
    )  # fmt: skip


def shown(what: ChaosRecord) -> str:
    out = io.StringIO()
    show(what, Console(file=out))
    return out.getvalue()


def test_a_fault_is_one_line_in_a_plain_log() -> None:
    lines = shown(record()).splitlines()
    (shard,) = [line for line in lines if "shard 1" in line]
    for part in ("10.0", "kill", "snapshot", "42", "3.75", "replay", " 6"):
        assert part in shard
    assert "0.50 + 1.00 + 0.50 + 0.25 + 1.25" in shard
    (pause,) = [line for line in lines if "pause" in line and "worker" in line]
    assert "pause 1.5 s" in pause
    (driver,) = [line for line in lines if " driver " in line and "40.0" in line]
    assert "never" in driver
    assert "\x1b" not in "".join(lines)


def test_the_summary_counts() -> None:
    text = shown(record())
    for line in (
        "job: demo, durability log, seed 3",
        "undisturbed: 300 steps in 30.0 s",
        "kills: 2; faults: 1 driver, 1 pause, 1 shard",
        "drivers started: 2",
        "steps replayed: 6",
        "duplicates dropped: 4",
        "bit-identical: yes (5 tables, 7 slots, 40 dense numbers; 9,000 numbers at step 300)",
    ):
        assert line in text.splitlines()


def test_differences_are_shown() -> None:
    bad = record(OTHER)
    assert not bad.good
    text = shown(bad)
    assert "round 1: table 'users', rows: 2 of 160 numbers differ; first id 3, column 0" in text
    assert "bit-identical: NO (" in text


def test_a_failure_is_shown_with_its_reason() -> None:
    bad = record(None, failure="it had not ended", driver_failures=["error: [bold]no"])
    assert not bad.good
    text = shown(bad)
    assert "round 1 FAILED: it had not ended" in text
    assert "drivers that ended by themselves: 1; last: error: [bold]no" in text
    assert "bit-identical: unknown: a run did not end well" in text


def test_too_few_kills_are_not_good() -> None:
    assert record().good
    assert not replace_wanted(3).good


def replace_wanted(kills: int) -> ChaosRecord:
    whole = record()
    whole.kills_wanted = kills
    return whole


def test_the_report_as_json() -> None:
    document = orjson.loads(to_json(record(OTHER)))
    assert document["good"] is False
    assert document["kills"] == 2
    assert document["faults_by_kind"] == {"driver": 1, "pause": 1, "shard": 1}
    assert document["recovery_s"]["shard"] == {
        "count": 1, "median_s": 3.75, "p90_s": 3.75, "max_s": 3.75,
    }  # fmt: skip
    (one,) = document["rounds"]
    assert one["identical"] is False
    assert one["comparison"]["differences"][0]["count"] == 2
    assert one["faults"][0]["recovery"]["log_s"] == 0.25
    assert one["faults"][0]["noticed_after_s"] == 0.5
    assert one["faults"][2]["recovered_after_s"] is None


def test_faults_are_told_when_they_come() -> None:
    out = io.StringIO()
    Lines(Console(file=out)).struck(record().faults[0])
    assert " ".join(out.getvalue().split()) == (
        "round 1 10.0 s kill shard 1 at version 42 (during a snapshot)"
    )


def durable_job(**train: object) -> JobConfig:
    job = every_optimizer_job(Path("examples.parquet"))
    return replace(
        job,
        train=replace(job.train, **train),
        output=replace(job.output, snapshot=Path("snapshots")),
        recovery=RecoveryConfig(durability="log", snapshot_every=25, step_deadline_s=9.0),
    )


def plan(job: JobConfig, **changes: object) -> object:
    options = {"kills": 5, "seed": 1, "nodes": 1, "kinds": None, "mean_gap_s": 2.0,
               "deadline_s": None} | changes  # fmt: skip
    return plan_of(job, **options)


def test_a_plan_follows_the_job() -> None:
    found = plan(durable_job())
    assert found.targets == Targets(shards=2, workers=2, nodes=1)
    assert found.kinds == DEFAULT_KINDS
    assert (found.snapshot_every, found.step_deadline_s) == (25, 9.0)


@pytest.mark.parametrize(
    ("job", "changes", "message"),
    [
        (every_optimizer_job(Path("x")), {}, r"recovery\.durability: .* snapshot or log, got none"),
        (durable_job(mode="async", max_staleness=2), {}, r"train\.mode: chaos compares bits"),
        (durable_job(), {"mean_gap_s": 0.0}, "--mean-gap must be above 0"),
        (durable_job(), {"deadline_s": -1.0}, "--deadline must be above 0"),
        (durable_job(), {"kinds": "node"}, "needs --nodes 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    job: JobConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(job, **changes)


def test_more_threads_are_refused() -> None:
    job = durable_job()
    threads = replace(job, cluster=replace(job.cluster, threads_per_worker=2))
    with pytest.raises(ConfigError, match="threads_per_worker"):
        plan(threads)


def test_a_run_is_the_users_with_outputs_of_its_own() -> None:
    job = durable_job()
    arguments, outputs = train_arguments(job, Path("job.yaml"), ["train.epochs=3"])
    assert arguments == [
        "train", "job.yaml", "--set", "train.epochs=3", "--set", "output.export=null",
    ]  # fmt: skip
    assert outputs == {"snapshots": "output.snapshot", "metrics": "output.metrics"}
    logged = replace(job, recovery=replace(job.recovery, log=Path("log")))
    assert train_arguments(logged, Path("job.yaml"), [])[1]["log"] == "recovery.log"


def test_nodes_together_have_what_the_job_asks_for() -> None:
    job = every_optimizer_job(
        Path("x"), shards=3, workers=2, shard_resources={"CPU": 1.0, "memory": 100.0},
        worker_resources={"CPU": 2.0, "TPU": 4.0},
    )  # fmt: skip
    node = shape_of(job).node(2)
    assert node == {"num_cpus": 4 + 2, "num_gpus": 0, "memory": 300, "resources": {"TPU": 8.0}}
    assert shape_of(job).node(1)["num_cpus"] == 7 + 2
