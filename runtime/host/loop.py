"""Waits for sockets, descriptors and signals, and calls whoever asked to hear of them: the one loop of an agent."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import TYPE_CHECKING, Any

from ..messages.frames import may_receive

if TYPE_CHECKING:
    from collections.abc import Callable

    import zmq


class Loop:
    """What one thread waits for.

    Not ``zmq.Poller``: that asks every socket at each turn, some eleven system calls a message. A socket's descriptor
    tells of changes only, and a send may take note of one: who sends on a socket that is watched has to say so.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._descriptors: dict[int, Callable[[], object]] = {}
        self._sockets: dict[Any, Callable[[], object]] = {}
        self._touched: set[Any] = set()

    def watch_socket(self, socket: zmq.Socket[bytes], handler: Callable[[], object]) -> None:
        """Have ``handler`` called whenever ``socket`` has something to receive."""
        self._sockets[socket] = handler
        self.watch(socket.FD, lambda: self._serve(socket))
        self._touched.add(socket)

    def unwatch_socket(self, socket: zmq.Socket[bytes]) -> None:
        """End that, before the socket is closed."""
        if self._sockets.pop(socket, None) is not None:
            self._touched.discard(socket)
            self.unwatch(socket.FD)

    def touch(self, socket: zmq.Socket[bytes]) -> None:
        """Something was sent on a socket that is watched."""
        self._touched.add(socket)

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        handler = self._sockets.get(socket)
        if handler is not None:
            handler()
            if may_receive(socket) and socket in self._sockets:
                self._touched.add(socket)

    def watch(self, fd: int, handler: Callable[[], object]) -> None:
        """Have ``handler`` called whenever ``fd`` is readable."""
        self._descriptors[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """End that."""
        if self._descriptors.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def watch_signals(self, signums: tuple[int, ...], handler: Callable[[list[int]], object]) -> None:
        """Have ``handler`` called with the signals of ``signums`` that have come, between other calls.

        The interpreter itself writes their numbers to a pipe: a handler in Python, due just before the thread falls
        asleep, would run only when it wakes up for something else.
        """
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for signum in signums:
            signal.signal(signum, _nothing)
        self.watch(reading, lambda: handler(list(os.read(reading, 4096))))

    def wait(self, timeout_ms: int) -> None:
        """Wait for something, at most for so long, and call its handler."""
        touched, self._touched = self._touched, set()
        for socket in touched:
            self._serve(socket)
        wait_s = 0 if self._touched else None if timeout_ms < 0 else timeout_ms / 1000
        for fd, _ in self._epoll.poll(wait_s):
            handler = self._descriptors.get(fd)
            if handler is not None:
                handler()


def _nothing(_signum: int, _frame: object) -> None:
    return
