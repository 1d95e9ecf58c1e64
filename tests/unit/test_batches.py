"""Examples from Parquet: each one once per epoch, in an order that can be repeated."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.columns import (
    categorical_column_with_identity,
    configs_from_columns,
    embedding_column,
    sequence_categorical_column_with_identity,
)
from ps.errors import DataError
from ps.optimizers import SGD
from workers.batches import Batch, ExampleReader
from workers.columns import bag_column, number_column
from workers.config import DataConfig, FeatureEntry
from workers.raw_inputs import column_inputs

FEATURES = {
    "user": FeatureEntry(table="t"),
    "tags": FeatureEntry(table="t", column="tag_list", weights="tag_weights"),
}


def columns_of(num_rows: int, start: int = 0) -> dict[str, Any]:
    """Row i: user i, i mod 3 tags i, i + 1 with weights i / 2, label i, price i + .25."""
    rows = range(start, start + num_rows)
    tags = [[i, i + 1][: i % 3] for i in rows]
    return {
        "user": pa.array(rows, pa.int32()),
        "tag_list": pa.array(tags, pa.list_(pa.int64())),
        "tag_weights": pa.array(
            [[i / 2] * len(t) for i, t in zip(rows, tags, strict=True)], pa.list_(pa.float64())
        ),
        "rating": pa.array([float(i) for i in rows], pa.float32()),
        "price": pa.array([i + 0.25 for i in rows], pa.float64()),
        "unused": pa.array(["x"] * num_rows),
    }


def write(
    path: Path, num_rows: int = 20, *, start: int = 0, group: int = 7, **changes: Any
) -> Path:
    columns = columns_of(num_rows, start) | changes
    table = pa.table({k: v for k, v in columns.items() if v is not None})
    pq.write_table(table, path, row_group_size=group)
    return path


GOLDEN_ORDER = [12, 48, 46, 49, 42, 11, 8, 9, 6, 50, 1, 2, 51, 5, 45, 4, 3, 47, 52, 0, 7, 13, 43]
GOLDEN_ORDER += [10, 44, 14]
"""The first rows of `shared` with seed 7, windows of 20 and batches of 13."""


def reader_of(path: Path, *, shuffle_rows: int = 8, **arguments: Any) -> ExampleReader:
    data = DataConfig(train=path, label="rating", dense=("price",), shuffle_rows=shuffle_rows)
    return ExampleReader(path, data, FEATURES, **arguments)


def labels(batches: list[Batch]) -> list[int]:
    """Row numbers, after checking that each example's columns still belong together."""
    found: list[int] = []
    for batch in batches:
        rows = [int(r) for r, w in zip(batch.labels, batch.example_weights, strict=True) if w]
        count = len(rows)
        assert batch.bags["user"].to_lists()[:count] == [[i] for i in rows]
        assert batch.bags["tags"].to_lists()[:count] == [[i, i + 1][: i % 3] for i in rows]
        weights = np.repeat(np.float32(rows) / 2, [i % 3 for i in rows])
        np.testing.assert_array_equal(batch.bags["tags"].weights, weights)
        np.testing.assert_array_equal(batch.dense[:count, 0], np.float32(rows) + 0.25)
        found += rows
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """53 rows in three files with row groups of 7."""
    folder = tmp_path_factory.mktemp("data")
    for name, start, stop in [("a", 0, 20), ("b", 20, 21), ("c", 21, 53)]:
        write(folder / f"{name}.parquet", stop - start, start=start)
    return folder


# --- training order


@settings(max_examples=40)
@given(
    num_workers=st.integers(1, 4),
    batch_size=st.integers(1, 9),
    shuffle_rows=st.sampled_from([0, 1, 10, 1000]),
    epoch=st.integers(0, 3),
)
def test_an_epoch_shows_every_row_at_most_once_to_one_worker(
    shared: Path, num_workers: int, batch_size: int, shuffle_rows: int, epoch: int
) -> None:
    seen: list[int] = []
    for worker in range(num_workers):
        reader = reader_of(
            shared, shuffle_rows=shuffle_rows, worker=worker, num_workers=num_workers, seed=5
        )
        batches = list(reader.epoch(epoch, batch_size))
        assert len(batches) == reader.steps_per_epoch(batch_size)
        for batch in batches:
            assert batch.labels.shape == batch.example_weights.shape == (batch_size,)
            assert batch.dense.shape == (batch_size, 1)
            assert batch.labels.dtype == batch.dense.dtype == np.float32
            assert batch.example_weights.all()
        seen += labels(batches)
    assert max(Counter(seen).values(), default=1) == 1
    steps = 53 // num_workers // batch_size
    assert len(seen) == steps * batch_size * num_workers
    assert set(seen) <= set(range(53))


