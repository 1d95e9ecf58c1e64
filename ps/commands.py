"""The `manta` commands about snapshots and exports: `verify` and `inspect`.

Thin calls into the library. What a command needs is imported when it runs, so that `manta --help`
stays quick.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

app = typer.Typer()  # its commands become commands of `manta`

Location = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="Snapshot or export: its root, or one version; a local path, s3://… or gs://…",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("verify")
def verify_command(
    location: Location,
    allow_non_finite: Annotated[
        bool,
        typer.Option("--allow-non-finite", help="NaN and infinite values are no finding."),
    ] = False,
    json: Json = False,
) -> None:
    """Check a snapshot or an export, every byte of it.

    Exit code: 0 it is sound, 1 something is wrong with it, 2 it could not be checked.
    """
    from ps.errors import MantaError
    from ps.verify import verify

    try:
        result = verify(location, allow_non_finite=allow_non_finite)
    except (MantaError, OSError) as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(2) from None
    if json:
        _print_json(result.to_json())
    else:
        for line in result.lines():
            typer.echo(line)
    raise typer.Exit(0 if result.ok else 1)


@app.command("inspect")
def inspect_command(
    location: Location,
    stats: Annotated[
        bool, typer.Option("--stats", help="Figures of every table's numbers; reads all of it.")
    ] = False,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            "--row", metavar="TABLE:ID", help="Print a row and its slots only; repeatable."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show what is in a snapshot or an export."""
    from ps.contents import describe, parse_row

    wanted = [parse_row(text) for text in rows or ()]
    contents = describe(location)
    found = [contents.table(table).row(row_id) for table, row_id in wanted]
    figures = {t.name: t.stats() for t in contents.tables.values()} if stats else {}
    from ps.contents_text import console, print_contents, print_row, print_stats

    if json:
        document = contents.to_json()
        if stats:
            document["stats"] = {name: s.to_json() for name, s in figures.items()}
        if rows:
            document["rows"] = [row.to_json() for row in found]
        _print_json(document)
        return
    out = console()
    if stats or not rows:
        print_contents(out, contents)
    for name, table_stats in figures.items():
        print_stats(out, contents.table(name), table_stats)
    for place, row in enumerate(found):
        if place or stats:
            out.print()
        print_row(out, row)


def _print_json(document: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
