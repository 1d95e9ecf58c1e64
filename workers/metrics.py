"""Final metrics over labels and predictions of a whole data set, in float64."""

from __future__ import annotations

import numpy as np

from ps.ragged import F32


def rmse(labels: F32, predictions: F32) -> float:
    """√ mean (prediction - label)²."""
    return float(np.sqrt(np.mean(np.square(predictions.astype(np.float64) - labels))))


def auc(labels: F32, scores: F32) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half.

    Exact, from ranks (Mann-Whitney U); NaN if there is only one class.
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2.0)[inverse]
    positive = labels > 0.5
    num_positive = int(positive.sum())
    num_negative = labels.size - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    u = ranks[positive].sum() - num_positive * (num_positive + 1) / 2.0
    return float(u / (num_positive * num_negative))


def log_loss(labels: F32, logits: F32) -> float:
    """Mean binary cross-entropy of logits."""
    x = logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, x) - labels * x))


def evaluate(
    loss: str, labels: F32, predictions: F32, clip: tuple[float, ...] | None
) -> dict[str, float]:
    """`rmse` for `mse`; `auc` and `log_loss` for `bce`."""
    if loss == "bce":
        return {"auc": auc(labels, predictions), "log_loss": log_loss(labels, predictions)}
    if clip is not None:
        predictions = predictions.clip(clip[0], clip[1])
    return {"rmse": rmse(labels, predictions)}
