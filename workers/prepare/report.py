"""What a prepare run found and wrote: the contents of `dataset.json` and the lines to print.

Owns the JSON layout. Knows nothing about any one data set, nor about how files are written.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

DATASET_FORMAT = "manta-dataset"
DATASET_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnReport:
    """One column of `train.parquet` and `test.parquet`."""

    type: str
    """Arrow type as Arrow prints it: `int64`, `float32`, `list<int64>`."""
    vocabulary_size: int | None = None
    """Ids lie in `[0, vocabulary_size)`; None for a column that holds no ids."""
    table: str | None = None
    """Columns with the same name here hold ids of the same things and can share a table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """What was written to a data set folder, and what was irregular in its source."""

    name: str
    """Name of the data set: the source's file or folder name, or `synthetic-<kind>`."""
    kind: str
    """Format of the source: `ml-100k`, `ml-1m`, `ml-latest`, `criteo`, `synthetic-...`."""
    out: Path
    """The folder written. Not stored in `dataset.json`, so that the folder can be moved."""
    seed: int
    """Seed of every random choice made."""
    rows: Mapping[str, int]
    """Rows per split: `train`, `test`."""
    columns: Mapping[str, ColumnReport]
    """Columns in file order."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of the run that shaped the rows."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """How often each irregularity was met, e.g. `short_lines`."""
    notes: tuple[str, ...] = ()
    """Sentences for people: what was assumed, filled or left out."""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What the ids of a small vocabulary mean, e.g. `gender`: id 1 is `F`."""
    noise_floor: Mapping[str, float] = field(default_factory=dict)
    """Synthetic data only: what the planted model itself scores on the test split."""

    @property
    def vocabulary_sizes(self) -> dict[str, int]:
        """Vocabulary size of every column that holds ids."""
        return {
            name: column.vocabulary_size
            for name, column in self.columns.items()
            if column.vocabulary_size is not None
        }

    def to_json(self) -> str:
        """The text of `dataset.json`; the same run gives the same bytes."""
        body = {
            "format": DATASET_FORMAT,
            "version": DATASET_VERSION,
            "name": self.name,
            "source": {"kind": self.kind, "options": dict(self.options)},
            "seed": self.seed,
            "rows": dict(self.rows),
            "columns": {
                name: {"type": c.type, "vocabulary_size": c.vocabulary_size, "table": c.table}
                for name, c in self.columns.items()
            },
            "counters": dict(self.counters),
            "notes": list(self.notes),
            "labels": {name: list(values) for name, values in self.labels.items()},
            "noise_floor": dict(self.noise_floor),
        }
        return json.dumps(body, indent=2, ensure_ascii=False) + "\n"

    def lines(self) -> list[str]:
        """The report as lines of plain text for a terminal."""
        out = [f"{self.name} ({self.kind}) -> {self.out}"]
        out += [f"  {split:<6}{count:>14,} rows" for split, count in self.rows.items()]
        out += ["  vocabulary sizes: " + ", ".join(_runs(self.vocabulary_sizes))]
        out += [f"  {name}: {count:,}" for name, count in self.counters.items() if count]
        out += [f"  planted {name}: {value:.4f}" for name, value in self.noise_floor.items()]
        out += [f"  note: {note}" for note in self.notes]
        return out


def _runs(sizes: Mapping[str, int]) -> list[str]:
    """Three or more neighbours of equal size as one entry: `C1..C26 100,000`."""
    out = []
    for size, group in groupby(sizes.items(), key=lambda item: item[1]):
        names = [name for name, _ in group]
        labels = names if len(names) < 3 else [f"{names[0]}..{names[-1]}"]
        out += [f"{label} {size:,}" for label in labels]
    return out
