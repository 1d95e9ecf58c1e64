"""The `manta` commands of training: `train`, and `prepare` for raw data.

Thin calls into the library. What a command needs is imported when it runs, so that `manta --help`
stays quick.
"""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()  # its commands become commands of `manta`
prepare = typer.Typer(no_args_is_help=True, help="Turn raw data into Parquet for training.")
app.add_typer(prepare, name="prepare")

ConfigPath = Annotated[Path, typer.Argument(help="YAML file of the job.")]
OutFolder = Annotated[Path, typer.Argument(help="Folder to write; replaced if it is a data set.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join, e.g. 'auto'; default: one of its own."),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


@app.command("train")
def train_command(
    config: ConfigPath,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Override a key, e.g. train.epochs=3."),
    ] = None,
    address: Address = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Train the job of a YAML file; write an export and metrics."""
    from rich.console import Console

    from ps.cluster import ray_cluster
    from workers.config import load_job
    from workers.job import train
    from workers.jobplan import plan_job
    from workers.progress import LiveDisplay, MetricsFile, PlainLines

    job = load_job(config, overrides or ())
    console = Console(quiet=quiet)
    display = LiveDisplay(console) if console.is_terminal else PlainLines(console)
    with contextlib.ExitStack() as stack:
        stack.callback(display.close)
        listeners: list[Any] = [display]
        if job.output.metrics is not None:
            listeners.append(stack.enter_context(MetricsFile(job.output.metrics)))
        plan_job(job)  # bad input is found before Ray is started
        stack.enter_context(ray_cluster(address, job.num_cpus))
        # As Ctrl-C does: stop the actors and leave. After Ray, which sets a handler of its own.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        train(job, listeners)


@prepare.command("movielens")
def prepare_movielens_command(
    source: Annotated[Path, typer.Argument(help="Folder of ml-100k, ml-1m, ml-latest, …")],
    out: OutFolder,
    split: Annotated[str, typer.Option(help="random, time, or u1 … u5, ua, ub.")] = "random",
    test_fraction: Annotated[
        float | None, typer.Option(help="Part of random and time splits [0.1].")
    ] = None,
    max_history: Annotated[int, typer.Option(help="Items in a user's history; 0: none.")] = 50,
    max_ratings: Annotated[int, typer.Option(help="Ratings in a user's or item's bag.")] = 64,
    seed: Seed = 0,
) -> None:
    """MovieLens ratings, in any of its formats."""
    from workers.prepare import prepare_movielens

    _report(
        prepare_movielens(
            source,
            out,
            split=split,
            test_fraction=test_fraction,
            max_history=max_history,
            max_ratings=max_ratings,
            seed=seed,
        )
    )


@prepare.command("criteo")
def prepare_criteo_command(
    source: Annotated[Path, typer.Argument(help="Tab-separated log, plain or .gz.")],
    out: OutFolder,
    buckets: Annotated[
        int, typer.Option(help="Hash buckets of each categorical column.")
    ] = 100_000,
    test_fraction: Annotated[float, typer.Option(help="Part of the lines held out.")] = 0.1,
    seed: Seed = 0,
) -> None:
    """Criteo click log: label, 13 integers, 26 categories."""
    from workers.prepare import prepare_criteo

    _report(prepare_criteo(source, out, test_fraction=test_fraction, buckets=buckets, seed=seed))


@prepare.command("synthetic")
def prepare_synthetic_command(
    kind: Annotated[str, typer.Argument(help="movielens or criteo.")],
    out: OutFolder,
    rows: Annotated[int, typer.Option(help="Examples.")] = 100_000,
    test_fraction: Annotated[float, typer.Option(help="Part of the rows held out.")] = 0.1,
    users: Annotated[int | None, typer.Option(help="movielens: users [6040].")] = None,
    items: Annotated[int | None, typer.Option(help="movielens: items [3706].")] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="criteo: ids of all 26 columns together [1000000].")
    ] = None,
    equal_tables: Annotated[
        bool, typer.Option("--equal-tables", help="criteo: as many ids in every column.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Made-up data of any size, with Zipf ids and a signal to learn."""
    from workers.prepare import prepare_synthetic

    _report(
        prepare_synthetic(
            kind,
            out,
            rows=rows,
            test_fraction=test_fraction,
            num_users=users,
            num_items=items,
            total_vocabulary=vocabulary,
            table_sizes="equal" if equal_tables else None,
            seed=seed,
        )
    )


def _report(report: Any) -> None:
    for line in report.lines():
        typer.echo(line)
