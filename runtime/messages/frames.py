"""Sends and receives messages of several frames without the wrappers around ZeroMQ's sockets, which cost more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import zmq
from zmq.backend import Socket as _Raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_EVENTS: Final = int(zmq.EVENTS)
_MORE: Final = int(zmq.RCVMORE)
_IN: Final = int(zmq.POLLIN)
_NOBLOCK: Final = int(zmq.NOBLOCK)
_SNDMORE: Final = int(zmq.SNDMORE)
_get: Callable[..., Any] = _Raw.get
_recv: Callable[..., Any] = _Raw.recv
_send: Callable[..., Any] = _Raw.send

NOBLOCK: Final = _NOBLOCK
"""Flag of :func:`send`: raise where there is no room."""

COPY_BELOW: Final = 64 << 10
"""Frames from this size on are handed over without a copy."""


def may_receive(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message is there."""
    return not socket.closed and bool(_get(socket, _EVENTS) & _IN)


def received(socket: zmq.Socket[bytes], limit: int) -> Iterator[list[Any]]:
    """Yield the messages that are there, ``limit`` of them at most; never blocks."""
    for _ in range(limit):
        # Asked for, since an empty socket raises, which costs more.
        if not may_receive(socket):
            return
        frames = [_recv(socket, _NOBLOCK)]
        while _get(socket, _MORE):
            frames.append(_recv(socket, _NOBLOCK))
        yield frames


def send(socket: zmq.Socket[bytes], frames: Sequence[Any], flags: int = 0) -> None:
    """Send one message.

    Raises:
        zmq.Again: With ``NOBLOCK``, there is no room for it.
    """
    for frame in frames[:-1]:
        _send(socket, frame, flags | _SNDMORE, len(frame) < COPY_BELOW)
    _send(socket, frames[-1], flags, len(frames[-1]) < COPY_BELOW)
