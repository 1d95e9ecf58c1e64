"""MovieLens folders in each of their formats, and the leave-one-out history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.errors import DataError
from workers.prepare import prepare_movielens
from workers.prepare.history import Ratings, TrainHistory

Rows = list[tuple[int, int, float, int]]


def make_rows(num_users: int = 12, num_items: int = 15, seed: int = 0) -> Rows:
    """About half of all user-item pairs, in random order; ids from 1."""
    rng = np.random.default_rng(seed)
    pairs = [(u, i) for u in range(1, num_users + 1) for i in range(1, num_items + 1)]
    chosen = rng.permutation(len(pairs))[: len(pairs) // 2]
    return [(*pairs[k], int(rng.integers(1, 6)), 1000 + int(rng.integers(0, 50))) for k in chosen]


def write_100k(folder: Path, rows: Rows, *, sides: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    write_tabs(folder / "u.data", rows)
    if sides:
        flags = ["0|1" + "|0" * 17, "0" * 1 + "|0|1|0|1" + "|0" * 14, "0" + "|0" * 18]
        titles = ["Toy Story (1995)", "Été, l' (1968) (V)", "unknown"]
        lines = [f"{i}|{titles[i % 3]}|01-Jan-1995||http://x|{flags[i % 3]}" for i in range(1, 18)]
        (folder / "u.item").write_text("\n".join(lines) + "\n", encoding="latin-1")
        users = ["1|7|M|writer|1", "2|18|F|artist|1", "3|56|M|artist|T8H1N", "4|49|F|other|1"]
        (folder / "u.user").write_text("\n".join(users) + "\n")
    return folder


def write_tabs(path: Path, rows: Rows) -> None:
    path.write_text("".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in rows))


def write_1m(folder: Path, rows: Rows) -> Path:
    folder.mkdir()
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in rows))
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::0::70072\n3::M::25::20::1\n")
    (folder / "movies.dat").write_text(
        "1::Misérables, Les (1995)::Drama|Musical\n17::Z: A Film (1969)::Drama\n", "latin-1"
    )
    return folder


def write_latest(folder: Path, rows: Rows) -> Path:
    folder.mkdir()
    lines = [f"{u * 10},{i * 7},{r - 0.5},{t}" for u, i, r, t in rows]
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *lines]))
    (folder / "movies.csv").write_text(
        'movieId,title,genres\n7,"American President, The (1995)",Comedy|Drama\n'
        '14,"He said ""hi"" (2006\u20132007)",(no genres listed)\n999,Unrated (1950),Western\n',
        encoding="utf-8",
    )
    return folder


def read(out: Path, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / f"{split}.parquet").to_pylist()
    return rows


def keys_of(rows: list[dict[str, Any]]) -> list[tuple[int, int, float, int]]:
    return [(r["user"] + 1, r["item"] + 1, r["rating"], r["timestamp"]) for r in rows]


def test_ml_100k_columns_types_and_sizes(tmp_path: Path) -> None:
    source = write_100k(tmp_path / "ml-100k", make_rows())
    report = prepare_movielens(source, tmp_path / "out", history_rating=True)
    schema = pq.read_schema(tmp_path / "out" / "train.parquet")
    types = {name: str(kind).replace("element: ", "") for name, kind in zip(
        schema.names, schema.types, strict=True
    )}  # fmt: skip
    assert types == {
        "user": "int64",
        "item": "int64",
        "rating": "float",
        "liked": "float",
        "timestamp": "int64",
        "genres": "list<int64>",
        "year": "int64",
        "age": "int64",
        "gender": "int64",
        "occupation": "int64",
        "history": "list<int64>",
        "history_rating": "list<float>",
    }
    assert list(report.columns) == list(types)
    assert (report.name, report.kind) == ("ml-100k", "ml-100k")
    assert report.vocabulary_sizes == {
        "user": 12,
        "item": 17,
        "genres": 19,
        "year": 151,
        "age": 8,
        "gender": 3,
        "occupation": 4,
        "history": 17,
    }
    assert report.columns["history"].table == report.columns["item"].table
    assert report.labels["occupation"] == ("unknown", "artist", "other", "writer")


def test_ml_100k_side_features_belong_to_their_row(tmp_path: Path) -> None:
    source = write_100k(tmp_path / "raw", make_rows())
    report = prepare_movielens(source, tmp_path / "out")
    sides = {0: (1, 2, 3), 1: (2, 1, 1), 2: (7, 2, 1), 3: (5, 1, 2)}
    for row in read(tmp_path / "out", "train") + read(tmp_path / "out", "test"):
        assert (row["age"], row["gender"], row["occupation"]) == sides.get(row["user"], (0, 0, 0))
        kind = (row["item"] + 1) % 3
        assert row["genres"] == [[1], [2, 4], []][kind]
        assert row["year"] == [1995 - 1899, 1968 - 1899, 0][kind]
        assert row["liked"] == float(row["rating"] >= 4)
    assert report.counters["users_not_in_side_file"] == 8
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert [row["raw_id"] for row in items] == list(range(1, 18))
    assert items[0]["title"] == "Été, l' (1968) (V)"
    users = pq.read_table(tmp_path / "out" / "users.parquet").to_pylist()
    assert [(row["user"], row["raw_id"]) for row in users] == [(i, i + 1) for i in range(12)]


def test_the_random_split_keeps_every_row_once_and_follows_the_seed(tmp_path: Path) -> None:
    rows = make_rows()
    source = write_100k(tmp_path / "raw", rows)
    splits = []
    for seed in (0, 0, 1):
        report = prepare_movielens(source, tmp_path / "out", test_fraction=0.2, seed=seed)
        train, test = (keys_of(read(tmp_path / "out", s)) for s in ("train", "test"))
        assert sorted(train + test) == sorted(rows)
        assert len(test) == report.rows["test"] == round(len(rows) * 0.2)
        splits.append((train, test))
    assert splits[0] == splits[1] != splits[2]


def test_the_time_split_tests_on_the_last_ratings(tmp_path: Path) -> None:
    source = write_100k(tmp_path / "raw", make_rows())
    prepare_movielens(source, tmp_path / "out", split="time", test_fraction=0.3)
    train, test = (read(tmp_path / "out", s) for s in ("train", "test"))
    assert max(r["timestamp"] for r in train) <= min(r["timestamp"] for r in test)


def test_a_named_split_works_without_u_data(tmp_path: Path) -> None:
    rows = make_rows()
    source = write_100k(tmp_path / "raw", rows)
    (source / "u.data").unlink()
    write_tabs(source / "u1.base", rows[:60])
    write_tabs(source / "u1.test", rows[60:])
    prepare_movielens(source, tmp_path / "out", split="u1", shuffle=False)
    assert keys_of(read(tmp_path / "out", "train")) == rows[:60]
    assert keys_of(read(tmp_path / "out", "test")) == rows[60:]
    with pytest.raises(DataError, match=r"no file 'u\.data'; wanted it, or a named split"):
        prepare_movielens(source, tmp_path / "out")
    with pytest.raises(DataError, match=r"split 'u2': no file '.*u2\.base'"):
        prepare_movielens(source, tmp_path / "out", split="u2")


def test_training_rows_are_shuffled_unless_told_otherwise(tmp_path: Path) -> None:
    rows = make_rows()
    source = write_100k(tmp_path / "raw", rows)
    prepare_movielens(source, tmp_path / "out", test_fraction=0, shuffle=False)
    assert keys_of(read(tmp_path / "out", "train")) == rows
    prepare_movielens(source, tmp_path / "out", test_fraction=0)
    shuffled = keys_of(read(tmp_path / "out", "train"))
    assert shuffled != rows
    assert sorted(shuffled) == sorted(rows)


def test_ml_1m_is_read_with_its_side_files(tmp_path: Path) -> None:
    rows = make_rows()
    source = write_1m(tmp_path / "raw", rows)
    report = prepare_movielens(source, tmp_path / "out", test_fraction=0, shuffle=False)
    got = read(tmp_path / "out", "train")
    assert keys_of(got) == rows
    assert report.kind == "ml-1m"
    assert report.vocabulary_sizes["item"] == 17
    assert report.vocabulary_sizes["occupation"] == 22
    sides = {0: (1, 1, 11), 1: (7, 2, 1), 2: (3, 2, 21)}
    for row in got:
        assert (row["age"], row["gender"], row["occupation"]) == sides.get(row["user"], (0, 0, 0))
        assert row["genres"] == ([0, 1] if row["item"] == 0 else [])
    assert report.labels["genres"] == ("Drama", "Musical")
    assert report.labels["occupation"][11] == "K-12 student"
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert items[0]["title"] == "Misérables, Les (1995)"
    assert items[1]["title"] is None


def test_ml_latest_maps_sorted_raw_ids_to_dense_ones(tmp_path: Path) -> None:
    rows = make_rows()
    source = write_latest(tmp_path / "raw", rows)
    report = prepare_movielens(source, tmp_path / "out", test_fraction=0, shuffle=False)
    got = read(tmp_path / "out", "train")
    assert keys_of(got) == [(u, i, r - 0.5, t) for u, i, r, t in rows]
    assert report.kind == "ml-latest"
    assert report.vocabulary_sizes["item"] == 15
    assert "age" not in report.columns
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert [row["raw_id"] for row in items] == [7 * i for i in range(1, 16)]
    assert items[0]["title"] == "American President, The (1995)"
    assert items[1]["title"] == 'He said "hi" (2006\u20132007)'
    assert [row["genres"] for row in items[:3]] == [[0, 1], [], []]
    assert [row["year"] for row in items[:3]] == [96, 107, 0]


def test_without_side_files_there_are_no_side_columns(tmp_path: Path) -> None:
    source = write_100k(tmp_path / "raw", make_rows(), sides=False)
    report = prepare_movielens(source, tmp_path / "out", max_history=0)
    assert list(report.columns) == ["user", "item", "rating", "liked", "timestamp"]
    assert len(report.notes) == 2


def reference_history(
    train: list[dict[str, Any]], row: dict[str, Any], max_history: int
) -> list[tuple[int, float]]:
    """Sorted by time with Python's stable sort, own item removed, last ones kept."""
    own = sorted((r for r in train if r["user"] == row["user"]), key=lambda r: r["timestamp"])
    pairs = [(r["item"], r["rating"]) for r in own if r["item"] != row["item"]]
    return pairs[-max_history:]


