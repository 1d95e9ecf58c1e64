"""Synthetic data sets: deterministic, Zipf-distributed, and learnable up to a known floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ps.errors import DataError
from workers.prepare import prepare_synthetic
from workers.prepare.criteo import CATEGORICAL_NAMES, INTEGER_NAMES
from workers.prepare.planted import BLOCK_ROWS, StreamingAuc
from workers.prepare.synthetic_criteo import CriteoShape
from workers.prepare.synthetic_movielens import NOISE_SCALE, PlantedTaste
from workers.prepare.zipf import ZipfSampler, from_generator


def read(out: Path, split: str) -> dict[str, Any]:
    table = pq.read_table(out / f"{split}.parquet")
    return {
        name: table.column(name).to_pylist()
        if str(table.schema.field(name).type).startswith("list")
        else table.column(name).to_numpy()
        for name in table.column_names
    }


def exact_auc(score: np.ndarray[Any, Any], positive: np.ndarray[Any, Any]) -> float:
    """Mann-Whitney with average ranks for ties."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    rank = (last - (counts - 1) / 2)[inverse]
    num_positive = int(positive.sum())
    num_pairs = num_positive * (len(score) - num_positive)
    return float((rank[positive].sum() - num_positive * (num_positive + 1) / 2) / num_pairs)


@pytest.mark.parametrize(("num_ids", "exponent"), [(1, 1.05), (7, 1.0), (200, 1.05), (500, 0.5)])
def test_zipf_ranks_follow_the_exact_distribution(num_ids: int, exponent: float) -> None:
    num_draws = 200_000
    draw = from_generator(np.random.default_rng(5))
    counts = np.bincount(ZipfSampler(num_ids, exponent).sample_ranks(draw, num_draws))
    assert len(counts) <= num_ids
    expected = np.arange(1, num_ids + 1.0) ** -exponent
    expected *= num_draws / expected.sum()
    chi_square = float(
        ((np.pad(counts, (0, num_ids - len(counts))) - expected) ** 2 / expected).sum()
    )
    freedom = num_ids - 1
    assert chi_square <= freedom + 4 * (2 * freedom) ** 0.5


