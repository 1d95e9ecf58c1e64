"""TensorFlow's servers; apart from the clients, so that their processes import TensorFlow only."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import tensorflow as tf

from benchmarks.ps.processes import Child, wait_for_end

Cluster = dict[str, list[str]]


def new_cluster(num_ps: int) -> Cluster:
    """Parameter servers and one worker, on free ports."""
    with ExitStack() as stack:  # all open at once, so that no port comes twice
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(num_ps + 1)]
        for listener in listeners:
            stack.enter_context(listener)
        *ps, worker = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    return {"ps": ps, "worker": [worker]}


def start(cluster: Cluster, job: str) -> list[Child]:
    """A process for each task of a job."""
    return [Child(_serve, cluster, job, task) for task in range(len(cluster[job]))]


def server(cluster: Cluster, job: str, task: int) -> Any:
    """A server in this process."""
    return tf.distribute.Server(
        tf.train.ClusterSpec(cluster), job_name=job, task_index=task, protocol="grpc"
    )


def _serve(pipe: Connection, cluster: Cluster, job: str, task: int) -> None:
    running = server(cluster, job, task)
    pipe.send("ready")
    wait_for_end(pipe)
    del running