@pytest.mark.parametrize("shuffle_rows", [0, 10, 1000])
def test_one_seed_is_one_order(shared: Path, shuffle_rows: int) -> None:
    def order(seed: int, epoch: int, worker: int = 0) -> list[int]:
        reader = reader_of(
            shared, shuffle_rows=shuffle_rows, seed=seed, worker=worker, num_workers=2
        )
        return labels(list(reader.epoch(epoch, 4)))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert not set(order(1, 0, worker=0)) & set(order(1, 0, worker=1))


@pytest.mark.parametrize("shuffle_rows", [0, 10, 1000])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_reading_ahead_changes_nothing(shared: Path, shuffle_rows: int, ahead: int) -> None:
    def orders(**options: int) -> list[list[int]]:
        reader = reader_of(shared, shuffle_rows=shuffle_rows, seed=3, **options)
        return [labels(list(reader.epoch(1, 4))), labels(list(reader.in_order(4)))]

    assert orders(ahead=ahead) == orders()


def test_reading_ahead_ends_with_its_iterator(shared: Path) -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "windows"}

    before = threads()
    batches = reader_of(shared, ahead=1).epoch(0, 2)
    next(batches)
    (thread,) = threads() - before
    batches.close()
    assert not thread.is_alive()


def test_the_order_of_an_epoch_is_what_it_always_was(shared: Path) -> None:
    """Snapshots of earlier releases go on with the examples that come next."""
    reader = reader_of(shared, shuffle_rows=20, seed=7)
    assert labels(list(reader.epoch(0, 13)))[:26] == GOLDEN_ORDER


def test_bags_of_all_kinds_stay_with_their_examples(tmp_path: Path) -> None:
    """Null lists, null ids and nothing at all, mixed over windows of several row groups."""
    ids = [[None, None, [i], [i, None, -i], []][i % 5] for i in range(40)]
    weights = [[None, None, [0.5], [i, 9.0, -i], []][i % 5] for i in range(40)]
    ones = [i if i % 7 else None for i in range(40)]
    changes = {
        "tag_list": pa.array(ids, pa.list_(pa.int32())),
        "tag_weights": pa.array(weights, pa.list_(pa.float32())),
        "user": pa.array(ones, pa.int16()),
    }
    path = write(tmp_path / "x.parquet", 40, group=6, **changes)
    for batch in reader_of(path, shuffle_rows=15).epoch(0, 9):
        rows = [int(label) for label in batch.labels]
        assert batch.bags["user"].to_lists() == [[i] if i % 7 else [] for i in rows]
        want = [[[], [], [i], [i, -i], []][i % 5] for i in rows]
        assert batch.bags["tags"].to_lists() == want
        flat = [w for i in rows for w in [[], [], [0.5], [i, -i], []][i % 5]]
        np.testing.assert_array_equal(batch.bags["tags"].weights, np.float32(flat))


@pytest.mark.parametrize("batch_size", [3, 8])
def test_columns_and_sequences_stay_with_their_examples(tmp_path: Path, batch_size: int) -> None:
    def identity(name: str, make: Any) -> Any:
        return embedding_column(make(name, 1000), 2, "sum", max_sequence_length=2 * (name == "s"))

    steps = [[[i], [i, i + 1]][: i % 3] for i in range(20)]
    path = write(
        tmp_path / "x.parquet",
        group=6,
        k=pa.array([[i] * (i % 2) for i in range(20)]),
        s=pa.array(steps, pa.list_(pa.list_(pa.int64()))),
    )
    columns = [
        identity("k", categorical_column_with_identity),
        identity("s", sequence_categorical_column_with_identity),
    ]
    inputs = column_inputs(configs_from_columns(columns, SGD()))
    data = DataConfig(train=path, label="rating", shuffle_rows=11)
    reader = ExampleReader(path, data, {}, inputs, seed=1)
    for batch in [*reader.epoch(0, batch_size), *reader.in_order(batch_size)]:
        rows = [int(label) for label in batch.labels[batch.example_weights > 0]]
        empty = batch_size - len(rows)
        assert batch.bags["k"].to_lists() == [[i] * (i % 2) for i in rows] + [[]] * empty
        sequences = batch.bags["s"]
        assert sequences.lengths.tolist() == [min(i % 3, 2) for i in rows] + [0] * empty
        want = [step for i in rows for step in (steps[i] + [[], []])[:2]]
        assert sequences.bags.to_lists() == want + [[], []] * empty


def test_an_epoch_can_be_read_again_with_the_same_reader(shared: Path) -> None:
    reader = reader_of(shared)
    first = labels(list(reader.epoch(0, 5)))
    labels(list(reader.epoch(1, 5)))
    assert labels(list(reader.epoch(0, 5))) == first


