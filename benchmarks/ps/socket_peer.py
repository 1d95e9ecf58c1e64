"""Bare sockets: the bytes of a step over TCP loopback, and nothing done with them."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.ps.contenders import Gradients
from benchmarks.ps.processes import Child, keep_to_cpu
from benchmarks.ps.table import DIM, SHARDS, Batch, most_rows
from ps.memory import empty
from ps.ragged import F32, I64

_HEADER = struct.Struct("<qq48x")
_PULL, _PUSH = 0, 1
Batches = Mapping[int, Sequence[Batch]]


class Sockets:
    """A connection to each of two servers; both are sent to, then read from, at the same time."""

    def __init__(self, batches: Batches) -> None:
        self._most = max(map(most_rows, batches.values()))
        self._servers = [Child(_serve, self._most, shard) for shard in range(SHARDS)]
        self._sockets = [
            socket.create_connection(("127.0.0.1", server.receive())) for server in self._servers
        ]
        for sock in self._sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._gradients = Gradients(batches)
        self._grads: list[F32] = []
        self._rows: F32 = empty((max(batches), DIM))

    def pull(self, batch: Batch) -> Sequence[F32]:
        local = batch.local_rows
        _send(self._sockets, [[_HEADER.pack(_PULL, ids.size), _bytes(ids)] for ids in local])
        rows = self._rows[: len(batch.grads)]
        _receive(self._sockets, [_bytes(part) for part in batch.parts(rows)])
        return (rows,)

    def make_gradients(self, batch: Batch) -> None:
        self._grads = self._gradients.written(batch)

    def step(self, batch: Batch, upcoming: Batch) -> Sequence[F32]:
        _send(
            self._sockets,
            [
                [_HEADER.pack(_PUSH, ids.size), _bytes(ids), _bytes(grads)]
                for ids, grads in zip(batch.local_rows, self._grads, strict=True)
            ],
        )
        return self.pull(upcoming)

    def close(self) -> None:
        for server in self._servers:
            server.kill()


def _bytes(array: F32 | I64) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8).data)


def _send(sockets: Sequence[socket.socket], messages: Sequence[list[bytes | memoryview]]) -> None:
    """Send each socket its message, waiting for whichever takes more."""
    left = {sock.fileno(): (sock, parts) for sock, parts in zip(sockets, messages, strict=True)}
    while left:
        for fd, (sock, parts) in list(left.items()):
            flags = socket.MSG_DONTWAIT if len(left) > 1 else 0
            try:
                sent = sock.sendmsg(parts, (), flags)
            except BlockingIOError:
                continue
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = memoryview(parts[0])[sent:]
            else:
                del left[fd]
        if len(left) > 1:
            poll = select.poll()
            for fd in left:
                poll.register(fd, select.POLLOUT)
            poll.poll()


def _receive(sockets: Sequence[socket.socket], places: Sequence[memoryview]) -> None:
    """Fill each place from its socket, waiting for whichever has more."""
    left = {s.fileno(): (s, place) for s, place in zip(sockets, places, strict=True) if len(place)}
    poll = select.poll()
    for fd in left:
        poll.register(fd, select.POLLIN)
    while len(left) > 1:
        for fd, _ in poll.poll():
            sock, place = left[fd]
            place = place[sock.recv_into(place) :]
            left[fd] = sock, place
            if not len(place):
                poll.unregister(fd)
                del left[fd]
    for sock, place in left.values():
        _fill(sock, place)


def _fill(sock: socket.socket, place: memoryview) -> None:
    while len(place):
        count = sock.recv_into(place, 0, socket.MSG_WAITALL)
        if not count:
            raise EOFError
        place = place[count:]


def _serve(pipe: Connection, most: int, shard: int) -> None:
    keep_to_cpu(shard)
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    header = memoryview(bytearray(_HEADER.size))
    ids = _bytes(np.zeros(most, dtype=np.int64))
    values = _bytes(np.ones((most, DIM), dtype=np.float32))
    while True:
        _fill(sock, header)
        kind, count = _HEADER.unpack(header)
        _fill(sock, ids[: 8 * count])
        if kind == _PUSH:
            _fill(sock, values[: 4 * DIM * count])
        else:
            sock.sendall(values[: 4 * DIM * count])
