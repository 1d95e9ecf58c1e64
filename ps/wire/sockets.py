"""Sockets to shards: how they are connected, and how long they wait."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ps.errors import ShardLostError
from ps.wire.arena import available

if TYPE_CHECKING:
    from ps.wire.server import Endpoint

CHECK_EVERY_S = 0.1
"""Longest time that a read or write blocks before somebody looks whether to go on."""
_CONNECT_TIMEOUT_S = 10.0
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 3), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))
"""Seconds of silence, seconds between questions, and how many of them go without an answer."""

Check = Callable[[], None]
"""Called while something takes time; it may raise."""


def unix_socket(unix_name: str, check: Check) -> socket.socket | str:
    """A connection to a shard on this host, or why there is none."""
    if not unix_name or not available():
        return "this system, or the shard's, has no memfd"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _let_give_up(sock)
    deadline = time.monotonic() + _CONNECT_TIMEOUT_S
    try:
        while True:
            try:
                sock.connect(f"\0{unix_name}")
            except BlockingIOError:  # many wait to be accepted
                if time.monotonic() >= deadline:
                    raise
                check()
            else:
                return sock
    except OSError as e:  # such a name exists on the shard's own host only
        sock.close()
        return str(e.strerror)
    except BaseException:
        sock.close()
        raise


def still_listens(unix_name: str) -> bool:
    """Whether the process that had this name on this host lives, however little it does."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with sock:
        sock.setblocking(False)
        try:
            sock.connect(f"\0{unix_name}")
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


def tcp_socket(endpoint: Endpoint, check: Check) -> socket.socket:
    """A connection to a shard on any host.

    Raises:
        ShardLostError: nobody answers there.
    """
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            _connect(sock, address, check)
        except BaseException:
            sock.close()
            raise
    except OSError as e:
        raise ShardLostError(
            f"shard {endpoint.shard}: no connection to {endpoint.host}:{endpoint.port}: "
            f"{e.strerror or e}"
        ) from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(sock)
    _let_give_up(sock)
    return sock


def _connect(sock: socket.socket, address: Any, check: Check) -> None:
    sock.setblocking(False)
    deadline = time.monotonic() + _CONNECT_TIMEOUT_S
    if sock.connect_ex(address):
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLOUT)
        while not poll.poll(1000 * CHECK_EVERY_S):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"not within {_CONNECT_TIMEOUT_S:g} s")
            check()
        if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
    if sock.getsockname() == sock.getpeername():  # a free port of this host may reach itself
        raise ConnectionRefusedError("nobody listens")


def keep_alive(sock: socket.socket) -> None:
    """Let a TCP connection end within seconds of the other host, which cannot say so."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _let_give_up(sock: socket.socket) -> None:
    """Let a socket block for a while only, without a system call before each read."""
    sock.setblocking(True)
    whole = int(CHECK_EVERY_S)
    value = struct.pack("@ll", whole, int((CHECK_EVERY_S - whole) * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, value)
