"""A process's one-way connection to another process, and the lanes of its actors on it.

ZeroMQ sockets may move between threads if a lock orders their use: a caller's thread sends directly under the link's
lock, which saves the hand-off to the I/O thread (some 40 us a call). A caller in a burst leaves its messages in a batch
instead, and the I/O thread sends them as one frame.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import zmq

from ..address import host_of
from ..interrupts import InterruptsHeld
from . import wire
from .credits import CreditAccount
from .frames import send

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .attachment import Outgoing

MULTIPART: Final = b"\xc1"
"""First byte of a first frame that others follow; msgpack never begins so."""

_BATCH_BYTES: Final = 64 << 10
_BURST: Final = 8
_PROBE_S: Final = 0.05


class Link:
    """Sends envelopes to one process, in order. Holds them until the process is known to be up."""

    def __init__(self, proc: str, wake: Callable[[Link], None]) -> None:
        self.proc = proc
        self.lock = threading.Lock()
        self._wake = wake
        self._socket: zmq.Socket[bytes] | None = None
        self._send_raw: Callable[[bytes], object] = bytes
        self._held: list[list[Any]] = []
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._num_staged = 0
        self._closed = False
        self.was_open = False
        """Whether anything can have been sent."""
        self._forward: Link | None = None

    @property
    def is_open(self) -> bool:
        """Whether the other process is up and connected to."""
        return self._socket is not None

    def open(self, context: zmq.Context[Any], address: str) -> None:
        """Connect and send what was held; a second call does nothing."""
        with self.lock:
            if self._socket is not None or self._closed:
                return
            socket = context.socket(zmq.PUSH)
            socket.linger = 0
            socket.sndhwm = 0
            socket.connect(address)
            self._socket = socket
            self.was_open = True
            # The wrapper around it looks for options that are never used here.
            self._send_raw = partial(zmq.backend.Socket.send, socket)
            held, self._held = self._held, []
            for frames in held:
                socket.send_multipart(frames, copy=False)

    def send(self, data: bytes, frames: Sequence[Any] = (), *, lazy: bool = False) -> None:
        """Send one packed envelope and the frames it announces; never blocks.

        Args:
            data: The envelope.
            frames: Buffers that belong to it; copied before this returns.
            lazy: More will follow at once, so it may wait for the I/O thread to send a batch.
        """
        with self.lock:
            wake = self.send_locked(data, frames, lazy=lazy)
        if wake:
            self._wake(self)

    def stage(self, data: bytes) -> None:
        """Put a packed envelope before the next one sent, which has to follow at once: both go as one frame."""
        with self.lock:
            if self._socket is not None:
                self._batch.append(data)
                self._batch_bytes += len(data)
                self._num_staged += 1
            elif self._forward is not None:
                self._forward.stage(data)
            elif not self._closed:
                self._held.append([data])

    def send_locked(self, data: bytes, frames: Sequence[Any] = (), *, lazy: bool = False) -> bool:
        """Same as :meth:`send` for a holder of ``lock``; return whether :meth:`wake` has to be called after it."""
        socket = self._socket
        if socket is None:
            if self._forward is not None:
                self._forward.send(data, frames)
            elif not self._closed:
                self._held.append([MULTIPART + data, *map(bytes, frames)] if frames else [data])
            return False
        if frames:
            self._flush(socket)
            # Cut off in between, it would take the next message for its rest.
            with InterruptsHeld():
                socket.send(MULTIPART + data, zmq.SNDMORE)
                for frame in frames[:-1]:
                    socket.send(frame, zmq.SNDMORE, copy=True)
                socket.send(frames[-1], copy=True)
            return False
        if lazy:
            self._batch.append(data)
            self._batch_bytes += len(data)
            if self._batch_bytes >= _BATCH_BYTES:
                self._flush(socket)
            # The first that is not staged: what is staged has woken nobody.
            return len(self._batch) - self._num_staged == 1
        if self._batch:
            self._batch.append(data)
            self._flush(socket)
        else:
            self._send_raw(data)
        return False

    def carry(self, frames: Sequence[Any]) -> None:
        """Pass on a whole message that another process has sent."""
        with self.lock:
            socket = self._socket
            if socket is not None:
                self._flush(socket)
                send(socket, frames)
            elif not self._closed:
                self._held.append(list(frames))

    def forward_to(self, other: Link) -> None:
        """Nothing was sent over this link: what is held, and what is sent from now on, goes over ``other``."""
        with self.lock, other.lock:
            held, self._held, self._forward = self._held, [], other
            socket = other._socket
            if socket is None:
                other._held[:0] = held
                return
            for frames in held:
                socket.send_multipart(frames, copy=False)

    def wake(self) -> None:
        """Have the I/O thread flush this link soon."""
        self._wake(self)

    def flush(self) -> None:
        """Send the batch."""
        with self.lock:
            if self._socket is not None:
                self._flush(self._socket)

    def close(self, linger_ms: int = 0) -> None:
        """Drop what is held or on its way after ``linger_ms``; later sends are dropped too."""
        with self.lock:
            self._closed = True
            self._held.clear()
            socket, self._socket = self._socket, None
            if socket is not None:
                self._flush(socket)
                socket.close(linger_ms)

    def _flush(self, socket: zmq.Socket[bytes]) -> None:
        if self._batch:
            # Cut off in between, it would be lost or sent twice.
            with InterruptsHeld():
                batch, self._batch, self._batch_bytes, self._num_staged = self._batch, [], 0, 0
                socket.send(b"".join(batch))


class Lane:
    """The way from one actor here to one actor elsewhere: a link, and the credits of this pair."""

    __slots__ = ("account", "actor", "backlog", "host", "link", "name", "proc", "sender", "wait_id", "waiters")

    def __init__(self, link: Link, actor: str, sender: str, name: str, bound: int) -> None:
        self.link, self.actor, self.sender, self.name = link, actor, sender, name
        self.proc = link.proc
        self.host = host_of(link.proc)
        self.account = CreditAccount(bound)
        self.waiters: list[threading.Lock] = []
        self.backlog: deque[tuple[int, bytes, Outgoing]] = deque()
        self.wait_id = 0

    def try_post(self, data: bytes, frames: Sequence[Any], size_bytes: int) -> bool:
        """Send within the credits; return False, with nothing sent, where there is no room."""
        link, account = self.link, self.account
        with link.lock:
            if self.backlog or not account.has_room():
                return False
            # A burst: what follows will be many, so they share frames.
            lazy = account.spent - account.returned >= _BURST
            account.spent += 1
            account.spent_bytes += size_bytes
            wake = link.send_locked(data, frames, lazy=lazy)
        if wake:
            link.wake()
        return True

    def post_later(self, port: int, data: bytes, out: Outgoing) -> None:
        """Queue behind what already waits for room; the I/O thread sends it when credit comes back."""
        with self.link.lock:
            self.backlog.append((port, data, out))
        self.drain()

    def take_back(self, port: int) -> Outgoing | None:
        """Remove and return a queued message that was not sent; None where it is on its way already."""
        with self.link.lock:
            for queued in self.backlog:
                if queued[0] == port:
                    self.backlog.remove(queued)
                    return queued[2]
        return None

    def drain(self) -> None:
        """Send what the credits allow of the backlog (I/O thread, and whoever has just queued)."""
        with self.link.lock:
            while self.backlog and self.account.has_room():
                _, data, out = self.backlog.popleft()
                self.account.spend(out.size_bytes)
                self.link.send_locked(data, out.frames)

    def give_back(self, messages: int, size_bytes: int) -> None:
        """Take returned credit (I/O thread)."""
        self.account.give_back(messages, size_bytes)
        if self.backlog:
            self.drain()
        if self.waiters:
            self.wake_waiters()

    def wake_waiters(self) -> None:
        """Let blocked senders look again."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.release()

    def wait_room(self, origin: str, deadline_s: float | None, is_gone: Callable[[], bool]) -> bool:
        """Block until there may be room, or the receiver is gone; return False when the time has passed.

        While blocked, a probe goes along the chain of senders that wait for each other. If it comes back, they form a
        cycle that nothing else would end, and this lane goes over its bound.

        Args:
            origin: The sending process.
            deadline_s: ``time.monotonic`` seconds, or None.
            is_gone: Whether the receiver has died or was stopped.
        """
        self.wait_id += 1
        probe = wire.pack([wire.PROBE, self.actor, origin, self.sender, self.wait_id])
        pause_s = 0.0
        while not self.account.has_room() and not is_gone():
            waiter = threading.Lock()
            waiter.acquire()
            self.waiters.append(waiter)
            if self.account.has_room():
                break
            self.link.send(probe)
            pause_s = min(_PROBE_S, pause_s * 2 + 0.002)
            remaining_s = pause_s if deadline_s is None else min(pause_s, deadline_s - time.monotonic())
            if remaining_s <= 0:
                return False
            waiter.acquire(timeout=remaining_s)
        return True
