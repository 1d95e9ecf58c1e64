"""What is found out before a job starts any actor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ps.errors import ConfigError, ExportError, JobError
from tests.support.jobs import every_optimizer_job, write_examples
from workers.job import plan_job


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
