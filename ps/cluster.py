"""Connecting to Ray: a cluster that is there, or one started for the life of a command."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from ps.errors import JobError

NAMESPACE = "manta"
"""Of the names of all actors: every driver finds those of its job."""
_NAME_FREE_S = 30.0


@contextmanager
def ray_cluster(address: str | None, min_cpus: float) -> Iterator[None]:
    """Connect to Ray for the body of a `with`.

    Under `ray job submit`, or with an address, the cluster is joined as it is. Otherwise one is
    started on this machine, with at least `min_cpus` logical CPUs (so that a small machine can run
    every actor, slower), and stopped at the end. Ray's own services listen on all interfaces, with
    Ray's token authentication; what Manta opens listens on loopback.

    Raises:
        JobError: no cluster at that address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _join(address)
        else:
            with _uninterrupted():
                _start_local(min_cpus)
    except ConnectionError as e:
        raise JobError(f"no Ray cluster at '{address}': {str(e).splitlines()[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the body is done: half a Ray would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        ray.shutdown()
        raise KeyboardInterrupt


def _join(address: str) -> None:
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # `ray job submit` set up the paths
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env=None if submitted else _paths(),
    )


def _paths() -> dict[str, dict[str, str]]:
    """User modules (`model.build: package.module:function`) are found from the current folder."""
    paths = [os.getcwd(), os.environ.get("PYTHONPATH", "")]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}}


def _start_local(min_cpus: float) -> None:
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, int(min_cpus + 0.999)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env=_paths(),
    )


def actor_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """What an actor asks for, as Ray's options: some resources have an argument of their own."""
    own = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0}
    options |= {own[name]: amount for name, amount in resources.items() if name in own}
    return options | {"resources": {k: v for k, v in resources.items() if k not in own}}


def named(name: str, create: Callable[..., Any]) -> Any:
    """Create an actor by `create(name=…, namespace=…)`, once an earlier one of the name is gone.

    Raises:
        JobError: a living actor has the name.
    """
    deadline = time.monotonic() + _NAME_FREE_S
    while True:
        try:
            return create(name=name, namespace=NAMESPACE)
        except ValueError as e:  # Ray frees a name some time after its actor's end
            if time.monotonic() > deadline:
                raise JobError(f"actor '{name}' exists: another job of this name runs") from e
            time.sleep(0.05)


def free_resources() -> dict[str, float]:
    """What the cluster has free, without Ray's per-node entries and byte counts."""
    found = ray.available_resources()
    return {k: v for k, v in sorted(found.items()) if ":" not in k and "memory" not in k}


def num_nodes() -> int:
    """Machines (or what Ray takes for one) in the cluster."""
    return sum(node["Alive"] for node in ray.nodes())