@pytest.mark.parametrize("max_history", [1, 3, 50])
def test_history_is_leave_one_out_over_training_rows(tmp_path: Path, max_history: int) -> None:
    source = write_100k(tmp_path / "raw", make_rows(num_users=6))
    prepare_movielens(
        source,
        tmp_path / "out",
        test_fraction=0.3,
        max_history=max_history,
        history_rating=True,
        shuffle=False,
    )
    train, test = (read(tmp_path / "out", s) for s in ("train", "test"))
    for row in train + test:
        got = list(zip(row["history"], row["history_rating"], strict=True))
        assert got == reference_history(train, row, max_history)


@pytest.mark.parametrize(("layout", "levels"), [("100k", 5), ("latest", 10)])
def test_rating_bags_hold_what_others_gave_never_the_rows_own(
    tmp_path: Path, layout: str, levels: int
) -> None:
    write = {"100k": write_100k, "latest": write_latest}[layout]
    source = write(tmp_path / "raw", make_rows(num_users=6))
    report = prepare_movielens(source, tmp_path / "out", test_fraction=0.3, max_ratings=4)
    train, test = (read(tmp_path / "out", s) for s in ("train", "test"))
    for row in train + test:
        for column, key, other in (("rated", "user", "item"), ("raters", "item", "user")):
            own = [r for r in train if r[key] == row[key] and r[other] != row[other]]
            allowed = {int(r[other] * levels + r["rating"] * levels / 5 - 1) for r in own}
            assert set(row[column]) <= allowed
            assert len(row[column]) == min(4, len(own))
            assert all(0 <= i < report.vocabulary_sizes[column] for i in row[column])


