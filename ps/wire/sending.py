"""What waits until a socket that never blocks takes it."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from itertools import islice

from ps.wire.frames import Buffer

_MAX_PIECES = 1000
"""Buffers in one `sendmsg`; Linux takes 1024."""


class SendQueue:
    """Pieces of frames, in the order in which they go out."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        packets = sock.family == socket.AF_UNIX
        self._at_once = 1 if packets else _MAX_PIECES  # a packet holds one frame
        self.pieces: deque[memoryview] = deque()
        """What waits."""

    def add(self, pieces: Sequence[Buffer]) -> None:
        """Put a frame at the end."""
        self.pieces.extend(map(memoryview, pieces))

    def flush(self) -> int:
        """Send what the socket takes; returns the number of bytes.

        Raises:
            OSError: the connection is broken.
        """
        total, pieces = 0, self.pieces
        while pieces:
            count = len(pieces)
            few = pieces if count <= self._at_once else islice(pieces, self._at_once)
            try:
                sent = self._sock.sendmsg(list(few))
            except BlockingIOError:
                break
            total += sent
            self._drop(sent)
        return total

    def clear(self) -> None:
        """Forget what waits."""
        self.pieces.clear()

    def _drop(self, sent: int) -> None:
        pieces = self.pieces
        while pieces and sent >= len(pieces[0]):
            sent -= len(pieces.popleft())
        if sent:
            pieces[0] = pieces[0][sent:]
