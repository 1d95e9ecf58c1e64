"""`InOrder`: run numbered calls of each sender in the order of their numbers.

Ray does not promise that calls of one caller reach an asynchronous actor in order, and the
consistency of pulls and pushes rests on that order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable


class InOrder:
    """Holds calls back until all earlier ones of the same sender have run."""

    def __init__(self) -> None:
        self._next: defaultdict[int, int] = defaultdict(int)
        self._held: defaultdict[int, dict[int, Callable[[], None]]] = defaultdict(dict)

    def deliver(self, sender: int, number: int, call: Callable[[], None]) -> None:
        """Run `call`, now or as soon as the calls 0 … number - 1 of the sender have run."""
        held = self._held[sender]
        held[number] = call
        while self._next[sender] in held:
            ready = held.pop(self._next[sender])
            self._next[sender] += 1
            ready()
