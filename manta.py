"""The public face of Manta: `import manta` and the `manta` command.

Names are loaded when they are first used, so that `import manta` needs neither Ray nor TensorFlow.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import ps.commands
import serving.commands
import workers.chaos.commands
import workers.commands
from ps.errors import ConfigError, MantaError

__version__ = "0.1.0"

_EXPORTS = {
    "ps.config": ("TableConfig", "FeatureConfig", "QuantizationConfig", "CustomCombiner", "SGD",
                  "Adagrad", "AdagradMomentum", "Adam", "FTRL", "CustomOptimizer"),
    "ps.optimizers": ("ExponentialDecay", "LinearDecay"),
    "ps.initializers": ("Initializer", "TruncatedNormal", "RandomNormal", "RandomUniform",
                        "Constant", "RowIdInitializer"),
    "ps.ragged": ("Ragged",),
    "ps.inputs": ("Dense", "Sparse", "Bags"),
    "ps.lookup": ("embedding_lookup",),
    "ps.columns": ("embedding_column", "shared_embedding_columns",
                   "categorical_column_with_identity", "categorical_column_with_vocabulary_list",
                   "categorical_column_with_vocabulary_file",
                   "categorical_column_with_hash_bucket", "weighted_categorical_column",
                   "sequence_categorical_column_with_identity",
                   "sequence_categorical_column_with_vocabulary_list",
                   "sequence_categorical_column_with_vocabulary_file",
                   "sequence_categorical_column_with_hash_bucket",
                   "input_layer", "sequence_input_layer", "configs_from_columns", "RawValues"),
    "ps.errors": ("MantaError", "ConfigError", "DataError", "ExportError", "SnapshotError",
                  "CheckpointError", "InputError", "IdRangeError", "JobError", "ServerError",
                  "ServerUnavailableError"),
    "ps.export": ("open_export", "Export"),
    "ps.snapshot": ("open_snapshot", "Snapshot", "export_snapshot"),
    "workers.config": ("JobConfig", "load_job"),
    "workers.job": ("train", "TrainResult"),
    "serving.lookup": ("LookupService", "Raw"),
    "serving.client": ("LookupClient", "AsyncLookupClient"),
    "serving.tf.lookup": ("serving_embedding_lookup",),
    "serving.tf.embedding": ("EmbeddingForServing",),
    "serving.tf.saved_model": ("write_saved_model",),
    "serving.tf.checkpoint": ("write_checkpoint",),
    "serving.tf.checkpoint_import": ("import_export", "import_snapshot"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = ["__version__", "main", *_MODULE_OF]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'manta' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


TRUST = (
    "The build function, package.module:function, of a model of your own: it will be run. "
    "two_tower and dlrm need no mention."
)

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
app.add_typer(workers.chaos.commands.app)
app.add_typer(ps.commands.app)
app.add_typer(serving.commands.app)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command("export")
def export_command(
    source: Annotated[Path, typer.Argument(help="Snapshot or export: its root, or one version.")],
    export: Annotated[
        Path | None, typer.Option(metavar="ROOT", help="Write a serving export (of a snapshot).")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write a TensorFlow checkpoint (of a snapshot)."),
    ] = None,
    saved_model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write a SavedModel.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="FEATURE=KIND",
            help="SavedModel: dense, ragged, ragged_weighted, sparse, sparse_weighted [ragged].",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="FUNCTION", help=TRUST)] = None,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Leave out the dense model.")
    ] = False,
) -> None:
    """Write a snapshot or an export in another form: for serving, or for TensorFlow."""
    if export is checkpoint is saved_model is None:
        raise ConfigError("export: say what to write: --export, --checkpoint or --saved-model")
    if inputs and saved_model is None:
        raise ConfigError("export: --input is about a SavedModel; give --saved-model too")
    if model is not None and (no_model or checkpoint is saved_model is None):
        raise ConfigError(
            "export: --model is about the dense model of a --checkpoint or --saved-model; "
            "it does not go with --no-model"
        )
    from ps.export import open_export
    from ps.manifest import holds
    from ps.snapshot import SNAPSHOT, export_snapshot, open_snapshot

    def rebuilt(described: dict[str, Any] | None) -> Any:
        return None if no_model else _rebuilt(described, model)

    if not holds(SNAPSHOT, source):
        if export is not None or checkpoint is not None:
            raise ConfigError(f"export: --export and --checkpoint need a snapshot, not '{source}'")
        assert saved_model is not None
        opened = open_export(source)
        _write_saved_model(opened, saved_model, inputs, rebuilt(opened.dense_model))
        return
    snapshot = open_snapshot(source, verify=True)  # all of it is read anyway
    described = None if snapshot.dense is None else snapshot.dense.model
    if export is not None:
        typer.echo(f"export: {export_snapshot(snapshot, export, dense=not no_model)}")
    if checkpoint is not None:
        built = rebuilt(described)
        from serving.tf.checkpoint import write_checkpoint

        typer.echo(f"checkpoint: {write_checkpoint(snapshot, checkpoint, model=built)}")
    if saved_model is not None:
        parent = saved_model.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            opened = open_export(export_snapshot(snapshot, Path(folder)))
            _write_saved_model(opened, saved_model, inputs, rebuilt(described))


@app.command("import")
def import_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Prefix of a TensorFlow checkpoint, or a folder with some.")
    ],
    config: Annotated[Path, typer.Argument(help="YAML file of the job whose tables it has.")],
    export: Annotated[
        Path | None, typer.Option(metavar="ROOT", help="Write a serving export.")
    ] = None,
    snapshot: Annotated[
        Path | None,
        typer.Option(metavar="ROOT", help="Write a snapshot to train from (train.start_from)."),
    ] = None,
    attribute: Annotated[
        str, typer.Option(help="The embedding's name in the checkpoint.")
    ] = "embedding",
    step: Annotated[int, typer.Option(min=0, help="Training steps behind the values.")] = 0,
    initial_slots: Annotated[
        bool,
        typer.Option("--initial-slots", help="Give slots that it lacks their first values."),
    ] = False,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Leave out the dense model.")
    ] = False,
) -> None:
    """Read a TensorFlow checkpoint of TPUEmbedding tables: to serve it, or to go on training."""
    if export is snapshot is None:
        raise ConfigError("import: say what to write: --export or --snapshot")
    if initial_slots and snapshot is None:
        raise ConfigError("import: --initial-slots is about a snapshot; give --snapshot too")
    from workers.config import load_job

    job = load_job(config)
    _quiet_tensorflow()
    from serving.tf.checkpoint_import import import_export, import_snapshot
    from workers.model import built_model, describe_model, job_inputs

    model = None if no_model else built_model(job.model, job_inputs(job))
    common: dict[str, Any] = {
        "attribute": attribute,
        "step": step,
        "job": job.name,
        "transforms": job.transforms(),
        "model": model,
        "model_info": None if no_model else describe_model(job),
    }
    spec = job.embedding_spec()
    if export is not None:
        typer.echo(f"export: {import_export(checkpoint, spec, export, **common)}")
    if snapshot is not None:
        slots: Any = "initial" if initial_slots else "required"
        path = import_snapshot(checkpoint, spec, snapshot, seed=job.seed, slots=slots, **common)
        typer.echo(f"snapshot: {path}")


def _rebuilt(described: dict[str, Any] | None, trusted: str | None) -> Any:
    _quiet_tensorflow()
    from workers.model import rebuild_model

    return None if described is None else rebuild_model(described, trusted)


def _write_saved_model(export: Any, folder: Path, inputs: list[str] | None, model: Any) -> None:
    _quiet_tensorflow()
    from serving.tf.saved_model import write_saved_model

    kinds: dict[str, Any] = {}
    for text in inputs or ():
        feature, equals, kind = text.partition("=")
        if not equals:
            raise ConfigError(f"export: --input {text}: write FEATURE=KIND")
        kinds[feature] = kind
    dense = export.dense_model["dense"] if model is not None else 0
    path = write_saved_model(export, folder, model=model, inputs=kinds, dense=dense)
    typer.echo(f"SavedModel: {path}")


def _quiet_tensorflow() -> None:
    """Import TensorFlow for work with files: on the CPU, without its greetings.

    It greets before it has read how much it should log; what fails is raised all the same.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        importlib.import_module("tensorflow").config.list_physical_devices()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


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
