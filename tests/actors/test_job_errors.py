"""What goes wrong in an actor reaches the caller as one clear error, and leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from ps.config import SGD
from ps.errors import ConfigError, IdRangeError, JobError
from tests.support.jobs import BrokenRate, every_optimizer_job, write_examples
from tests.support.runs import train_steps
from workers.config import JobConfig
from workers.job import Progress, plan_job, running, train

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def job(examples: Path) -> JobConfig:
    return every_optimizer_job(examples, shards=1)


def living_actors() -> list[str]:
    return [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]


def test_an_id_out_of_range_names_feature_id_and_range(job: JobConfig, tmp_path: Path) -> None:
    table = pq.read_table(job.data.train)
    users = table["user"].to_pylist()
    users[777] = 300
    bad = tmp_path / "bad.parquet"
    pq.write_table(table.set_column(0, "user", pa.array(users)), bad)
    bad_job = replace(
        job,
        data=replace(job.data, train=bad),
        output=replace(job.output, export=tmp_path / "export"),
    )
    with pytest.raises(IdRangeError, match=r"feature 'user.*': id 300 is not in \[0, 300\)"):
        train(bad_job)
    assert not (tmp_path / "export").exists()
    assert living_actors() == []


def test_a_model_that_cannot_be_built_is_a_config_error(job: JobConfig) -> None:
    missing = replace(job, model=replace(job.model, build="no_such_module:build"))
    with pytest.raises(ConfigError, match="no_such_module"):
        train(missing)
    unknown = replace(job, model=replace(job.model, build="dlrn"))
    with pytest.raises(ConfigError, match="no model 'dlrn'; known: dlrm, two_tower"):
        train(unknown)
    params = replace(job, model=replace(job.model, params={"depth": 3}))
    with pytest.raises(ConfigError, match="unexpected keyword argument 'depth'"):
        train(params)
    assert living_actors() == []


def test_a_killed_shard_ends_the_job_with_an_error(job: JobConfig) -> None:
    class KillOne:
        def __init__(self, victim: object) -> None:
            self.victim = victim

        def progress(self, progress: Progress) -> None:
            ray.kill(self.victim)

    plan = plan_job(job)
    gone = r"actor|shard 0: the connection is gone"
    with pytest.raises(JobError, match=gone), running(job) as run:
        train_steps(run, plan, [KillOne(run.shards.handles[0])])
    assert living_actors() == []


def test_more_resources_than_the_cluster_has_is_an_error_at_the_deadline(job: JobConfig) -> None:
    greedy = replace(
        job,
        cluster=replace(job.cluster, shard_resources={"CPU": 1000.0}, start_timeout_s=3.0),
    )
    with pytest.raises(JobError, match="1 shards were not ready within 3 s"):
        train(greedy)


def test_workers_that_wait_for_a_tpu_say_so(job: JobConfig) -> None:
    waiting = replace(
        job, cluster=replace(job.cluster, worker_resources={"TPU": 4.0}, start_timeout_s=5.0)
    )
    with pytest.raises(JobError, match=r"2 of 2 workers had not set up after 5 s.*TPU"):
        train(waiting)


@pytest.mark.parametrize("bad_step", [3, 19])
@pytest.mark.timeout(60)  # below the job's own step_timeout_s
def test_a_step_that_a_shard_cannot_apply_ends_the_job_at_once(
    job: JobConfig, tmp_path: Path, bad_step: int
) -> None:
    users = replace(job.tables["users"], optimizer=SGD(BrokenRate(bad_step)))
    broken = replace(
        job,
        data=replace(job.data, test=None),
        tables=job.tables | {"users": users},
        output=replace(job.output, export=tmp_path / "export"),
    )
    with pytest.raises(JobError, match=f"no rate for step {bad_step}"):
        train(broken)
    assert not (tmp_path / "export").exists()
    assert living_actors() == []


def test_a_bunch_of_steps_may_take_longer_than_one_step_may(job: JobConfig) -> None:
    slow = replace(
        job,
        data=replace(job.data, test=None),
        train=replace(job.train, epochs=100, report_every=1000),
        cluster=replace(job.cluster, step_timeout_s=4.0),
    )
    assert train(slow).steps == 1000


def test_memory_can_be_asked_for(job: JobConfig) -> None:
    resources = {"CPU": 1.0, "memory": 1e8}
    asking = replace(
        job,
        train=replace(job.train, epochs=1),
        cluster=replace(job.cluster, shard_resources=resources, worker_resources=resources),
    )
    assert train(asking).steps == 10
