"""Criteo files: every field lands in its own column, whatever is missing."""

from __future__ import annotations

import gzip
import math
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import DataError
from workers.prepare import criteo as criteo_module
from workers.prepare import prepare_criteo
from workers.prepare.criteo import CATEGORICAL_NAMES, INTEGER_NAMES

MASK = (1 << 64) - 1
BUCKETS = 1000


def splitmix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def expected_id(text: str, column: int, buckets: int = BUCKETS) -> int:
    """The documented hash, in Python integers."""
    if not text:
        return 0
    key = splitmix((0x9E3779B97F4A7C15 + column) & MASK)
    return 1 + splitmix((int(text, 16) + key) & MASK) % (buckets - 1)


def line(label: str = "0", integers: Any = (), categoricals: Any = ()) -> list[str]:
    """Fields of a whole line; those not given are empty."""
    integers = [*integers, *[""] * (13 - len(integers))]
    return [label, *integers, *categoricals, *[""] * (26 - len(categoricals))]


def write_lines(path: Path, lines: list[list[str]], end: str = "\n") -> Path:
    path.write_bytes(end.join("\t".join(fields) for fields in lines).encode() + end.encode())
    return path


def prepare_rows(source: Path, out: Path, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    report = prepare_criteo(source, out, test_fraction=0.0, buckets=BUCKETS, **options)
    return report, pq.read_table(out / "train.parquet").to_pylist()


def assert_row(row: dict[str, Any], fields: list[str]) -> None:
    fields = fields + [""] * (40 - len(fields))
    assert row["label"] == float(fields[0])
    for name, text in zip(INTEGER_NAMES, fields[1:14], strict=True):
        want = math.log1p(max(int(text), 0)) if text else 0.0
        assert row[name] == pytest.approx(want, rel=1e-6), name
    for column, (name, text) in enumerate(zip(CATEGORICAL_NAMES, fields[14:], strict=True), 1):
        assert row[name] == expected_id(text, column), name


def test_columns_and_types_are_those_documented(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "raw.txt", [line()])
    report, _ = prepare_rows(source, tmp_path / "out")
    schema = pq.read_schema(tmp_path / "out" / "train.parquet")
    assert schema.names == ["label", *INTEGER_NAMES, *CATEGORICAL_NAMES] == list(report.columns)
    assert set(schema.types[:14]) == {pa.float32()}
    assert set(schema.types[14:]) == {pa.int64()}
    assert report.vocabulary_sizes == dict.fromkeys(CATEGORICAL_NAMES, BUCKETS)


integer_text = st.one_of(
    st.just(""),
    st.integers(-3, 70_000).map(str),
    st.integers(0, 10**18 - 1).map(str),
)
hex_text = st.one_of(
    st.just(""),
    st.integers(0, 2**32 - 1).map(lambda n: f"{n:08x}"),
    st.integers(0, 2**64 - 1).map(lambda n: f"{n:X}"),
)
whole_line = st.tuples(
    st.sampled_from("01"),
    st.lists(integer_text, min_size=13, max_size=13),
    st.lists(hex_text, min_size=26, max_size=26),
).map(lambda parts: [parts[0], *parts[1], *parts[2]])
cut_line = st.tuples(whole_line, st.integers(1, 40)).map(lambda pair: pair[0][: pair[1]])


@given(
    lines=st.lists(cut_line, min_size=1, max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    last_newline=st.booleans(),
    blanks=st.lists(st.integers(0, 8), max_size=2),
)
@settings(max_examples=60)
def test_no_column_ever_shifts(
    lines: list[list[str]], end: str, last_newline: bool, blanks: list[int]
) -> None:
    texts = ["\t".join(fields) for fields in lines]
    for place in blanks:
        texts.insert(place, "")
    data = end.join(texts) + (end if last_newline else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "raw.txt"
        source.write_bytes(data.encode())
        report, rows = prepare_rows(source, Path(folder) / "out")
    assert len(rows) == len(lines) == report.counters["lines"]
    for row, fields in zip(rows, lines, strict=True):
        assert_row(row, fields)
    assert report.counters["short_lines"] == sum(len(fields) < 40 for fields in lines)
    assert report.counters["short_fields_filled"] == sum(40 - len(fields) for fields in lines)
    assert report.counters["empty_fields"] == sum(fields.count("") for fields in lines)
    assert report.counters["bad_fields"] == 0


def test_missing_is_id_zero_and_no_value_hashes_to_it(tmp_path: Path) -> None:
    values = [f"{i:08x}" for i in range(300)]
    lines = [line(categoricals=[value]) for value in values] + [line()]
    source = write_lines(tmp_path / "raw.txt", lines)
    prepare_criteo(source, tmp_path / "out", test_fraction=0.0, buckets=2)
    table = pq.read_table(tmp_path / "out" / "train.parquet")
    assert table.column("C1").to_pylist() == [1] * 300 + [0]


def test_equal_values_get_unrelated_ids_in_two_columns(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "raw.txt", [line(categoricals=["0a1b2c3d"] * 26)])
    _, rows = prepare_rows(source, tmp_path / "out")
    assert len({rows[0][name] for name in CATEGORICAL_NAMES}) > 20


def test_unreadable_fields_are_counted_and_treated_as_missing(tmp_path: Path) -> None:
    integers = ["x", "1.5", "-", "1e3", "--1", "12345678x", "9" * 19, "7"]
    categoricals = ["68fd1e6g", "0x1", "-1", "f" * 17, "é", "@AB", "`12", "ab cd", "Ff"]
    source = write_lines(tmp_path / "raw.txt", [line("1", integers, categoricals)])
    report, rows = prepare_rows(source, tmp_path / "out")
    assert report.counters["bad_integer_fields"] == 7
    assert report.counters["bad_categorical_fields"] == 8
    assert report.counters["bad_fields"] == 15
    assert_row(rows[0], line("1", [""] * 7 + ["7"], [""] * 8 + ["ff"]))
    assert "fields that are no integer" in " ".join(report.lines())


def test_negative_integers_become_zero_and_are_counted(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "raw.txt", [line(integers=["-2", "-1", "0", "1"])])
    report, rows = prepare_rows(source, tmp_path / "out")
    assert [rows[0][name] for name in ("I1", "I2", "I3")] == [0, 0, 0]
    assert rows[0]["I4"] == pytest.approx(math.log(2))
    assert report.counters["negative_integers"] == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([*line(), ""], r":4: 41 fields in .*; wanted at most 40"),
        (line("2"), r":4: label is '2', wanted '0' or '1'"),
        (line(""), r":4: label is '', wanted '0' or '1'"),
        (line("01"), r":4: label is '01', wanted '0' or '1'"),
    ],
)
def test_what_cannot_be_repaired_names_file_and_line(
    tmp_path: Path, bad: list[str], message: str
) -> None:
    source = write_lines(tmp_path / "raw.txt", [line(), [""], line(), bad, line()])
    with pytest.raises(DataError, match=r"raw\.txt" + message):
        prepare_criteo(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_a_bad_line_in_a_later_chunk_is_named_by_its_place_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criteo_module, "_CHUNK_BYTES", 100)
    source = write_lines(tmp_path / "raw.txt", [line(), [""], line()] * 20 + [line("x")])
    with pytest.raises(DataError, match=r":61: label is 'x'"):
        prepare_criteo(source, tmp_path / "out")


def many_lines(num_lines: int) -> list[list[str]]:
    return [
        line(str(i % 2), [str(i), "", str(-i)], ["", f"{i * 7919:08x}"])[: 17 + i % 24]
        for i in range(num_lines)
    ]


def test_gzip_and_chunk_size_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "raw.txt", many_lines(500))
    packed = tmp_path / "raw.txt.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    whole = prepare_criteo(source, tmp_path / "a", row_group_rows=50)
    monkeypatch.setattr(criteo_module, "_CHUNK_BYTES", 1000)
    chunked = prepare_criteo(packed, tmp_path / "b", row_group_rows=50)
    assert chunked.counters == whole.counters
    assert chunked.rows == whole.rows
    for split in ("train", "test"):
        left, right = tmp_path / "a" / f"{split}.parquet", tmp_path / "b" / f"{split}.parquet"
        assert left.read_bytes() == right.read_bytes()


