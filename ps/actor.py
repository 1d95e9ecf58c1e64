"""`ShardServer`: the Ray shell of a shard. It forwards and decides nothing.

Steps do not pass through Ray: workers speak to the shard's `ShardLoop`, which also runs what Ray
asks for, between their messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import ray

from ps.export_file import RowFile
from ps.messages import ShardStats
from ps.ragged import F32
from ps.shard import ShardSpec, ShardState
from ps.shard_files import load_pieces, write_pieces
from ps.warm import warm_up
from ps.wire.server import Endpoint, ServerOptions, ShardLoop

NODE_ADDRESS = ""
"""`ServerOptions.host` for the address by which Ray knows the shard's node."""


class ShardServer:
    """Ray actor around one shard.

    A restarted actor has lost its rows; it answers pulls and pushes with `ShardNotReadyError`
    until `set_dense` marks it ready, which only the driver that starts a job does.
    """

    def __init__(self, spec: ShardSpec, options: ServerOptions) -> None:
        warm_up(spec)
        format = options.format
        format.widened(format.narrowed(np.zeros((1, 1), dtype=np.float32)))
        if options.host == NODE_ADDRESS:
            options = replace(options, host=ray.util.get_node_ip_address())
        self._state = ShardState(spec)
        self._loop = ShardLoop(self._state, options)

    async def endpoint(self) -> Endpoint:
        """Where workers reach the shard."""
        return self._loop.endpoint

    async def load_table(self, table: str, rows: RowFile, slots: dict[str, RowFile]) -> None:
        """Take this shard's rows and slots of a table from a snapshot's files."""
        await self._stream(load_pieces(self._state, table, rows, slots))

    async def set_dense(self, dense: F32, state: F32, slots: dict[str, F32], version: int) -> None:
        """See `ShardState.set_dense`."""
        call = self._loop.call(lambda: self._state.set_dense(dense, state, slots, version))
        await asyncio.wrap_future(call)

    async def stats(self) -> ShardStats:
        """See `ShardState.stats`."""
        return await asyncio.wrap_future(self._loop.call(self._state.stats))

    async def read(self, version: int, table: str) -> list[tuple[int, F32, dict[str, F32]]]:
        """(first id, rows, slots) of every slab of a table: for tests and small tables."""
        found: list[tuple[int, F32, dict[str, F32]]] = []

        def pieces() -> Iterator[None]:
            for slab, rows, slots in self._state.slabs(table):
                self._state.check_version(version)
                copies = {name: slot.copy() for name, slot in slots.items()}
                found.append((slab.first_id, rows.copy(), copies))
                yield

        await self._stream(pieces())
        return found

    async def read_dense(self, version: int) -> tuple[F32, dict[str, F32], F32]:
        """See `ShardState.dense`; the shard must be at `version`."""

        def read() -> tuple[F32, dict[str, F32], F32]:
            self._state.check_version(version)
            dense, slots, state = self._state.dense()
            return dense.copy(), {n: slot.copy() for n, slot in slots.items()}, state.copy()

        return await asyncio.wrap_future(self._loop.call(read))

    async def write_table(
        self, version: int, table: str, rows: RowFile, slots: dict[str, RowFile]
    ) -> int:
        """Write this shard's rows of a table, and the named slots; returns the number of rows.

        The shard must be at `version`, and stay there.
        """
        counts: list[int] = []
        await self._stream(
            map(counts.append, write_pieces(self._state, version, table, rows, slots))
        )
        return sum(counts)

    async def _stream(self, pieces: Iterator[None]) -> None:
        await asyncio.wrap_future(self._loop.stream(pieces))
