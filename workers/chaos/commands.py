"""The `manta chaos` command."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ps.errors import ConfigError

if TYPE_CHECKING:
    from workers.chaos.ray_nodes import JobShape
    from workers.chaos.rounds import ChaosPlan
    from workers.config import JobConfig

app = typer.Typer()  # its command becomes a command of `manta`


@app.command("chaos")
def chaos_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the job.")],
    kills: Annotated[int, typer.Option(min=1, help="Processes (or nodes) to kill.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all faults.")] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Override a key, e.g. train.epochs=3."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Ray nodes, all on this machine.")] = 1,
    kinds: Annotated[
        str | None,
        typer.Option(
            metavar="KIND,…",
            help="shard, worker, driver, node, cut, delay, disk, pause; default: all but node.",
        ),
    ] = None,
    mean_gap: Annotated[float, typer.Option(help="Mean seconds between faults.")] = 5.0,
    deadline: Annotated[
        float | None,
        typer.Option(
            help="Seconds a run may take; default: by the undisturbed run and the faults."
        ),
    ] = None,
    workdir: Annotated[
        Path | None, typer.Option(help="Folder to make the runs in; default: a temporary one.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the runs' folders there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train while things are killed and broken; fail if one bit differs from an undisturbed run."""
    from rich.console import Console

    from workers.chaos.compare import Comparison, compare_snapshots
    from workers.chaos.processes import uninterrupted
    from workers.chaos.ray_nodes import ray_cluster
    from workers.chaos.report import Lines, show, to_json
    from workers.chaos.rounds import run_chaos
    from workers.config import load_job
    from workers.jobplan import plan_job

    def compare(undisturbed: Path, disturbed: Path) -> Comparison:
        from ps.snapshot import open_snapshot

        return compare_snapshots(open_snapshot(undisturbed), open_snapshot(disturbed))

    def loaded(folder: Path) -> JobConfig:
        own = [f"output.snapshot={folder / 'snapshots'}", "output.export=null"]
        return load_job(config, [*(overrides or ()), *own])

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does: clean up, leave
    console = Console(file=sys.stderr if json else sys.stdout)  # stdout as it is now
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=workdir)).absolute()
    try:
        job = loaded(folder)
        plan = plan_of(job, kills, seed, nodes, kinds, mean_gap, deadline)
        plan_job(job)  # bad input is found before Ray is started
        arguments, outputs = train_arguments(job, config, overrides or ())
        with ray_cluster(shape_of(job), nodes, arguments, outputs) as cluster:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set one of its own
            record = run_chaos(plan, cluster, folder, Lines(console), compare, keep=keep)
    finally:
        if keep:
            console.print(f"kept: {folder}", highlight=False, markup=False, soft_wrap=True)
        else:
            with uninterrupted():
                shutil.rmtree(folder, ignore_errors=True)
    if json:
        sys.stdout.write(to_json(record).decode() + "\n")
    else:
        show(record, console)
    if not record.good:
        raise typer.Exit(1)


def plan_of(
    job: JobConfig,
    kills: int,
    seed: int,
    nodes: int,
    kinds: str | None,
    mean_gap_s: float,
    deadline_s: float | None,
) -> ChaosPlan:
    """What is wanted of this job.

    Raises:
        ConfigError: the job cannot survive faults, or not with the same bits; or a bad option.
    """
    from workers.chaos.plan import DEFAULT_KINDS, Targets, parse_kinds
    from workers.chaos.rounds import ChaosPlan

    recovery = job.recovery
    if recovery.durability == "none":
        raise ConfigError(
            "recovery.durability: chaos needs a job that survives: snapshot or log, got none"
        )
    if job.train.mode != "sync":
        raise ConfigError(f"train.mode: chaos compares bits, which {job.train.mode} has no two of")
    if job.cluster.threads_per_worker != 1:
        raise ConfigError(
            "cluster.threads_per_worker: chaos compares bits, which TensorFlow repeats with 1 "
            f"thread only, got {job.cluster.threads_per_worker}"
        )
    if not mean_gap_s > 0:
        raise ConfigError(f"--mean-gap must be above 0 s, got {mean_gap_s:g}")
    if deadline_s is not None and not deadline_s > 0:
        raise ConfigError(f"--deadline must be above 0 s, got {deadline_s:g}")
    return ChaosPlan(
        job=job.name,
        durability=recovery.durability,
        targets=Targets(shards=job.cluster.shards, workers=job.cluster.workers, nodes=nodes),
        kills=kills,
        seed=seed,
        kinds=DEFAULT_KINDS if kinds is None else parse_kinds(kinds, nodes),
        mean_gap_s=mean_gap_s,
        deadline_s=deadline_s,
        step_deadline_s=recovery.step_deadline_s,
        snapshot_every=recovery.snapshot_every,
    )


def train_arguments(
    job: JobConfig, config: Path, overrides: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """How `manta` runs the job, and the keys of what a run writes, by attribute of `RunFolder`."""
    sets = [part for override in overrides for part in ("--set", override)]
    outputs = {"snapshots": "output.snapshot", "metrics": "output.metrics"}
    if job.recovery.log is not None:  # else it lies in the snapshots' folder
        outputs["log"] = "recovery.log"
    return ["train", str(config), *sets, "--set", "output.export=null"], outputs


def shape_of(job: JobConfig) -> JobShape:
    """What the cluster must know of the job."""
    from workers.chaos.ray_nodes import JobShape

    cluster = job.cluster
    return JobShape(
        name=job.name,
        shards=cluster.shards,
        shard_resources=cluster.shard_resources,
        workers=cluster.workers,
        worker_resources=cluster.worker_resources,
    )
