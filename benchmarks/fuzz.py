"""Bad frames against one shard while a worker trains: `python -m benchmarks.fuzz [frames]`.

Prints the frames sent by what is wrong with them, the shard's own memory before and after, and the
worker's median step without and with the attack. Ends with an error if the worker sees one, if its
bits are not those of one process, or if the shard's memory grows by more than `MAX_GROWTH`.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from contextlib import closing
from typing import Any

import numpy as np

from ps.optimizers import Adagrad
from tests.support.fuzzer import Fuzzer
from tests.support.wire import Job, Training, connected, train_locally
from tests.support.wire_processes import in_process, rss_bytes, shards_in_processes

JOB = Job(optimizers=(Adagrad(0.1),) * 2, dims=(16, 32), num_rows=100_000)
FRAMES, PIECES, QUIET_STEPS, WARM_UP = 100_000, 10, 300, 50
MAX_GROWTH = 16 << 20


def attack(endpoint: Any, frames: int, pipe: Any) -> None:
    """In a process of its own: all frames, in pieces; says after each what it has sent."""
    with closing(Fuzzer(endpoint, JOB, seed=2)) as fuzzer:
        for piece in range(PIECES):
            fuzzer.attack(frames * (piece + 1) // PIECES - fuzzer.sent.total())
            pipe.send(dict(fuzzer.sent))


def main(frames: int) -> None:
    ours, theirs = multiprocessing.Pipe()
    with (
        shards_in_processes(JOB, deadline_s=5.0) as (shard,),
        connected(JOB, [shard.endpoint], "arena") as (client, _),
    ):
        training = Training(JOB, client, 0)
        for _ in range(QUIET_STEPS):
            training.take_step()
        quiet = np.array(training.times_s[WARM_UP:])
        with in_process(attack, shard.endpoint, frames, theirs):
            started, memory, sent = time.perf_counter(), [], {}
            while len(memory) < PIECES:
                training.take_step()
                if ours.poll():
                    sent = ours.recv()
                    memory.append(rss_bytes(shard.process.pid))
            seconds = time.perf_counter() - started
        client.flush(30)
        report(sent, seconds, memory, quiet, np.array(training.times_s[QUIET_STEPS:]))
        wanted, (seen,) = train_locally(JOB, training.step)
        assert shard.contents() == wanted[0], "the shard has other bits than one process"
        assert training.seen == seen, "the worker has seen other rows"
        assert memory[-1] - memory[0] < MAX_GROWTH, "the shard's memory has grown"
        print(f"worker: no error in {training.step} steps, the bits of one process")


def report(
    sent: dict[str, int], seconds: float, memory: list[int], quiet: Any, attacked: Any
) -> None:
    print(f"{sum(sent.values())} bad frames in {seconds:.0f} s")
    for name, count in sorted(sent.items()):
        print(f"  {name:14s} {count:7d}")
    print("shard's memory, MiB:", " ".join(f"{size / 2**20:.1f}" for size in memory))
    for name, times in (("without", quiet), ("with", attacked)):
        ms = np.percentile(times, [50, 90, 99]) * 1e3
        print(f"step {name:8s} median {ms[0]:.2f} ms, p90 {ms[1]:.2f}, p99 {ms[2]:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else FRAMES)
