"""`InOrder` undoes any shuffling of one sender's calls."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.ordering import InOrder


@given(order=st.permutations(range(12)))
def test_calls_run_in_the_order_of_their_numbers(order: list[int]) -> None:
    ran: list[int] = []
    inbox = InOrder()
    for delivered, number in enumerate(order, start=1):
        inbox.deliver(0, number, lambda n=number: ran.append(n))  # type: ignore[misc]
        held = set(order[:delivered]) - set(ran)
        assert ran == list(range(len(ran)))
        assert len(ran) not in held, "a call that could run was held back"
    assert ran == list(range(12))


@given(calls=st.permutations([(s, n) for s in range(3) for n in range(4)]))
def test_senders_do_not_wait_for_each_other(calls: list[tuple[int, int]]) -> None:
    ran: list[tuple[int, int]] = []
    inbox = InOrder()
    for i, (sender, number) in enumerate(calls):
        inbox.deliver(sender, number, lambda c=(sender, number): ran.append(c))  # type: ignore[misc]
        arrived = {n for s, n in calls[: i + 1] if s == sender}
        ready = next(n for n in range(5) if n not in arrived)
        assert [n for s, n in ran if s == sender] == list(range(ready))
    assert len(ran) == len(calls)


def test_nothing_runs_before_call_zero() -> None:
    ran: list[int] = []
    inbox = InOrder()
    inbox.deliver(7, 1, lambda: ran.append(1))
    assert ran == []
    inbox.deliver(7, 0, lambda: ran.append(0))
    assert ran == [0, 1]


def test_a_call_may_deliver_the_next_ones() -> None:
    ran: list[int] = []
    inbox = InOrder()

    def first() -> None:
        inbox.deliver(0, 1, lambda: ran.append(1))
        ran.append(0)

    inbox.deliver(0, 2, lambda: ran.append(2))
    inbox.deliver(0, 0, first)
    assert sorted(ran) == [0, 1, 2]
    assert ran.index(1) < ran.index(2)


def test_a_call_that_raises_has_run() -> None:
    """Its error goes to whoever delivered it; the next number is the next to run."""
    ran: list[Any] = []
    inbox = InOrder()

    def fail() -> None:
        raise RuntimeError("first")

    with pytest.raises(RuntimeError, match="first"):
        inbox.deliver(0, 0, fail)
    inbox.deliver(0, 1, lambda: ran.append(1))
    assert ran == [1]
