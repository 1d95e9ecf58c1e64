"""`ps.contents` as people read it: tables that also read well in a file or a pipe.

Lines are never cut: a terminal that is too narrow wraps them, and a pipe gets the width it needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ps.contents import Contents, DenseContents, Row, TableContents, number
from ps.table_stats import TableStats

_PIPE_COLUMNS = 10_000
_MANY_VERSIONS = 12


def console() -> Console:
    """Standard output: as wide as the terminal, or as wide as needed; no markup, no colours."""
    out = Console(markup=False, highlight=False, emoji=False, no_color=True)
    if not out.is_terminal:
        out.width = _PIPE_COLUMNS
    return out


def print_contents(out: Console, contents: Contents) -> None:
    """Everything but the rows."""
    out.print(f"{contents.kind} {contents.location}", soft_wrap=True)
    for name, value in _facts(contents):
        out.print(f"  {name + ':':<11} {value}", soft_wrap=True)
    _print_tables(out, [*contents.tables.values()])
    _print_features(out, contents)
    if contents.dense is not None:
        _print_dense(out, contents.dense)


def print_stats(out: Console, table: TableContents, stats: TableStats) -> None:
    """Figures of one table."""
    title = f"table '{table.name}': {table.vocabulary_size} rows of {table.dim}"
    if stats.untouched_rows is not None:
        title += f", {stats.untouched_rows} never touched"
    names = ("array", "min", "max", "mean", "std", "mean norm", "zero rows", "NaN", "inf")
    lines = [
        [name, *map(_figure, (a.min, a.max, a.mean, a.std, a.mean_norm)),
         *map(str, (a.zero_rows, a.nan, a.inf))]
        for name, a in (("rows", stats.rows), *stats.slots.items())
    ]  # fmt: skip
    _print_grid(out, title, names, lines, right=range(1, 9))


def print_row(out: Console, row: Row) -> None:
    """One row with its slots, every number in the fewest digits that give it back."""
    out.print(f"table '{row.table}', row {row.id}", soft_wrap=True)
    arrays = [("row", row.values), *row.slots.items()]
    width = max(len(name) for name, _ in arrays)
    for name, row_D in arrays:
        out.print(f"  {name:<{width}}  {' '.join(map(number, row_D))}", soft_wrap=True)


def size_text(size_bytes: int) -> str:
    """Bytes for people.

    >>> size_text(999), size_text(1536), size_text(5 << 30)
    ('999 B', '1.5 KiB', '5.0 GiB')
    """
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def _facts(contents: Contents) -> list[tuple[str, str]]:
    facts = [
        ("version", f"{contents.version}, format {contents.format_version}"),
        ("job", contents.job),
        ("step", str(contents.step)),
        ("created", contents.created),
    ]
    if contents.seed is not None:
        facts.append(("seed", str(contents.seed)))
    if contents.num_shards is not None:
        facts.append(("shards", str(contents.num_shards)))
    if contents.fences is not None:
        facts.append(("ranks", f"{len(contents.fences)}, fences {_list(contents.fences)}"))
    if contents.cursor is not None:
        facts.append(("cursor", json.dumps(contents.cursor)))
    facts.append(("size", f"{size_text(contents.size_bytes)} ({contents.size_bytes} bytes)"))
    others = [name for name in contents.versions if name != contents.version]
    if others:
        facts.append(("others", _list(others)))
    return facts


def _list(values: Sequence[object]) -> str:
    """The values; of many, the first and last few."""
    shown = [str(value) for value in values]
    if len(shown) > _MANY_VERSIONS:
        hidden = len(shown) - _MANY_VERSIONS + 2
        shown = [*shown[:5], f"… {hidden} more …", *shown[-5:]]
    return ", ".join(shown)


def _print_tables(out: Console, tables: Sequence[TableContents]) -> None:
    names = ("table", "rows", "dim", "combiner", "size", "slots")
    lines = [
        [t.name, str(t.vocabulary_size), str(t.dim), t.combiner, size_text(t.size_bytes),
         ", ".join(t.slots) or "-"]
        for t in tables
    ]  # fmt: skip
    _print_grid(out, "tables", names, lines, right=(1, 2, 4))
    optimizers = {t.name: call_text(t.optimizer) for t in tables if t.optimizer is not None}
    _print_each(out, "optimizers", optimizers)


def _print_features(out: Console, contents: Contents) -> None:
    names = ("feature", "table", "steps of a sequence")
    lines = [
        (f.name, f.table, str(f.max_sequence_length) if f.max_sequence_length else "-")
        for f in contents.features
    ]
    _print_grid(out, "features", names, lines, right=(2,))
    transforms = {name: _arguments(t.to_json()) for name, t in contents.transforms.items()}
    _print_each(out, "ids of raw values", transforms)


def _print_dense(out: Console, dense: DenseContents) -> None:
    names = ("variable", "shape", "size", "trained")
    trainable = dense.trainable
    lines = [
        (name, str(list(shape)), size_text(4 * math.prod(shape)),
         "-" if trainable is None else "yes" if name in trainable else "no")
        for name, shape in dense.shapes.items()
    ]  # fmt: skip
    _print_grid(out, f"dense model, {size_text(dense.size_bytes)}", names, lines, right=(2,))
    facts = {"built by": json.dumps(dense.model)}
    if dense.optimizer is not None:
        facts["optimizer"] = call_text(dense.optimizer)
    if dense.slots:
        facts["slots"] = ", ".join(dense.slots)
    _print_each(out, "", facts)


def _print_each(out: Console, title: str, facts: Mapping[str, str]) -> None:
    if facts and title:
        out.print(f"\n{title}", soft_wrap=True)
    for name, value in facts.items():
        out.print(f"  {name}: {value}", soft_wrap=True)


def _print_grid(
    out: Console,
    title: str,
    names: Sequence[str],
    lines: Iterable[Sequence[str]],
    right: Collection[int],
) -> None:
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="")
    for place, name in enumerate(names):
        grid.add_column(name, justify="right" if place in right else "left", overflow="fold")
    for line in lines:
        grid.add_row(*line)
    with out.capture() as drawn:
        out.print(grid)
    out.print(f"\n{title}", soft_wrap=True)
    for line in drawn.get().splitlines():
        out.print(line.rstrip(), soft_wrap=True)


def call_text(described: Mapping[str, Any]) -> str:
    """An optimizer as one writes it; arguments that are off are left out.

    >>> call_text({"name": "SGD", "learning_rate": 0.1, "clipvalue": None})
    'SGD(learning_rate=0.1)'
    """
    arguments = {
        k: v for k, v in described.items() if k != "name" and v is not None and v is not False
    }
    return f"{described.get('name')}({_arguments(arguments)})"


def _arguments(values: Mapping[str, Any]) -> str:
    shown = {name: call_text(v) if _named(v) else v for name, v in values.items() if v is not None}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def _named(value: object) -> bool:
    return isinstance(value, dict) and "name" in value


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
