"""What waits until a socket that never blocks takes it."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence

from ps.wire.frames import Buffer

_MAX_PIECES = 1000
"""Buffers in one `sendmsg`; Linux takes 1024."""


class SendQueue:
    """Pieces of frames, in the order in which they go out."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        packets = sock.family == socket.AF_UNIX
        self._at_once = 1 if packets else _MAX_PIECES  # a packet holds one frame
        self._pieces: deque[memoryview] = deque()

    def __bool__(self) -> bool:
        """Whether something waits."""
        return bool(self._pieces)

    def add(self, pieces: Sequence[Buffer]) -> None:
        """Put a frame at the end."""
        self._pieces.extend(map(memoryview, pieces))

    def flush(self) -> int:
        """Send what the socket takes; returns the number of bytes.

        Raises:
            OSError: the connection is broken.
        """
        total = 0
        while self._pieces:
            count = min(len(self._pieces), self._at_once)
            try:
                sent = self._sock.sendmsg([self._pieces[i] for i in range(count)])
            except BlockingIOError:
                break
            total += sent
            self._drop(sent)
        return total

    def clear(self) -> None:
        """Forget what waits."""
        self._pieces.clear()

    def _drop(self, sent: int) -> None:
        pieces = self._pieces
        while pieces and sent >= len(pieces[0]):
            sent -= len(pieces.popleft())
        if sent:
            pieces[0] = pieces[0][sent:]
