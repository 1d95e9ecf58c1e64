"""A shard's side of a snapshot: the pieces of a cut become files while the shard goes on.

The caller's thread copies and writes one piece after the other. The thread that owns the state has
little to do with it: it puts into each piece the rows that were saved since the cut.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from ps.cut import Cut, Piece
from ps.ragged import F32
from ps.spec import EmbeddingSpec
from ps.storage import Storage
from ps.table_parts import PartTarget, PartWriter, SealedPart

PIECE_BYTES = 2 << 20
_NICENESS = 19

Call = Callable[[Callable[[], Any]], Future[Any]]
"""Runs a short function in the thread that owns the state."""


@dataclass(frozen=True, slots=True, eq=False)
class WrittenCut:
    """What one shard has of a snapshot: files with its rows, and the little that goes with them."""

    version: int
    fences: tuple[int, ...]
    parts: tuple[SealedPart, ...]
    dense: F32
    """float32 [p]: the shard's slice of the trainable dense values."""
    dense_slots: dict[str, F32]
    state: F32
    """float32 [s]: its slice of the non-trainable ones."""
    seconds: float
    """From the cut until all files were durable."""


def write_cut(
    cut: Cut, spec: EmbeddingSpec, target: PartTarget, storage: Storage, call: Call
) -> WrittenCut:
    """Write every table's part of a shard; blocks until all of them are durable.

    The thread that calls it gets a low priority: training comes first.

    Raises:
        StorageError: the storage refuses; the cut is closed and what was written is of no use.
    """
    began = time.monotonic()
    parts: list[SealedPart] = []
    _yield_to_others()
    try:
        with ExitStack() as open_parts:
            piece = _next_piece(cut, call)
            for number, table in enumerate(spec.tables):
                part = PartWriter(target, table, storage)
                open_parts.callback(part.abandon)
                while piece is not None and piece.table == number:
                    part.append(piece.rows, piece.slots)
                    piece = _next_piece(cut, call)
                parts.append(part.close())
            assert piece is None, "pieces come in the order of the tables"
    finally:
        call(cut.close).result()
    return WrittenCut(
        cut.version,
        cut.fences,
        tuple(parts),
        cut.dense,
        cut.dense_slots,
        cut.state,
        time.monotonic() - began,
    )


def _next_piece(cut: Cut, call: Call) -> Piece | None:
    piece = cut.copy_piece(PIECE_BYTES)
    if piece is not None:
        sealed = piece
        call(lambda: cut.seal(sealed)).result()
    return piece


def _yield_to_others() -> None:
    """Let this thread have the time that no other thread of the machine wants."""
    with suppress(OSError, AttributeError):  # where threads have no priority of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
