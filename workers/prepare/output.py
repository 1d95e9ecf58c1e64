"""Writes a data set folder: whole or not at all, in row groups of an exact size.

Owns the temporary sibling folder, the rename at the end and the Parquet settings. Knows nothing
about where rows come from.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ps.errors import DataError
from workers.prepare.report import DATASET_FORMAT, ColumnReport, PrepareReport

DEFAULT_ROW_GROUP_ROWS = 65_536
MIN_ROW_GROUPS = 16
DATASET_FILE = "dataset.json"
_OWN_FILES = frozenset(
    {DATASET_FILE, "train.parquet", "test.parquet", "users.parquet", "items.parquet"}
)

INT64_LIST = pa.list_(pa.int64())
FLOAT32_LIST = pa.list_(pa.float32())


def list_column(values: np.ndarray[Any, Any], row_splits: np.ndarray[Any, Any]) -> Any:
    """A ragged column as Arrow list array (`list<int64>` or `list<float32>`).

    Args:
        values: int64 or float32, all rows' values one after the other.
        row_splits: int64 `[num_rows + 1]`, row i is `values[row_splits[i]:row_splits[i + 1]]`.
    """
    offsets = pa.array(row_splits.astype(np.int32))
    list_type = FLOAT32_LIST if values.dtype == np.float32 else INT64_LIST
    return pa.ListArray.from_arrays(offsets, pa.array(values), type=list_type)


def schema_of(columns: Mapping[str, ColumnReport]) -> Any:
    """Arrow schema of the given columns, in order."""
    types = {
        "int64": pa.int64(),
        "float32": pa.float32(),
        "list<int64>": INT64_LIST,
        "list<float32>": FLOAT32_LIST,
    }
    return pa.schema([pa.field(name, types[c.type]) for name, c in columns.items()])


def row_group_rows_for(expected_rows: int, option: int | None) -> int:
    """Rows per row group: the option, else few enough for 16 groups, else 65,536."""
    if option is not None:
        return option
    return max(1, min(DEFAULT_ROW_GROUP_ROWS, expected_rows // MIN_ROW_GROUPS))


class SplitWriter:
    """Writes one Parquet file as a stream; row groups do not depend on the size of the writes."""

    def __init__(self, path: Path, schema: Any, row_group_rows: int) -> None:
        self.num_rows = 0
        self._schema = schema
        self._row_group_rows = row_group_rows
        self._pending: list[Any] = []
        self._pending_rows = 0
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", compression_level=1)

    def write(self, columns: Mapping[str, Any]) -> None:
        """Append rows.

        Args:
            columns: NumPy or Arrow arrays of one length; names and types as in the schema.
        """
        table = pa.table(dict(columns), schema=self._schema)
        if table.num_rows == 0:
            return
        self.num_rows += table.num_rows
        self._pending.append(table)
        self._pending_rows += table.num_rows
        if self._pending_rows >= self._row_group_rows:
            self._write_groups()

    def _write_groups(self) -> None:
        table = pa.concat_tables(self._pending)
        size = self._row_group_rows
        whole = table.num_rows - table.num_rows % size
        for start in range(0, whole, size):
            self._writer.write_table(table.slice(start, size), row_group_size=size)
        rest = table.slice(whole)
        self._pending = [rest] if rest.num_rows else []
        self._pending_rows = rest.num_rows

    def close(self) -> None:
        """Write what is pending and the footer."""
        if self._pending:
            self._writer.write_table(
                pa.concat_tables(self._pending), row_group_size=self._row_group_rows
            )
            self._pending = []
        self._writer.close()


class OutputFolder:
    """A data set folder under construction, in a temporary sibling of its final place.

    Use as a context manager. Without `commit` (or on any error) nothing is left behind and what
    was at `out` before is untouched.

    Raises:
        DataError: `out` is something that `prepare` must not replace.
    """

    def __init__(self, out: Path, *, source: Path | None = None) -> None:
        self.out = out
        self._final = Path(os.path.realpath(out))
        self._check_replaceable()
        if source is not None and self._final in Path(os.path.realpath(source)).parents:
            raise DataError(
                f"output folder '{out}': it holds the source '{source}', which would be deleted;"
                f" wanted another folder"
            )
        self._writers: list[SplitWriter] = []

    def __enter__(self) -> Self:
        self._final.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(
            prefix=f".{self._final.name}-", suffix=".partial", dir=self._final.parent
        )
        self.path = Path(made)
        self.path.chmod(0o755)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in self._writers:
            try:
                writer.close()
            except (OSError, pa.ArrowException):
                if kind is None:
                    raise
        shutil.rmtree(self.path, ignore_errors=True)

    def split_writer(self, split: str, schema: Any, row_group_rows: int) -> SplitWriter:
        """Open `<split>.parquet`; closed by `commit`."""
        if row_group_rows < 1:
            raise DataError(f"row_group_rows is {row_group_rows}, wanted 1 or more")
        writer = SplitWriter(self.path / f"{split}.parquet", schema, row_group_rows)
        self._writers.append(writer)
        return writer

    def write_vocabulary(self, name: str, columns: Mapping[str, Any]) -> None:
        """Write `<name>.parquet`: one row per id, in id order."""
        pq.write_table(pa.table(dict(columns)), self.path / f"{name}.parquet", compression="zstd")

    def commit(self, report: PrepareReport) -> None:
        """Write `dataset.json` and put the folder in its place."""
        for writer in self._writers:
            writer.close()
        self._writers = []
        (self.path / DATASET_FILE).write_text(report.to_json(), encoding="utf-8")
        self._check_replaceable()
        if not self._final.exists():
            os.rename(self.path, self._final)
            return
        old = Path(
            tempfile.mkdtemp(prefix=f".{self._final.name}-", suffix=".old", dir=self._final.parent)
        )
        os.rename(self._final, old)
        try:
            os.rename(self.path, self._final)
        except OSError:
            os.rename(old, self._final)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _check_replaceable(self) -> None:
        if not self._final.exists():
            return
        if not self._final.is_dir():
            raise DataError(f"output folder '{self.out}': it is a file, wanted a folder")
        names = {path.name for path in self._final.iterdir()}
        if not names:
            return
        if DATASET_FILE not in names or not _is_ours(self._final / DATASET_FILE):
            raise DataError(
                f"output folder '{self.out}': it is not empty and holds no {DATASET_FILE} written"
                f" by prepare; wanted a new folder, an empty one or an earlier data set"
            )
        if foreign := sorted(names - _OWN_FILES):
            raise DataError(
                f"output folder '{self.out}': it holds '{foreign[0]}', which prepare did not write"
                f" and would delete; move it away first"
            )


def _is_ours(path: Path) -> bool:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(body, dict) and body.get("format") == DATASET_FORMAT


def check_split_options(test_fraction: float, seed: int) -> None:
    """Raise DataError unless `0 <= test_fraction < 1` and `seed >= 0`."""
    if seed < 0:
        raise DataError(f"seed is {seed}, wanted 0 or more")
    if not 0 <= test_fraction < 1:
        raise DataError(f"test_fraction is {test_fraction}, wanted 0 <= test_fraction < 1")
