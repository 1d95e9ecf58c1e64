"""Criteo display advertising data (`train.txt`) -> Parquet, streaming.

Columns: `label` float32; `I1`..`I13` float32, `log1p(max(x, 0))`, missing 0.0; `C1`..`C26` int64
in `[0, buckets)`: 0 is missing, otherwise `1 + hash(column, value) % (buckets - 1)`.

The public files are irregular: trailing empty fields are cut off and many fields are empty. These
are filled and counted. What cannot be repaired honestly (a label that is not 0 or 1, more than 40
fields) is an error that names the line.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ps.errors import DataError
from workers.prepare.criteo_lines import (
    NUM_CATEGORICALS,
    NUM_INTEGERS,
    ParsedLines,
    add_counters,
    add_totals,
    parse_lines,
)
from workers.prepare.mixing import U64, mix, stream_key, uniform
from workers.prepare.output import (
    OutputFolder,
    SplitWriter,
    check_split_options,
    row_group_rows_for,
    schema_of,
)
from workers.prepare.report import ColumnReport, PrepareReport

INTEGER_NAMES = tuple(f"I{i}" for i in range(1, NUM_INTEGERS + 1))
CATEGORICAL_NAMES = tuple(f"C{i}" for i in range(1, NUM_CATEGORICALS + 1))
_CHUNK_BYTES = 2 << 20
_GZIP_MAGIC = b"\x1f\x8b"


def prepare_criteo(
    source: Path,
    out: Path,
    *,
    test_fraction: float = 0.1,
    buckets: int = 100_000,
    seed: int = 0,
    row_group_rows: int | None = None,
) -> PrepareReport:
    """Read a Criteo file and write a data set folder.

    Memory is bounded by one chunk of lines and one row group. Which rows are test rows depends on
    the seed and the line number only.

    Args:
        source: `train.txt` or the like, plain or gzip.
        out: Folder to write; an earlier data set there is replaced at the end.
        test_fraction: Share of test rows in [0, 1).
        buckets: Vocabulary size of each categorical column, 2 or more.
        seed: Seed of the split. Ids do not depend on it.
        row_group_rows: Rows per Parquet row group; None picks 65,536 or, for small data, less.

    Raises:
        DataError: A line that cannot be repaired, a bad option, or `out` must not be replaced.
    """
    source, out = Path(source), Path(out)
    _check_options(source, test_fraction, buckets, seed)
    columns = criteo_columns([buckets] * NUM_CATEGORICALS)
    counters: dict[str, int] = {}
    with OutputFolder(out, source=source) as folder:
        writers: dict[str, SplitWriter] = {}
        for parsed, expected_rows in _parsed_chunks(source):
            if not writers:
                writers = _open_writers(
                    folder, columns, expected_rows, test_fraction, row_group_rows
                )
            _write_chunk(writers, parsed, test_fraction, buckets, seed)
            add_counters(counters, parsed.counters)
        add_totals(counters)
        if not writers or writers["train"].num_rows == 0:
            raise DataError(f"Criteo file '{source}': it gives no training rows, wanted at least 1")
        report = PrepareReport(
            name=source.name,
            kind="criteo",
            out=out,
            seed=seed,
            rows={split: writer.num_rows for split, writer in writers.items()},
            columns=columns,
            options={"test_fraction": test_fraction, "buckets": buckets},
            counters=counters,
            notes=_notes(counters),
        )
        folder.commit(report)
    return report


def criteo_columns(vocabulary_sizes: list[int]) -> dict[str, ColumnReport]:
    """Columns of a Criteo data set with the given sizes of C1..C26."""
    columns = {name: ColumnReport(type="float32") for name in ("label", *INTEGER_NAMES)}
    for name, size in zip(CATEGORICAL_NAMES, vocabulary_sizes, strict=True):
        columns[name] = ColumnReport(type="int64", vocabulary_size=size, table=name)
    return columns


def hash_ids(value_L: U64, column: int, buckets: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`1 + hash(column, value) % (buckets - 1)`, int64: the same on every machine and run.

    Args:
        value_L: uint64, the hexadecimal strings as numbers.
        column: 1 for C1 ... 26 for C26; equal values in two columns get unrelated ids.
        buckets: Vocabulary size, 2 or more.
    """
    hashed = mix(value_L, stream_key(column)) % np.uint64(buckets - 1)
    return hashed.astype(np.int64) + 1