def test_shuffling_does_not_change_the_history_of_a_row(tmp_path: Path) -> None:
    source = write_100k(tmp_path / "raw", make_rows())
    found = []
    for shuffle in (False, True):
        prepare_movielens(source, tmp_path / "out", max_history=4, shuffle=shuffle)
        rows = read(tmp_path / "out", "train")
        found.append({(r["user"], r["item"]): r["history"] for r in rows})
    assert found[0] == found[1]


@given(
    pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=40),
    max_history=st.integers(1, 6),
)
def test_history_never_holds_the_own_item_even_if_rated_twice(
    pairs: list[tuple[int, int]], max_history: int
) -> None:
    user, item = np.array(pairs, np.int64).T.copy()
    rating = np.arange(len(pairs), dtype=np.float32)
    train = Ratings(user, item, rating, np.zeros(len(pairs), np.int64))
    history = TrainHistory(user, item, train, 5)
    items, ratings, splits = history.of_rows(user, item, max_history)
    for row in range(len(pairs)):
        mine = items[splits[row] : splits[row + 1]]
        assert item[row] not in mine
        assert len(mine) <= max_history
        assert (item[ratings[splits[row] : splits[row + 1]].astype(int)] == mine).all()
    empty = history.of_rows(np.array([4]), np.array([0]), max_history)
    assert empty[2].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("bad_line", "reason"),
    [
        ("1\t2\t3", "3 fields in"),
        ("1\t2\t3\t4\t5", "5 fields in"),
        ("1\ttwo\t3\t4", "item is 'two', not a number"),
        ("1\t2\t\t4", "rating is '', not a number"),
        ("0\t2\t3\t4", r"user id is 0, not in \[1, "),
        ("1\t99999999999\t3\t4", "item id is 99999999999, not in"),
        ("1\t2\tnan\t4", r"rating is nan, not in \[0.5, 5\]"),
        ("1\t2\t6\t4", r"rating is 6.0, not in \[0.5, 5\]"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, bad_line: str, reason: str) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    (source / "u.data").write_text(f"1\t1\t3\t4\n\n{bad_line}\n2\t2\t2\t2\n")
    with pytest.raises(DataError, match=r"u\.data:3: " + reason + ".*wanted"):
        prepare_movielens(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_malformed_line_is_named_in_the_other_formats(tmp_path: Path) -> None:
    one, latest = tmp_path / "one", tmp_path / "latest"
    one.mkdir()
    latest.mkdir()
    for text, reason in (
        ("1::1::5::7\n1:1:5:7\n", "1 fields"),
        ("1::1::5::7\n1\t1::5::7\n", "3 f"),
    ):
        (one / "ratings.dat").write_text(text)
        with pytest.raises(DataError, match=rf"ratings\.dat:2: {reason}"):
            prepare_movielens(one, tmp_path / "out")
    (latest / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,x,4\n")
    with pytest.raises(DataError, match=r"ratings\.csv:2: rating is 'x'"):
        prepare_movielens(latest, tmp_path / "out")
    (latest / "ratings.csv").write_text("userId,movieId,score,timestamp\n1,2,3,4\n")
    with pytest.raises(DataError, match=r"ratings\.csv:1: header .* has no column 'rating'"):
        prepare_movielens(latest, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("u.user", "1|24|M|writer\n", r"u\.user:1: 4 fields"),
        ("u.user", "1|24|M|writer|1\n2|old|M|writer|1\n", r"u\.user:2: .*'old'"),
        ("u.item", "1|Toy Story (1995)|x||y|1|0\n", r"u\.item:1: 7 fields"),
    ],
)
def test_a_malformed_side_line_is_named(tmp_path: Path, name: str, text: str, reason: str) -> None:
    source = write_100k(tmp_path / "raw", make_rows())
    (source / name).write_text(text)
    with pytest.raises(DataError, match=reason):
        prepare_movielens(source, tmp_path / "out")


def test_an_unknown_ml_1m_occupation_is_named(tmp_path: Path) -> None:
    source = write_1m(tmp_path / "raw", make_rows())
    (source / "users.dat").write_text("1::F::1::21::48067\n")
    with pytest.raises(DataError, match=r"users\.dat:1: occupation 21 is not in \[0, 21\)"):
        prepare_movielens(source, tmp_path / "out")


def test_a_folder_of_no_known_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "photo.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"found photo\.jpg; wanted u\.data or"):
        prepare_movielens(tmp_path / "raw", tmp_path / "out")
    with pytest.raises(DataError, match="it is no folder"):
        prepare_movielens(tmp_path / "nope", tmp_path / "out")


def test_a_rating_file_without_rows_is_refused(tmp_path: Path) -> None:
    write_100k(tmp_path / "raw", [])
    with pytest.raises(DataError, match=r"u\.data"):
        prepare_movielens(tmp_path / "raw", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "u9"}, "split is 'u9', wanted one of random, time, u1"),
        ({"test_fraction": -0.1}, "test_fraction is -0.1"),
        ({"test_fraction": 0.1, "split": "u1"}, "but split 'u1' has its own test rows"),
        ({"max_history": -1}, "max_history is -1"),
        ({"max_ratings": -1}, "max_ratings is -1"),
        ({"max_history": 0, "history_rating": True}, "history_rating is on but max_history is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"test_fraction": 0.999}, "leaves none to train"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = write_100k(tmp_path / "raw", make_rows())
    with pytest.raises(DataError, match=message):
        prepare_movielens(source, tmp_path / "out", **options)


def test_named_splits_belong_to_ml_100k(tmp_path: Path) -> None:
    source = write_1m(tmp_path / "raw", make_rows())
    with pytest.raises(DataError, match="ml-1m comes without named splits"):
        prepare_movielens(source, tmp_path / "out", split="u1")


def test_the_real_ml_100k_has_its_published_counts(real_data: Path, tmp_path: Path) -> None:
    report = prepare_movielens(real_data / "ml-100k", tmp_path / "out", split="u1")
    assert report.rows == {"train": 80_000, "test": 20_000}
    assert report.vocabulary_sizes["user"] == 943
    assert report.vocabulary_sizes["item"] == 1682
    assert report.vocabulary_sizes["occupation"] == 22
    assert report.counters["repeated_user_item_pairs"] == 0
    assert report.counters["users_not_in_side_file"] == 0
    file = pq.ParquetFile(tmp_path / "out" / "train.parquet")
    assert file.metadata.num_row_groups >= 16
    for row in file.read_row_group(0).slice(0, 500).to_pylist():
        assert row["item"] not in row["history"]
        assert len(row["history"]) <= 50
    report = prepare_movielens(real_data / "ml-100k", tmp_path / "out", split="random")
    assert report.rows == {"train": 90_000, "test": 10_000}


def test_half_stars_in_the_form_of_ml_1m_have_ten_levels(tmp_path: Path) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    lines = ["1::1::5::1", "1::2::0.5::2", "2::1::3.5::3", "2::2::0.5::4"]
    (source / "ratings.dat").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    report = prepare_movielens(source, out, test_fraction=0, max_ratings=4, shuffle=False)
    assert report.vocabulary_sizes["rated"] == 20
    assert [row["rated"] for row in read(out, "train")] == [[10], [9], [10], [6]]


def test_a_rating_below_half_a_star_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    (source / "ratings.dat").write_text("1::1::0.2::1\n")
    with pytest.raises(DataError, match=r"rating is 0.2, not in \[0.5, 5\]"):
        prepare_movielens(source, tmp_path / "out", test_fraction=0)
