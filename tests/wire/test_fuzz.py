"""Bad frames by the thousand, before and after the handshake, while a worker trains."""

from __future__ import annotations

import threading
from contextlib import closing

import numpy as np
import pytest

from ps.optimizers import Adagrad
from tests.support.fuzzer import Fuzzer
from tests.support.shards import contents
from tests.support.wire import Job, Training, connected, local_client, wait_until
from tests.support.wire_processes import open_files, rss_bytes, shards_in_processes

JOB = Job(
    optimizers=(Adagrad(0.1),) * 2, dims=(4, 8), num_workers=2, mode="async", max_staleness=10**6
)
"""Worker 0 trains; worker 1 is the fuzzer, for whom nobody waits."""
FRAMES = 2000


@pytest.mark.parametrize("kind", ["arena", "tcp"])
def test_a_worker_trains_through_bad_frames_to_the_same_bits(kind: str) -> None:
    with (
        shards_in_processes(JOB, deadline_s=2.0) as (shard,),
        connected(JOB, [shard.endpoint], kind) as (client, _),  # type: ignore[arg-type]
        closing(Fuzzer(shard.endpoint, JOB, seed=1)) as fuzzer,
    ):
        training, stop = Training(JOB, client, 0), threading.Event()
        errors: list[BaseException] = []

        def train() -> None:
            try:
                while not stop.is_set():
                    training.take_step()
            except BaseException as e:
                errors.append(e)

        thread = threading.Thread(target=train)
        thread.start()
        fuzzer.attack(FRAMES // 4)  # until everything has been used once
        before = rss_bytes(shard.process.pid)
        fuzzer.attack(FRAMES // 4)
        stop.set()
        thread.join(30)
        assert errors == []
        grown = rss_bytes(shard.process.pid) - before
        assert grown < 8 << 20, f"{grown} bytes more"
        assert min(fuzzer.sent.values()) > 0
        client.flush(30)
        state = JOB.shard(0)
        alone = Training(JOB, local_client(JOB, [state], 0), 0)
        alone.run(training.step)
        assert shard.contents() == [a.tobytes() for a in contents(state)]
        assert training.seen == alone.seen
        assert np.median(training.times_s) < 1.0
        assert training.step > 10
        fuzzer.leave()
        wait_until(lambda: bad_files(shard.process.pid) <= 4, "all bad connections are closed")


def bad_files(pid: int) -> int:
    """Sockets and segments; the shard's own are two listeners, a worker and the test's pipe."""
    return sum(f.startswith(("socket:", "/memfd:fuzz")) for f in open_files(pid))