def _check_options(source: Path, test_fraction: float, buckets: int, seed: int) -> None:
    check_split_options(test_fraction, seed)
    if not 2 <= buckets <= 2**62:
        raise DataError(f"buckets is {buckets}, wanted 2 or more")
    if not source.is_file():
        raise DataError(f"Criteo source '{source}': no such file; wanted a file like train.txt")


def _open_writers(
    folder: OutputFolder,
    columns: dict[str, ColumnReport],
    expected_rows: int,
    test_fraction: float,
    row_group_rows: int | None,
) -> dict[str, SplitWriter]:
    schema = schema_of(columns)
    shares = {"train": 1 - test_fraction, "test": test_fraction}
    return {
        split: folder.split_writer(
            split, schema, row_group_rows_for(int(expected_rows * share), row_group_rows)
        )
        for split, share in shares.items()
    }


def _parsed_chunks(source: Path) -> Iterator[tuple[ParsedLines, int]]:
    """Parsed chunks, each with an estimate of the rows in the whole file."""
    size = source.stat().st_size
    num_lines = 0
    with source.open("rb") as raw:
        is_gzip = raw.peek(2)[:2] == _GZIP_MAGIC
        stream: Any = gzip.GzipFile(fileobj=raw) if is_gzip else raw
        for data in _line_chunks(stream, source):
            parsed = parse_lines(data, str(source), num_lines + 1)
            num_lines += parsed.num_lines
            yield parsed, round(num_lines * size / max(1, raw.tell()))


def _line_chunks(stream: BinaryIO, source: Path) -> Iterator[bytes]:
    """Whole lines, each ended by a newline, about `_CHUNK_BYTES` at a time."""
    rest = b""
    while True:
        try:
            data = stream.read(_CHUNK_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"Criteo file '{source}': damaged gzip file: {error}") from error
        if not data:
            break
        cut = data.rfind(b"\n") + 1
        if cut == 0 and len(rest) + len(data) > _CHUNK_BYTES:
            raise DataError(
                f"Criteo file '{source}': a line is longer than {_CHUNK_BYTES} bytes; wanted"
                f" tab-separated text"
            )
        if cut:
            yield rest + data[:cut]
            rest = b""
        rest += data[cut:]
    if rest := rest.removesuffix(b"\r"):
        yield rest + b"\n"


def _write_chunk(
    writers: dict[str, SplitWriter],
    parsed: ParsedLines,
    test_fraction: float,
    buckets: int,
    seed: int,
) -> None:
    columns: dict[str, Any] = {"label": parsed.label_L}
    integers_IL = np.where(parsed.has_integer_IL, np.maximum(parsed.integers_IL, 0), 0)
    dense_IL = np.log1p(integers_IL.astype(np.float32))
    columns |= zip(INTEGER_NAMES, dense_IL, strict=True)
    for i, name in enumerate(CATEGORICAL_NAMES):
        ids_L = hash_ids(parsed.categoricals_CL[i], i + 1, buckets)
        columns[name] = np.where(parsed.has_categorical_CL[i], ids_L, 0)
    in_test_L = uniform(parsed.line_number_L, stream_key(seed)) < test_fraction
    for split, mask_L in (("train", ~in_test_L), ("test", in_test_L)):
        writers[split].write({name: values[mask_L] for name, values in columns.items()})


def _notes(counters: dict[str, int]) -> tuple[str, ...]:
    notes = []
    if counters["short_lines"]:
        notes.append("short lines: taken as lines whose trailing empty fields were cut off")
    if counters["bad_fields"]:
        notes.append("fields that are no integer or no hex string were treated as missing")
    return tuple(notes)
