"""Kernels that copy whole records, against NumPy, in arrays that end at a forbidden page."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from ps.kernels.records import (
    gather_records,
    patch_saved,
    save_records,
    scatter_records,
    split_records,
)
from ps.ragged import F32
from tests.support.guarded import guarded
from tests.support.reference import same_bits
from tests.support.strategies import frozen, unaligned

Edge = Literal["start", "end"]
WIDTHS = [(1, 1), (3, 1), (6, 3), (16, 1), (17, 1), (32, 2), (48, 3), (130, 2)]
"""(numbers in a record, arrays that they belong to)."""
V = 40


def records_of(width: int, edge: Edge) -> F32:
    bits = np.random.default_rng(width).integers(0, 2**32, size=(V, width), dtype=np.uint32)
    return guarded(bits.view(np.float32), edge)  # NaN, infinities and denormals among them


@pytest.mark.parametrize("edge", ["start", "end"])
@pytest.mark.parametrize(("width", "num_arrays"), WIDTHS)
def test_records_are_gathered_and_put_back(width: int, num_arrays: int, edge: Edge) -> None:
    records = records_of(width, edge)
    for rows in (np.array([3, 0, V - 1, 3]), np.zeros(0, dtype=np.int64)):
        index, wanted = guarded(rows, edge), records[rows]
        out = guarded(np.zeros((index.size, width), np.float32), edge)
        gather_records(records, index, out)
        assert same_bits(out, wanted)
        other = guarded(np.zeros((V, width), np.float32), edge)
        scatter_records(frozen(unaligned(wanted)), frozen(index), other)
        expected = np.zeros((V, width), np.float32)
        expected[index] = wanted
        assert same_bits(other, expected)


@pytest.mark.parametrize("edge", ["start", "end"])
@pytest.mark.parametrize(("width", "num_arrays"), WIDTHS)
def test_records_are_saved_once_and_taken_apart_as_they_were(
    width: int, num_arrays: int, edge: Edge
) -> None:
    rng = np.random.default_rng(width)
    records = records_of(width, edge)
    before, passed = records.copy(), 7
    places = guarded(np.zeros(V, np.uint32), edge)
    saved = guarded(np.zeros((V - passed, width), np.float32), edge)
    count, touched = 0, set[int]()
    for index in (rng.integers(0, V, size=9), np.zeros(0, np.int64), np.array([V - 1, V - 1, 0]),
                  np.arange(V)):  # fmt: skip
        count = save_records(records, guarded(index, edge), passed, places, count, saved)
        touched |= {int(row) for row in index if row >= passed}
        assert count == len(touched)
        records[index] = rng.normal(size=(index.size, width))
        out = guarded(np.zeros((num_arrays, V - passed, width // num_arrays), np.float32), edge)
        split_records(records, passed, out)
        patch_saved(places, saved, passed, out)
        assert same_bits(np.concatenate(list(out), axis=1), before[passed:])
    assert not places[:passed].any()
    assert sorted(places[passed:]) == list(range(1, V - passed + 1))


def test_without_saved_records_the_living_ones_are_taken_apart() -> None:
    records = records_of(6, "end")
    out = np.zeros((3, 10, 2), np.float32)
    split_records(records, 30, out)
    assert same_bits(np.concatenate(list(out), axis=1), records[30:])
