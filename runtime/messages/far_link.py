"""The way to processes of other hosts: all of it leads through the gate of the host's own agent, in one line.

One socket for all of them, since messages to one process and casts to many have to stay in order.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import zmq

from ..interrupts import InterruptsHeld
from . import wire
from .link import MULTIPART, Link

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PLAIN = 0
CAST = 1
REPLY = 3
"""Kinds of what goes through the gate; see network/packets.py."""


class Gate:
    """This process's connection to the agent, for what goes to other hosts.

    Args:
        context: ZeroMQ's.
        path: Path of the agent's socket; it may be bound later.
    """

    def __init__(self, context: zmq.Context[Any], path: Callable[[], str]) -> None:
        self.lock = threading.Lock()
        self._context, self._path = context, path
        self._socket: zmq.Socket[bytes] | None = None

    def send_locked(self, meta: bytes, frames: Sequence[Any]) -> None:
        """Send one message; the caller holds ``lock``."""
        socket = self._socket
        if socket is None:
            socket = self._socket = self._context.socket(zmq.PUSH)
            socket.linger = 0
            socket.sndhwm = 0
            socket.connect(f"ipc://{self._path()}")
        with InterruptsHeld():
            socket.send(meta, zmq.SNDMORE)
            for frame in frames[:-1]:
                socket.send(frame, zmq.SNDMORE, copy=True)
            socket.send(frames[-1], copy=True)

    def close(self, linger_ms: int = 0) -> None:
        """Close the connection, once what is on its way has had ``linger_ms``."""
        with self.lock:
            socket, self._socket = self._socket, None
            if socket is not None:
                socket.close(linger_ms)


class FarLink(Link):
    """Sends envelopes to one process of another host. Holds them until the process is known to be up."""

    def __init__(self, proc: str, wake: Callable[[Link], None], gate: Gate) -> None:
        super().__init__(proc, wake)
        self.lock = gate.lock
        self._gate = gate
        self._meta: bytes | None = None

    @property
    def is_open(self) -> bool:
        """Whether the other process is up."""
        return self._meta is not None

    def open(self, context: zmq.Context[Any], address: str) -> None:
        """Send what was held; a second call does nothing."""
        del context, address
        with self.lock:
            if self._meta is not None or self._closed:
                return
            meta: bytes = wire.pack([PLAIN, self.proc])
            self._meta, self.was_open = meta, True
            held, self._held = self._held, []
            for frames in held:
                self._gate.send_locked(meta, frames)

    def stage(self, data: bytes) -> None:
        """Send it at once: there is no batch to save it for."""
        self.send(data)

    def send_locked(self, data: bytes, frames: Sequence[Any] = (), *, lazy: bool = False) -> bool:
        """Same as :meth:`send` for a holder of ``lock``; nothing has to be woken after it."""
        del lazy
        if self._meta is not None:
            self._gate.send_locked(self._meta, [MULTIPART + data, *frames] if frames else [data])
        elif self._forward is not None:
            # The lock is shared by all links of this kind.
            self._forward.send_locked(data, frames)
        elif not self._closed:
            self._held.append([MULTIPART + data, *map(bytes, frames)] if frames else [data])
        return False

    def send_reply(self, port: int, data: bytes, frames: Sequence[Any]) -> None:
        """Send a reply that may wait a moment for others to the same port."""
        with self.lock:
            if self._meta is None or frames:
                self.send_locked(data, frames)
            else:
                self._gate.send_locked(wire.pack([REPLY, self.proc, port]), [data])

    def forward_to(self, other: Link) -> None:
        """Nothing was sent over this link: what is held, and what is sent from now on, goes over ``other``."""
        assert isinstance(other, FarLink)
        with self.lock:
            held, self._held, self._forward = self._held, [], other
            if other._meta is None:
                other._held[:0] = held
                return
            for frames in held:
                self._gate.send_locked(other._meta, frames)

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self, linger_ms: int = 0) -> None:
        """Drop what is held; later sends are dropped too."""
        del linger_ms
        with self.lock:
            self._closed, self._meta = True, None
            self._held.clear()
