"""Reads the rating files of the MovieLens releases, whichever of three formats they are in.

`ml-100k` (tab-separated `u.data`, or only `u1.base`/`u1.test`), `ml-1m` (`ratings.dat`, `::`) and
`ml-latest` (`ratings.csv` with a header; also ml-20m, ml-25m). Formats are documented in the
README of each release at https://grouplens.org/datasets/movielens/. Ids stay raw here.

Files are parsed by pyarrow; only when it refuses a file is the file read again line by line, to
name the line.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from ps.errors import DataError
from workers.prepare.history import Ratings

NAMED_SPLITS = ("u1", "u2", "u3", "u4", "u5", "ua", "ub")
MIN_RATING, MAX_RATING = 0.5, 5.0
_FIELDS = ("user", "item", "rating", "timestamp")
_CSV_NAMES = ("userId", "movieId", "rating", "timestamp")


@dataclass(frozen=True, slots=True)
class RatingFormat:
    """How the lines of a rating file look."""

    kind: str
    separator: str
    has_header: bool = False
    max_id: int = 10_000_000
    """Largest raw id; where row i stands for id i + 1, a huge id would mean a huge table."""


ML_100K = RatingFormat("ml-100k", "\t")
ML_1M = RatingFormat("ml-1m", "::")
ML_LATEST = RatingFormat("ml-latest", ",", has_header=True, max_id=2**62)


def detect_format(source: Path) -> RatingFormat:
    """Which release a folder holds, from the names of its files."""
    if not source.is_dir():
        raise DataError(f"MovieLens source '{source}': it is no folder, wanted the unpacked folder")
    if (source / "u.data").exists() or any((source / f"{s}.base").exists() for s in NAMED_SPLITS):
        return ML_100K
    if (source / "ratings.dat").exists():
        return ML_1M
    if (source / "ratings.csv").exists():
        return ML_LATEST
    found = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
    raise DataError(
        f"MovieLens source '{source}': found {found}; wanted u.data or u1.base and u1.test"
        f" (ml-100k), ratings.dat (ml-1m) or ratings.csv (ml-latest, ml-20m, ml-25m)"
    )


def rating_file(source: Path, layout: RatingFormat) -> Path:
    """The file with all ratings of a release."""
    name = {"ml-100k": "u.data", "ml-1m": "ratings.dat", "ml-latest": "ratings.csv"}[layout.kind]
    path = source / name
    if not path.exists():
        raise DataError(
            f"MovieLens source '{source}': no file '{name}'; wanted it, or a named split such as"
            f" 'u1', whose files u1.base and u1.test hold the rows"
        )
    return path


def named_split_files(source: Path, layout: RatingFormat, split: str) -> tuple[Path, Path]:
    """Training and test file of a split that the release itself defines."""
    if layout is not ML_100K:
        raise DataError(
            f"split '{split}': {layout.kind} comes without named splits; wanted 'random' or 'time'"
        )
    paths = (source / f"{split}.base", source / f"{split}.test")
    for path in paths:
        if not path.exists():
            raise DataError(f"split '{split}': no file '{path}'; wanted {split}.base and .test")
    return paths


def read_ratings(path: Path, layout: RatingFormat) -> Ratings:
    """Read one rating file; ids stay as in the file.

    Raises:
        DataError: A line is malformed; the message names file and line.
    """
    try:
        table = _parse(path, layout)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise _name_bad_line(path, layout, str(error)) from error
    ratings = Ratings(*(table.column(i).to_numpy() for i in range(4)))
    if len(ratings) == 0:
        raise DataError(f"rating file '{path}': it holds no rows, wanted at least 1")
    if not _all_in_range(ratings, layout.max_id):
        raise _name_bad_line(path, layout, "a value is out of range")
    return ratings


def _parse(path: Path, layout: RatingFormat) -> Any:
    names = _CSV_NAMES if layout.has_header else _FIELDS
    types = (pa.int64(), pa.int64(), pa.float32(), pa.int64())
    source: Any = str(path)
    delimiter = layout.separator
    if len(delimiter) > 1:
        data = path.read_bytes()
        if b"\t" in data:
            raise pa.ArrowInvalid("the file holds a tab")
        source, delimiter = pa.BufferReader(data.replace(delimiter.encode(), b"\t")), "\t"
    return pacsv.read_csv(
        source,
        read_options=pacsv.ReadOptions(column_names=None if layout.has_header else list(names)),
        parse_options=pacsv.ParseOptions(
            delimiter=delimiter, quote_char='"' if layout.has_header else False
        ),
        convert_options=pacsv.ConvertOptions(
            column_types=dict(zip(names, types, strict=True)),
            include_columns=list(names),
            null_values=[],
        ),
    )


def _all_in_range(ratings: Ratings, max_id: int) -> bool:
    ids_fit = all(ids.min() >= 1 and ids.max() <= max_id for ids in (ratings.user, ratings.item))
    in_scale = (ratings.rating >= MIN_RATING) & (ratings.rating <= MAX_RATING)  # False for NaN
    return bool(ids_fit and in_scale.all())


def _name_bad_line(path: Path, layout: RatingFormat, parser_message: str) -> DataError:
    """The error for the first malformed line, found by reading the file once more."""
    wanted = layout.separator.join(_CSV_NAMES if layout.has_header else _FIELDS)
    columns = [0, 1, 2, 3]
    for number, fields in _raw_lines(path, layout):
        if layout.has_header and number == 1:
            if missing := [name for name in _CSV_NAMES if name not in fields]:
                return DataError(
                    f"{path}:1: header {fields} has no column '{missing[0]}'; wanted {wanted!r}"
                )
            columns = [fields.index(name) for name in _CSV_NAMES]
            width = len(fields)
            continue
        expected = width if layout.has_header else 4
        if len(fields) != expected:
            return DataError(
                f"{path}:{number}: {len(fields)} fields in {fields}; wanted {expected}: {wanted!r}"
            )
        if reason := _wrong_value([fields[i] for i in columns], layout.max_id):
            return DataError(f"{path}:{number}: {reason} in {fields}; wanted {wanted!r}")
    return DataError(f"rating file '{path}': {parser_message}; wanted lines {wanted!r}")


def _raw_lines(path: Path, layout: RatingFormat) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        if layout.has_header:
            reader = csv.reader(file)
            yield from ((reader.line_num, fields) for fields in reader if fields)
            return
        for number, line in enumerate(file, start=1):
            if text := line.rstrip("\r\n"):
                yield number, text.split(layout.separator)


def _wrong_value(fields: list[str], max_id: int) -> str | None:
    for name, text in zip(_FIELDS, fields, strict=True):
        try:
            value = float(text) if name == "rating" else int(text)
        except ValueError:
            return f"{name} is {text!r}, not a number,"
        if name in ("user", "item") and not 1 <= value <= max_id:
            return f"{name} id is {value}, not in [1, {max_id}],"
        if name == "rating" and not MIN_RATING <= value <= MAX_RATING:
            return f"rating is {value}, not in [{MIN_RATING:g}, {MAX_RATING:g}],"
    return None


def dense_ids(raw: np.ndarray[Any, Any], raw_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Index of each raw id in the sorted array `raw_ids`; -1 where it is not there.

    >>> dense_ids(np.array([30, 7, 10]), np.array([10, 20, 30])).tolist()
    [2, -1, 0]
    """
    if len(raw_ids) == 0:
        return np.full(len(raw), -1, np.int64)
    index = np.searchsorted(raw_ids, raw).astype(np.int64)
    index[index == len(raw_ids)] = 0
    index[raw_ids[index] != raw] = -1
    return index
