"""Made-up data sets of any size, streamed, that a model can learn and whose best score is known.

The same seed gives the same rows; fewer rows are a prefix of more rows (before the split into
train and test). The only dependence on the machine is the last bit of `exp` and `log`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ps.errors import DataError
from workers.prepare.output import (
    OutputFolder,
    SplitWriter,
    check_split_options,
    row_group_rows_for,
    schema_of,
)
from workers.prepare.planted import BLOCK_ROWS, Block, Generator
from workers.prepare.report import PrepareReport
from workers.prepare.synthetic_criteo import CriteoGenerator, CriteoShape
from workers.prepare.synthetic_movielens import MovieLensGenerator, MovieLensShape

KINDS = ("movielens", "criteo")


def prepare_synthetic(
    kind: str,
    out: Path,
    *,
    rows: int,
    seed: int = 0,
    test_fraction: float = 0.1,
    exponent: float = 1.05,
    row_group_rows: int | None = None,
    num_users: int | None = None,
    num_items: int | None = None,
    user_exponent: float | None = None,
    max_history: int | None = None,
    history_rating: bool | None = None,
    total_vocabulary: int | None = None,
    table_sizes: str | None = None,
) -> PrepareReport:
    """Write a synthetic data set folder; options left None take the default of the kind.

    Args:
        kind: `movielens` or `criteo`: the columns of that data set.
        out: Folder to write; an earlier data set there is replaced at the end.
        rows: Rows of train and test together, 1 or more.
        seed: Seed of everything, 0 or more.
        test_fraction: Share of test rows in [0, 1); each row is drawn by itself.
        exponent: Zipf exponent of the ids (of items, in `movielens`).
        row_group_rows: Rows per Parquet row group; None picks 65,536 or, for small data, less.
        num_users: See `MovieLensShape`, as for the next four.
        num_items: See there.
        user_exponent: See there.
        max_history: See there.
        history_rating: See there.
        total_vocabulary: See `CriteoShape`, as for the next.
        table_sizes: See there.

    Raises:
        DataError: A bad option, one of the other kind, or `out` must not be replaced.
    """
    _check_options(kind, rows, seed, test_fraction)
    movielens_options = {
        "num_users": num_users,
        "num_items": num_items,
        "user_exponent": user_exponent,
        "max_history": max_history,
        "history_rating": history_rating,
    }
    criteo_options = {"total_vocabulary": total_vocabulary, "table_sizes": table_sizes}
    common = {"rows": rows, "test_fraction": test_fraction, "exponent": exponent}
    generator: Generator
    if kind == "movielens":
        films = MovieLensShape(**_given(kind, movielens_options, criteo_options))
        generator = MovieLensGenerator(films, seed, test_fraction, exponent)
        options = {**common, **asdict(films)}
    else:
        clicks = CriteoShape(**_given(kind, criteo_options, movielens_options))
        generator = CriteoGenerator(clicks, seed, test_fraction, exponent)
        options = {**common, **asdict(clicks)}
    return _write(kind, Path(out), generator, options, seed, row_group_rows)


def _given(kind: str, mine: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given; those of another kind are an error."""
    if wrong := [name for name, value in others.items() if value is not None]:
        raise DataError(f"option {wrong[0]} has no effect on kind '{kind}'; wanted {list(mine)}")
    return {name: value for name, value in mine.items() if value is not None}


def _check_options(kind: str, rows: int, seed: int, test_fraction: float) -> None:
    if kind not in KINDS:
        raise DataError(f"synthetic kind is '{kind}', wanted one of {', '.join(KINDS)}")
    if rows < 1:
        raise DataError(f"rows is {rows}, wanted 1 or more")
    check_split_options(test_fraction, seed)


def _write(
    kind: str,
    out: Path,
    generator: Generator,
    options: dict[str, Any],
    seed: int,
    row_group_rows: int | None,
) -> PrepareReport:
    rows, test_fraction = options["rows"], options["test_fraction"]
    schema = schema_of(generator.columns)
    with OutputFolder(out) as folder:
        writers = {
            split: folder.split_writer(
                split, schema, row_group_rows_for(int(rows * share), row_group_rows)
            )
            for split, share in (("train", 1 - test_fraction), ("test", test_fraction))
        }
        for index, start in enumerate(range(0, rows, BLOCK_ROWS)):
            _write_block(writers, generator.block(index, min(BLOCK_ROWS, rows - start)))
        if writers["train"].num_rows == 0:
            raise DataError(f"rows is {rows}: all fell into the test split; wanted more rows")
        report = PrepareReport(
            name=f"synthetic-{kind}",
            kind=f"synthetic-{kind}",
            out=out,
            seed=seed,
            rows={split: writer.num_rows for split, writer in writers.items()},
            columns=generator.columns,
            options=options,
            notes=generator.notes,
            labels=generator.labels,
            noise_floor=generator.noise_floor(),
        )
        folder.commit(report)
    return report


def _write_block(writers: dict[str, SplitWriter], block: Block) -> None:
    for split, mask in (("train", ~block.in_test), ("test", block.in_test)):
        rows = np.flatnonzero(mask)
        table = {
            name: values[rows] if isinstance(values, np.ndarray) else values.take(pa.array(rows))
            for name, values in block.columns.items()
        }
        writers[split].write(table)
