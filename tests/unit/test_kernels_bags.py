"""Bags in another order equal their plain twin, for arrays of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.kernels.bags import take_bags
from ps.ragged import F32, I64
from tests.support import reference as twin
from tests.support.guarded import guarded
from tests.support.reference import same_bits
from tests.support.strategies import frozen, unaligned

KINDS = {
    "plain": lambda a: a,
    "frozen": frozen,
    "unaligned": unaligned,
    "start": lambda a: guarded(a, "start"),
    "end": lambda a: guarded(a, "end"),
}
CANARY = 7


def check(kind: Any, lengths: list[int], order: list[int], weighted: bool) -> None:
    splits = np.cumsum([0, *lengths])
    ids = np.arange(splits[-1]) << 33
    weights = np.arange(splits[-1] if weighted else 0, dtype=np.float32) / 3
    places = np.array(order, dtype=np.int64)
    want_ids, want_weights = twin.take_bags(ids, splits, weights, places)
    ids_out: I64 = np.full(want_ids.size + 1, CANARY)
    weights_out: F32 = np.full(want_weights.size + 1, CANARY, dtype=np.float32)
    inputs = [kind(a) for a in (ids, splits, weights, places)]
    take_bags(*inputs, ids_out[:-1], weights_out[:-1])
    np.testing.assert_array_equal(ids_out, [*want_ids, CANARY])
    assert same_bits(weights_out[:-1], want_weights)
    assert weights_out[-1] == CANARY


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 5) | st.sampled_from([40, 200]), max_size=80),
    seed=st.integers(0, 2**32 - 1),
    weighted=st.booleans(),
    kind=st.sampled_from(list(KINDS)),
)
def test_mixed_bags_equal_their_twin(
    lengths: list[int], seed: int, weighted: bool, kind: str
) -> None:
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    check(KINDS[kind], lengths, order, weighted)


@pytest.mark.parametrize("kind", list(KINDS))
def test_bags_may_be_left_out_and_come_again(kind: str) -> None:
    check(KINDS[kind], [3, 0, 1, 100], [3, 3, 0, 1], weighted=True)
