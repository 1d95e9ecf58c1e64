"""MovieLens-like rows of any number, with ratings that a low-rank model can learn.

    score = mean + b_user + b_item + p_user . q_item       (4 factors)
    rating = 1 + number of thresholds 1.5, 2.5, 3.5, 4.5 below score + logistic noise

Biases and factors are hashes of (seed, id), so no table is held in memory. With logistic noise the
best prediction is known exactly: `E[rating | score] = 1 + sum_t sigmoid((score - t) / scale)`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ps.errors import DataError
from workers.prepare import movielens_sides as sides
from workers.prepare.history import keep_where, slices_of
from workers.prepare.mixing import mix, stream_key, uniform
from workers.prepare.output import list_column
from workers.prepare.planted import (
    BLOCK_ROWS,
    F64,
    Block,
    StreamingAuc,
    block_generator,
    centred_parts,
    sigmoid,
)
from workers.prepare.report import ColumnReport
from workers.prepare.zipf import ZipfSampler, from_generator

I64 = npt.NDArray[np.int64]

MEAN_SCORE = 3.5
NOISE_SCALE = 0.45
_RANK = 4
_THRESHOLDS = (1.5, 2.5, 3.5, 4.5)
_FACTOR_STD = 0.47
_BIAS_STD = 0.3
_SIDE_STD = 0.15
_NUM_GENRES = len(sides.GENRES_100K)
_FIRST_TIMESTAMP = 978_307_200
_KIND = 1
_USER, _ITEM, _USER_BIAS, _ITEM_BIAS, _SIDE, _USER_SIDE, _ITEM_SIDE, _HISTORY = range(8)


@dataclass(frozen=True, slots=True, kw_only=True)
class MovieLensShape:
    """Options of the MovieLens-like kind."""

    num_users: int = 6_040
    """Vocabulary size of `user`."""
    num_items: int = 3_706
    """Vocabulary size of `item` and `history`."""
    user_exponent: float = 0.6
    """Zipf exponent of users; activity of people is less skewed than popularity of films."""
    max_history: int = 0
    """Most items in `history`; 0 writes no such column."""
    history_rating: bool = False
    """Also write the ratings of the history."""

    def __post_init__(self) -> None:
        if self.max_history < 0:
            raise DataError(f"max_history is {self.max_history}, wanted 0 (no history) or more")
        if self.history_rating and self.max_history == 0:
            raise DataError("history_rating is on but max_history is 0, wanted 1 or more")


class PlantedTaste:
    """Who likes what: pure functions of (seed, user id, item id)."""

    def __init__(self, seed: int) -> None:
        self._keys = [stream_key(seed, _KIND, stream) for stream in range(8)]
        effects = centred_parts(np.arange(8 * 64), self._keys[_SIDE], 1)[0]
        self._side_effects = _SIDE_STD * effects.reshape(8, 64)

    def score(self, user: I64, item: I64) -> F64:
        """The rating before noise and rounding, without bounds."""
        age, _, occupation = self.user_sides(user)
        total = MEAN_SCORE + self.affinity(user, item)
        total += _BIAS_STD * centred_parts(user, self._keys[_USER_BIAS], 1)[0]
        total += _BIAS_STD * centred_parts(item, self._keys[_ITEM_BIAS], 1)[0]
        total += self._side_effects[0, age] + self._side_effects[1, occupation]
        total += self._side_effects[2, self.first_genre(item)]
        return total

    def affinity(self, user: I64, item: I64) -> F64:
        """Dot product of the user's and the item's factors."""
        user_parts = centred_parts(user, self._keys[_USER], _RANK)
        item_parts = centred_parts(item, self._keys[_ITEM], _RANK)
        total = user_parts[0] * item_parts[0]
        for left, right in zip(user_parts[1:], item_parts[1:], strict=True):
            total += left * right
        return total * _FACTOR_STD**2

    def rating(self, score: F64, uniform_noise: F64) -> npt.NDArray[np.float32]:
        """Ratings 1..5 for scores; `uniform_noise` in [0, 1) becomes logistic noise."""
        noise = np.clip(uniform_noise, 1e-12, 1 - 1e-12)
        noisy = score + NOISE_SCALE * np.log(noise / (1 - noise))
        return np.clip(np.floor(noisy + 0.5), 1, 5).astype(np.float32)

    def user_sides(self, user: I64) -> tuple[I64, I64, I64]:
        """Age bucket, gender and occupation of users, none unknown."""
        bits = (mix(user, self._keys[_USER_SIDE]) >> np.uint64(1)).astype(np.int64)
        age = 1 + bits % (len(sides.AGES) - 1)
        gender = 1 + (bits >> 20) % 2
        return age, gender, 1 + (bits >> 40) % (len(sides.OCCUPATIONS_1M) - 1)

    def first_genre(self, item: I64) -> I64:
        """The genre that shifts the score."""
        return (mix(item, self._keys[_ITEM_SIDE]) % np.uint64(_NUM_GENRES)).astype(np.int64)

    def genres(self, item: I64) -> tuple[I64, I64]:
        """One to three distinct genres per item, and row splits."""
        bits = (mix(item, self._keys[_ITEM_SIDE]) >> np.uint64(32)).astype(np.int64)
        step = 1 + bits % (_NUM_GENRES - 1)
        place, splits = slices_of(np.zeros_like(item), 1 + (bits >> 16) % 3)
        count = np.diff(splits)
        genre = np.repeat(self.first_genre(item), count) + place * np.repeat(step, count)
        return genre % _NUM_GENRES, splits

    def year(self, item: I64) -> I64:
        """Year bucket of items: 1950 to 1999."""
        bits = (mix(item, self._keys[_ITEM_SIDE]) >> np.uint64(16)).astype(np.int64)
        return 1 + 50 + (bits & 0xFFFF) % 50

    def history(self, user: I64, items: ZipfSampler, max_history: int) -> tuple[I64, I64]:
        """One to `max_history` distinct items per user and row splits.

        For every entry two items are drawn and the one that the user likes more is kept, so that a
        history tells something about its user.
        """
        key = self._keys[_HISTORY]
        length = 1 + (uniform(user, key) * max_history).astype(np.int64)
        place, splits = slices_of(np.zeros_like(user), length)
        owner = np.repeat(user, length)
        seat = owner * (2 * max_history) + 2 * place

        def candidate(second: int) -> I64:
            def draw(attempt: int, positions: I64) -> F64:
                return uniform(seat[positions] + second, stream_key(key, attempt))

            return items.sample(draw, len(seat))

        first, second = candidate(0), candidate(1)
        better = self.affinity(owner, second) > self.affinity(owner, first)
        chosen = np.where(better, second, first)
        row = np.repeat(np.arange(len(user)), length)
        fresh = np.zeros(len(chosen), np.bool_)
        fresh[np.unique(row * items.num_ids + chosen, return_index=True)[1]] = True
        return chosen[fresh], keep_where(fresh, splits)


class MovieLensGenerator:
    """Makes MovieLens-like rows block by block."""

    def __init__(
        self, shape: MovieLensShape, seed: int, test_fraction: float, exponent: float
    ) -> None:
        self._shape = shape
        self._seed = seed
        self._test_fraction = test_fraction
        self._users = ZipfSampler(shape.num_users, shape.user_exponent)
        self._items = ZipfSampler(shape.num_items, exponent)
        self._taste = PlantedTaste(seed)
        self._auc = StreamingAuc()
        self._test_sums = np.zeros(4)  # rows, squared errors, ratings, squared ratings
        self.columns = _columns(shape)
        self.labels: dict[str, tuple[str, ...]] = {
            "genres": sides.GENRES_100K,
            "age": sides.AGES,
            "gender": sides.GENDERS,
            "occupation": sides.OCCUPATIONS_1M,
        }
        self.notes: tuple[str, ...] = ("a user may rate an item more than once",)
        if shape.max_history:
            self.notes += ("a history depends on the user alone, not on the rows of this data set",)

    def block(self, index: int, num_rows: int) -> Block:
        """The first `num_rows` rows of a block; its test rows are added to the score."""
        rng = block_generator(self._seed, _KIND, 0, index)
        draw = from_generator(rng)
        user = self._users.sample(draw, BLOCK_ROWS)[:num_rows]
        item = self._items.sample(draw, BLOCK_ROWS)[:num_rows]
        score = self._taste.score(user, item)
        rating = self._taste.rating(score, rng.random(BLOCK_ROWS)[:num_rows])
        in_test = (rng.random(BLOCK_ROWS) < self._test_fraction)[:num_rows]
        age, gender, occupation = self._taste.user_sides(user)
        columns: dict[str, Any] = {
            "user": user,
            "item": item,
            "rating": rating,
            "liked": (rating >= 4).astype(np.float32),
            "timestamp": _FIRST_TIMESTAMP + index * BLOCK_ROWS + np.arange(num_rows),
            "genres": list_column(*self._taste.genres(item)),
            "year": self._taste.year(item),
            "age": age,
            "gender": gender,
            "occupation": occupation,
        }
        if self._shape.max_history:
            columns |= self._history_columns(user, item)
        self._score_test(score[in_test], rating[in_test].astype(np.float64))
        return Block(columns, in_test)

    def noise_floor(self) -> dict[str, float]:
        """RMSE and AUC (for `liked`) of the planted model; RMSE of always saying the mean."""
        num, errors, total, squares = self._test_sums.tolist()
        if num == 0:
            return {}
        floor = {
            "test_rmse": (errors / num) ** 0.5,
            "test_rmse_of_mean": max(0.0, squares / num - (total / num) ** 2) ** 0.5,
        }
        auc = self._auc.value()
        return floor if auc is None else {**floor, "test_auc_of_liked": auc}

    def _history_columns(self, user: I64, item: I64) -> dict[str, Any]:
        distinct, row = np.unique(user, return_inverse=True)
        items, user_splits = self._taste.history(distinct, self._items, self._shape.max_history)
        start = user_splits[row]
        position, splits = slices_of(start, user_splits[row + 1] - start)
        others = items[position] != np.repeat(item, np.diff(splits))
        position, splits = position[others], keep_where(others, splits)
        columns = {"history": list_column(items[position], splits)}
        if self._shape.history_rating:
            owner = np.repeat(distinct, np.diff(user_splits))
            noise = uniform(owner * self._items.num_ids + items, stream_key(self._seed, _HISTORY))
            rating = self._taste.rating(self._taste.score(owner, items), noise)
            columns["history_rating"] = list_column(rating[position], splits)
        return columns

    def _score_test(self, score: F64, rating: F64) -> None:
        steps = [sigmoid((score - threshold) / NOISE_SCALE) for threshold in _THRESHOLDS]
        error = 1.0 + np.sum(steps, axis=0) - rating
        self._test_sums += [len(rating), (error**2).sum(), rating.sum(), (rating**2).sum()]
        self._auc.add(steps[2], rating >= 4)


def _columns(shape: MovieLensShape) -> dict[str, ColumnReport]:
    sizes = {
        "year": sides.NUM_YEARS,
        "age": len(sides.AGES),
        "gender": len(sides.GENDERS),
        "occupation": len(sides.OCCUPATIONS_1M),
    }
    columns = {
        "user": ColumnReport(type="int64", vocabulary_size=shape.num_users, table="user"),
        "item": ColumnReport(type="int64", vocabulary_size=shape.num_items, table="item"),
        "rating": ColumnReport(type="float32"),
        "liked": ColumnReport(type="float32"),
        "timestamp": ColumnReport(type="int64"),
        "genres": ColumnReport(type="list<int64>", vocabulary_size=_NUM_GENRES, table="genre"),
    }
    for name, size in sizes.items():
        columns[name] = ColumnReport(type="int64", vocabulary_size=size, table=name)
    if shape.max_history:
        columns["history"] = ColumnReport(
            type="list<int64>", vocabulary_size=shape.num_items, table="item"
        )
    if shape.history_rating:
        columns["history_rating"] = ColumnReport(type="list<float32>")
    return columns
