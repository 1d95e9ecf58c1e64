"""Frames: a fixed header, a small `meta` part, and arrays.

All numbers are little-endian. A frame is

    header (64 bytes) | meta (`meta_bytes`) | payload (`payload_bytes`)

and its checksum is XXH3-64 of the header's first 56 bytes, the meta part and the payload. Sizes are
checked before anything is allocated. `FrameReader` turns bytes into frames, however they arrive; it
does no I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import xxhash

from ps.errors import ProtocolError

MAGIC = b"MNTA"
PROTOCOL = 2
HEADER_BYTES = 64
OBSERVER = 2**32 - 1
"""Instead of a worker's rank, in the HELLO of who only wants to notice a shard's end."""
MAX_META_BYTES = 1 << 20
MAX_ERROR_BYTES = 1 << 12

_HEADER = struct.Struct("<4sBBHIIQQqqQQ")
_CHECKED_BYTES = 56
assert _HEADER.size == HEADER_BYTES

Buffer = memoryview | bytes | bytearray


class Kind(IntEnum):
    """What a frame is."""

    CHALLENGE = 1
    """Shard: a nonce to be signed."""
    HELLO = 2
    """Worker: who it is, its own nonce, and the signature of both."""
    WELCOME = 3
    """Shard: its signature, and which push it expects next; pulls and pushes may follow."""
    ARENA = 4
    """Worker: one more segment of shared memory; its file descriptor comes with the frame."""
    PULL = 5
    PUSH = 6
    FLUSH = 7
    """Worker: tell me when all pushes before this frame have been taken."""
    ROWS = 8
    """Shard: the answer to a PULL."""
    FLUSHED = 9
    """Shard: the answer to a FLUSH."""
    ERROR = 10
    """Shard: a request failed; `meta` is the name of the error, a line feed, and the message."""


class Header(NamedTuple):
    """The first 64 bytes of a frame. A field means nothing where its kind does not name it."""

    kind: Kind
    meta_bytes: int = 0
    worker: int = 0
    """HELLO, PULL, PUSH: rank of the worker."""
    payload_bytes: int = 0
    request: int = 0
    """Number of a request on its connection, from 1; its answer has the same."""
    step: int = 0
    """PULL, PUSH: the worker's step. WELCOME and answers: pushes of this worker for steps below are
    done with, and their memory may be used again."""
    version: int = 0
    """PULL: wanted, -1 for the latest. ROWS: of the rows. HELLO: the shard's number. WELCOME: the
    step whose push the shard expects next."""
    aux: int = 0
    """ROWS: nanoseconds that the answer waited for its version. ARENA: bytes of the segment. HELLO:
    fingerprint of the job's tables."""
    flags: int = 0
    """None so far."""


@dataclass(slots=True, eq=False)
class Frame:
    """A frame that has arrived whole, its checksum right."""

    header: Header
    meta: bytes
    payload: Sequence[memoryview]


def encode(header: Header, meta: Buffer = b"", payload: Sequence[Buffer] = ()) -> bytearray:
    """The header and the meta part as bytes, with the checksum; the payload is sent behind them.

    Sizes in `header` are replaced by those of the parts.
    """
    size = sum(map(len, payload)) if payload else 0
    frame = bytearray(HEADER_BYTES + len(meta))
    pack(frame, header.kind, header.flags, len(meta), header.worker, size, header.request,
         header.step, header.version, header.aux)  # fmt: skip
    frame[HEADER_BYTES:] = meta
    seal(frame, payload)
    return frame


def pack(
    frame: bytearray,
    kind: int,
    flags: int,
    meta_bytes: int,
    worker: int,
    payload_bytes: int,
    request: int,
    step: int,
    version: int,
    aux: int,
) -> None:
    """Write a header at the start of a frame, its checksum still missing."""
    _HEADER.pack_into(frame, 0, MAGIC, PROTOCOL, kind, flags, meta_bytes, worker, payload_bytes,
                      request, step, version, aux, 0)  # fmt: skip


def seal(frame: bytearray, payload: Sequence[Buffer] = ()) -> None:
    """Write the checksum into a header whose meta part follows it in `frame`."""
    digest = _digest(frame, memoryview(frame)[HEADER_BYTES:], payload)
    frame[_CHECKED_BYTES:HEADER_BYTES] = digest.to_bytes(8, "little")


def _digest(header: Buffer, meta: Buffer, payload: Sequence[Buffer]) -> int:
    start = bytes(header[:_CHECKED_BYTES]) + meta
    if not payload:
        return xxhash.xxh3_64_intdigest(start)
    state = xxhash.xxh3_64(start)
    for part in payload:
        state.update(part)
    return state.intdigest()


