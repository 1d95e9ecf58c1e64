"""MovieLens -> Parquet: one row per rating, with side features and the user's training history.

Columns (those of side files only if the file is there):

- `user`, `item` int64: ml-100k, ml-1m: raw id - 1. ml-latest: index in the sorted raw ids rated.
- `rating` float32, `liked` float32 (1.0 if rating >= 4), `timestamp` int64 (seconds).
- `genres` list<int64>; `year` int64 bucket of the "(1995)" in the title.
- `age` int64 bucket (see `movielens_sides.AGES`), `gender`, `occupation` int64; 0 is unknown.
- `history` list<int64>: items the user rated in the training rows, oldest first, never the row's
  own item, so that training rows look like test rows. `history_rating` list<float32> beside it.
- `rated` list<int64>: what the user gave to which item in the training rows, as one id
  `item * levels + level`; `raters` list<int64>: what the item got from which user, as
  `user * levels + level`. Never the row's own rating. Levels are the 5 stars, or 10 half stars.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ps.errors import DataError
from workers.prepare import movielens_files as files
from workers.prepare import movielens_sides as sides
from workers.prepare.history import Ratings, TrainHistory, slices_of
from workers.prepare.output import (
    OutputFolder,
    check_split_options,
    list_column,
    row_group_rows_for,
    schema_of,
)
from workers.prepare.report import ColumnReport, PrepareReport

I64 = npt.NDArray[np.int64]

LIKED_FROM = 4.0
_CHUNK_ROWS = 65_536


def prepare_movielens(
    source: Path,
    out: Path,
    *,
    split: str = "random",
    test_fraction: float | None = None,
    seed: int = 0,
    max_history: int = 50,
    history_rating: bool = False,
    max_ratings: int = 0,
    shuffle: bool = True,
    row_group_rows: int | None = None,
) -> PrepareReport:
    """Read a MovieLens folder and write a data set folder.

    Args:
        source: The unpacked release: ml-100k, ml-1m, ml-20m, ml-25m or ml-latest.
        out: Folder to write; an earlier data set there is replaced at the end.
        split: `random`, `time` (the last ratings are the test rows) or, for ml-100k, one of
            `u1`..`u5`, `ua`, `ub`.
        test_fraction: Share of test rows in [0, 1), None for 0.1; a named split brings its own and
            takes none.
        seed: Seed of the random split and of the order of the training rows.
        max_history: Most recent training items kept per row; 0 writes no history column.
        history_rating: Also write the ratings of the history, for use as weights.
        max_ratings: Most recent training ratings in `rated` and `raters`; 0 writes neither.
        shuffle: Write training rows in a seeded random order. Most files are sorted by user, which
            makes bad batches. Test rows stay in file order.
        row_group_rows: Rows per Parquet row group; None picks 65,536 or, for small data, less.

    Raises:
        DataError: No known format, a malformed line, a bad option, or `out` must not be replaced.
    """
    _check_options(split, max_history, history_rating, max_ratings)
    if test_fraction is not None and split in files.NAMED_SPLITS:
        raise DataError(
            f"test_fraction is {test_fraction}, but split '{split}' has its own test rows"
        )
    test_fraction = 0.1 if test_fraction is None else test_fraction
    check_split_options(test_fraction, seed)
    source, out = Path(source), Path(out)
    layout = files.detect_format(source)
    options = {"split": split, "test_fraction": test_fraction, "shuffle": shuffle}
    options |= {"max_history": max_history, "history_rating": history_rating}
    options["max_ratings"] = max_ratings
    with OutputFolder(out, source=source / "any") as folder:
        data = _load(source, layout, split, test_fraction, seed)
        rows = _RowMaker(data)
        if max_history:
            rows.add_history(max_history, history_rating)
        if max_ratings:
            rows.add_ratings(max_ratings, half_stars=layout.has_header or _has_halves(data))
        train = _shuffled(data.train, seed) if shuffle else data.train
        rows.write_split(folder, "train", train, row_group_rows)
        rows.write_split(folder, "test", data.test, row_group_rows)
        _write_vocabularies(folder, data)
        report = PrepareReport(
            name=source.resolve().name,
            kind=layout.kind,
            out=out,
            seed=seed,
            columns=rows.columns,
            options=options,
            **_findings(data),
        )
        folder.commit(report)
    return report


def _check_options(split: str, max_history: int, history_rating: bool, max_ratings: int) -> None:
    if split not in (allowed := ("random", "time", *files.NAMED_SPLITS)):
        raise DataError(f"split is '{split}', wanted one of {', '.join(allowed)}")
    if max_history < 0:
        raise DataError(f"max_history is {max_history}, wanted 0 (no history) or more")
    if max_ratings < 0:
        raise DataError(f"max_ratings is {max_ratings}, wanted 0 (no such columns) or more")
    if history_rating and max_history == 0:
        raise DataError(
            "history_rating is on but max_history is 0, wanted max_history of 1 or more"
        )


@dataclass(frozen=True, slots=True)
class _Data:
    """A release in memory, with dense ids."""

    train: Ratings
    test: Ratings
    raw_users: I64
    raw_items: I64
    users: sides.UserSide | None
    items: sides.ItemSide | None
    unlisted: dict[str, int]


def _load(
    source: Path, layout: files.RatingFormat, split: str, test_fraction: float, seed: int
) -> _Data:
    if split in files.NAMED_SPLITS:
        base, test_path = files.named_split_files(source, layout, split)
        train, test = files.read_ratings(base, layout), files.read_ratings(test_path, layout)
    else:
        ratings = files.read_ratings(files.rating_file(source, layout), layout)
        in_test = _test_mask(ratings, split, test_fraction, seed)
        train, test = ratings.take(~in_test), ratings.take(in_test)
    user_rows = sides.read_users(source, layout.kind)
    item_rows = sides.read_items(source, layout.kind)
    user_ids = [row.raw_id for row in user_rows or ()]
    item_ids = [row.raw_id for row in item_rows or ()]
    raw_users = _raw_ids(layout, train.user, test.user, user_ids)
    raw_items = _raw_ids(layout, train.item, test.item, item_ids)

    def dense(part: Ratings) -> Ratings:
        user = files.dense_ids(part.user, raw_users)
        item = files.dense_ids(part.item, raw_items)
        return Ratings(user, item, part.rating, part.timestamp)

    users = sides.user_side(user_rows, raw_users, layout.kind) if user_rows else None
    items = sides.item_side(item_rows, raw_items, layout.kind) if item_rows else None
    unlisted = {}
    if user_rows:
        unlisted["users_not_in_side_file"] = len(set(raw_users.tolist()) - set(user_ids))
    if item_rows:
        unlisted["items_not_in_side_file"] = len(set(raw_items.tolist()) - set(item_ids))
    return _Data(dense(train), dense(test), raw_users, raw_items, users, items, unlisted)


def _raw_ids(layout: files.RatingFormat, train: I64, test: I64, listed: list[int]) -> I64:
    """Raw id of every dense id, sorted."""
    if layout.has_header:
        return np.union1d(train, test)
    last = max(int(train.max()), int(test.max(initial=0)), max(listed, default=0))
    return np.arange(1, last + 1)


def _test_mask(
    ratings: Ratings, split: str, test_fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    num_test = round(len(ratings) * test_fraction)
    if split == "time":
        order = np.argsort(ratings.timestamp, kind="stable")
    else:
        order = np.random.default_rng([seed, 0]).permutation(len(ratings))
    mask = np.zeros(len(ratings), np.bool_)
    mask[order[len(order) - num_test :]] = True
    if mask.all():
        raise DataError(
            f"test_fraction {test_fraction} of {len(ratings)} rows leaves none to train"
        )
    return mask


def _has_halves(data: _Data) -> bool:
    """ml-10m has half stars in the format of ml-1m."""
    return any(bool((part.rating % 1).any()) for part in (data.train, data.test))


def _shuffled(ratings: Ratings, seed: int) -> Ratings:
    return ratings.take(np.random.default_rng([seed, 1]).permutation(len(ratings)))


class _RowMaker:
    """Builds the output columns of any slice of ratings, chunk by chunk."""

    def __init__(self, data: _Data) -> None:
        num_users, num_items = len(data.raw_users), len(data.raw_items)
        self._train = data.train
        self._num_users, self._num_items = num_users, num_items
        self.columns = {
            "user": ColumnReport(type="int64", vocabulary_size=num_users, table="user"),
            "item": ColumnReport(type="int64", vocabulary_size=num_items, table="item"),
            "rating": ColumnReport(type="float32"),
            "liked": ColumnReport(type="float32"),
            "timestamp": ColumnReport(type="int64"),
        }
        self._makers: dict[str, Callable[[Ratings], Any]] = {
            "user": lambda part: part.user,
            "item": lambda part: part.item,
            "rating": lambda part: part.rating,
            "liked": lambda part: (part.rating >= LIKED_FROM).astype(np.float32),
            "timestamp": lambda part: part.timestamp,
        }
        if data.items:
            self._add_items(data.items)
        if data.users:
            self._add_users(data.users)

    def add_history(self, max_history: int, with_rating: bool) -> None:
        """Add the columns `history` and, if asked for, `history_rating`."""
        history = TrainHistory(self._train.user, self._train.item, self._train, self._num_users)

        def items(part: Ratings) -> Any:
            item, _, splits = history.of_rows(part.user, part.item, max_history)
            return list_column(item, splits)

        def ratings(part: Ratings) -> Any:
            _, rating, splits = history.of_rows(part.user, part.item, max_history)
            return list_column(rating, splits)

        self._add_bag("history", self._num_items, "item", items)
        if with_rating:
            self.columns["history_rating"] = ColumnReport(type="list<float32>")
            self._makers["history_rating"] = ratings

    def add_ratings(self, max_ratings: int, half_stars: bool) -> None:
        """Add the columns `rated` and `raters`."""
        levels, per_star = (10, 2) if half_stars else (5, 1)
        train = self._train
        of_user = TrainHistory(train.user, train.item, train, self._num_users)
        of_item = TrainHistory(train.item, train.user, train, self._num_items)

        def bag(history: TrainHistory, key: I64, other: I64) -> Any:
            others, rating, splits = history.of_rows(key, other, max_ratings)
            level = np.rint(rating * per_star).astype(np.int64) - 1
            return list_column(others * levels + level, splits)

        self._add_bag("rated", self._num_items * levels, "rated",
                      lambda part: bag(of_user, part.user, part.item))  # fmt: skip
        self._add_bag("raters", self._num_users * levels, "raters",
                      lambda part: bag(of_item, part.item, part.user))  # fmt: skip

    def _add_bag(self, name: str, size: int, table: str, make: Callable[[Ratings], Any]) -> None:
        self.columns[name] = ColumnReport(type="list<int64>", vocabulary_size=size, table=table)
        self._makers[name] = make

    def _add_ids(self, name: str, size: int, make: Callable[[Ratings], I64]) -> None:
        self.columns[name] = ColumnReport(type="int64", vocabulary_size=size, table=name)
        self._makers[name] = make

    def _add_users(self, users: sides.UserSide) -> None:
        self._add_ids("age", len(sides.AGES), lambda part: users.age[part.user])
        self._add_ids("gender", len(sides.GENDERS), lambda part: users.gender[part.user])
        size = len(users.occupations)
        self._add_ids("occupation", size, lambda part: users.occupation[part.user])

    def _add_items(self, items: sides.ItemSide) -> None:
        def genres(part: Ratings) -> Any:
            start = items.genre_splits[part.item]
            position, splits = slices_of(start, items.genre_splits[part.item + 1] - start)
            return list_column(items.genres[position], splits)

        self._add_bag("genres", max(1, len(items.genre_names)), "genre", genres)
        if items.year.any():
            self._add_ids("year", sides.NUM_YEARS, lambda part: items.year[part.item])

    def write_split(
        self, folder: OutputFolder, split: str, ratings: Ratings, row_group_rows: int | None
    ) -> None:
        """Write one row per rating to `<split>.parquet`."""
        group = row_group_rows_for(len(ratings), row_group_rows)
        writer = folder.split_writer(split, schema_of(self.columns), group)
        for start in range(0, len(ratings), _CHUNK_ROWS):
            part = ratings.take(np.arange(start, min(start + _CHUNK_ROWS, len(ratings))))
            columns = {name: make(part) for name, make in self._makers.items()}
            writer.write(columns)


def _write_vocabularies(folder: OutputFolder, data: _Data) -> None:
    users: dict[str, Any] = {"user": np.arange(len(data.raw_users)), "raw_id": data.raw_users}
    if side := data.users:
        users |= {"age": side.age, "gender": side.gender, "occupation": side.occupation}
    items: dict[str, Any] = {"item": np.arange(len(data.raw_items)), "raw_id": data.raw_items}
    titles = data.items.title if data.items else [None] * len(data.raw_items)
    items["title"] = pa.array(titles, pa.string())
    if data.items:
        items["genres"] = list_column(data.items.genres, data.items.genre_splits)
        items["year"] = data.items.year
    folder.write_vocabulary("users", users)
    folder.write_vocabulary("items", items)


def _findings(data: _Data) -> dict[str, Any]:
    """What the data say, as fields of the report."""
    return {
        "rows": {"train": len(data.train), "test": len(data.test)},
        "counters": _counters(data),
        "notes": _notes(data),
        "labels": _labels(data),
    }


def _counters(data: _Data) -> dict[str, int]:
    train, test = data.train, data.test
    num_items = len(data.raw_items)
    pairs = np.concatenate([train.user, test.user]) * num_items
    pairs += np.concatenate([train.item, test.item])
    seen_user = np.bincount(train.user, minlength=len(data.raw_users)) > 0
    seen_item = np.bincount(train.item, minlength=num_items) > 0
    return {
        "repeated_user_item_pairs": len(pairs) - len(np.unique(pairs)),
        "test_rows_of_users_not_in_train": int((~seen_user[test.user]).sum()),
        "test_rows_of_items_not_in_train": int((~seen_item[test.item]).sum()),
        **data.unlisted,
    }


def _notes(data: _Data) -> tuple[str, ...]:
    notes = []
    if data.users is None:
        notes.append("no user side file: no columns age, gender, occupation")
    if data.items is None:
        notes.append("no movie side file: no columns genres, year; no titles")
    return tuple(notes)


def _labels(data: _Data) -> dict[str, tuple[str, ...]]:
    labels: dict[str, tuple[str, ...]] = {}
    if data.items:
        labels["genres"] = data.items.genre_names
    if data.users:
        labels["age"], labels["gender"] = sides.AGES, sides.GENDERS
        labels["occupation"] = data.users.occupations
    return labels
