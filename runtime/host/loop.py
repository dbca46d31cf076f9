"""Waits for sockets, descriptors and signals, and calls whoever asked to hear of them: the one loop of an agent."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import TYPE_CHECKING, Any

import zmq

if TYPE_CHECKING:
    from collections.abc import Callable


class Loop:
    """What one thread waits for."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._sockets: dict[Any, Callable[[], object]] = {}
        self._epoll = select.epoll()
        self._descriptors: dict[int, Callable[[], object]] = {}
        self._poller.register(self._epoll, zmq.POLLIN)

    def watch_socket(self, socket: zmq.Socket[bytes], handler: Callable[[], object]) -> None:
        """Have ``handler`` called whenever ``socket`` has something to receive."""
        self._sockets[socket] = handler
        self._poller.register(socket, zmq.POLLIN)

    def unwatch_socket(self, socket: zmq.Socket[bytes]) -> None:
        """End that."""
        if self._sockets.pop(socket, None) is not None:
            self._poller.unregister(socket)

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
        for ready, _ in self._poller.poll(timeout_ms):
            self._sockets.get(ready, self._on_descriptors)()

    def _on_descriptors(self) -> None:
        for fd, _ in self._epoll.poll(0):
            handler = self._descriptors.get(fd)
            if handler is not None:
                handler()


def _nothing(_signum: int, _frame: object) -> None:
    return
