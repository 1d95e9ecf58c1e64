"""The place in the input: going on from it shows what would have come, and reads nothing before."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import ConfigError
from tests.support.jobs import every_optimizer_job, with_ranks, with_recovery, write_examples
from tests.support.reference import same_bits
from workers.batches import Batch, ExampleReader
from workers.config import DataConfig, FeatureEntry
from workers.jobplan import JobPlan, bunch_ends, check_cursor, cursor

FEATURES = {
    "user": FeatureEntry(table="t"),
    "items": FeatureEntry(table="t", weights="item_weights"),
}
ROWS = 230


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files with row groups of up to 100, so of 100, 7 and some more."""
    folder = tmp_path_factory.mktemp("cursor")
    for k, rows in enumerate((107, 120, 3)):
        write_examples(folder / str(k), rows=rows, seed=k)
    return folder


class CountingReader(ExampleReader):
    """Knows which pieces it read."""

    def _read(self, piece: Any) -> Batch:
        self.__dict__.setdefault("pieces", []).append(piece)
        return super()._read(piece)


def reader_of(data: Path, shuffle_rows: int, **arguments: Any) -> CountingReader:
    config = DataConfig(train=data, label="label", dense=("x",), shuffle_rows=shuffle_rows)
    return CountingReader(data, config, FEATURES, seed=3, **arguments)


def same_batches(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        same_bits(one, two)
        for x, y in zip(a, b, strict=True)
        for one, two in zip(arrays(x), arrays(y), strict=True)
    )


def arrays(batch: Batch) -> list[np.ndarray]:
    bags = [batch.bags["user"], batch.bags["items"]]
    weights = batch.bags["items"].weights
    return [batch.dense, batch.labels, batch.example_weights, weights,
            *(a for bag in bags for a in (bag.ids, bag.row_splits))]  # fmt: skip


@settings(max_examples=60)
@given(
    ranks=st.integers(1, 4),
    batch_size=st.integers(1, 40),
    shuffle_rows=st.sampled_from([0, 1, 30, 101, 150, 10_000]),
    epoch=st.integers(0, 2),
    ahead=st.integers(0, 1),
    at=st.floats(0, 1.2),
    rank=st.integers(0, 3),
)
def test_an_epoch_goes_on_at_any_batch(
    data: Path, ranks: int, batch_size: int, shuffle_rows: int, epoch: int, ahead: int,
    at: float, rank: int,
) -> None:  # fmt: skip
    options = {"worker": rank % ranks, "num_workers": ranks}
    whole = reader_of(data, shuffle_rows, **options)
    first_batch = int(at * whole.steps_per_epoch(batch_size))
    want = list(itertools.islice(whole.epoch(epoch, batch_size), first_batch, None))
    got = reader_of(data, shuffle_rows, ahead=ahead, **options)
    assert same_batches(list(got.epoch(epoch, batch_size, first_batch)), want)


@pytest.mark.parametrize("shuffle_rows", [0, 50])
def test_windows_before_the_place_are_not_read(data: Path, shuffle_rows: int) -> None:
    def pieces(first_batch: int) -> list[Any]:
        reader = reader_of(data, shuffle_rows)
        assert list(reader.epoch(0, 10, first_batch)) or first_batch == ROWS // 10
        return reader.__dict__.get("pieces", [])

    every = pieces(0)
    read = [pieces(first_batch) for first_batch in range(ROWS // 10 + 1)]
    assert len(every) > 4
    for some in read:
        assert some == every[len(every) - len(some) :], "the last ones, each once"
    sizes = [len(some) for some in read]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (len(every), 0)
    rows_left = [sum(p.stop - p.start for p in some) for some in read]
    for first_batch, rows in enumerate(rows_left[:-1]):
        assert rows - (ROWS - 10 * first_batch) < max(101, shuffle_rows + 100), (
            "one window too much"
        )


# --- what a snapshot keeps of it


def plan_of(resume_step: int = 25, **changes: Any) -> JobPlan:
    """Epochs of 10 steps from step 5 on, batches of 120."""
    job = every_optimizer_job(Path("examples.parquet"))
    values = {"train_rows": 1200, "test_rows": 0, "steps_per_epoch": 10, "first_step": 5, **changes}
    return JobPlan(**{"job": job, **values}, resume_step=resume_step)


def test_a_cursor_fits_the_run_that_it_is_of() -> None:
    kept = cursor(plan_of())
    assert kept == {
        "first_step": 5, "ranks": 2, "batch_size": 120, "seed": 11, "steps_per_epoch": 10,
        "train_rows": 1200,
    }  # fmt: skip
    for step in range(5, 26):
        check_cursor(kept, plan_of(resume_step=step))
    more_epochs = replace(plan_of().job, train=replace(plan_of().job.train, epochs=9))
    check_cursor(kept, plan_of(job=more_epochs))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 60, "train.batch_size: the snapshot of step 25 is of a run with 60, .* 120"),
        ("seed", 12, "seed: .* 12, this one has 11"),
        ("train_rows", 1201, "data.train: .* 1201, this one has 1200"),
        ("steps_per_epoch", 11, "data.train: .* 11"),
        ("first_step", 0, "train.start_from: .* 0, this one has 5"),
        ("seed", None, "seed: .* None"),
    ],
)
def test_a_cursor_of_another_run_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_cursor({**cursor(plan_of()), key: value}, plan_of())


def test_ranks_may_change_between_epochs_only() -> None:
    plan = plan_of()
    kept = cursor(replace(plan, job=with_ranks(plan.job, 6, 2)))
    for step in (5, 15, 25):
        check_cursor(kept, plan_of(resume_step=step))
    for step in (6, 14, 24):
        with pytest.raises(ConfigError, match=r"train\.ranks: .*set train\.ranks to 6"):
            check_cursor(kept, plan_of(resume_step=step))
    check_cursor(kept, plan_of(resume_step=6, job=with_ranks(plan.job, 6, 3)))
    train = replace(plan.job.train, mode="async", max_staleness=1)
    with pytest.raises(ConfigError, match=r"train\.ranks"):
        check_cursor(kept, plan_of(job=replace(plan.job, train=train)))


@pytest.mark.parametrize("first_step", [0, 1, 4, 7, 12])
@pytest.mark.parametrize("every", [1, 3, 4, 100])
def test_workers_stop_at_multiples_and_at_the_end(first_step: int, every: int) -> None:
    job = every_optimizer_job(Path("examples.parquet"))  # a report every 7 steps
    durable = with_recovery(job, "snapshots", snapshot_every=every)
    for chosen, multiples in ((job, [7]), (durable, [7, every])):
        ends = bunch_ends(plan_of(first_step=first_step, job=chosen))
        last = first_step + 20
        want = [s for s in range(first_step + 1, last + 1)
                if s == last or any(s % n == 0 for n in multiples)]  # fmt: skip
        assert ends == want


def test_a_run_resumes_no_earlier_than_it_begins() -> None:
    assert plan_of(resume_step=0).resume_step == 5
    assert plan_of(resume_step=7).resume_step == 7
