"""`ShardClient`: one pull or push over all shards, whatever carries the messages.

The client puts a step's arrays into one block of memory, in which each shard has its part, and a
`Transport` carries the parts. Rows arrive in the arrays that the caller gets. Calls of one client
must not run at the same time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ps.bags import ShardBags
from ps.errors import ProtocolError
from ps.messages import Rows
from ps.partition import DistinctRows, Layout
from ps.ragged import F32, I64
from ps.shard import ShardState
from ps.spec import EmbeddingSpec
from ps.step_message import NO_PLACE, BagsByShard, Places, StepMessage, TablePart
from ps.wire.arena import Block, Memory, PrivateMemory, address, room
from ps.wire.messages import WireFormat

DEFAULT_TIMEOUT_S = 120.0


class PendingRows(Protocol):
    """An answer under way."""

    def result(self, timeout_s: float) -> tuple[int, float]:
        """Wait until the rows are in their place.

        Returns:
            Their version, and seconds that the shard waited for it.
        """
        ...


class Transport(Protocol):
    """Carries the messages of one worker to shards, in order per shard."""

    memory: Memory
    """For messages."""

    def pull(self, message: StepMessage) -> Sequence[PendingRows]:
        """Send a pull to all shards; returns at once."""
        ...

    def push(self, message: StepMessage) -> None:
        """Send a push to all shards; returns at once, or after room is made in a bounded window."""
        ...

    def flush(self, timeout_s: float) -> None:
        """Wait until the shards are done with all pushes; raises what a shard raised."""
        ...

    def close(self) -> None:
        """Give everything back; who waits gets an error."""
        ...


@dataclass(slots=True, eq=False)
class PulledRows:
    """Rows of one batch, at one version."""

    version: int
    rows: dict[str, F32]
    """float32 [U, D] per table, in the order of its `DistinctRows`; the partial sums of all shards,
    [num_shards, bags, D], for `ShardBags`."""
    dense: F32
    """float32 [P]: all trainable dense values."""
    state: F32
    """float32 [S]: all non-trainable dense values."""
    barrier_s: tuple[float, ...] = ()
    """Seconds that each shard waited for other workers before it answered."""
    wait_s: tuple[float, ...] = ()
    """Seconds that this worker waited for each shard, one after the other."""
    message: StepMessage | None = None
    """The pull; it knows how many bytes went to and fro."""


class PendingPull:
    """A pull under way on all shards."""

    def __init__(
        self,
        spec: EmbeddingSpec,
        message: StepMessage,
        answers: Sequence[PendingRows],
        format: WireFormat,
    ) -> None:
        self._spec = spec
        self._message = message
        self._answers = answers
        self._format = format

    def result(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> PulledRows:
        """Wait for every shard; in sync mode all answer at the same version."""
        answers, laps = [], [time.perf_counter()]
        for pending in self._answers:
            answers.append(pending.result(timeout_s))
            laps.append(time.perf_counter())
        versions = {version for version, _ in answers}
        message = self._message
        if len(versions) != 1 and message.version >= 0:
            raise ProtocolError(f"one pull was answered at several versions: {sorted(versions)}")
        assert message.state is not None, "a pull has room for all dense values"
        return PulledRows(
            version=min(versions),
            rows={
                table.name: self._format.widened(part.values)
                for table, part in zip(self._spec.tables, message.tables, strict=True)
            },
            dense=message.dense,
            state=message.state,
            barrier_s=tuple(waited_s for _, waited_s in answers),
            wait_s=tuple(b - a for a, b in pairwise(laps)),
            message=message,
        )


class ShardClient:
    """One worker's access to all shards."""

    def __init__(
        self,
        spec: EmbeddingSpec,
        layout: Layout,
        transport: Transport,
        worker: int,
        format: WireFormat | None = None,
    ) -> None:
        self.spec = spec
        self.layout = layout
        self._transport = transport
        self._worker = worker
        self._format = format or WireFormat(tuple(table.dim for table in spec.tables))
        local = isinstance(transport, LocalTransport)
        assert not local or self._format.dtype == "float32", "nothing travels in one process"
        self._pulled: dict[int, tuple[dict[int, _Named], Block | None]] = {}
        """What the last pulls named, by step, and by identity of its `DistinctRows`: a push of the
        same rows points to the same memory. And the pull's block, with room for dense gradients."""
        self._lent: dict[int, tuple[int, F32]] = {}
        """Arrays from `gradients` and their places, by address; kept, so that no other array gets
        the address."""

    def pull(
        self, step: int, version: int, distinct: Mapping[str, DistinctRows | ShardBags]
    ) -> PendingPull:
        """Ask for the rows of a batch at exactly `version`; returns without waiting."""
        wanted = [distinct[table.name] for table in self.spec.tables]
        shapes = [self._values_shape(d, k) for d, k in zip(wanted, self._format.dims, strict=True)]
        item = self._format.item
        num_dense, num_state = self.layout.dense_splits[-1], self.layout.state_splits[-1]
        size = 2 * (room(4 * num_dense) + room(4 * num_state))  # and for the push's
        size += sum(_room_for_names(d) for d in wanted)
        size += sum(room(item.itemsize * math.prod(shape)) for shape in shapes)
        block = self._transport.memory.block(size)
        tables, places, named = [], [], {}
        for d, shape in zip(wanted, shapes, strict=True):
            names = named[id(d)] = _named(block, d)
            values, place = block.take(shape, item)
            tables.append(names.part(values))
            places.append(names.places(place))
        dense, dense_place = block.take((num_dense,), np.float32)
        state, state_place = block.take((num_state,), np.float32)
        message = StepMessage(self._worker, step, version, tables, self.layout, dense, state,
                              places, dense_place, state_place)  # fmt: skip
        self._remember(step, named, block)
        return PendingPull(self.spec, message, self._transport.pull(message), self._format)

    def gradients(self, shape: tuple[int, ...]) -> F32:
        """A float32 array of any content, in memory that the next push sends without a copy."""
        block = self._transport.memory.block(room(4 * math.prod(shape)))
        array: F32
        array, place = block.take(shape, np.float32)
        self._lent[address(array)] = place, array
        return array

    def push(
        self,
        step: int,
        distinct: Mapping[str, DistinctRows | ShardBags],
        grads: Mapping[str, F32],
        dense_grad: F32,
        state: F32 | None,
    ) -> StepMessage:
        """Send a step's gradients: float32 [U, D] per table, and the flat dense gradient [P].

        Arrays from `gradients` must not be changed any more. The gradient of `ShardBags` is
        [bags, D]. Returns what was sent.
        """
        assert dense_grad.size == self.layout.dense_splits[-1], "one gradient per dense value"
        named, block = self._pulled.pop(step, ({}, None))
        pushed = [distinct[table.name] for table in self.spec.tables]
        new = [d for d in pushed if id(d) not in named]
        values = [self._format.narrowed(grads[table.name]) for table in self.spec.tables]
        lent = [self._lent_place(v) for v in values]
        copied = [v for v, place in zip(values, lent, strict=True) if place is None]
        if new or copied or block is None:
            size = sum(_room_for_names(d) for d in new) + room(dense_grad.nbytes)
            size += sum(room(v.nbytes) for v in copied) + (
                0 if state is None else room(state.nbytes)
            )
            block = self._transport.memory.block(size)
        named |= {id(d): _named(block, d) for d in new}
        tables, places = [], []
        for d, array, known in zip(pushed, values, lent, strict=True):
            placed, place = _copied(block, array) if known is None else (array, known)
            tables.append(named[id(d)].part(placed))
            places.append(named[id(d)].places(place))
        dense, dense_place = _copied(block, dense_grad)
        state, state_place = (None, NO_PLACE) if state is None else _copied(block, state)
        self._lent.clear()
        message = StepMessage(self._worker, step, NO_PLACE, tables, self.layout, dense, state,
                              places, dense_place, state_place)  # fmt: skip
        self._transport.push(message)
        return message

    def flush(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Wait until every shard is done with every push sent so far.

        They are applied then, and durable where the job wants that.
        """
        self._transport.flush(timeout_s)

    def close(self) -> None:
        """Close the transport, and let go of its memory; who waits for rows gets an error."""
        self._pulled.clear()
        self._lent.clear()
        self._transport.close()

    def _lent_place(self, array: F32) -> int | None:
        """Where an array from `gradients` lies; None for others, and for views with gaps."""
        place, _ = self._lent.get(address(array), (None, None))
        return place if array.flags.c_contiguous else None

    def _values_shape(self, d: DistinctRows | ShardBags, dim: int) -> tuple[int, ...]:
        if isinstance(d, ShardBags):
            return (self.layout.num_shards, d.bags.count, dim)
        return (d.local_rows.size, dim)

    def _remember(self, step: int, named: dict[int, _Named], block: Block) -> None:
        self._pulled[step] = named, block
        while len(self._pulled) > _PULLS_REMEMBERED:
            del self._pulled[next(iter(self._pulled))]


_PULLS_REMEMBERED = 4
"""One more than there are at lookahead 2."""


@dataclass(slots=True, eq=False)
class _Named:
    """The rows that a message names, in its memory."""

    of: DistinctRows | ShardBags
    """Kept, so that no other object gets its identity."""
    local_rows: I64
    local_rows_place: int
    bags: BagsByShard | None = None
    row_splits_place: int = NO_PLACE
    weights_place: int = NO_PLACE

    def part(self, values: Any) -> TablePart:
        return TablePart(self.local_rows, self.of.shard_splits, values, self.bags)

    def places(self, values: int) -> Places:
        return Places(self.local_rows_place, values, self.row_splits_place, self.weights_place)


def _named(block: Block, d: DistinctRows | ShardBags) -> _Named:
    local_rows, place = _copied(block, d.local_rows)
    if not isinstance(d, ShardBags):
        return _Named(d, local_rows, place)
    row_splits, splits_place = _copied(block, d.bags.row_splits)
    weights, weights_place = d.bags.weights, NO_PLACE
    if weights.size:
        weights, weights_place = _copied(block, weights)
    bags = BagsByShard(row_splits, weights)
    return _Named(d, local_rows, place, bags, splits_place, weights_place)


def _room_for_names(d: DistinctRows | ShardBags) -> int:
    size = room(d.local_rows.nbytes)
    if isinstance(d, ShardBags):
        size += room(d.bags.row_splits.nbytes) + room(d.bags.weights.nbytes)
    return size


def _copied(block: Block, array: npt.NDArray[Any]) -> tuple[Any, int]:
    copy, place = block.take(array.shape, array.dtype)
    copy[...] = array
    return copy, place


class LocalTransport:
    """Shards in this process: for tests, and for runs that want no Ray."""

    def __init__(self, shards: Sequence[ShardState]) -> None:
        self.memory: Memory = PrivateMemory()
        self._shards = shards

    def pull(self, message: StepMessage) -> Sequence[PendingRows]:
        """See `Transport.pull`."""
        answers = []
        for k, shard in enumerate(self._shards):
            answers.append(_LocalRows())
            shard.pull(message.pull(k), answers[-1].set)
        return answers

    def push(self, message: StepMessage) -> None:
        """See `Transport.push`."""
        for k, shard in enumerate(self._shards):
            shard.push(message.push(k))

    def flush(self, timeout_s: float) -> None:
        """Nothing to wait for: pushes have been taken when `push` returns."""

    def close(self) -> None:
        """Nothing to give back."""


class _LocalRows:
    def __init__(self) -> None:
        self._rows: Rows | None = None

    def set(self, rows: Rows) -> None:
        self._rows = rows

    def result(self, timeout_s: float) -> tuple[int, float]:
        if self._rows is None:
            raise ProtocolError("the version is not made yet, and nobody else will make it")
        return self._rows.version, 0.0
