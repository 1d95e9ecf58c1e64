"""Manta: whole jobs on a local Ray, as `manta train` runs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.dlrm.case import BATCH, CHUNK, Case, Setting, job
from benchmarks.dlrm.result import SKIPPED, Run, rate
from ps.cluster import ray_cluster
from workers.job import train
from workers.listener import Listener
from workers.report import Progress


class Reports(Listener):
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[Progress] = []

    def progress(self, progress: Progress) -> None:
        """Keep it."""
        self.reports.append(progress)


def run(case: Case, settings: Sequence[Setting]) -> list[Run]:
    """A job per setting, one after the other."""
    jobs = [job(case, setting) for setting in settings]
    runs = []
    with ray_cluster(None, max(j.num_cpus for j in jobs)):
        for setting, config in zip(settings, jobs, strict=True):
            heard = Reports()
            train(config, [heard])
            runs.append(_run(setting, heard.reports))
            found = rate(runs[-1:])
            print(f"  Manta, {setting}, {setting.optimizer}: {found:,.0f} examples/s", flush=True)
    return runs


def _run(setting: Setting, reports: Sequence[Progress]) -> Run:
    full = reports[: reports[-1].examples // (CHUNK * BATCH)]
    counted = full[SKIPPED:]
    parts: dict[str, float] = {
        cause: float(np.median([report.time[cause] for report in counted]))
        for cause in counted[0].time
    }
    rates = [report.examples_per_s for report in full]
    return Run(f"Manta, {setting}", setting.optimizer, rates, reports[0].loss, parts)
