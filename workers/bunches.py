"""`Bunches`: the steps that workers are told to run, some at a time, and what they report."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from workers.modes import in_rank_order
from workers.recovery import Failure
from workers.remote import plain_error
from workers.report import StepReport
from workers.run import Run
from workers.vitals import FailedError

_QUEUED = 2
"""Bunches that workers are told of: they go on with the next while the last is reported."""


@dataclass(slots=True)
class Bunch:
    """The steps of all workers up to `end`."""

    end: int
    by_worker: dict[int, list[StepReport]] = field(default_factory=dict)

    @property
    def reports(self) -> list[StepReport]:
        """One per rank."""
        return in_rank_order([self.by_worker[worker] for worker in sorted(self.by_worker)])


class Bunches:
    """Workers are told of absolute steps, so that a new one can be told the same."""

    def __init__(
        self, run: Run, ends: Sequence[int], step: int, post: Callable[[str, Any, Any], None]
    ) -> None:
        """All workers are at `step`. `post("steps", key, future)` is called when one is through."""
        self._run = run
        self._ends = ends
        self._post = post
        self._told: dict[tuple[int, int], object] = {}
        """By (worker, end): stands for the call; what an earlier one says does not count."""
        self._open: deque[Bunch] = deque()
        self.queued_to = step
        """Workers know of the steps before this one."""

    @property
    def done(self) -> bool:
        """Whether workers have run all that they were told."""
        return not self._open

    @property
    def full(self) -> bool:
        """Whether workers know of enough for now, or of all."""
        return len(self._open) >= _QUEUED or self.queued_to >= self._ends[-1]

    @property
    def at_end(self) -> bool:
        """Whether workers know of all steps."""
        return self.queued_to >= self._ends[-1]

    def queue(self) -> None:
        """Tell all workers of the next steps."""
        end = next(end for end in self._ends if end > self.queued_to)
        self._open.append(Bunch(end))
        for worker in range(len(self._run.workers)):
            self._tell(worker, end)
        self.queued_to = end

    def again(self, workers: Collection[int]) -> None:
        """Tell new workers what the old ones have not reported."""
        for bunch in self._open:
            for worker in sorted(set(workers) - bunch.by_worker.keys()):
                self._tell(worker, bunch.end)

    def start_over(self, step: int) -> None:
        """All workers are at `step`, and know of nothing."""
        self._told.clear()
        self._open.clear()
        self.queued_to = step

    def take(self, worker: int, end: int, call: object, future: Any) -> Iterator[Bunch]:
        """Take what a worker says; gives the bunches that all workers are through with.

        Raises:
            FailedError: it has died.
        """
        if self._told.get((worker, end)) is not call:
            return
        try:
            reports = future.result()
        except ray.exceptions.RayActorError as e:
            cause = f"worker {worker}: {plain_error(e)}"
            raise FailedError(Failure(cause, workers=frozenset([worker]))) from e
        del self._told[worker, end]
        next(b for b in self._open if b.end == end).by_worker[worker] = reports
        while self._open and len(self._open[0].by_worker) == len(self._run.workers):
            yield self._open.popleft()

    def _tell(self, worker: int, end: int) -> None:
        self._told[worker, end] = call = object()
        future = self._run.workers[worker].run_to.remote(end).future()
        future.add_done_callback(lambda f: self._post("steps", (worker, end, call), f))
