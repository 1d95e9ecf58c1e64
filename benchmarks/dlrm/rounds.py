"""Who runs in a round, each side in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks.dlrm.case import Case, Setting
from benchmarks.dlrm.result import Run

PARTS = ("tensorflow", "manta", "workers")
_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""For TensorFlow's tables; Manta asks for its own."""

BEST = (Setting(), Setting(threads=2))
SETTINGS = (
    Setting(lookahead=0),
    *BEST,
    Setting(lookahead=2),
    Setting(optimizer="SGD"),
    Setting(optimizer="SGD", threads=2),
)
WORKERS = (Setting(workers=2),)


def run_round(case: Case, only: Sequence[str], whole: bool) -> list[Run]:
    """One round of everyone; only the contenders for the best places if not `whole`."""
    runs: list[Run] = []
    if "tensorflow" in only:
        runs += _apart(_run_peers, case, whole, environment=_HUGE_PAGES)
    settings = [*(SETTINGS if whole else BEST)] if "manta" in only else []
    settings += WORKERS if "workers" in only else ()
    return runs + (_apart(_run_ours, case, settings) if settings else [])


def _apart(
    function: Callable[..., list[Run]], *args: Any, environment: dict[str, str] | None = None
) -> list[Run]:
    """In a new process, which gets the environment that it needs."""
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT | (environment or {}))
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            return process.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run_peers(case: Case, whole: bool) -> list[Run]:
    from benchmarks.dlrm.peers import Peer, run

    best = [Peer("tables"), Peer("one"), Peer("one", reads=True)]
    others = [Peer("one, no XLA"), Peer("Keras")]
    others += [Peer(kind, "SGD") for kind in ("tables", "one", "Keras")]
    return run(case, best + others if whole else best)


def _run_ours(case: Case, settings: Sequence[Setting]) -> list[Run]:
    from benchmarks.dlrm.ours import run

    return run(case, settings)
