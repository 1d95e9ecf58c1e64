"""Shards that only listen, transports that only keep, and peers that send any bytes."""

from __future__ import annotations

import fcntl
import os
import socket
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from ps.bags import ShardBags
from ps.client import ShardClient, Transport
from ps.messages import Bags, Pull, Push, Rows
from ps.partition import DistinctRows
from ps.ragged import F32
from ps.step_message import FIELDS, NO_PLACE, TAIL
from ps.wire.frames import Buffer, Frame, FrameReader, Header, Kind, decode_packet, encode
from ps.wire.handshake import check_welcome, hello, new_nonce
from ps.wire.server import Endpoint
from tests.support.wire import FINGERPRINT, TIMEOUT_S, TOKEN, Job, any_bits, floats, num_gradients


class Recorder:
    """A state that keeps what it gets and answers pulls with any numbers: for one worker."""

    def __init__(self, job: Job, shard: int, seed: int = 0) -> None:
        self.spec = job.shard(shard).spec
        self._layout = job.layout
        self._rng = np.random.default_rng([seed, shard])
        self._values = floats if job.dtype != "float32" else any_bits
        self.pulls: list[Pull] = []
        self.pushes: list[Push] = []
        self.answers: list[Rows] = []

    def pull(self, pull: Pull, reply: Callable[[Rows], None]) -> None:
        self.pulls.append(_kept_pull(pull))
        dims = [table.dim for table in self.spec.embedding.tables]
        bags = pull.bags or (None,) * len(dims)
        sizes = [
            r.size if b is None else b.count for r, b in zip(pull.local_rows, bags, strict=True)
        ]
        rows = tuple(self._values(self._rng, n, d) for n, d in zip(sizes, dims, strict=True))
        k = self.spec.shard_id
        dense, state = (
            any_bits(self._rng, splits[k + 1] - splits[k])
            for splits in (self._layout.dense_splits, self._layout.state_splits)
        )
        self.answers.append(Rows(pull.version, rows, dense, state))
        if pull.into is None:
            reply(self.answers[-1])
            return
        for given, out in zip(rows, pull.into.rows, strict=True):
            out[...] = given
        pull.into.dense[...], pull.into.state[...] = dense, state
        reply(Rows(pull.version, pull.into.rows, pull.into.dense, pull.into.state))

    def push(self, push: Push) -> None:
        self.pushes.append(_kept_push(push))

    def flush(self, worker: int, reply: Callable[[int], None]) -> None:
        reply(len(self.pushes))

    def forget(self, replies: object) -> None:
        """Nothing waits."""

    def done_step(self, worker: int) -> int:
        return len(self.pushes)

    def fences(self) -> tuple[int, ...]:
        return (0,) * self.spec.num_workers

    def dense(self) -> tuple[F32, dict[str, F32], F32]:
        k, d, s = self.spec.shard_id, self._layout.dense_splits, self._layout.state_splits
        zeros = np.zeros(d[k + 1] - d[k], np.float32), np.zeros(s[k + 1] - s[k], np.float32)
        return zeros[0], {}, zeros[1]


def _kept_bags(bags: Sequence[Bags | None]) -> tuple[Bags | None, ...]:
    return tuple(b and Bags(b.row_splits.copy(), b.weights.copy()) for b in bags)


def _kept_pull(pull: Pull) -> Pull:
    rows = tuple(r.copy() for r in pull.local_rows)
    return Pull(pull.worker, pull.step, pull.version, rows, _kept_bags(pull.bags))


def _kept_push(push: Push) -> Push:
    return Push(
        push.worker,
        push.step,
        tuple(r.copy() for r in push.local_rows),
        tuple(g.copy() for g in push.grads),
        push.dense_grad.copy(),
        None if push.state is None else push.state.copy(),
        _kept_bags(push.bags),
    )


def bits_of(message: Pull | Push | Rows) -> list[tuple[tuple[int, ...], str, bytes] | None]:
    """Every array of a message: shape, dtype and bytes."""
    arrays: list[Any] = []
    if isinstance(message, Rows):
        arrays = [*message.rows, message.dense, message.state]
    else:
        arrays = list(message.local_rows)
        for bags in message.bags:
            arrays += [None] if bags is None else [bags.row_splits, bags.weights]
    if isinstance(message, Push):
        arrays += [*message.grads, message.dense_grad, message.state]
    return [None if a is None else (a.shape, str(a.dtype), a.tobytes()) for a in arrays]


