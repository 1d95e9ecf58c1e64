"""The outbox: what is kept, for how long, and what is sent again."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.errors import ReplayGapError
from ps.step_message import StepMessage
from ps.wire.frames import Header, Kind
from ps.wire.outbox import Outbox, Sent


class Message:
    """As much of a `StepMessage` as an outbox looks at."""

    def __init__(self, step: int) -> None:
        self.step = step


def message(step: int) -> StepMessage:
    return cast("StepMessage", Message(step))


def outbox_of(*kinds: str, first_step: int = 0) -> tuple[Outbox, list[Sent]]:
    """Pulls, pushes and flushes in this order; the n-th push is of step `first_step` + n."""
    outbox, sent, step = Outbox(1, 2), [], first_step
    for kind in kinds:
        of = message(step) if kind != "FLUSH" else None
        sent.append(outbox.add(Kind[kind], of))
        step += kind == "PUSH"
    return outbox, sent


def answer(sent: Sent, done_step: int = 0) -> Header:
    kind = {Kind.PULL: Kind.ROWS, Kind.FLUSH: Kind.FLUSHED}[sent.kind]
    return Header(kind, request=sent.request, step=done_step)


def test_what_is_answered_is_not_sent_again() -> None:
    outbox, sent = outbox_of("PULL", "PULL", "PUSH", "FLUSH", "PULL")
    assert outbox.to_replay() == sent
    assert outbox.answered(answer(sent[1])) is sent[1]
    assert outbox.answered(answer(sent[3])) is sent[3]
    assert sent[1].header is not None
    assert outbox.to_replay() == [sent[0], sent[2], sent[4]]
    assert outbox.answered(answer(sent[1])) is None, "nobody waits for it any more"


@pytest.mark.parametrize(
    "header",
    [Header(Kind.ROWS, request=9), Header(Kind.ROWS, request=2), Header(Kind.FLUSHED, request=1),
     Header(Kind.ROWS, request=3), Header(Kind.PULL, request=1)],
    ids=["unknown", "of a push", "flushed for a pull", "rows for a flush", "no answer"],
)  # fmt: skip
def test_what_answers_no_request_is_refused(header: Header) -> None:
    outbox, sent = outbox_of("PULL", "PUSH", "FLUSH")
    assert outbox.answered(header) is None
    assert outbox.to_replay() == sent


def test_pushes_stay_until_the_shard_is_done_with_them() -> None:
    outbox, sent = outbox_of("PUSH", "PUSH", "PULL", "PULL")
    outbox.answered(answer(sent[2], done_step=1))
    outbox.forget_done()
    assert outbox.num_pushes == 1
    outbox.answered(answer(sent[3], done_step=2))
    outbox.forget_done()
    assert outbox.num_pushes == 0


def test_a_push_on_its_way_stays_though_the_shard_has_its_step() -> None:
    """The shard reads it, in memory that must not be used for anything else."""
    outbox, sent = outbox_of("PULL", "PUSH", "PULL")
    outbox.answered(answer(sent[0], done_step=5))
    outbox.forget_done()
    assert outbox.num_pushes == 1
    outbox.answered(answer(sent[2], done_step=5))
    outbox.forget_done()
    assert outbox.num_pushes == 0


def test_what_the_shard_has_is_kept_but_not_sent() -> None:
    outbox, sent = outbox_of("PUSH", "PULL", "PUSH", "PULL", "PUSH")
    outbox.welcomed(done_step=1, fence=2)
    assert outbox.to_replay() == [sent[1], sent[3], sent[4]]
    assert outbox.num_pushes == 2
    outbox.welcomed(done_step=1, fence=1)  # it came back without it
    assert outbox.to_replay() == sent[1:]


def test_what_was_replayed_is_on_its_way_again() -> None:
    outbox, sent = outbox_of("PUSH", "PULL", "PUSH", "PULL")
    outbox.welcomed(done_step=0, fence=0)
    outbox.answered(answer(sent[1], done_step=9))
    outbox.forget_done()
    assert outbox.num_pushes == 1, "the second one comes after what was answered"


@pytest.mark.parametrize(("fence", "gap"), [(3, False), (2, True), (0, True)])
def test_a_shard_that_wants_what_is_gone_is_told_apart(fence: int, gap: bool) -> None:
    outbox, _ = outbox_of("PUSH", "PUSH", "PUSH", "PUSH", "PULL")
    outbox.welcomed(done_step=3, fence=3)
    outbox.welcomed(done_step=0, fence=fence)
    if not gap:
        assert len(outbox.to_replay()) == 2
        return
    text = f"shard 1 .* of worker 2 from step {fence} on, .* from step 3 on"
    with pytest.raises(ReplayGapError, match=text):
        outbox.to_replay()


def test_nothing_kept_means_that_the_next_push_is_the_first() -> None:
    outbox, sent = outbox_of("PUSH", "PULL")
    outbox.answered(answer(sent[1], done_step=1))
    outbox.forget_done()
    outbox.welcomed(done_step=1, fence=1)
    assert outbox.to_replay() == []
    outbox.welcomed(done_step=0, fence=0)
    with pytest.raises(ReplayGapError):
        outbox.to_replay()
    outbox = Outbox(0, 0)
    outbox.next_push = 7  # nothing has been pushed, but that is where it will start
    outbox.welcomed(done_step=7, fence=7)
    assert outbox.to_replay() == []
    outbox.welcomed(done_step=6, fence=6)
    with pytest.raises(ReplayGapError):
        outbox.to_replay()


@settings(max_examples=200)
@given(st.data())
def test_a_shard_that_loses_what_it_has_not_kept_has_every_step_once(data: Any) -> None:
    """Any order of requests, answers, cuts and crashes, against a shard that is a few numbers."""
    outbox, step = Outbox(0, 0), 0
    durable = fence = 0
    wire: list[Sent] = []
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["push", "pull", "read", "sync", "cut", "crash"]))
        if what == "push":
            wire.append(outbox.add(Kind.PUSH, message(step)))
            step += 1
        elif what == "pull":
            wire.append(outbox.add(Kind.PULL, message(step)))
        elif what == "read" and wire:
            sent = wire.pop(0)
            if sent.kind == Kind.PULL:
                assert outbox.answered(answer(sent, durable)) is sent, "asked once"
            else:
                assert sent.message is not None
                assert sent.message.step <= fence, "no gap"
                fence = max(fence, sent.message.step + 1)
            outbox.forget_done()
        elif what == "sync":
            durable = fence
        elif what in ("cut", "crash"):
            fence = durable if what == "crash" else fence
            outbox.welcomed(durable, fence)
            wire = outbox.to_replay()
        on_their_way = sum(sent.kind == Kind.PUSH for sent in wire)
        assert outbox.num_pushes >= max(on_their_way, step - durable), "in case they are lost"
    while wire:
        sent = wire.pop(0)
        if sent.kind == Kind.PUSH:
            assert sent.message is not None
            fence = max(fence, sent.message.step + 1)
    assert fence == step