def test_the_row_groups_of_a_small_file_read_in_chunks_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criteo_module, "_CHUNK_BYTES", 4000)
    source = write_lines(tmp_path / "raw.txt", many_lines(2000))
    prepare_criteo(source, tmp_path / "out")
    assert pq.ParquetFile(tmp_path / "out" / "train.parquet").num_row_groups >= 12


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    packed = tmp_path / "raw.txt.gz"
    packed.write_bytes(gzip.compress(b"\t".join([b"0"] * 40) * 1000)[:-30])
    with pytest.raises(DataError, match=r"raw\.txt\.gz': damaged gzip file"):
        prepare_criteo(packed, tmp_path / "out")


def test_a_file_without_line_ends_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criteo_module, "_CHUNK_BYTES", 1000)
    (tmp_path / "raw.bin").write_bytes(b"\0" * 5000)
    with pytest.raises(DataError, match="a line is longer than 1000 bytes"):
        prepare_criteo(tmp_path / "raw.bin", tmp_path / "out")


def test_the_split_follows_the_seed_and_has_about_the_right_size(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "raw.txt", many_lines(4000))
    first = prepare_criteo(source, tmp_path / "a", test_fraction=0.25)
    again = prepare_criteo(source, tmp_path / "b", test_fraction=0.25)
    other = prepare_criteo(source, tmp_path / "c", test_fraction=0.25, seed=1)
    assert sum(first.rows.values()) == 4000
    assert 900 < first.rows["test"] < 1100
    read = {n: (tmp_path / n / "test.parquet").read_bytes() for n in "abc"}
    assert read["a"] == read["b"] != read["c"]
    assert again.rows == first.rows != other.rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": 1}, "buckets is 1, wanted 2 or more"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0, wanted 0 <= test_fraction < 1"),
        ({"seed": -1}, "seed is -1, wanted 0 or more"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = write_lines(tmp_path / "raw.txt", [line()])
    with pytest.raises(DataError, match=message):
        prepare_criteo(source, tmp_path / "out", **options)


@pytest.mark.parametrize("data", [b"", b"\n\r\n\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "raw.txt").write_bytes(data)
    with pytest.raises(DataError, match="no training rows"):
        prepare_criteo(tmp_path / "raw.txt", tmp_path / "out")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.txt': no such file"):
        prepare_criteo(tmp_path / "nope.txt", tmp_path / "out")


def test_the_head_of_the_real_file_is_read_exactly(real_data: Path, tmp_path: Path) -> None:
    # Counted independently with awk -F'\t' on the file itself.
    source = real_data / "criteo" / "train-head.txt"
    report, rows = prepare_rows(source, tmp_path / "out")
    assert {name: count for name, count in report.counters.items() if count} == {
        "lines": 1000,
        "short_lines": 498,
        "short_fields_filled": 1025,
        "short_categorical_fields_filled": 1025,
        "empty_fields": 4855,
        "empty_integer_fields": 2753,
        "empty_categorical_fields": 2102,
        "negative_integers": 109,
    }
    texts = source.read_text().split("\n")
    assert sum(row["label"] for row in rows) == 205
    for row, text in zip(rows, texts, strict=True):
        assert_row(row, text.split("\t"))
