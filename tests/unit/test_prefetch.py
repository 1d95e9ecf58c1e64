"""Items made ahead: the same ones, no more than asked for, and no thread left behind."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.prefetch import Prefetched

NAME = "prefetch-test"
PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not threads()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


class Source:
    """0, 1, 2 …; an item is made when its permit is given. Tells what was made, and its end."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.permits = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self.made = threading.Semaphore(0)
        self.count = 0
        self.closed = False
        self._fail_at = fail_at

    def __iter__(self) -> Iterator[int]:
        try:
            for i in itertools.count():
                self.asked.release()
                assert self.permits.acquire(timeout=PATIENCE_S)
                if i == self._fail_at:
                    raise KeyError(i)
                self.count += 1
                self.made.release()
                yield i
        finally:
            self.closed = True

    def allow(self, count: int) -> None:
        self.permits.release(count)

    def wait_for(self, event: threading.Semaphore, count: int = 1) -> None:
        for _ in range(count):
            assert event.acquire(timeout=PATIENCE_S)


def failing(count: int, error: BaseException | None) -> Iterator[int]:
    yield from range(count)
    if error is not None:
        raise error


@given(count=st.integers(0, 12), depth=st.integers(0, 5), taken=st.integers(0, 15))
def test_items_are_those_of_the_source_in_order(count: int, depth: int, taken: int) -> None:
    with Prefetched(iter(range(count)), depth, name=NAME) as items:
        assert list(itertools.islice(items, taken)) == list(range(min(count, taken)))
        assert list(items) == list(range(min(count, taken), count))
        assert list(items) == []


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()], ids=["error", "stop"])
def test_an_error_comes_where_its_item_would_have(depth: int, error: BaseException) -> None:
    with Prefetched(failing(3, error), depth, name=NAME) as items:
        assert [next(items), next(items), next(items)] == [0, 1, 2]
        with pytest.raises(type(error)) as caught:
            next(items)
        assert caught.value is error
        assert list(items) == []


@given(depth=st.integers(1, 4), taken=st.integers(0, 4))
def test_no_more_than_depth_items_are_made_ahead(depth: int, taken: int) -> None:
    source = Source()
    source.allow(100)
    with Prefetched(iter(source), depth, name=NAME) as items:
        assert list(itertools.islice(items, taken)) == list(range(taken))
        source.wait_for(source.made, taken + depth)
        # The thread now waits for room. It would have asked for the next item otherwise.
        assert source.count == taken + depth
    assert source.count == taken + depth


def test_without_depth_items_are_made_when_they_are_asked_for() -> None:
    source = Source()
    source.allow(2)
    with Prefetched(iter(source), 0, name=NAME) as items:
        assert not threads()
        assert source.count == 0
        assert next(items) == 0
        assert source.count == 1
    assert source.closed
    assert list(items) == []


def test_closing_while_an_item_is_made_waits_for_it_and_drops_it() -> None:
    source = Source()
    items = Prefetched(iter(source), 2, name=NAME)
    source.wait_for(source.asked)
    closing = threading.Thread(target=items.close)
    closing.start()
    assert not source.closed
    source.allow(1)
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert source.closed
    assert source.count == 1
    assert list(items) == []
    items.close()


def test_closing_wakes_a_thread_that_waits_for_room() -> None:
    source = Source()
    source.allow(10)
    with Prefetched(iter(source), 1, name=NAME):
        source.wait_for(source.made)
    assert source.count == 1
    assert source.closed


def test_closing_ends_the_wait_of_a_consumer_in_another_thread() -> None:
    source = Source()
    items = Prefetched(iter(source), 1, name=NAME)
    found: list[int] = []
    consumer = threading.Thread(target=lambda: found.extend(items))
    consumer.start()
    source.wait_for(source.asked)
    source.allow(1)  # the item that is made while closing waits
    items.close()
    consumer.join(PATIENCE_S)
    assert not consumer.is_alive()
    assert found in ([], [0])


def test_an_abandoned_iterator_ends_its_thread() -> None:
    source = Source()
    source.allow(3)
    items = Prefetched(iter(source), 1, name=NAME)
    assert next(items) == 0
    source.wait_for(source.made, 2)
    (thread,) = threads()
    del items
    gc.collect()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert source.closed


def test_an_error_is_kept_while_nobody_asks() -> None:
    source = Source(fail_at=1)
    with Prefetched(iter(source), 5, name=NAME) as items:
        (thread,) = threads()
        source.allow(2)
        thread.join(PATIENCE_S)
        assert next(items) == 0
        with pytest.raises(KeyError):
            next(items)


def test_sources_nest_and_close_together() -> None:
    inner_source = Source()
    inner_source.allow(10)

    def outer() -> Iterator[int]:
        with Prefetched(iter(inner_source), 1, name=NAME) as inner:
            for item in inner:
                yield 10 * item

    with Prefetched(outer(), 1, name=NAME) as items:
        assert next(items) == 0
        assert next(items) == 10
    assert inner_source.closed


@pytest.mark.parametrize("depth", [0, 2])
def test_waiting_is_measured(depth: int) -> None:
    ticks = itertools.count()
    items = Prefetched(iter("ab"), depth, name=NAME, clock=lambda: float(next(ticks)))
    assert items.waited_s == 0
    assert list(items) == ["a", "b"]
    assert items.waited_s == 3  # two items and the end, a tick each
    items.close()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_consumer_can_be_told_to_stop(depth: int) -> None:
    """Whether it waits or not, and whatever lies ready."""
    source = Source()
    source.allow(depth + 1)
    items = Prefetched(iter(source), depth, name=NAME)
    assert next(items) == 0
    items.fail(ValueError("stop"))
    for _ in range(2):
        with pytest.raises(ValueError, match="stop"):
            next(items)
    source.allow(1)
    items.close()


def test_a_consumer_that_waits_for_a_stuck_source_is_told_to_stop() -> None:
    source, errors = Source(), list[str]()
    items = Prefetched(iter(source), 1, name=NAME)

    def consume() -> None:
        try:
            next(items)
        except ValueError as e:
            errors.append(str(e))

    consumer = threading.Thread(target=consume)
    consumer.start()
    source.wait_for(source.asked)
    items.fail(ValueError("stop"))
    consumer.join(PATIENCE_S)
    assert errors == ["stop"]
    source.allow(1)
    items.close()
