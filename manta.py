"""The public face of Manta: `import manta` and the `manta` command.

Names are loaded when they are first used, so that `import manta` needs neither Ray nor TensorFlow.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any, NoReturn

import typer

import serving.commands
import workers.commands
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


app.add_typer(workers.commands.app)
app.add_typer(serving.commands.app)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


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
