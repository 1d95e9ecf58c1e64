"""Frames that a shard must not mind: malformed, truncated, oversized, forged, and nearly right."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np

from ps.step_message import FIELDS, NO_PLACE, TAIL
from ps.wire.frames import HEADER_BYTES, MAGIC, PROTOCOL, Header, Kind, encode, pack, seal
from ps.wire.server import Endpoint
from tests.support.wire import TOKEN, Job
from tests.support.wire_peers import RawPeer

NO_STEP = 1 << 40
"""Of every push: one of the right step would be a worker's own mistake, and be applied."""
_SEGMENT = 1 << 16
_IDLE = 20
_ODD = [-2, -1, 0, 1, 2, 63, 64, 2**31, 2**40, 2**40 - 1, 2**60, 2**63 - 1, -(2**63)]


class Fuzzer:
    """Sends bad frames to one shard; whom it pretends to be is worker 1."""

    def __init__(self, endpoint: Endpoint, job: Job, seed: int) -> None:
        self._endpoint = endpoint
        self._job = job
        self._rng = np.random.default_rng(seed)
        self._idle: deque[RawPeer] = deque()
        self._fds = [_memfd(sealed=True), _memfd(sealed=False)]
        self.sent: Counter[str] = Counter()
        """Frames by what is wrong with them."""

    def close(self) -> None:
        """Close what is open."""
        self.leave()
        for fd in self._fds:
            os.close(fd)

    def leave(self) -> None:
        """Close the connections that are still open."""
        while self._idle:
            self._idle.pop().sock.close()

    def attack(self, frames: int) -> None:
        """Send so many, a few per connection."""
        until = self.sent.total() + frames
        while self.sent.total() < until:
            self._one_connection(until)

    def _one_connection(self, until: int) -> None:
        kind = "unix" if self._rng.random() < 0.5 else "tcp"
        knows = self._rng.random() < 0.6
        peer = RawPeer(self._endpoint, kind)
        try:
            answer = peer.shake_hands(worker=1) if knows else None
            assert knows == (answer is not None), "who knows the token is let in"
            with contextlib.suppress(OSError):
                if knows and kind == "unix":
                    self._send(peer, bytes(encode(Header(Kind.ARENA, aux=_SEGMENT))), self._fds[:1])
                for _ in range(min(int(self._rng.integers(1, 9)), until - self.sent.total())):
                    if not self._bad_frame(peer, knows, kind):
                        break  # nothing that follows is read
        except OSError:  # cut off
            self.sent["refused"] += 1
        finally:
            self._leave(peer)

    def _leave(self, peer: RawPeer) -> None:
        """Close it now, or later, or with a reset."""
        how = self._rng.random()
        if how < 0.1:
            self._idle.append(peer)
            peer = self._idle.popleft() if len(self._idle) > _IDLE else peer
            if peer in self._idle:
                return
        elif how < 0.3 and peer.sock.family == socket.AF_INET:
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.sock.close()

    def _bad_frame(self, peer: RawPeer, knows: bool, kind: str) -> bool:
        """Send one; returns whether the connection may survive it."""
        ways: dict[str, Callable[[], bytes]] = {
            "garbage": self._garbage,
            "odd header": self._odd_header,
            "oversized": self._oversized,
            "truncated": lambda: self._truncated(kind),
            "flipped bit": lambda: self._flipped(kind),
            "wrong token": lambda: self._forged(peer),
            "nearly right": lambda: self._nearly_right(kind),
        }
        if knows:  # most of what the state sees comes from here
            ways |= {f"nearly right {i}": ways["nearly right"] for i in range(4)}
        name = str(self._rng.choice(list(ways)))
        fds = []
        if knows and kind == "unix" and self._rng.random() < 0.1:
            fds = [self._fds[i] for i in self._rng.integers(0, 2, size=self._rng.integers(1, 4))]
        self.sent[name.rstrip(" 0123")] += 1
        self._send(peer, ways[name](), fds)
        return knows and name.startswith("nearly right")

    def _send(self, peer: RawPeer, data: bytes, fds: list[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        peer.sock.sendmsg([data], ancillary)

    def _any(self, of: Sequence[int]) -> int:
        return of[int(self._rng.integers(0, len(of)))]

    def _garbage(self) -> bytes:
        data = self._rng.bytes(int(self._rng.integers(1, 400)))
        return MAGIC + bytes([PROTOCOL]) + data if self._rng.random() < 0.3 else data

    def _odd_header(self) -> bytes:
        """The checksum is right."""
        frame = bytearray(HEADER_BYTES)
        signed = [self._any(_ODD) for _ in range(2)]
        plain = [self._any(_ODD) % 2**64 for _ in range(2)]
        pack(frame, int(self._rng.integers(0, 12)), 0, 0, int(self._rng.integers(0, 3)), 0,
             plain[0], signed[0] + NO_STEP if signed[0] < 2**62 else NO_STEP, signed[1],
             plain[1])  # fmt: skip
        seal(frame)
        return bytes(frame)

    def _oversized(self) -> bytes:
        frame = bytearray(HEADER_BYTES)
        sizes = [2**20 + 1, 2**26, 2**30 + 1, 2**32 - 1]
        payload = self._any([0, 2**31, 2**40, 2**63, 2**64 - 1])
        pack(frame, int(self._rng.integers(1, 11)), 0, self._any(sizes), 0, payload, 1,
             NO_STEP, 0, 0)  # fmt: skip
        seal(frame)
        return bytes(frame)

    def _truncated(self, kind: str) -> bytes:
        data = self._nearly_right(kind)
        return data[: int(self._rng.integers(1, len(data)))]

    def _flipped(self, kind: str) -> bytes:
        data = bytearray(self._nearly_right(kind))
        bit = int(self._rng.integers(0, 8 * len(data)))
        data[bit // 8] ^= 1 << bit % 8
        return bytes(data)

    def _forged(self, peer: RawPeer) -> bytes:
        nonce_and_mac = self._rng.bytes(32) + self._rng.bytes(32)
        assert TOKEN not in nonce_and_mac
        return bytes(encode(Header(Kind.HELLO, aux=0xF00D), nonce_and_mac))

    def _nearly_right(self, kind: str) -> bytes:
        """A pull, push or flush whose checksum is right, and a few of its numbers wrong."""
        rng, of_kind = self._rng, Kind(int(self._rng.choice([5, 5, 6, 6, 7])))
        if of_kind == Kind.FLUSH:
            return bytes(encode(Header(of_kind, worker=1, request=int(rng.integers(0, 9)))))
        entries = int(rng.integers(0, 20))
        bags = int(rng.integers(0, 5)) if rng.random() < 0.3 else -1
        numbers = self._description(entries, bags, of_kind)
        payload = b""
        if kind == "tcp":
            payload = self._payload(entries, bags, of_kind)
        for _ in range(int(rng.integers(0, 3))):
            numbers[rng.integers(0, numbers.size)] = self._any(_ODD)
        version = self._any([-1, 0, 5, NO_STEP])
        step = NO_STEP + int(rng.integers(0, 100)) if of_kind == Kind.PUSH else version
        header = Header(of_kind, worker=int(rng.random() < 0.9), request=int(rng.integers(0, 99)),
                        step=step, version=version)  # fmt: skip
        return bytes(encode(header, numbers.tobytes(), [memoryview(payload)])) + payload

    def _description(self, entries: int, bags: int, kind: Kind) -> np.ndarray:
        numbers = np.zeros(FIELDS * len(self._job.dims) + TAIL, dtype="<i8")
        for i in range(len(self._job.dims)):
            places = self._rng.integers(0, _SEGMENT, size=4)
            numbers[FIELDS * i : FIELDS * (i + 1)] = [entries, bags, *places]
            numbers[FIELDS * i + 4] = NO_PLACE
        state = self._job.state_size if kind == Kind.PULL else NO_PLACE
        numbers[-TAIL:] = 0, self._job.dense_size, 64, state
        return numbers

    def _payload(self, entries: int, bags: int, kind: Kind) -> bytes:
        rng, parts = self._rng, []
        for _ in self._job.dims:
            high = self._job.num_rows + int(rng.random() < 0.3)
            parts.append(rng.integers(0, high, size=entries).astype("<i8").tobytes())
            if bags >= 0:
                splits = np.sort(rng.integers(0, entries + 1, size=bags + 1))
                splits[0], splits[-1] = 0, entries
                parts.append(splits.astype("<i8").tobytes())
        if kind == Kind.PUSH:
            parts.append(rng.bytes(4 * self._job.dense_size))
            count = entries if bags < 0 else bags
            parts += [rng.bytes(4 * count * dim) for dim in self._job.dims]
        return b"".join(parts)


def _memfd(sealed: bool) -> int:
    fd = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.posix_fallocate(fd, 0, _SEGMENT)
    if sealed:
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