def test_rows_are_mixed_within_windows_only(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", 40, group=10)
    order = labels(list(reader_of(path, shuffle_rows=20).epoch(0, 40)))
    groups = [{i // 10 for i in order[k : k + 20]} for k in (0, 20)]
    assert [len(g) for g in groups] == [2, 2]
    assert order[:20] != sorted(order[:20])
    unmixed = labels(list(reader_of(path, shuffle_rows=0).epoch(0, 10)))
    assert all(
        unmixed[k : k + 10] == [*range(unmixed[k], unmixed[k] + 10)] for k in range(0, 40, 10)
    )
    assert unmixed[::10] != [0, 10, 20, 30]


def test_batches_do_not_stop_at_the_end_of_a_row_group(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", 20, group=3)
    assert len(labels(list(reader_of(path).epoch(0, 19)))) == 19


def test_too_little_data_for_a_batch_is_no_batch(tmp_path: Path) -> None:
    reader = reader_of(write(tmp_path / "x.parquet", 5), num_workers=2)
    assert reader.steps_per_epoch(3) == 0
    assert list(reader.epoch(0, 3)) == []


# --- evaluation order


@pytest.mark.parametrize("num_workers", [1, 2, 3, 60])
@pytest.mark.parametrize("batch_size", [1, 4, 53, 100])
def test_in_order_shows_every_row_once_and_pads_the_last_batch(
    shared: Path, num_workers: int, batch_size: int
) -> None:
    seen: list[int] = []
    for worker in range(num_workers):
        reader = reader_of(shared, worker=worker, num_workers=num_workers)
        batches = list(reader.in_order(batch_size))
        for batch in batches:
            assert batch.labels.shape == (batch_size,)
            assert batch.bags["user"].num_examples == batch_size
            assert batch.bags["tags"].num_examples == batch_size
            count = int(batch.example_weights.sum())
            assert count == batch_size or batch is batches[-1]
            assert batch.example_weights[:count].all()
            padding = slice(count, None)
            assert not batch.labels[padding].any()
            assert not batch.dense[padding].any()
            assert not any(batch.bags["tags"].to_lists()[count:])
        seen += labels(batches)
    assert seen == list(range(53))


# --- columns


def bag_of(ids: Any, weights: Any = None) -> tuple[list[list[int]], Any]:
    table = pa.table({"ids": ids} | ({} if weights is None else {"w": weights}))
    bag = bag_column(table, "ids", None if weights is None else "w")
    return bag.to_lists(), None if bag.weights is None else bag.weights.tolist()


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.large_list(pa.int16()), pa.list_(pa.uint32(), 2)], ids=str
)
def test_null_lists_and_null_ids_are_no_ids(kind: pa.DataType) -> None:
    ids = pa.array([[1, 2], None, [3, None], [None, None], [4, 5]], kind)
    assert bag_of(ids) == ([[1, 2], [], [3], [], [4, 5]], None)
    assert bag_of(ids.slice(2)) == ([[3], [], [4, 5]], None)
    chunks = pa.chunked_array([ids.slice(0, 1), ids.slice(1)])
    assert bag_of(chunks) == ([[1, 2], [], [3], [], [4, 5]], None)


def test_a_null_id_takes_its_weight_along() -> None:
    ids = pa.array([[1, None], None, [2], []])
    weights = pa.array([[0.5, 9.0], None, [2], []])
    assert bag_of(ids, weights) == ([[1], [], [2], []], [0.5, 2.0])
    assert bag_of(pa.array([1, None, 3]), pa.array([1, 2, 3])) == ([[1], [], [3]], [1.0, 3.0])


def test_null_scalars_are_empty_bags() -> None:
    assert bag_of(pa.array([1, None, 3], pa.int8())) == ([[1], [], [3]], None)
    bag = bag_column(pa.table({"ids": pa.array([], pa.int64())}), "ids", None)
    assert (bag.num_examples, bag.ids.size) == (0, 0)


@pytest.mark.parametrize(
    ("weights", "fragment"),
    [
        (pa.array([[1.0], [2.0, 3.0]]), "differ in the length"),
        (pa.array([1.0, 2.0]), "differ in the length"),
        (pa.array([[1.0, None], [2.0]]), "null weights"),
        (pa.array([None, [2.0]]), "differ in the length"),
    ],
)
def test_weights_that_do_not_pair_with_ids_are_refused(weights: Any, fragment: str) -> None:
    with pytest.raises(DataError, match=fragment) as caught:
        bag_of(pa.array([[1, 2], [3]]), weights)
    assert "'w'" in str(caught.value)


def test_ids_beyond_int64_are_refused_not_wrapped() -> None:
    with pytest.raises(ValueError, match=str(2**63)):
        bag_of(pa.array([1, 2**63], pa.uint64()))


@pytest.mark.parametrize(
    "values",
    [
        pa.array([0, 1], pa.uint8()),
        pa.array([0.0, 1.0], pa.float16()),
        pa.array([0.0, 1.0], pa.float64()),
        pa.array([False, True]),
    ],
    ids=lambda v: str(v.type),
)
def test_numbers_become_float32(values: pa.Array) -> None:
    got = number_column(pa.table({"x": values}), "x")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [0, 1])


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.float64()], ids=str)
def test_numbers_that_float32_cannot_hold_exactly_are_rounded(kind: pa.DataType) -> None:
    """Counts and timestamps beyond 2²⁴ are ordinary dense values."""
    big = 2**24 + 1
    got = number_column(pa.table({"x": pa.array([big, 2**30 + 1], kind)}), "x")
    np.testing.assert_array_equal(got, np.array([big, 2**30 + 1], dtype=np.float32))


