"""Final metrics against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.ragged import F32
from workers.metrics import auc, evaluate, log_loss, rmse

# Few different scores, so that there are ties.
PAIRS = st.lists(
    st.tuples(st.booleans(), st.sampled_from([-3.5, -1.0, 0.0, 0.25, 0.5, 7.0])), max_size=30
)


def f32(*values: float) -> F32:
    return np.array(values, dtype=np.float32)


@given(pairs=PAIRS)
def test_auc_is_the_chance_that_a_positive_scores_above_a_negative(
    pairs: list[tuple[bool, float]],
) -> None:
    positive = [score for label, score in pairs if label]
    negative = [score for label, score in pairs if not label]
    got = auc(f32(*(label for label, _ in pairs)), f32(*(score for _, score in pairs)))
    if not positive or not negative:
        assert math.isnan(got)
        return
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert got == pytest.approx(wins / (len(positive) * len(negative)), rel=1e-12)


def test_auc_of_many_examples_is_exact() -> None:
    n = 60_000  # pairs beyond 2^31
    labels, scores = f32(*([0.0] * n + [1.0] * n)), np.arange(2 * n, dtype=np.float32)
    assert auc(labels, scores) == 1.0
    assert auc(labels, -scores) == 0.0
    assert auc(labels, np.zeros_like(scores)) == 0.5


def test_rmse_is_computed_in_float64() -> None:
    assert rmse(f32(1, 2, 3), f32(1, 2, 6)) == pytest.approx(math.sqrt(3))
    assert rmse(f32(1, 2), f32(1, 2)) == 0.0
    assert rmse(f32(16_777_216), f32(16_777_218)) == 2.0
    big = np.full(100_000, 0.1, dtype=np.float32)
    assert rmse(np.zeros_like(big), big) == pytest.approx(float(np.float32(0.1)), rel=1e-12)


@given(pairs=PAIRS.filter(len))
def test_log_loss_is_that_of_the_sigmoid(pairs: list[tuple[bool, float]]) -> None:
    want = -np.mean(
        [
            math.log(1 / (1 + math.exp(-x))) if y else math.log(1 / (1 + math.exp(x)))
            for y, x in pairs
        ]
    )
    got = log_loss(f32(*(y for y, _ in pairs)), f32(*(x for _, x in pairs)))
    assert got == pytest.approx(want, rel=1e-9)


def test_log_loss_of_huge_logits_is_finite() -> None:
    assert log_loss(f32(1, 0), f32(1e30, -1e30)) == 0.0
    assert log_loss(f32(0), f32(1000)) == 1000.0


def test_each_loss_has_its_metrics() -> None:
    labels, predictions = f32(1, 0, 5), f32(0.5, -2, 9)
    assert set(evaluate("bce", f32(1, 0), f32(1, 0), None)) == {"auc", "log_loss"}
    assert evaluate("mse", labels, predictions, None) == {"rmse": rmse(labels, predictions)}


def test_predictions_are_cut_to_the_range_before_the_rmse() -> None:
    predictions = f32(-2, 3, 9)
    got = evaluate("mse", f32(1, 3, 5), predictions, (1.0, 5.0))
    assert got == {"rmse": 0.0}
    np.testing.assert_array_equal(predictions, [-2, 3, 9])
