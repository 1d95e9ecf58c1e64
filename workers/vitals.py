"""`Vitals`: what the driver knows of its shards, and by which signs it sees that one has died."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from ps.errors import JobError
from ps.messages import ShardStats
from ps.wire.watch import ShardWatch
from workers.recovery import Failure, laggards
from workers.remote import plain_error
from workers.run import Run


class FailedError(JobError):
    """Carries a `Failure` to who can mend it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.cause)
        self.failure = failure


class Vitals:
    """Counters of all shards, when steps were last made, and connections that end with a shard."""

    def __init__(
        self,
        run: Run,
        post: Callable[[str, Any, Any], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`post(kind, key, value)` gets ("lost", watch, shard) and ("stats", look, answers)."""
        self._run = run
        self._post = post
        self._clock = clock
        self._look_at = self._moved_at = clock()
        self._look: object | None = None
        self._watch: ShardWatch | None = None
        self._watched = object()
        self.stats: list[ShardStats] = run.shards.stats()

    @property
    def newest_version(self) -> int:
        """Of any shard."""
        return max(s.version for s in self.stats)

    @property
    def oldest_version(self) -> int:
        """Of any shard: so many steps are made everywhere."""
        return min(s.version for s in self.stats)

    @property
    def due_s(self) -> float:
        """Seconds until the next look is due."""
        return self._look_at - self._clock()

    @property
    def still_s(self) -> float:
        """Seconds since the last push, of any worker, that a shard took."""
        return self._clock() - self._moved_at

    def moved(self) -> None:
        """What was mended just now has its time from now on."""
        self._moved_at = self._clock()

    def note(self, stats: list[ShardStats]) -> None:
        """Take counters that have come."""
        if [s.expected for s in stats] != [s.expected for s in self.stats]:
            self.moved()
        self.stats = stats

    def look(self, again_s: float) -> None:
        """Ask for the counters, unless an answer is awaited; the next look is due `again_s` on."""
        self._look_at = self._clock() + again_s
        if self._look is not None:
            return
        self._look = look = object()
        waiting = [handle.stats.remote().future() for handle in self._run.shards.handles]
        answers: dict[int, Any] = {}

        def arrived(shard: int) -> Callable[[Any], None]:
            def done(future: Any) -> None:
                answers[shard] = future
                if len(answers) == len(waiting):
                    self._post("stats", look, answers)

            return done

        for shard, future in enumerate(waiting):
            future.add_done_callback(arrived(shard))

    def answered(self, look: object, answers: dict[int, Any]) -> list[ShardStats] | None:
        """The counters of a look; None if it was of shards that are no more.

        Raises:
            FailedError: shards are dead.
            StorageError: a commit log cannot be written any more.
        """
        if look is not self._look:
            return None
        self._look = None
        try:
            return [answers[shard].result() for shard in sorted(answers)]
        except ray.exceptions.RayActorError as e:
            dead = frozenset(k for k, f in answers.items() if f.exception() is not None)
            cause = f"shard {min(dead)}: {plain_error(e)}"
            raise FailedError(Failure(cause, shards=dead)) from e

    def stuck(self, deadline_s: float) -> Failure:
        """Who is to blame that no push came for so long."""
        shards, workers = self._run.unanswering()
        if shards or workers:
            who = [f"shard {k}" for k in sorted(shards)] + [f"worker {k}" for k in sorted(workers)]
            return Failure(
                f"{', '.join(who)} did not answer, after no step was made in {deadline_s:g} s",
                shards,
                workers,
            )
        slow = laggards(self.stats, len(self._run.workers))
        names = ", ".join(str(worker) for worker in sorted(slow))
        return Failure(
            f"no step was made in {deadline_s:g} s: worker {names} is stuck at step "
            f"{self.oldest_version}",
            workers=slow,
        )

    @contextmanager
    def watching(self, wanted: bool) -> Iterator[None]:
        """Hold a connection to every shard for the body of a `with`, if that is wanted."""
        if wanted:
            self.watch()
        try:
            yield
        finally:
            self.end_watch()

    def watch(self) -> None:
        """Connect to the shards of now: a connection ends with its shard's process.

        The system says so at once, whatever state Ray is in, and whether or not a call is pending.
        """
        self.end_watch()
        access, self._watched = self._run.access, (watched := object())
        self._watch = ShardWatch(
            access.endpoints,
            access.token,
            access.fingerprint,
            lambda shard: self._post("lost", watched, shard),
        )

    def is_watched(self, watched: object) -> bool:
        """Whether a loss is of the shards of now."""
        return watched is self._watched

    def end_watch(self) -> None:
        """Close the connections, and let no answer on the way count."""
        self._look = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
