"""Options of async mode, and variants that save bytes, in a job's configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ps.errors import ConfigError
from tests.support.jobs import every_optimizer_job
from workers.config import ClusterConfig, DataConfig, OutputConfig, TrainConfig

JOB = every_optimizer_job(Path("examples.parquet"))


def test_async_takes_its_options() -> None:
    train = TrainConfig(mode="async", lookahead=1, max_staleness=1, cached_rows=10, cache_max_age=2)
    assert train.max_staleness == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "async"}, r"max_staleness must be at least lookahead \(0\).*got None"),
        ({"mode": "async", "lookahead": 2, "max_staleness": 1}, r"at least lookahead \(2\).*got 1"),
        (
            {"mode": "async", "max_staleness": 0, "reduction": "sum"},
            "reduction sum is for mode sync",
        ),
        ({"max_staleness": 1}, "max_staleness is for mode async"),
        ({"cached_rows": 5, "cache_max_age": 1}, "cached_rows is for mode async"),
        ({"cache_max_age": 1}, "go together, got 0 and 1"),
        ({"mode": "async", "max_staleness": 0, "cached_rows": 5}, "go together, got 5 and 0"),
        (
            {"mode": "async", "max_staleness": 0, "cached_rows": -5, "cache_max_age": 1},
            "cached_rows must be at least 0, got -5",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)


def test_a_sequence_is_not_combined_on_shards() -> None:
    recents = replace(JOB.tables["recents"], combine_on="shard")
    with pytest.raises(ConfigError, match=r"table 'recents'.*max_sequence_length"):
        replace(JOB, tables={**JOB.tables, "recents": recents}).embedding_spec()


def test_shards_that_combine_leave_no_rows_to_cache() -> None:
    users = replace(JOB.tables["users"], combine_on="shard")
    train = replace(JOB.train, mode="async", max_staleness=1, cached_rows=5, cache_max_age=1)
    with pytest.raises(ConfigError, match=r"users\.combine_on: shard leaves no rows to cache"):
        replace(JOB, tables={**JOB.tables, "users": users}, train=train).embedding_spec()


def test_prefetch_and_the_metrics_of_every_step_are_checked() -> None:
    with pytest.raises(ConfigError, match="prefetch must be at least 0, got -1"):
        DataConfig(train=Path("x"), label="y", prefetch=-1)
    with pytest.raises(ConfigError, match="metrics_every_step needs `metrics`"):
        OutputConfig(metrics_every_step=True)
    assert ClusterConfig(transport="tcp", pin_shards=False).transport == "tcp"
