"""The `manta` commands of serving: `serve` and `lookup`.

Thin calls into the library. What a command needs is imported when it runs, so that `manta --help`
stays quick.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()  # its commands become commands of `manta`

ExportPath = Annotated[Path, typer.Argument(help="Export root, or one version of it.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to join, e.g. 'auto'; default: one of its own."),
]


@app.command("serve")
def serve_command(
    export: ExportPath,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")
    ] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Serving processes.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPUs per process, for big lookups.")] = 1,
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
    with ray_cluster(address, replicas * threads + 1):
        url = deploy(opened.path, host=host, port=port, num_replicas=replicas, threads=threads)
        try:
            typer.echo(f"serving {opened.job} {opened.version} (step {opened.step}) at {url}")
            if check:
                example_lookup(url, opened)
            else:
                with _stop_signal() as stop:
                    typer.echo("Ctrl-C stops it")
                    stop.wait()
        finally:
            undeploy()


def example_lookup(url: str, export: Any) -> None:
    """Ask the server for one example of every feature, and show question and answer."""
    from serving.client import LookupClient
    from serving.lookup import example_input

    inputs: dict[str, Any] = {
        name: [[0]] if feature.max_sequence_length else [0]
        for name, feature in export.features.items()
    }
    raw = {name: example_input(transform) for name, transform in export.transforms.items()}
    inputs |= {name: value.values for name, value in raw.items()}
    weights = {name: value.weights for name, value in raw.items() if value.weights is not None}
    with LookupClient(url) as client:
        outputs = client.lookup(inputs, weights)
    more_arguments = f", {weights}" if weights else ""
    typer.echo(f"LookupClient('{url}').lookup({inputs}{more_arguments})")
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
        typer.Argument(help="FEATURE=IDS, e.g. user=1,2, 'genres=[[0,3],[5]]' or 'city=\"Rome\"'."),
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
