"""Channels: a port that anyone may send to, and the receiver that one process reads."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..context import local_proc
from ..invoke import dump_error, dump_value
from ..messages import wire
from .future import Future

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..errors import SupervisionError
    from ..failure import MeshFailure
    from ..messages.attachment import Incoming

T = TypeVar("T")


class Port(Generic[T]):
    """Where values can be sent from any actor: picklable, ordered per sender, many senders."""

    __slots__ = ("_port", "_proc", "_slot")

    def __init__(self, proc: str, port: int, slot: int = 0) -> None:
        self._proc, self._port, self._slot = proc, port, slot

    def send(self, value: T) -> None:
        """Send ``value`` to the receiver; does not wait."""
        self._post(wire.OK, dump_value(value))

    def exception(self, error: BaseException) -> None:
        """Send ``error``: it is raised where the receiver asks."""
        self._post(wire.ERROR, dump_error(f"port of {self._proc}", error))

    def _post(self, status: int, payload: Any) -> None:
        if self._port:
            proc = local_proc()
            proc.reply(
                self._proc, self._port, self._slot, status, proc.snapshot(payload, [self._proc]), load=0, lazy=False
            )

    def __reduce__(self) -> tuple[type[Port[Any]], tuple[str, int, int]]:
        return Port, (self._proc, self._port, self._slot)

    def __repr__(self) -> str:
        return f"<Port {self._proc}:{self._port}>"


class _Queue:
    """The sink behind a receiver; the receiver's end removes it."""

    def __init__(self, proc: str, once: bool) -> None:
        self.proc, self.once = proc, once
        self.failure: MeshFailure | None = None
        self.lock = threading.Lock()
        self.arrived: deque[Callable[[], Any]] = deque()
        self.waiting: deque[Future[Any]] = deque()

    def on_reply(self, _slot: int, status: int, body: bytes | None, incoming: Incoming | None) -> bool:
        from .replies import load_reply

        load = partial(load_reply, "Port.send", status, body, incoming)
        with self.lock:
            while self.waiting:
                if self.waiting.popleft()._resolve(load):
                    return self.once
            self.arrived.append(load)
        return self.once

    def on_gone(self, proc: str, failure: MeshFailure) -> bool:
        if proc != self.proc:
            return False
        # The runtime of this process itself has ended: nothing arrives any more.
        with self.lock:
            self.failure = failure
            while self.waiting:
                future = self.waiting.popleft()
                future._reject(self.error(future.describe()))
        return True

    def error(self, name: str) -> SupervisionError:
        from .replies import gone_error

        assert self.failure is not None
        return gone_error(self.failure, name)


class PortReceiver(Generic[T]):
    """The receiving end of a channel; belongs to the process that opened it."""

    def __init__(self, queue: _Queue, name: str) -> None:
        self._queue, self._name = queue, name

    def recv(self) -> Future[T]:
        """Return a future of the next value; an exception sent on the port is raised by it."""
        future: Future[T] = Future(self._name)
        with self._queue.lock:
            if self._queue.arrived:
                future._resolve(self._queue.arrived.popleft())
            elif self._queue.failure is not None:
                future._reject(self._queue.error(self._name))
            else:
                self._queue.waiting.append(future)
        return future

    def __aiter__(self) -> PortReceiver[T]:
        return self

    async def __anext__(self) -> T:
        return await self.recv()

    def __repr__(self) -> str:
        return f"<PortReceiver {self._name}>"


class Channel(Generic[T]):
    """A way for other actors to send values here.

    Example:
        >>> from danaus import Channel
        >>> port, receiver = Channel[int].open()
        >>> port.send(3)
        >>> receiver.recv().get(timeout=10)
        3
    """

    @staticmethod
    def open(once: bool = False) -> tuple[Port[Any], PortReceiver[Any]]:
        """Return both ends; the port may be sent to any actor.

        Args:
            once: Take one value only.
        """
        proc = local_proc()
        number = proc.next_port()
        queue = _Queue(proc.proc_id, once)
        proc.ports[number] = queue
        receiver: PortReceiver[Any] = PortReceiver(queue, f"port {proc.proc_id}:{number}")
        weakref.finalize(receiver, proc.ports.pop, number, None).atexit = False
        return Port(proc.proc_id, number), receiver
