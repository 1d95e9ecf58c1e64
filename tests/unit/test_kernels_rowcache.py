"""A cache's kernels equal their plain twins, bit for bit, and write nothing but their outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.kernels.rowcache import copy_rows, split_fresh
from ps.ragged import I64
from tests.support import reference_cache as twin
from tests.support.guarded import EVERY_KIND, Canaries, guarded

C = 6
few = settings(max_examples=40)


def i64(values: list[int]) -> I64:
    return np.array(values, dtype=np.int64)


@few
@given(
    kept=st.lists(st.integers(-1, C - 1), max_size=12),
    pulled_at=st.lists(st.integers(-1, 5), min_size=C, max_size=C),
    oldest=st.integers(-3, 5),
    used=st.lists(st.booleans(), min_size=C, max_size=C),
)
def test_fresh_rows_are_split_from_the_others(
    kept: list[int], pulled_at: list[int], oldest: int, used: list[bool]
) -> None:
    """Outputs have room for one place per row, and not a byte more."""
    args = i64(kept), i64(pulled_at), oldest, np.array(used)
    fresh, missing, marks = twin.split_fresh(*args)
    for change, _ in EVERY_KIND:
        outputs = [guarded(a) for a in (args[3], np.zeros_like(args[0]), np.zeros_like(args[0]))]
        count = split_fresh(change(args[0]), change(args[1]), oldest, *outputs)
        assert count == fresh.size
        np.testing.assert_array_equal(outputs[0], marks)
        np.testing.assert_array_equal(outputs[1][:count], fresh)
        np.testing.assert_array_equal(outputs[2][: len(kept) - count], missing)


@few
@given(data=st.data(), dim=st.sampled_from([1, 17, 64]))
def test_copied_rows_equal_their_twin(data: Any, dim: int) -> None:
    num_rows = data.draw(st.integers(0, 12))
    check_copy(
        i64(data.draw(st.lists(st.integers(0, 6), min_size=num_rows, max_size=num_rows))),
        i64(data.draw(st.lists(st.integers(0, 4), min_size=num_rows, max_size=num_rows))),
        dim,
    )


@pytest.mark.parametrize("dim", [1, 64])
def test_many_copied_rows_equal_their_twin(dim: int) -> None:
    """More than are asked for ahead."""
    rng = np.random.default_rng(dim)
    check_copy(rng.integers(0, 7, 200), rng.integers(0, 5, 200), dim)


def check_copy(source: I64, target: I64, dim: int) -> None:
    """Any bits are copied as they are, NaN with all its payload."""
    raw = np.random.default_rng(1).integers(0, 1 << 32, (7, dim), dtype=np.uint32)
    rows, start = raw.view(np.float32), np.zeros((5, dim), dtype=np.float32)
    want = twin.copy_rows(rows, source, start, target)
    for change, offset in EVERY_KIND:
        out = Canaries((5, dim), offset=offset)
        out.array[...] = start
        copy_rows(change(rows), change(source), out.array, change(target))
        assert out.intact, "written outside the output"
        assert out.array.tobytes() == want.tobytes()
