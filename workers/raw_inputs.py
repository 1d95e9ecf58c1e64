"""Features of embedding columns: raw Parquet values to the ids that a step looks up.

What a transform gives is made fit for training: with `use_safe_embedding_lookup` what TensorFlow's
safe lookup drops is dropped here, and sequences become one bag per position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ps.columns import ColumnConfigs, Steps, Transform, length_key
from ps.config import Combiner
from ps.errors import DataError, InputError
from ps.lookup import pruned
from ps.ragged import F32, I64, Ragged


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """The ids of B sequences, cut or padded to L positions; a position may have no id, or several.

    Sequences of other features are `Ragged`, one id per position.
    """

    bags: Ragged
    """One bag per position, B·L of them."""
    lengths: I64
    """int64 [B]: positions up to the last one with a value, at most L."""

    @classmethod
    def of(cls, steps: Steps, length: int) -> Positions:
        """The first `length` steps of each example, without ids below 0."""
        steps = steps.cut(length)
        lengths = steps.lengths
        example = np.repeat(np.arange(lengths.size), lengths)
        place = example * length + np.arange(example.size) - steps.row_splits[example]
        sizes = np.zeros(lengths.size * length, dtype=np.int64)
        sizes[place] = np.diff(steps.bags.row_splits)
        splits = np.concatenate([[0], np.cumsum(sizes)])
        return cls(pruned(Ragged(steps.bags.ids, splits), "sum"), lengths)

    @property
    def num_examples(self) -> int:
        """B."""
        return self.lengths.size


@dataclass(frozen=True, slots=True)
class ColumnInput:
    """How one feature of an embedding column is read."""

    transform: Transform
    combiner: Combiner
    safe: bool
    """Drop ids < 0 and, for mean and sqrtn, weights <= 0; else they are errors, or count."""
    length: int
    """L of a sequence, 0 for none."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The Parquet columns that it reads."""
        return self.transform.raw_keys

    def check(self, schema: pa.Schema, path: Path) -> None:
        """See that the columns are there and hold what the transform takes.

        Raises:
            DataError: names the data set and the column.
        """
        for column in self.columns:
            if column not in schema.names:
                raise DataError(
                    f"data set {path} has no column '{column}'; it has {', '.join(schema.names)}"
                )
        kind = schema.field(self.columns[0]).type
        while hasattr(kind, "value_type"):  # lists, and dictionaries of strings
            kind = kind.value_type
        try:
            self.transform.column.check_type(kind)
        except InputError as e:
            raise DataError(f"data set {path}: column '{self.columns[0]}': {e}") from None

    def read(self, table: pa.Table) -> Ragged | Positions:
        """The ids of B examples.

        Raises:
            InputError: raw values that the transform does not take.
        """
        raw = {column: table[column] for column in self.columns}
        if self.length:
            return Positions.of(self.transform.steps(raw), self.length)
        bags = self.transform.bags(raw)
        return pruned(bags, self.combiner) if self.safe else bags


def column_inputs(configs: ColumnConfigs) -> dict[str, ColumnInput]:
    """The features of embedding columns, by name."""
    inputs = {}
    for name, feature in configs.feature_config.items():
        combiner = feature.table.combiner
        assert isinstance(combiner, str), "embedding columns have no custom combiner"
        inputs[name] = ColumnInput(
            configs.transforms[name],
            combiner,  # type: ignore[arg-type]
            feature.validate_weights_and_indices,
            feature.max_sequence_length,
        )
    return inputs


def lengths(bags: Mapping[str, Ragged | Positions]) -> dict[str, F32]:
    """float32 [B] by `length_key`, for sequences of embedding columns."""
    return {
        length_key(name): bag.lengths.astype(np.float32)
        for name, bag in bags.items()
        if isinstance(bag, Positions)
    }
