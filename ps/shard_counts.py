"""`Counts`: what a shard did since it started, and how old the rows behind its gradients were."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ps.messages import Push

STALENESS_BINS = 64


class Counts:
    """Counters of one shard; see `ps.messages.ShardStats`."""

    def __init__(self) -> None:
        self.rows_pulled = self.duplicates = 0
        self.pulls: dict[tuple[int, int], int] = {}
        """Updates behind the rows that were pulled, by worker and step, until the push comes."""
        self._updates = 0
        self._staleness = np.zeros(STALENESS_BINS, dtype=np.int64)

    @property
    def staleness(self) -> tuple[int, ...]:
        """Pushes by the number of updates between a push's pull and itself."""
        return tuple(np.trim_zeros(self._staleness, "b").tolist())

    def note_pull(self, worker: int, step: int, behind: int) -> None:
        """A worker has got rows for a step from `behind` updates ago; its push will follow."""
        self.pulls[worker, step] = self._updates - behind

    def note_update(self, pushes: Sequence[Push] = ()) -> None:
        """The state was changed once, by these pushes."""
        for push in pushes:
            at_pull = self.pulls.pop((push.worker, push.step), None)
            if at_pull is not None:
                self._staleness[min(self._updates - at_pull, STALENESS_BINS - 1)] += 1
        self._updates += 1
