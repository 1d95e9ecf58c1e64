"""A CPU is claimed by one shard at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from ps.wire.cpu import ClaimedCpu, claim_cpu


def in_thread(function: Callable[[], None]) -> None:
    """Affinity is a thread's own."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(10)


def test_every_thread_gets_a_cpu_of_its_own_while_there_are_some() -> None:
    allowed = os.sched_getaffinity(0)
    claimed: list[ClaimedCpu] = []
    left: list[set[int]] = []

    def claim() -> None:
        if (cpu := claim_cpu()) is not None:
            claimed.append(cpu)
        left.append(os.sched_getaffinity(0))

    for _ in range(len(allowed) + 1):
        in_thread(claim)
    cpus = [c.cpu for c in claimed]
    assert len(cpus) == len(set(cpus))
    assert set(cpus) <= allowed, "other shards of this machine may have the rest"
    assert left[-1] == allowed, "who comes too late is not pinned"
    assert [s for s in left if s != allowed] == [{c} for c in cpus]
    assert os.sched_getaffinity(0) == allowed
    for cpu in claimed:
        cpu.release()
    in_thread(claim)
    assert not cpus or claimed[-1].cpu == cpus[0]
    for cpu in claimed[len(cpus) :]:
        cpu.release()
