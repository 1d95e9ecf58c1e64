"""The public face of Manta: `import manta` and the `manta` command.

Names are loaded when they are first used, so that `import manta` needs neither Ray nor TensorFlow.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ps.errors import MantaError

__version__ = "0.1.0"

_EXPORTS = {
    "ps.config": ("TableConfig", "FeatureConfig", "SGD", "Adagrad", "AdagradMomentum", "Adam",
                  "FTRL"),
    "ps.optimizers": ("ExponentialDecay", "LinearDecay"),
    "ps.initializers": ("Initializer", "TruncatedNormal", "RandomNormal", "RandomUniform",
                        "Constant", "RowIdInitializer"),
    "ps.ragged": ("Ragged",),
    "ps.errors": ("MantaError", "ConfigError", "DataError", "ExportError", "InputError",
                  "IdRangeError", "JobError", "ServerError", "ServerUnavailableError"),
    "ps.export": ("open_export", "Export"),
    "workers.config": ("JobConfig", "load_job"),
    "workers.job": ("train", "TrainResult"),
    "serving.client": ("LookupClient", "AsyncLookupClient"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = ["__version__", "main", *_MODULE_OF]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'manta' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A Ray-native parameter server for embedding models.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"manta {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


prepare = typer.Typer(no_args_is_help=True, help="Turn raw data into Parquet for training.")
app.add_typer(prepare, name="prepare")

ConfigPath = Annotated[Path, typer.Argument(help="YAML file of the job.")]
ExportPath = Annotated[Path, typer.Argument(help="Export root, or one version of it.")]
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
    from workers.job import plan_job, train
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


@app.command("serve")
def serve_command(
    export: ExportPath,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")
    ] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Serving processes.")] = 1,
    verify: Annotated[bool, typer.Option("--verify", help="Check all checksums first.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Answer one example lookup over HTTP, then stop.")
    ] = False,
    address: Address = None,
) -> None:
    """Serve an export over HTTP with Ray Serve, until Ctrl-C."""
    from ps.cluster import ray_cluster
    from ps.export import open_export
    from serving.deployment import deploy, undeploy

    opened = open_export(export, verify=verify)
    with ray_cluster(address, replicas + 1):
        url = deploy(opened.path, host=host, port=port, num_replicas=replicas)
        try:
            typer.echo(f"serving {opened.job} {opened.version} (step {opened.step}) at {url}")
            if check:
                _example_lookup(url, opened)
            else:
                with _stop_signal() as stop:
                    typer.echo("Ctrl-C stops it")
                    stop.wait()
        finally:
            undeploy()


def _example_lookup(url: str, export: Any) -> None:
    """Ask the server for the first row of every feature, and show question and answer."""
    from serving.client import LookupClient

    inputs = {
        name: [[0]] if feature.max_sequence_length else [0]
        for name, feature in export.features.items()
    }
    with LookupClient(url) as client:
        outputs = client.lookup(inputs)
    typer.echo(f"LookupClient('{url}').lookup({inputs})")
    for name, values in outputs.items():
        numbers = ", ".join(f"{x:.4f}" for x in values.reshape(-1)[:4])
        more = ", …" if values.size > 4 else ""
        typer.echo(f"  {name}: float32 {list(values.shape)} [{numbers}{more}]")


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set."""
    stop = threading.Event()
    previous = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@app.command("lookup")
def lookup_command(
    inputs: Annotated[
        list[str],
        typer.Argument(help="FEATURE=IDS, e.g. user=1,2 or 'genres=[[0,3],[5]]'."),
    ],
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
) -> None:
    """Ask a running server for combined embeddings; prints JSON."""
    import orjson

    from ps.errors import InputError
    from serving.client import LookupClient

    parsed = [_parse_input(text) for text in inputs]
    features = [feature for feature, _ in parsed]
    for feature in features:
        if features.count(feature) > 1:
            raise InputError(f"lookup: feature '{feature}' stands twice", feature)
    with LookupClient(url) as client:
        outputs = client.lookup(dict(parsed))
    typer.echo(orjson.dumps(outputs, option=orjson.OPT_SERIALIZE_NUMPY).decode())


def _parse_input(text: str) -> tuple[str, Any]:
    import orjson

    from ps.errors import InputError

    feature, equals, ids = text.partition("=")
    if not equals or not feature:
        raise InputError(f"lookup {text}: write FEATURE=IDS, e.g. user=1,2")
    try:
        return feature, orjson.loads(ids if ids.startswith("[") else f"[{ids}]")
    except orjson.JSONDecodeError:
        raise InputError(f"lookup {text}: '{ids}' is not a list of ids", feature) from None


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


def main() -> NoReturn:
    """The `manta` command: a `MantaError` (or what the disk refuses) is one line, exit code 1."""
    try:
        app(prog_name="manta")
    except MantaError as e:
        typer.echo(f"error: {e}", err=True)
        sys.exit(1)
    except OSError as e:  # a folder that may not be written, a full disk
        place = f"'{e.filename}': " if e.filename else ""
        typer.echo(f"error: {place}{e.strerror or e}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
