"""Moves bytes over a connected socket, plain or TLS, to and from memory in place.

Python's TLS takes megabytes at a time for sending and gives 16 KiB at a time when receiving; both let other threads
run, and neither copies more than the encryption itself does.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    import ssl

PIECE_BYTES: Final = 1 << 20
"""Between pieces of this size a transfer looks at its limit, and whether it was called off."""

STALL_S: Final = 30.0
"""A peer that takes or sends nothing for so long is given up."""

_BUFFER_BYTES: Final = 4 << 20


class Watch(Protocol):
    """Who follows a transfer; what these raise ends it."""

    def on_moved(self, size_bytes: int, /) -> None:
        """So many bytes more have gone or come."""
        ...

    def on_stall(self) -> None:
        """Nothing came for the length of the connection's timeout."""
        ...


class Cut(ConnectionError):  # noqa: N818  names what happened
    """The connection ended within a transfer."""


def receive_exactly(connection: socket.socket, size_bytes: int) -> bytes:
    """Receive a header.

    Raises:
        Cut: The connection ended before or within it.
    """
    data = bytearray(size_bytes)
    receive(connection, memoryview(data))
    return bytes(data)


def receive(connection: socket.socket, into: memoryview, watch: Watch | None = None) -> None:
    """Fill ``into``.

    Args:
        connection: Where from.
        into: Where to.
        watch: Told of what came, once per piece, and when nothing came within the connection's timeout.

    Raises:
        Cut: The connection ended.
        TimeoutError: Nothing came within the connection's timeout, and there is no ``watch``.
    """
    size_bytes, done, noted = len(into), 0, 0
    receive_into = connection.recv_into
    while done < size_bytes:
        try:
            got = receive_into(into[done : done + PIECE_BYTES])
        except TimeoutError:
            if watch is None:
                raise
            watch.on_stall()
            continue
        if not got:
            raise Cut(f"the connection ended after {done} of {size_bytes} bytes")
        done += got
        if watch is not None and (done - noted >= PIECE_BYTES or done == size_bytes):
            watch.on_moved(done - noted)
            noted = done


def send(connection: socket.socket, data: memoryview, watch: Watch | None = None) -> None:
    """Send all of ``data``; see :func:`receive`."""
    for start in range(0, len(data), PIECE_BYTES):
        piece = data[start : start + PIECE_BYTES]
        connection.sendall(piece)
        if watch is not None:
            watch.on_moved(len(piece))


def prepare(connection: socket.socket) -> None:
    """Set what streams of large data want."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    else:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)


def wrapped(context: ssl.SSLContext, raw: socket.socket, *, is_server: bool) -> ssl.SSLSocket:
    """Return a connection with TLS over ``raw``, which it takes over. Its handshake has to follow.

    Raises:
        OSError: The other end is gone.
    """
    import ssl

    try:
        # The handshake apart: this does without where the other end has gone.
        return context.wrap_socket(raw, server_side=is_server, do_handshake_on_connect=False)
    except OSError as error:
        # CPython leaves the new socket open where the other end has gone before it looks.
        at = error.__traceback__
        while at is not None:
            made = at.tb_frame.f_locals.get("self")
            if isinstance(made, ssl.SSLSocket):
                close(made)
            at = at.tb_next
        raise


def is_own_user(connection: socket.socket, uid: int) -> bool:
    """Whether the process at the other end of a unix socket is this user's."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] in {uid, 0}


def peer_pid(connection: socket.socket) -> int:
    """Process that listens or connected at the other end of a unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[0]


def cut(connection: socket.socket) -> None:
    """End a connection that another thread may be using: that thread finds it ended."""
    # Not the method of SSLSocket: it would let the other thread go on in plain text.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def close(connection: Any) -> None:
    """Close a connection that no other thread uses."""
    with contextlib.suppress(OSError):
        connection.close()


def is_readable(descriptor: int, wait_s: float = 0.0) -> bool:
    """Whether something can be read (of a pidfd: whether its process has ended)."""
    # Not select(), which knows no descriptors above 1023.
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))


def remaining_s(deadline_s: float) -> float:
    """Seconds until ``deadline_s``, not below zero."""
    return max(0.0, deadline_s - time.monotonic())
