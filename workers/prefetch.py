"""`Prefetched`: items of an iterator, made ahead by a thread of their own.

Order, items and errors are those of the iterator; only the time at which they are made differs.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetched(AbstractContextManager["Prefetched[T]"], Iterator[T]):
    """The items of `source`, of which at most `depth` are made before they are asked for.

    The one under way counts, so that no more than `depth` items ever lie in memory. With depth 0
    there is no thread: the items are made when they are asked for.

    One thread may iterate. Close it, or use it as a context manager, when items may be left over;
    an object that nobody holds any more ends its thread too, after the item under way.
    """

    def __init__(
        self,
        source: Iterator[T],
        depth: int,
        *,
        name: str = "prefetch",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start at once, in a thread of this name."""
        assert depth >= 0, "a number of items"
        self.waited_s = 0.0
        """Seconds that the consumer waited for items."""
        self._clock = clock
        self._source = source
        self._queue: _Queue[T] = _Queue(depth)
        self._closed = False
        self._thread: threading.Thread | None = None
        if depth:
            # The thread knows the queue only, or nobody could see that this object is gone.
            arguments = (source, self._queue)
            self._thread = threading.Thread(target=_fill, args=arguments, name=name, daemon=True)
            weakref.finalize(self, self._queue.close)
            self._thread.start()

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        start = self._clock()
        try:
            if self._thread is not None:
                return self._queue.take()
            self._queue.check()
            return next(self._source)
        finally:
            self.waited_s += self._clock() - start

    def close(self) -> None:
        """End the thread, after the item that it is making, and close the source; may be repeated.

        Items that are ready are dropped. Raises what closing the source raises.
        """
        if self._closed:
            return
        self._closed = True
        self._queue.close()
        if self._thread is not None:
            self._thread.join()
        close = getattr(self._source, "close", None)
        if close is not None:
            close()

    def fail(self, error: BaseException) -> None:
        """Let whoever waits for an item, and whoever asks for one, get this error; any thread may.

        The source may be stuck: it is not waited for.
        """
        self._queue.fail(error)

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _End:
    """Where the items end: what the source raised, None at its regular end."""

    error: BaseException | None


class _Queue(Generic[T]):
    """Items in order, between one thread that puts and one that takes."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: deque[T | _End] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None

    def wait_for_room(self) -> bool:
        """Wait until fewer than `depth` items lie here; False if no more are wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            return not self._closed

    def put(self, item: T | _End) -> None:
        with self._changed:
            if not self._closed:
                self._items.append(item)
                self._changed.notify()

    def take(self) -> T:
        """The next item; at the end what the source raised, and StopIteration from then on."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            self.check()
            item = self._items.popleft() if self._items else _End(None)
            if isinstance(item, _End):
                self._items.append(_End(None))
                raise StopIteration if item.error is None else item.error
            self._changed.notify()
        return item

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def fail(self, error: BaseException) -> None:
        self._failure = error
        self.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def _fill(source: Iterator[T], queue: _Queue[T]) -> None:
    while queue.wait_for_room():
        try:
            item = next(source)
        except StopIteration:
            queue.put(_End(None))
            return
        except BaseException as e:  # of any kind: it belongs to the consumer
            queue.put(_End(e))
            return
        queue.put(item)
        del item  # or it would live until the next one is made
