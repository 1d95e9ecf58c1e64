"""Every optimizer option acts on real shard actors; a failing computation ends in a clear error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ps.client import ShardClient
from ps.custom_optimizer import CustomOptimizer
from ps.dense_variables import DenseValues
from ps.errors import ConfigError
from ps.group import ShardGroup
from ps.ragged import F32
from ps.shard import ShardSpec
from tests.support.goldens import (
    DENSE,
    G1,
    GOLDENS,
    TOUCHED,
    Golden,
    golden_spec,
    push_step,
    run_goldens,
    shard_spec,
)
from tests.support.jobs import every_optimizer_job, write_examples
from workers.job import train

pytestmark = [pytest.mark.actors, pytest.mark.usefixtures("ray_session")]


@contextmanager
def started(spec: ShardSpec, name: str) -> Iterator[tuple[ShardGroup, list[ShardClient]]]:
    """Shard actors, and one client per worker, all of them in this process."""
    group = ShardGroup(spec, {"CPU": 1.0}, name)
    try:
        group.wait_ready(120.0)
        dense = DenseValues(trainable=DENSE, slots={}, state=np.zeros(0, dtype=np.float32))
        layout = group.set_dense(dense)
        access = group.access()
        transports = [access.connect(w, "auto", False, 60.0) for w in range(spec.num_workers)]
        yield (
            group,
            [ShardClient(spec.embedding, layout, t, w) for w, t in enumerate(transports)],
        )
    finally:
        group.stop()


def fails_at_step_1(gradient: Any, table: Any, slots: Any, rate: Any, hyper: Any) -> Any:
    if rate == 1:
        raise ArithmeticError("no such rate")
    return table - gradient


def rate_is_step(step: int) -> float:
    return float(step)


def test_every_option_gives_the_published_numbers() -> None:
    with started(shard_spec(golden_spec(), 2, 2), "goldens") as (group, clients):

        def table_of(name: str, version: int) -> Sequence[F32]:
            state = group.read_table(name, version)
            return [state.rows, *state.slots.values()]

        run_goldens(clients, table_of, GOLDENS)


def test_a_failing_computation_reaches_the_worker_and_changes_no_row() -> None:
    custom = CustomOptimizer(fails_at_step_1, rate_is_step)
    goldens = [
        Golden("plain", None, [[G1], [G1]], {}),
        Golden("custom", custom, [[G1], [G1]], {}),
    ]
    with started(shard_spec(golden_spec(goldens), 1, 1), "failing") as (group, clients):
        push_step(clients, goldens, 0)
        clients[0].flush()
        before = group.read_table("plain", 1)
        assert before.rows[TOUCHED[0]].tolist() == pytest.approx([0.95, -1.9])
        push_step(clients, goldens, 1)
        with pytest.raises(ConfigError, match=r"table 'custom', step 1: .*no such rate"):
            clients[0].flush()
        after = group.read_table("plain", 1)
        assert after.rows.tobytes() == before.rows.tobytes()


def test_a_job_ends_with_the_error_of_its_computation(tmp_path: Path) -> None:
    job = every_optimizer_job(write_examples(tmp_path))
    custom = replace(job.tables["users"], optimizer=CustomOptimizer(fails_at_step_1, rate_is_step))
    with pytest.raises(ConfigError, match=r"table 'users', step 1: .*ArithmeticError"):
        train(replace(job, tables=job.tables | {"users": custom}))
