"""`Ranks`: the ranks of one worker, step by step. No Ray.

In each step all ranks run, one after the other, before any of them runs the next. So ranks never
wait for each other, on one worker or on several: with every rank r at step t, what r waits for is

- its rows, of version t or older: they need other ranks' pushes of steps before t only;
- room for its push, if it has as many under way as it may: a shard is asked to say when it is done
  with the pushes that r has sent, which are of steps before t too (`WireTransport` asks before it
  sends, however few it may have under way).

All ranks of this worker have sent their pushes of steps before t when the first of them begins t.
On other workers the same holds for the ranks that are furthest behind, so those can always go on.
After a failure ranks may start at different steps: those ahead wait until the others are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ps.errors import MantaError
from ps.ragged import F32
from workers.batches import ExampleReader
from workers.report import StepReport, Steps
from workers.step import StepLoop


class Ranks:
    """Step loops that advance together."""

    def __init__(self, loops: Mapping[int, StepLoop], *, keep_records: bool = False) -> None:
        """Take the loops by rank; they may be at different steps."""
        self._loops = dict(sorted(loops.items()))
        self._keep = keep_records

    def where(self) -> dict[int, int]:
        """The next step of each rank; any thread may ask."""
        return {rank: loop.step for rank, loop in self._loops.items()}

    def run_to(self, end: int) -> list[StepReport]:
        """Run all steps before `end`, as far as there is input; a report per rank, in order.

        Raises:
            MantaError: what a rank raised. The others are where they were, ready to be closed.
        """
        done = {rank: Steps(keep=self._keep) for rank in self._loops}
        for step in range(min(self.where().values()), end):
            # One that is ahead of the others is not behind `step`, nor is one without input.
            running = [rank for rank, loop in self._loops.items() if loop.step == step]
            if not running:
                continue
            records = {rank: self._loops[rank].run_one() for rank in running}
            if not any(records.values()):
                break
            for rank, record in records.items():
                if record is not None:
                    done[rank].add(record)
        return [StepReport(**steps.sums()) for steps in done.values()]

    def finish(self) -> None:
        """Wait until the shards have every push."""
        for loop in self._loops.values():
            loop.finish()

    def evaluate(self, readers: Mapping[int, ExampleReader], version: int) -> list[tuple[F32, F32]]:
        """(labels, predictions) of each rank's part of a data set, in order of the ranks."""
        return [loop.evaluate(readers[rank], version) for rank, loop in self._loops.items()]

    def abort(self, error: MantaError) -> None:
        """Let every step from now on raise this, and one that waits for its input; any thread may.

        A step that waits for a shard is up to its transport.
        """
        for loop in self._loops.values():
            loop.abort(error)

    def close(self) -> None:
        """End the threads that read ahead."""
        for loop in self._loops.values():
            loop.close()


class Noise:
    """What a model's random layers draw (dropout, say), as a function of rank and step.

    Keras' layers draw from a state that each draw moves on, and that a worker would lose when it
    dies. Here each step of each rank starts from a state of its own, made of the layer's first one:
    so it matters neither who ran the steps before, nor how many ranks share a worker.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        """Take the model's variables; those that are no states of random numbers are left alone."""
        self._states = [
            (variable, np.asarray(variable.numpy()))
            for variable in variables
            if variable.name.split(":")[0].endswith(SEED_STATE)
        ]

    def of_rank(self, rank: int) -> Callable[[int], None] | None:
        """To be called with each step before the model runs; None if the model draws nothing."""
        return (lambda step: self._set(rank, step)) if self._states else None

    def _set(self, rank: int, step: int) -> None:
        for variable, first in self._states:
            entropy = [*first.astype(np.uint64).tolist(), rank, step]
            words = np.random.SeedSequence(entropy).generate_state(first.size)
            # Keras makes int32 of them: leave the sign out.
            variable.assign((words >> 1).astype(first.dtype).reshape(first.shape))


SEED_STATE = "seed_generator_state"
"""How Keras calls those variables."""
