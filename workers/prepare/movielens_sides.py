"""Reads the user and movie files of the MovieLens releases into one array entry per dense id.

In every column id 0 means "unknown", except in genres, where an unknown movie has an empty list.
"""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ps.errors import DataError
from workers.prepare.movielens_files import dense_ids

I64 = npt.NDArray[np.int64]
Row = TypeVar("Row")

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip
AGE_STARTS = (0, 18, 25, 35, 45, 50, 56)
"""First age in years of buckets 1, 2, ...: those of ml-1m, used for ml-100k too."""
AGES = ("unknown", "0-17", "18-24", "25-34", "35-44", "45-49", "50-55", "56+")
GENDERS = ("unknown", "F", "M")
FIRST_YEAR, LAST_YEAR = 1900, 2049
NUM_YEARS = LAST_YEAR - FIRST_YEAR + 2
"""Bucket 0 is unknown, bucket 1 is 1900 or earlier, ..., bucket 150 is 2049 or later."""
OCCUPATIONS_1M = (
    "unknown", "other", "academic/educator", "artist", "clerical/admin", "college/grad student",
    "customer service", "doctor/health care", "executive/managerial", "farmer", "homemaker",
    "K-12 student", "lawyer", "programmer", "retired", "sales/marketing", "scientist",
    "self-employed", "technician/engineer", "tradesman/craftsman", "unemployed", "writer",
)  # fmt: skip

_NO_GENRES = "(no genres listed)"
_YEAR = re.compile(r"\((\d{4})(?:[-\u2013]\d{0,4})?\)")


@dataclass(frozen=True, slots=True)
class UserSide:
    """What the release says of its users; entry i belongs to dense user i."""

    age: I64
    gender: I64
    occupation: I64
    occupations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ItemSide:
    """What the release says of its movies; entry i belongs to dense item i."""

    title: list[str | None]
    year: I64
    genres: I64
    genre_splits: I64
    genre_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UserRow:
    """One line of a user file."""

    raw_id: int
    age: int
    gender: str
    occupation: str


@dataclass(frozen=True, slots=True)
class ItemRow:
    """One line of a movie file."""

    raw_id: int
    title: str
    genres: tuple[str, ...]


def year_bucket(title: str) -> int:
    """Bucket of the last year in parentheses, 0 if there is none.

    >>> year_bucket("Toy Story (1995)"), year_bucket("unknown")
    (96, 0)
    """
    years = _YEAR.findall(title)
    return min(max(int(years[-1]), FIRST_YEAR), LAST_YEAR) - FIRST_YEAR + 1 if years else 0


def read_users(source: Path, kind: str) -> list[UserRow] | None:
    """Lines of the user file; None if the release or the folder has none."""
    if kind == "ml-100k":
        return _read(source / "u.user", "|", "id|age|gender|occupation|zip", 5, _user_100k)
    if kind == "ml-1m":
        return _read(source / "users.dat", "::", "id::gender::age::occupation::zip", 5, _user_1m)
    return None


def read_items(source: Path, kind: str) -> list[ItemRow] | None:
    """Lines of the movie file; None if the folder has none."""
    if kind == "ml-100k":
        wanted = "id|title|date|video date|url|19 genre flags"
        return _read(source / "u.item", "|", wanted, 24, _item_100k)
    if kind == "ml-1m":
        return _read(source / "movies.dat", "::", "id::title::genres", 3, _item_1m)
    return _read(source / "movies.csv", ",", "movieId,title,genres", 3, _item_1m)


def _user_100k(fields: Sequence[str]) -> UserRow:
    return UserRow(int(fields[0]), int(fields[1]), fields[2], fields[3])


def _user_1m(fields: Sequence[str]) -> UserRow:
    code = int(fields[3])
    if not 0 <= code < len(OCCUPATIONS_1M) - 1:
        raise ValueError(f"occupation {code} is not in [0, {len(OCCUPATIONS_1M) - 1})")
    return UserRow(int(fields[0]), int(fields[2]), fields[1], OCCUPATIONS_1M[1 + code])


def _item_100k(fields: Sequence[str]) -> ItemRow:
    flags = [int(flag) for flag in fields[5:]]
    genres = tuple(name for name, flag in zip(GENRES_100K, flags, strict=True) if flag)
    return ItemRow(int(fields[0]), fields[1], genres)


def _item_1m(fields: Sequence[str]) -> ItemRow:
    genres = tuple(name for name in fields[2].split("|") if name and name != _NO_GENRES)
    return ItemRow(int(fields[0]), fields[1], genres)


def _read(
    path: Path, separator: str, wanted: str, num_fields: int, make: Callable[[Sequence[str]], Row]
) -> list[Row] | None:
    if not path.exists():
        return None
    rows = []
    for number, fields in _lines(path, separator):
        if len(fields) != num_fields:
            raise DataError(
                f"{path}:{number}: {len(fields)} fields in {fields}; wanted {num_fields}: {wanted}"
            )
        try:
            rows.append(make(fields))
        except (ValueError, IndexError) as error:
            raise DataError(f"{path}:{number}: {error} in {fields}; wanted {wanted}") from error
    return rows


def _lines(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    is_csv = separator == ","
    encoding = "utf-8-sig" if is_csv else "latin-1"
    with path.open(encoding=encoding, errors="replace", newline="") as file:
        if is_csv:
            reader = csv.reader(file)
            next(reader, None)  # header
            yield from ((reader.line_num, fields) for fields in reader if fields)
            return
        for number, line in enumerate(file, start=1):
            if text := line.rstrip("\r\n"):
                yield number, text.split(separator)


def user_side(rows: list[UserRow], raw_ids: I64, kind: str) -> UserSide:
    """Columns for every dense user; users that the file does not list are unknown."""
    seen = sorted({row.occupation for row in rows})
    occupations = OCCUPATIONS_1M if kind == "ml-1m" else ("unknown", *seen)
    code = {name: i for i, name in enumerate(occupations)}
    dense = dense_ids(np.array([row.raw_id for row in rows], np.int64), raw_ids)
    known = dense >= 0
    ages = np.searchsorted(AGE_STARTS, [row.age for row in rows], side="right")
    genders = [GENDERS.index(row.gender) if row.gender in GENDERS else 0 for row in rows]
    columns = np.zeros((3, len(raw_ids)), np.int64)
    values = np.array([ages, genders, [code[row.occupation] for row in rows]], np.int64)
    columns[:, dense[known]] = values[:, known]
    return UserSide(columns[0], columns[1], columns[2], occupations)


def item_side(rows: list[ItemRow], raw_ids: I64, kind: str) -> ItemSide:
    """Columns for every dense item; items that the file does not list are unknown."""
    names = GENRES_100K if kind == "ml-100k" else tuple(sorted({g for r in rows for g in r.genres}))
    code = {name: i for i, name in enumerate(names)}
    dense = dense_ids(np.array([row.raw_id for row in rows], np.int64), raw_ids)
    titles: list[str | None] = [None] * len(raw_ids)
    genres: list[list[int]] = [[] for _ in raw_ids]
    year = np.zeros(len(raw_ids), np.int64)
    for index, row in zip(dense.tolist(), rows, strict=True):
        if index >= 0:
            titles[index] = row.title
            genres[index] = [code[name] for name in row.genres]
            year[index] = year_bucket(row.title)
    splits = np.zeros(len(raw_ids) + 1, np.int64)
    np.cumsum([len(ids) for ids in genres], out=splits[1:])
    flat = np.array([i for ids in genres for i in ids], np.int64)
    return ItemSide(titles, year, flat, splits, names)
