"""In sync mode the final bits depend on neither shards, transport, timing nor the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.jobs import every_optimizer_job, with_lookahead, write_examples
from tests.support.runs import evaluated, train_steps
from workers.config import JobConfig
from workers.job import plan_job, running

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("examples"))


def final_bits(job: JobConfig) -> dict[str, bytes]:
    """Everything that a run ends with: rows, slots, dense values, their slots, and metrics."""
    plan = plan_job(job)
    with running(job) as run:
        train_steps(run, plan, ())
        bits = {"metrics": repr(evaluated(run, plan)).encode()}
        for table in job.tables:
            state = run.shards.read_table(table, plan.total_steps)
            bits[table] = state.rows.tobytes()
            bits |= {f"{table}/{name}": slot.tobytes() for name, slot in state.slots.items()}
            assert np.isfinite(state.rows).all()
        dense, slots, state_values = run.shards.read_dense(plan.total_steps)
        bits |= {"dense": dense.tobytes(), "state": state_values.tobytes()}
        bits |= {f"dense/{name}": slot.tobytes() for name, slot in slots.items()}
    return bits


@pytest.fixture(scope="module")
def two_shards(examples: Path, ray_session: None) -> dict[str, bytes]:
    return final_bits(every_optimizer_job(examples))


@pytest.fixture(scope="module")
def two_shards_ahead(examples: Path, ray_session: None) -> dict[str, bytes]:
    return final_bits(with_lookahead(every_optimizer_job(examples), 1))


def test_a_run_changes_every_array(examples: Path, two_shards: dict[str, bytes]) -> None:
    job = every_optimizer_job(examples)
    with running(job) as run:
        for table in job.tables:
            assert run.shards.read_table(table, 0).rows.tobytes() != two_shards[table]
        dense, _, state = run.shards.read_dense(0)
        assert dense.tobytes() != two_shards["dense"]
        assert state.tobytes() != two_shards["state"]


@pytest.mark.parametrize(
    ("shards", "transport"), [(2, "auto"), (2, "tcp"), (1, "arena"), (3, "auto"), (5, "tcp")]
)
def test_a_repeated_run_ends_with_the_same_bits_on_any_number_of_shards_and_transport(
    examples: Path, two_shards: dict[str, bytes], shards: int, transport: str
) -> None:
    job = every_optimizer_job(examples, shards=shards, transport=transport)
    assert final_bits(job) == two_shards


@pytest.mark.parametrize(("shards", "transport"), [(1, "auto"), (3, "tcp"), (5, "arena")])
def test_the_same_is_true_at_lookahead_1(
    examples: Path, two_shards_ahead: dict[str, bytes], shards: int, transport: str
) -> None:
    job = every_optimizer_job(examples, shards=shards, transport=transport)
    assert final_bits(with_lookahead(job, 1)) == two_shards_ahead


def test_and_at_lookahead_2(examples: Path, two_shards_ahead: dict[str, bytes]) -> None:
    ends = [
        final_bits(with_lookahead(every_optimizer_job(examples, shards=k, transport=t), 2))
        for k, t in ((1, "arena"), (2, "tcp"))
    ]
    assert ends[0] == ends[1] != two_shards_ahead


def test_lookahead_is_really_one_step_behind(
    two_shards: dict[str, bytes], two_shards_ahead: dict[str, bytes]
) -> None:
    assert two_shards["users"] != two_shards_ahead["users"]