def test_zipf_ids_cover_a_huge_vocabulary_and_scatter_the_ranks() -> None:
    ids = ZipfSampler(100_000_000, 1.05).sample(from_generator(np.random.default_rng(0)), 50_000)
    assert ids.min() == 0
    assert 90_000_000 < ids.max() < 100_000_000
    assert np.bincount(ids // 10_000_000).min() > 100


@pytest.mark.parametrize("kind", ["movielens", "criteo"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    tmp_path: Path, kind: str
) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        prepare_synthetic(kind, tmp_path / name, rows=500, seed=seed)
    a, b, c = ((tmp_path / n / "train.parquet").read_bytes() for n in "abc")
    assert a == b != c


@pytest.mark.parametrize("kind", ["movielens", "criteo"])
def test_fewer_rows_are_a_prefix_of_more_rows(tmp_path: Path, kind: str) -> None:
    prepare_synthetic(kind, tmp_path / "few", rows=BLOCK_ROWS // 2, test_fraction=0)
    prepare_synthetic(kind, tmp_path / "many", rows=BLOCK_ROWS + 100, test_fraction=0)
    few, many = (pq.read_table(tmp_path / n / "train.parquet") for n in ("few", "many"))
    assert (few.num_rows, many.num_rows) == (BLOCK_ROWS // 2, BLOCK_ROWS + 100)
    assert many.slice(0, few.num_rows).equals(few)


def test_criteo_like_rows_have_the_columns_of_criteo(tmp_path: Path) -> None:
    report = prepare_synthetic("criteo", tmp_path / "out", rows=5000, total_vocabulary=10_000)
    assert list(report.columns) == ["label", *INTEGER_NAMES, *CATEGORICAL_NAMES]
    assert sum(report.vocabulary_sizes.values()) == 10_000
    assert sum(report.rows.values()) == 5000
    data = read(tmp_path / "out", "train")
    for name, size in report.vocabulary_sizes.items():
        assert data[name].min() >= 0
        assert data[name].max() < size
    for name in INTEGER_NAMES:
        assert data[name].dtype == np.float32
        assert data[name].min() == 0
    assert set(data["label"]) == {0.0, 1.0}
    assert 0.2 < data["label"].mean() < 0.3


@pytest.mark.parametrize("total", [52, 53, 1000, 33_762_577, 200_000_000])
@pytest.mark.parametrize("table_sizes", ["skewed", "equal"])
def test_table_sizes_sum_to_the_total(total: int, table_sizes: str) -> None:
    sizes = CriteoShape(total_vocabulary=total, table_sizes=table_sizes).vocabulary_sizes()
    assert sum(sizes) == total
    assert min(sizes) >= 2
    if table_sizes == "equal":
        assert max(sizes) - min(sizes) < 26
    elif total > 1000:
        assert sizes.index(max(sizes)) == 2
        assert max(sizes) > total / 4


def test_click_rates_per_id_predict_clicks_but_not_beyond_the_planted_auc(tmp_path: Path) -> None:
    report = prepare_synthetic("criteo", tmp_path / "out", rows=60_000, total_vocabulary=2_000)
    train, test = read(tmp_path / "out", "train"), read(tmp_path / "out", "test")
    score = np.zeros(len(test["label"]))
    for name, size in report.vocabulary_sizes.items():
        shown = np.bincount(train[name], minlength=size) + 20
        clicked = np.bincount(train[name], train["label"], minlength=size) + 5
        score += np.log(clicked / (shown - clicked))[test[name]]
    learned = exact_auc(score, test["label"] == 1)
    planted = report.noise_floor["test_auc"]
    assert 0.6 < learned < planted < 0.9


def test_movielens_like_rows_have_the_columns_of_movielens(tmp_path: Path) -> None:
    report = prepare_synthetic(
        "movielens",
        tmp_path / "out",
        rows=3000,
        num_users=200,
        num_items=100,
        max_history=8,
        history_rating=True,
    )
    names = "user item rating liked timestamp genres year age gender occupation"
    assert list(report.columns) == [*names.split(), "history", "history_rating"]
    data = read(tmp_path / "out", "train")
    assert set(np.unique(data["rating"])) <= {1, 2, 3, 4, 5}
    assert (data["liked"] == (data["rating"] >= 4)).all()
    assert (np.diff(data["timestamp"]) > 0).all()
    for name, size in report.vocabulary_sizes.items():
        flat = np.concatenate(data[name]) if isinstance(data[name], list) else data[name]
        assert 0 <= flat.min() <= flat.max() < size, name
    for genres in data["genres"]:
        assert 1 <= len(set(genres)) == len(genres) <= 3
    for item, history, ratings in zip(
        data["item"], data["history"], data["history_rating"], strict=True
    ):
        assert item not in history
        assert len(set(history)) == len(history) == len(ratings) <= 8


def test_the_planted_score_is_the_floor_in_dataset_json(tmp_path: Path) -> None:
    report = prepare_synthetic("movielens", tmp_path / "out", rows=40_000, seed=7)
    train, test = read(tmp_path / "out", "train"), read(tmp_path / "out", "test")
    score = PlantedTaste(7).score(test["user"], test["item"])
    best = 1 + sum(1 / (1 + np.exp(-(score - t) / NOISE_SCALE)) for t in (1.5, 2.5, 3.5, 4.5))
    floor = report.noise_floor
    assert np.sqrt(np.mean((best - test["rating"]) ** 2)) == pytest.approx(floor["test_rmse"])
    assert np.std(test["rating"]) == pytest.approx(floor["test_rmse_of_mean"])
    assert exact_auc(score, test["liked"] == 1) == pytest.approx(
        floor["test_auc_of_liked"], abs=1e-3
    )
    assert abs(np.mean(best - test["rating"])) < 0.05
    num_items = report.vocabulary_sizes["item"]
    mean = train["rating"].mean()
    count = np.bincount(train["item"], minlength=num_items) + 5
    offset = np.bincount(train["item"], train["rating"] - mean, minlength=num_items) / count
    by_item = np.sqrt(np.mean((mean + offset[test["item"]] - test["rating"]) ** 2))
    assert floor["test_rmse"] < by_item < floor["test_rmse_of_mean"]


def test_a_history_holds_what_its_user_likes_and_never_changes(tmp_path: Path) -> None:
    prepare_synthetic(
        "movielens", tmp_path / "out", rows=4000, seed=2, num_users=50, max_history=20
    )
    data = read(tmp_path / "out", "train")
    taste = PlantedTaste(2)
    whole: dict[int, set[int]] = {}
    for user, history in zip(data["user"], data["history"], strict=True):
        whole.setdefault(int(user), set()).update(history)
    for user, item, history in zip(data["user"], data["item"], data["history"], strict=True):
        assert whole[int(user)] - {int(item)} == set(history)
    pairs = [(user, item) for user, items in whole.items() for item in items]
    user, item = np.array(pairs).T.copy()
    assert taste.affinity(user, item).mean() > 0.05


def test_streaming_auc_agrees_with_the_exact_one() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(3000)
    positive = rng.random(3000) < probability
    auc = StreamingAuc()
    assert auc.value() is None
    for part in np.array_split(np.arange(3000), 4):
        auc.add(probability[part], positive[part])
    assert auc.value() == pytest.approx(exact_auc(probability, positive), abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("netflix", {}, "synthetic kind is 'netflix', wanted one of movielens, criteo"),
        ("criteo", {"rows": 0}, "rows is 0, wanted 1 or more"),
        ("criteo", {"seed": -1}, "seed is -1, wanted 0 or more"),
        ("criteo", {"num_users": 5}, "option num_users has no effect on kind 'criteo'"),
        ("movielens", {"table_sizes": "equal"}, "option table_sizes has no effect on kind"),
        ("criteo", {"table_sizes": "odd"}, "table_sizes is 'odd', wanted 'skewed' or 'equal'"),
        ("criteo", {"total_vocabulary": 51}, "total_vocabulary is 51, wanted 52 or more"),
        ("criteo", {"exponent": -1.0}, "Zipf exponent is -1.0"),
        ("movielens", {"num_users": 0}, "vocabulary size is 0"),
        ("movielens", {"history_rating": True}, "history_rating is on but max_history is 0"),
        ("movielens", {"test_fraction": 1.5}, "test_fraction is 1.5"),
        ("movielens", {"rows": 1, "test_fraction": 0.9999}, "all fell into the test split"),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare_synthetic(kind, tmp_path / "out", **{"rows": 100, **options})
    assert list(tmp_path.iterdir()) == []
