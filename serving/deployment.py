"""The Ray Serve shell: places replicas and restarts them; each opens the export by itself.

Holds no decision about lookups: the app is `create_app`, which is tested without Serve. The version
that LATEST names when `deploy` is called is what every replica serves, also after a restart.
"""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Callable
from pathlib import Path

import ray
from fastapi import FastAPI
from ray import serve

from ps.errors import ConfigError, ServerUnavailableError
from ps.export import open_export
from ps.threads import Threads
from serving.app import create_app
from serving.client import LookupClient
from serving.limits import Limits
from serving.lookup import LookupService

MAX_ONGOING_REQUESTS = 100
"""Requests that Serve sends to one replica at a time; its default of 5 is for slow models."""
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


def deploy(
    export_path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    num_replicas: int = 1,
    threads: int = 1,
    name: str = "manta",
    limits: Limits | None = None,
) -> str:
    """Serve an export on the current Ray, which is started if there is none.

    Args:
        export_path: an export root or version folder, visible to every node that runs a replica.
        host: address to listen on; the default answers only this machine.
        port: port to listen on; 0 is a free one.
        num_replicas: processes that answer.
        threads: CPUs that each of them asks Ray for and cuts big lookups between.
        name: name of the Serve application.
        limits: bounds of one request.

    Returns:
        The base URL, ready for lookups.

    Raises:
        ExportError: the export is missing or damaged; found before Ray is started.
        ConfigError: the port is taken or cannot be had, or Serve runs already on another one.
        ServerUnavailableError: the replicas did not start.
    """
    version = open_export(Path(export_path)).path
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if not ray.is_initialized():
        ray.init(logging_level="WARNING", include_dashboard=False)
    port = port or _free_port(host)
    _start_serve(host, port)
    reachable = _reachable(host)
    url = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    try:
        ingress = serve.ingress(_builder(str(version), limits, threads))()
        _run(serve.deployment(ingress), name, num_replicas, threads)
        with LookupClient(url) as client:
            client.wait_ready()
    except BaseException:
        serve.delete(name, _blocking=False)  # also after Ctrl-C while replicas wait for room
        raise
    return url


def undeploy(name: str = "manta") -> None:
    """Let the replicas finish their requests and stop them; Serve and Ray stay."""
    if ray.is_initialized() and _serve_runs():
        serve.delete(name)


def shutdown() -> None:
    """Stop Serve and all its applications; Ray itself stays."""
    if ray.is_initialized():
        serve.shutdown()


def _run(ingress: serve.Deployment, name: str, num_replicas: int, cpus: int) -> None:
    """Start the replicas and wait for them."""
    deployment = ingress.options(
        name="lookup",
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        logging_config=_QUIET,
    )
    try:
        serve.run(deployment.bind(), name=name, route_prefix="/", logging_config=_QUIET)
    except RuntimeError as e:
        raise ServerUnavailableError(
            f"application '{name}' did not start; does every node see the export? {e}"
        ) from e


def _builder(version: str, limits: Limits | None, threads: int) -> Callable[[], FastAPI]:
    """What a replica runs first. Travels by pickle, so it holds the path and not the tables."""

    def build() -> FastAPI:
        app = create_app(LookupService(open_export(Path(version)), Threads(threads)), limits)
        gc.collect()
        gc.freeze()  # what lives now lives for ever: keep it out of collections
        return app

    return build


def _start_serve(host: str, port: int) -> None:
    """Start Serve's proxy, or see that the running one is where the caller wants it."""
    address = (_reachable(host), port)
    if _serve_runs():
        if not _listens(address):
            raise ConfigError(
                f"Serve runs already, but not on {host}:{port}; "
                "use its address or call shutdown() first"
            )
        return
    if _listens(address):
        raise ConfigError(f"{host}:{port} is taken by another program; choose another port")
    _free_port(host, port)
    serve.start(http_options={"host": host, "port": port}, logging_config=_QUIET)


def _serve_runs() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


def _free_port(host: str, port: int = 0) -> int:
    """The port, found free, or any free one for 0."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            found: int = probe.getsockname()[1]
            return found
    except (OSError, OverflowError) as e:
        raise ConfigError(f"cannot listen on {host}:{port}: {e}") from None


def _reachable(host: str) -> str:
    """The address to ask when the server listens on every one."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
