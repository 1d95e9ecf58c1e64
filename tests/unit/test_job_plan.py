"""What is found out before a job starts any actor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ps.errors import ConfigError, ExportError, JobError
from tests.support.jobs import every_optimizer_job, with_ranks, with_recovery, write_examples
from tests.support.snapshots import small
from workers.jobplan import JobPlan, plan_job


def test_a_plan_counts_rows_and_steps(tmp_path: Path) -> None:
    plan = plan_job(every_optimizer_job(write_examples(tmp_path, rows=250)))
    assert (plan.train_rows, plan.test_rows, plan.steps_per_epoch) == (250, 250, 2)
    assert plan.total_steps == 4


def test_too_few_rows_for_one_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="119 rows do not fill one batch of 120"):
        plan_job(every_optimizer_job(write_examples(tmp_path, rows=119)))


def test_an_export_that_would_go_with_a_submitted_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = every_optimizer_job(write_examples(tmp_path))
    relative = replace(job, output=replace(job.output, export=Path("runs/export")))
    folder = tmp_path / "_ray_pkg_123"
    folder.mkdir()
    plan_job(relative)
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"output\.export: 'runs/export' would lie in Ray's copy"):
        plan_job(relative)


def test_an_export_root_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    job = every_optimizer_job(write_examples(tmp_path))
    (tmp_path / "file").write_text("")
    nowhere = replace(job, output=replace(job.output, export=tmp_path / "file" / "export"))
    with pytest.raises(ExportError, match="export"):
        plan_job(nowhere)
    fine = replace(job, output=replace(job.output, export=tmp_path / "new" / "export"))
    plan_job(fine)
    assert not (tmp_path / "new").exists(), "looking leaves nothing behind"


def test_steps_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    for rows in (250, 251, 359, 360):
        job = every_optimizer_job(write_examples(tmp_path / str(rows), rows=rows))
        plans = [plan_job(with_ranks(job, ranks, 1)) for ranks in (1, 2, 3, 8, 120)]
        assert {plan.steps_per_epoch for plan in plans} == {rows // 120}


def durable(tmp_path: Path, name: str = "test") -> JobPlan:
    """The plan of a job of 4 steps."""
    job = replace(every_optimizer_job(write_examples(tmp_path, rows=250)), name=name)
    return plan_job(with_recovery(job, tmp_path / "snapshots"))


def test_a_durable_job_takes_its_own_snapshots_for_granted(tmp_path: Path) -> None:
    assert durable(tmp_path).last_step == 4
    small(tmp_path / "snapshots", step=3)
    assert durable(tmp_path).first_step == 0


def test_a_durable_job_lets_other_jobs_snapshots_be(tmp_path: Path) -> None:
    """It would remove them, being more than it keeps."""
    small(tmp_path / "snapshots", step=3)
    with pytest.raises(ConfigError, match=r"output\.snapshot: '.*step-000000003' is of job 'test'"):
        durable(tmp_path, name="other")


def test_a_last_snapshot_that_cannot_be_resumed_from_is_in_the_way(tmp_path: Path) -> None:
    small(tmp_path / "snapshots", step=4)
    with pytest.raises(ConfigError, match=r"step-000000004' already, of a run that cannot be res"):
        durable(tmp_path)
    job = every_optimizer_job(tmp_path / "examples.parquet")
    with pytest.raises(ConfigError, match=r"step-000000004' already, of another run"):
        plan_job(replace(job, output=replace(job.output, snapshot=tmp_path / "snapshots")))


def test_a_durable_job_does_not_start_from_where_its_own_snapshots_go(tmp_path: Path) -> None:
    job = every_optimizer_job(write_examples(tmp_path, rows=250))
    job = replace(job, train=replace(job.train, start_from=tmp_path / "snapshots" / "step-1"))
    with pytest.raises(ConfigError, match=r"train\.start_from: .*lies in output\.snapshot"):
        plan_job(with_recovery(job, tmp_path / "snapshots"))