def decode_header(
    data: Buffer, max_payload_bytes: int, max_meta_bytes: int = MAX_META_BYTES
) -> tuple[Header, int]:
    """A header and the checksum that it names.

    Raises:
        ProtocolError: not a header of this protocol, or sizes beyond the limits.
    """
    magic, protocol, kind, flags, meta_bytes, worker, payload_bytes, request, *rest = (
        _HEADER.unpack(data)
    )
    step, version, aux, checksum = rest
    if magic != MAGIC:
        raise ProtocolError(f"frame starts with {magic!r}, wanted {MAGIC!r}")
    if protocol != PROTOCOL:
        raise ProtocolError(f"frame of protocol {protocol}, this side speaks {PROTOCOL}")
    if kind not in _KINDS:
        raise ProtocolError(f"frame of kind {kind}, wanted one of {sorted(_KINDS)}")
    if meta_bytes > max_meta_bytes:
        raise ProtocolError(f"meta part of {meta_bytes} bytes, at most {max_meta_bytes} are taken")
    if payload_bytes > max_payload_bytes:
        raise ProtocolError(
            f"payload of {payload_bytes} bytes, at most {max_payload_bytes} are taken"
        )
    header = Header(_KINDS[kind], meta_bytes, worker, payload_bytes, request, step, version, aux,
                    flags)  # fmt: skip
    return header, checksum


_KINDS = {int(kind): kind for kind in Kind}

Place = Callable[[Header, bytes], Sequence[memoryview]]
"""Says where a payload goes: buffers of together `payload_bytes`, from the header and the meta
part. Raises `ProtocolError` for sizes that do not fit them, before it allocates."""


class FrameReader:
    """Bytes in, frames out. Read into `wanted`, then say how many came with `received`.

    After a `ProtocolError` the stream has no next frame, and the connection must be closed.
    """

    def __init__(
        self, place: Place, max_payload_bytes: int, max_meta_bytes: int = MAX_META_BYTES
    ) -> None:
        self._place = place
        self._limits = (max_payload_bytes, max_meta_bytes)
        self._head = bytearray(HEADER_BYTES)
        self._start()

    def _start(self) -> None:
        self._header: Header | None = None
        self._checksum = 0
        self._meta = b""
        self._meta_buffer = bytearray()
        self._payload: Sequence[memoryview] = ()
        self._next = 0
        self._left = memoryview(self._head)

    @property
    def wanted(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return self._left

    @property
    def idle(self) -> bool:
        """Whether no byte of a frame has come that is not whole yet."""
        return self._header is None and len(self._left) == HEADER_BYTES

    def received(self, count: int) -> Frame | None:
        """Take note of `count` bytes in `wanted`; returns the frame if it is whole now.

        Raises:
            ProtocolError: not a frame of this protocol, too big, or damaged.
        """
        self._left = self._left[count:]
        while not len(self._left):
            if self._header is None:
                self._header, self._checksum = decode_header(self._head, *self._limits)
                if self._header.meta_bytes:
                    self._meta_buffer = bytearray(self._header.meta_bytes)
                    self._left = memoryview(self._meta_buffer)
                    continue
            if self._next == 0:
                self._meta = bytes(self._meta_buffer)
                self._payload = self._places(self._header)
            if self._next == len(self._payload):
                return self._whole(self._header)
            self._left = self._payload[self._next]
            self._next += 1
        return None

    def _places(self, header: Header) -> Sequence[memoryview]:
        if not header.payload_bytes:
            return ()
        places = [view for view in self._place(header, self._meta) if len(view)]
        assert sum(map(len, places)) == header.payload_bytes, "`Place` checks the size"
        return places

    def _whole(self, header: Header) -> Frame:
        _check(header, self._checksum, _digest(self._head, self._meta, self._payload))
        frame = Frame(header, self._meta, self._payload)
        self._start()
        return frame


def decode_packet(packet: memoryview, max_meta_bytes: int = MAX_META_BYTES) -> Frame:
    """The frame that a packet of a Unix socket is: whole, and without a payload.

    Raises:
        ProtocolError: it is something else, or damaged.
    """
    if len(packet) < HEADER_BYTES:
        raise ProtocolError(f"a packet of {len(packet)} bytes, wanted at least {HEADER_BYTES}")
    header, checksum = decode_header(packet[:HEADER_BYTES], 0, max_meta_bytes)
    meta = packet[HEADER_BYTES:]
    if len(meta) != header.meta_bytes:
        raise ProtocolError(
            f"a packet with a meta part of {len(meta)} bytes, its header says {header.meta_bytes}"
        )
    _check(header, checksum, _digest(packet, meta, ()))
    return Frame(header, bytes(meta), ())


def _check(header: Header, checksum: int, digest: int) -> None:
    if digest != checksum:
        raise ProtocolError(
            f"frame of kind {header.kind.name}: checksum {digest:#018x}, "
            f"its header says {checksum:#018x}"
        )


def error_frame(request: int, error: Exception, done_step: int = 0) -> bytearray:
    """What tells a worker that its request failed."""
    text = f"{type(error).__name__}\n{error}".encode()[:MAX_ERROR_BYTES]
    return encode(Header(Kind.ERROR, request=request, step=done_step), text)
