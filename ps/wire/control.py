"""`Control`: what other threads tell a transport while its worker may be waiting in it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from copy import copy

from ps.errors import MantaError
from ps.wire.server import Endpoint


class Control:
    """Where shards live by now, and whether to stop."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self._changed = threading.Condition()
        self._endpoints = {endpoint.shard: endpoint for endpoint in endpoints}
        self._changes = 0
        self._error: MantaError | None = None
        self.repair_s = 0.0
        """Time that the transport has spent on broken connections."""

    def move(self, endpoints: Iterable[Endpoint]) -> None:
        """Say where shards live now; those that are not named stay where they were."""
        with self._changed:
            self._endpoints |= {endpoint.shard: endpoint for endpoint in endpoints}
            self._changes += 1
            self._changed.notify_all()

    def abort(self, error: MantaError) -> None:
        """From now on `check` raises this error; the first one counts."""
        with self._changed:
            self._error = self._error or error
            self._changes += 1
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what `abort` was told."""
        if self._error is not None:
            raise copy(self._error)  # one's traceback keeps messages in memory

    def endpoint(self, shard: int) -> Endpoint:
        """Where a shard lives."""
        return self._endpoints[shard]

    @property
    def changes(self) -> int:
        """How often something was said."""
        return self._changes

    def wait(self, seconds: float, changes: int) -> bool:
        """Wait until more than `changes` were said; whether that was so within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._changes != changes, seconds)