class RawPeer:
    """A connection that sends any bytes."""

    def __init__(self, endpoint: Endpoint, kind: str = "tcp", timeout_s: float = TIMEOUT_S) -> None:
        if kind == "tcp":
            self.sock = socket.create_connection((endpoint.host, endpoint.port), timeout_s)
        else:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.sock.settimeout(timeout_s)
            self.sock.connect(f"\0{endpoint.unix_name}")
        self.endpoint = endpoint
        self.frames = FrameReader(_anywhere, 1 << 40)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def read(self) -> Frame | None:
        """The next frame; None if the connection is closed."""
        while True:
            packets = self.sock.family == socket.AF_UNIX
            packet = memoryview(bytearray(1 << 16))
            try:
                count = self.sock.recv_into(packet if packets else self.frames.wanted)
            except ConnectionError:
                if packets:  # reported ahead of what came before it, and once
                    continue
                return None
            if count == 0:
                return None
            if packets:
                return decode_packet(packet[:count])
            if (frame := self.frames.received(count)) is not None:
                return frame

    def send(self, header: Header, meta: Buffer = b"", payload: Sequence[Buffer] = ()) -> None:
        self.sock.sendall(bytes(encode(header, meta, payload)) + b"".join(payload))

    def try_send(self, data: Buffer) -> None:
        """Send, or find that the other side has closed."""
        try:
            self.sock.sendall(data)
        except OSError:
            return

    def shake_hands(
        self, worker: int = 0, token: bytes = TOKEN, fingerprint: int = FINGERPRINT
    ) -> Frame | None:
        """The shard's answer to a HELLO."""
        challenged = self.read()
        assert challenged is not None
        nonce = new_nonce()
        shard = self.endpoint.shard
        self.sock.sendall(hello(token, challenged, nonce, worker, shard, fingerprint))
        answer = self.read()
        if answer is not None and answer.header.kind == Kind.WELCOME:
            check_welcome(token, challenged, nonce, answer)
        return answer

    def is_cut_off(self, timeout_s: float = TIMEOUT_S) -> bool:
        """Whether the shard closes the connection within the time, without another frame."""
        self.sock.settimeout(timeout_s)
        try:
            return self.read() is None
        except TimeoutError:
            return False


def _anywhere(header: Header, meta: bytes) -> Sequence[memoryview]:
    return [memoryview(bytearray(header.payload_bytes))]


@contextmanager
def authed(endpoint: Endpoint, kind: str = "tcp", worker: int = 0) -> Iterator[RawPeer]:
    """A peer that knows the token."""
    with RawPeer(endpoint, kind) as peer:
        answer = peer.shake_hands(worker)
        assert answer is not None
        assert answer.header.kind == Kind.WELCOME
        yield peer


class Captured:
    """A transport that keeps messages."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.pulls: list[Any] = []
        self.pushes: list[Any] = []

    def pull(self, message: Any) -> Sequence[Any]:
        self.pulls.append(message)
        return [_Now(message.version) for _ in range(message.layout.num_shards)]

    def push(self, message: Any) -> None:
        self.pushes.append(message)

    def flush(self, timeout_s: float) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to give back."""


class _Now:
    def __init__(self, version: int) -> None:
        self._version = version

    def result(self, timeout_s: float) -> tuple[int, float]:
        return self._version, 0.0


def capturing_client(job: Job, memory: Any) -> tuple[ShardClient, Captured]:
    captured = Captured(memory)
    client = ShardClient(job.embedding, job.layout, cast("Transport", captured), 0, job.format)
    return client, captured


def random_gradients(
    job: Job, names: Mapping[str, DistinctRows | ShardBags], seed: int, values: Any = any_bits
) -> dict[str, F32]:
    rng = np.random.default_rng([9, seed])
    pairs = zip(names.items(), job.dims, strict=True)
    return {name: values(rng, num_gradients(d), dim) for (name, d), dim in pairs}


META = FIELDS + TAIL


def description(entries: int = 0, **fields: int) -> bytes:
    """Of a message of one table over TCP."""
    numbers = np.full(META, NO_PLACE, dtype="<i8")
    numbers[[0, -3, -1]] = entries, 0, NO_PLACE
    for name, index in {"bags": 1, "dense": -3, "state": -1}.items():
        numbers[index] = fields.get(name, numbers[index])
    return numbers.tobytes()


def pull(peer: RawPeer, rows: Any, version: int = 0, request: int = 1, worker: int = 0) -> None:
    """A pull of these rows over TCP."""
    header = Header(Kind.PULL, worker=worker, request=request, step=version, version=version)
    payload = [memoryview(np.asarray(rows, dtype="<i8")).cast("B")] if len(rows) else []
    peer.send(header, description(len(rows)), payload)


def error_of(peer: RawPeer) -> str:
    frame = peer.read()
    assert frame is not None
    assert frame.header.kind == Kind.ERROR
    return frame.meta.decode()


def segment(size: int = 1 << 16) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.posix_fallocate(fd, 0, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def send_fds(peer: RawPeer, fds: list[int], data: bytes) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
    peer.sock.sendmsg([data], ancillary)


def give_segment(peer: RawPeer) -> None:
    """Announce a first segment over a Unix socket."""
    fd = segment()
    send_fds(peer, [fd], bytes(encode(Header(Kind.ARENA, aux=1 << 16))))
    os.close(fd)
