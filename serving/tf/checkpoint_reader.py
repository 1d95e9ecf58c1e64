"""What a TensorFlow checkpoint holds of embedding tables, and their rows, range by range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tensorflow as tf

from ps.errors import CheckpointError
from ps.optimizers import OPTIMIZERS
from ps.ragged import F32
from ps.spec import TableSpec
from serving.tf.bundle import Bundle
from serving.tf.object_graph import key_of, name_in
from serving.tf.sparse_core import LAYOUTS, StackedTable, stacked_tables

ReadRows = Callable[[int, F32], None]
"""`read(first_row, out_ND)` fills C-contiguous float32 [N, D]."""
_SLOTS = frozenset(name for kind in OPTIMIZERS.values() for name in kind().slot_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTable:
    """One table of a checkpoint."""

    name: str
    vocabulary_size: int
    dim: int
    slots: tuple[str, ...]
    """Names of the optimizer slots that are there too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointContents:
    """What a checkpoint holds under one attribute."""

    prefix: str
    attribute: str
    tables: tuple[CheckpointTable, ...]
    stacked: bool
    """Written on SparseCores, where tables share tensors."""


def read_checkpoint(prefix: str | Path, *, attribute: str = "embedding") -> CheckpointContents:
    """Describe the tables of a checkpoint; reads its index only.

    Args:
        prefix: of the checkpoint, or a folder, whose latest one is taken.
        attribute: name of the embedding in the `tf.train.Checkpoint`, or a path such as
            `trainer/embedding`.

    Raises:
        CheckpointError: there is none, or nothing of the kind under `attribute`.
    """
    return CheckpointReader(prefix, attribute).contents


class CheckpointReader:
    """Reads tables and slots under one attribute."""

    def __init__(self, prefix: str | Path, attribute: str) -> None:
        """Read the index; see `read_checkpoint`."""
        self._attribute = attribute
        self._bundle = Bundle(find_checkpoint(prefix))
        self._keys = set(self._bundle.keys)
        self._stacked = stacked_tables(self._bundle, attribute)
        tables = self._stacked_tables() if self._stacked else self._plain_tables()
        if not tables:
            raise CheckpointError(
                f"checkpoint '{self._bundle.prefix}': no tables under '{attribute}'; "
                f"its keys begin with {sorted({key.split('/')[0] for key in self._keys})}"
            )
        self.contents = CheckpointContents(
            prefix=self._bundle.prefix,
            attribute=attribute,
            tables=tuple(tables),
            stacked=bool(self._stacked),
        )

    def rows(self, table: TableSpec) -> ReadRows:
        """How to read the rows of a table.

        Raises:
            CheckpointError: it is not there, of another shape, or not float32.
        """
        stacked = self._stacked.get(table.name)
        if stacked is None:
            return self._tensor(table, self._key(table.name), "")
        wanted = (table.vocabulary_size, table.dim)
        self._check_shape(stacked.key, (stacked.vocabulary_size, stacked.dim), wanted, table.name)
        self._check_dtype(stacked.key)
        return partial(_read_stacked, stacked, self._bundle)

    def has_slot(self, table: TableSpec, slot: str) -> bool:
        """Whether a slot of a table is there."""
        return self._slot_key(table.name, slot) in self._keys

    def slot(self, table: TableSpec, slot: str) -> ReadRows:
        """How to read a slot of a table.

        Raises:
            CheckpointError: it is not there, of another shape, or not float32.
        """
        return self._tensor(table, self._slot_key(table.name, slot), f", slot '{slot}'")

    def _key(self, name: str) -> str:
        return key_of(self._attribute, name)

    def _slot_key(self, table: str, slot: str) -> str:
        """A slot that a `slot_variable_creation_fn` made lies under `_variables`."""
        made = key_of(f"{self._attribute}/_variables/{_part(table)}", slot)
        return made if made in self._keys else self._key(f"{table}/{slot}")

    def _tensor(self, table: TableSpec, key: str, what: str) -> ReadRows:
        if key not in self._keys:
            known = [t.name for t in self.contents.tables]
            raise CheckpointError(
                f"checkpoint '{self._bundle.prefix}': no '{key}' (table '{table.name}'{what}); "
                f"tables there: {known}"
            )
        wanted = (table.vocabulary_size, table.dim)
        self._check_shape(key, self._bundle.shape(key), wanted, table.name)
        self._check_dtype(key)
        return partial(self._bundle.read_rows, key)

    def _check_shape(
        self, key: str, seen: tuple[int, ...], wanted: tuple[int, int], table: str
    ) -> None:
        if seen != wanted:
            raise CheckpointError(
                f"checkpoint '{self._bundle.prefix}': '{key}' (table '{table}') has shape "
                f"{list(seen)}, wanted {list(wanted)}"
            )

    def _check_dtype(self, key: str) -> None:
        if (seen := self._bundle.dtype(key)) != "float":
            raise CheckpointError(
                f"checkpoint '{self._bundle.prefix}': '{key}' is of type {seen}, wanted float32"
            )

    def _stacked_tables(self) -> list[CheckpointTable]:
        return [
            CheckpointTable(name=name, vocabulary_size=t.vocabulary_size, dim=t.dim, slots=())
            for name, t in sorted(self._stacked.items())
        ]

    def _plain_tables(self) -> list[CheckpointTable]:
        named = {name: key for key in self._keys if (name := name_in(self._attribute, key))}
        shapes = {name: self._bundle.shape(key) for name, key in named.items()}
        shapes = {n: s for n, s in shapes.items() if len(s) == 2 and n != LAYOUTS}
        tables = []
        for name, shape in sorted(shapes.items()):
            owner, _, last = name.rpartition("/")
            if last in _SLOTS and shapes.get(owner) == shape:
                continue  # a slot of another table
            slots = tuple(sorted(s for s in _SLOTS if self._slot_key(name, s) in self._keys))
            tables.append(
                CheckpointTable(name=name, vocabulary_size=shape[0], dim=shape[1], slots=slots)
            )
        return tables


def find_checkpoint(path: str | Path) -> str:
    """A checkpoint's prefix: the given one, or the latest one of a folder.

    Raises:
        CheckpointError: the folder has none.
    """
    if not Path(path).is_dir():
        return str(path)
    try:
        latest: str | None = tf.train.latest_checkpoint(str(path))
    except UnicodeDecodeError as e:
        raise CheckpointError(f"'{path}/checkpoint' is damaged: {e}") from e
    if latest is None:
        raise CheckpointError(f"folder '{path}' has no checkpoint that its `checkpoint` file names")
    return latest


def _part(name: str) -> str:
    return key_of("", name).split("/")[1]


def _read_stacked(table: StackedTable, bundle: Bundle, first_row: int, out_ND: F32) -> None:
    table.read_rows(bundle, first_row, out_ND)
