"""`ShardServer`: the Ray shell of `ShardState`. It forwards and decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from ps.export_file import RowFile, read_rows, write_rows
from ps.messages import Pull, Push, Rows, ShardStats
from ps.ordering import InOrder
from ps.ragged import F32
from ps.shard import ShardSpec, ShardState
from ps.warm import warm_up

T = TypeVar("T")


class ShardServer:
    """Ray actor around one shard.

    A restarted actor has lost its rows; it answers pulls and pushes with `ShardNotReadyError`
    until `set_dense` marks it ready, which only the driver that starts a job does.
    """

    def __init__(self, spec: ShardSpec) -> None:
        warm_up(spec)
        self._state = ShardState(spec)
        self._inbox = InOrder()

    async def load_table(self, table: str, rows: RowFile, slots: dict[str, RowFile]) -> None:
        """Take this shard's rows and slots of a table from a snapshot's files."""
        for slab, row_view, slot_views in self._state.slabs(table):
            read_rows(rows, slab.first_id, row_view)
            for name, slot_view in slot_views.items():
                read_rows(slots[name], slab.first_id, slot_view)

    async def set_dense(self, dense: F32, state: F32, slots: dict[str, F32], version: int) -> None:
        """See `ShardState.set_dense`."""
        self._state.set_dense(dense, state, slots, version)

    async def pull(self, number: int, pull: Pull) -> Rows:
        """See `ShardState.pull`; `number` counts this worker's calls to this shard."""
        answer: asyncio.Future[Rows] = asyncio.get_running_loop().create_future()

        def reply(rows: Rows) -> None:
            if not answer.done():  # the caller may have given up
                answer.set_result(rows)

        call = _into(answer, lambda: self._state.pull(pull, reply))
        self._inbox.deliver(pull.worker, number, call)
        return await answer

    async def push(self, number: int, push: Push) -> None:
        """See `ShardState.push`."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def call() -> None:
            self._state.push(push)
            done.set_result(None)

        self._inbox.deliver(push.worker, number, _into(done, call))
        await done

    async def stats(self) -> ShardStats:
        """See `ShardState.stats`."""
        return self._state.stats()

    async def read(self, version: int, table: str) -> list[tuple[int, F32, dict[str, F32]]]:
        """(first id, rows, slots) of every slab of a table: for tests and small tables."""
        self._state.check_version(version)
        return [
            (slab.first_id, rows.copy(), {name: slot.copy() for name, slot in slots.items()})
            for slab, rows, slots in self._state.slabs(table)
        ]

    async def read_dense(self, version: int) -> tuple[F32, dict[str, F32], F32]:
        """See `ShardState.dense`; the shard must be at `version`."""
        self._state.check_version(version)
        dense, slots, state = self._state.dense()
        return dense.copy(), {name: slot.copy() for name, slot in slots.items()}, state.copy()

    async def write_table(
        self, version: int, table: str, rows: RowFile, slots: dict[str, RowFile]
    ) -> int:
        """Write this shard's rows of a table, and the named slots; returns the number of rows.

        The shard must be at `version`.
        """
        self._state.check_version(version)
        count = 0
        for slab, row_view, slot_views in self._state.slabs(table):
            write_rows(rows, slab.first_id, row_view)
            for name, file in slots.items():
                write_rows(file, slab.first_id, slot_views[name])
            count += slab.num_rows
        return count


def _into(future: asyncio.Future[T], call: Callable[[], None]) -> Callable[[], None]:
    """The call, with an exception of it handed to the future that its sender awaits."""

    def run() -> None:
        try:
            call()
        except Exception as e:
            future.set_exception(e)

    return run
