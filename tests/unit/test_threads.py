"""Work cut between threads has the bits of work on one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps import threads as subject
from ps.errors import ConfigError
from ps.kernels.combine import COMBINER_CODES
from ps.ragged import Ragged
from ps.threads import ONE_THREAD, Threads, combine, gather_rows
from tests.support.reference import same_bits
from tests.support.strategies import bags

ROWS = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def _small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "MIN_PART_BYTES", 1)
        yield


@given(size=st.integers(0, 1000), minimum=st.integers(0, 50), count=st.integers(1, 9))
def test_parts_cover_the_range_once(size: int, minimum: int, count: int) -> None:
    parts = Threads(count).parts(size, minimum)
    assert [i for part in parts for i in range(size)[part]] == list(range(size))
    assert 1 <= len(parts) <= count
    if len(parts) > 1:
        assert min(part.stop - part.start for part in parts) >= minimum


@settings(max_examples=60)
@given(bag=bags(6), combiner=st.sampled_from(sorted(COMBINER_CODES)), count=st.integers(2, 5))
def test_combining_on_threads_gives_the_same_bits(bag: Ragged, combiner: str, count: int) -> None:
    weights = np.zeros(0, dtype=np.float32) if bag.weights is None else bag.weights
    outs = [np.full((bag.num_examples, 8), np.nan, dtype=np.float32) for _ in range(2)]
    for threads, out in zip((ONE_THREAD, Threads(count)), outs, strict=True):
        code = COMBINER_CODES[combiner]
        combine(threads, ROWS, bag.ids, bag.row_splits, weights, code, out)
    assert same_bits(*outs)


def test_gathering_on_threads_gives_the_same_bits() -> None:
    index = np.random.default_rng(1).integers(0, 6, size=1000)
    out = np.empty((1000, 8), dtype=np.float32)
    gather_rows(Threads(3), ROWS, index, out)
    assert same_bits(out, ROWS[index])


def test_calls_run_at_the_same_time_and_all_end_before_an_error_is_raised() -> None:
    meeting, ended = threading.Barrier(3, timeout=30), []

    def call(number: int) -> None:
        meeting.wait()
        ended.append(number)
        if number:
            raise ValueError(f"call {number}")

    with pytest.raises(ValueError, match="call 1"):
        Threads(3).run([lambda n=n: call(n) for n in range(3)])
    assert sorted(ended) == [0, 1, 2]


def test_no_threads_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        Threads(0)