# --- what is refused


@pytest.mark.parametrize("column", ["rating", "price"])
def test_a_null_number_is_refused(tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "x.parquet", 3, **{column: pa.array([1.0, None, 2.0])})
    with pytest.raises(DataError, match=f"column '{column}' has 1 nulls"):
        list(reader_of(path).in_order(3))


@pytest.mark.parametrize("column", ["rating", "price", "user", "tag_list", "tag_weights"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "x.parquet", 3, **{column: None})
    with pytest.raises(DataError, match=f"no column '{column}'; it has .*unused"):
        reader_of(path)


@pytest.mark.parametrize(
    ("column", "values", "wanted"),
    [
        ("rating", pa.array(["a"] * 3), "a number"),
        ("price", pa.array([[1.0]] * 3), "a number"),
        ("price", pa.array([0] * 3, pa.timestamp("s")), "a number"),
        ("user", pa.array([1.0] * 3), "integers or lists"),
        ("user", pa.array([True] * 3), "integers or lists"),
        ("tag_list", pa.array([["a"]] * 3), "integers or lists"),
        ("tag_list", pa.array([[[1]]] * 3), "integers or lists"),
        ("tag_list", pa.array(["1,2"] * 3), "integers or lists"),
        ("tag_weights", pa.array([["a"]] * 3), "numbers or lists"),
        ("tag_weights", pa.array([True] * 3), "numbers or lists"),
    ],
    ids=lambda v: str(v.type) if isinstance(v, pa.Array) else v,
)
def test_a_column_of_the_wrong_type_is_named(
    tmp_path: Path, column: str, values: pa.Array, wanted: str
) -> None:
    path = write(tmp_path / "x.parquet", 3, **{column: values})
    with pytest.raises(DataError, match=f"column '{column}'.*wanted {wanted}") as caught:
        reader_of(path)
    assert f" is {pq.read_schema(path).field(column).type}, " in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_data_set_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.parquet: no such file or folder"):
        reader_of(tmp_path / "absent.parquet")


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("user,rating\n1,2\n")
    with pytest.raises(DataError, match=r"x\.parquet: not readable as Parquet"):
        reader_of(tmp_path / "x.parquet")


def test_a_data_set_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        reader_of(write(tmp_path / "x.parquet", 0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty.* has no (rows|files)"):
        reader_of(tmp_path / "empty")


# --- folders


def test_files_of_a_folder_follow_each_other_by_name(tmp_path: Path) -> None:
    for name, start in [("b", 4), ("a", 0), ("c", 8)]:
        write(tmp_path / f"{name}.parquet", 4, start=start)
    write(tmp_path / "_ignored.parquet", 4, start=90)
    write(tmp_path / "d.parquet", 0)
    assert reader_of(tmp_path).num_rows == 12
    assert labels(list(reader_of(tmp_path).in_order(5))) == list(range(12))


def test_a_damaged_file_among_good_ones_is_refused_at_the_start(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 4)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match=r"not readable as Parquet.*b\.parquet"):
        reader_of(tmp_path)


def test_files_may_differ_in_the_width_of_their_integers(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 4)
    write(tmp_path / "b.parquet", 4, start=4, user=pa.array(range(4, 8), pa.int64()))
    assert labels(list(reader_of(tmp_path).in_order(8))) == list(range(8))
    assert sorted(labels(list(reader_of(tmp_path).epoch(0, 8)))) == list(range(8))
    write(tmp_path / "c.parquet", 1, user=pa.array([2**40], pa.int64()))
    (batch,) = reader_of(tmp_path).in_order(9)
    assert batch.bags["user"].ids[-1] == 2**40


def test_files_that_disagree_about_a_column_are_refused_at_the_start(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 4)
    write(tmp_path / "b.parquet", 4, user=pa.array([[1]] * 4))
    with pytest.raises(DataError, match="user"):
        reader_of(tmp_path)


def test_a_file_without_a_column_among_good_ones_is_refused_at_the_start(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 4)
    write(tmp_path / "b.parquet", 4, start=4, user=None)
    with pytest.raises(DataError, match="no column 'user'"):
        reader_of(tmp_path)
