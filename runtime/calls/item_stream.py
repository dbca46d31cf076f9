"""Receives what a generator endpoint yields, and lets its caller iterate."""

from __future__ import annotations

import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from ..errors import CallTimeoutError, DanausError
from ..invoke import ITEM_WINDOW
from ..messages import wire
from ..supervision.slots import NOTE_AFTER_S, task_slot, thread_slot
from .future import call_soon, refuse_inside_loop
from .replies import Call, gone_error, load_reply, raise_error

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from ..failure import MeshFailure
    from ..messages.attachment import Incoming
    from ..messages.link import Lane

R = TypeVar("R")
_MORE_AT: Final = ITEM_WINDOW // 2


class _Items:
    """The sink behind an :class:`ItemStream`."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.arrived: deque[tuple[bool, Callable[[], Any]]] = deque()
        self.changed = threading.Condition()
        self.waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self.is_over = False
        self.peers: tuple[_Items, ...] = ()

    def on_reply(self, slot: int, status: int, body: bytes | None, incoming: Incoming | None) -> bool:
        """Take one item, or the end (I/O thread)."""
        if status != wire.ITEM:
            self.call.on_answered(slot)
        load = partial(load_reply, self.call.endpoint, status, body, incoming)
        if status == wire.ITEM:
            self._put(False, load)
        elif status == wire.END:
            self._put(True, _end)
        else:
            self._fail(load)
        return status != wire.ITEM

    def on_gone(self, proc: str, failure: MeshFailure) -> bool:
        """End with the failure (I/O thread)."""
        if proc != self.call.lanes[0].proc:
            return False
        self._fail(partial(raise_error, gone_error(failure, self.call.endpoint)))
        return True

    def on_timeout(self, timeout_s: float) -> None:
        """End with a timeout and close the generator (I/O thread)."""
        error = CallTimeoutError(self.call.endpoint, timeout_s, (self.call.lanes[0].name,))
        self._call_off(error, overdue_s=timeout_s)

    def wait(self) -> None:
        """Block until something has arrived."""
        since_s = time.time()
        with self.changed:
            if self.changed.wait_for(lambda: self.arrived, NOTE_AFTER_S):
                return
        slot = thread_slot()
        noted = None if slot is None else slot.note(self, since_s)
        try:
            with self.changed:
                self.changed.wait_for(lambda: self.arrived)
        finally:
            if slot is not None and noted is not None:
                slot.forget(noted)

    # what the wait-for graph asks (see slots.py):

    def describe(self) -> str:
        """What is awaited, as text."""
        return f"an item of {self.call.endpoint}"

    def done(self) -> bool:
        """Whether the next item need not be waited for."""
        return bool(self.arrived)

    def _waits_for(self) -> Sequence[tuple[Lane, int]]:
        return [(self.call.lanes[0], self.call.port)]

    def _call_off(self, error: DanausError, *, overdue_s: float = 0.0) -> None:
        if not self.is_over:
            self.close(overdue_s=overdue_s)
            self._fail(partial(raise_error, error))

    def _fail(self, load: Callable[[], Any]) -> None:
        """End with an error, for the streams beside this one too: their next item may wait for this rank."""
        self._put(True, load)
        for stream in self.peers:
            stream.close()
            stream._put(True, load)

    def _put(self, is_last: bool, load: Callable[[], Any]) -> None:
        with self.changed:
            self.is_over |= is_last
            self.arrived.append((is_last, load))
            self.changed.notify_all()
            waiter = self.waiter
        if waiter is not None:
            call_soon(waiter[0], waiter[1].set)

    def put_end(self) -> None:
        """Let whoever waits for an item see that none will come."""
        self._put(True, _end)

    def close(self, *, overdue_s: float = 0.0) -> None:
        """Tell the actor to close its generator."""
        if not self.is_over:
            self.is_over = True
            self.call.forget()
            self.call.cancel_slots([0], overdue_s=overdue_s)


class ItemStream(Generic[R]):
    """What a generator endpoint yields: iterate with ``for`` or ``async for``.

    The generator runs at most 64 items ahead. It is closed when this object is closed or dropped, when the call's
    timeout passes, and when the caller's process dies.
    """

    def __init__(self, items: _Items) -> None:
        self._items = items
        self._is_over = False
        self._taken = 0
        items.call.proc.num_droppable += 1

    def __iter__(self) -> Iterator[R]:
        return self

    def __next__(self) -> R:
        if self._is_over:
            raise StopIteration
        items = self._items
        if not items.arrived:
            refuse_inside_loop(repr(self), "async for")
            items.wait()
        return self._open(items.arrived.popleft(), StopIteration)

    def __aiter__(self) -> AsyncIterator[R]:
        return self

    async def __anext__(self) -> R:
        if self._is_over:
            raise StopAsyncIteration
        items = self._items
        while not items.arrived:
            import asyncio

            event, loop = asyncio.Event(), asyncio.get_running_loop()
            with items.changed:
                items.waiter = loop, event
            slot = task_slot(asyncio)
            if slot is not None:
                slot.on_await(items, loop)
            try:
                if not items.arrived:
                    await event.wait()
            finally:
                if slot is not None:
                    slot.on_awaited()
        return self._open(items.arrived.popleft(), StopAsyncIteration)

    def _open(self, item: tuple[bool, Callable[[], Any]], end: type[Exception]) -> R:
        is_last, load = item
        self._is_over = is_last
        self._taken += 1
        if self._taken % _MORE_AT == 0 and not is_last:
            call = self._items.call
            lane = call.lanes[0]
            call.proc.send(lane.proc, [wire.MORE, lane.actor, call.proc.proc_id, call.port, _MORE_AT])
        try:
            return load()
        except _StreamEnd:
            raise end from None

    def close(self) -> None:
        """Close the generator; items not yet taken are dropped, and a thread that waits for one goes on."""
        self._is_over = True
        self._items.close()
        self._items.put_end()

    def __enter__(self) -> ItemStream[R]:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Inside a garbage collection, on any thread: no lock may be taken, so the I/O thread does it.
        self._items.call.proc.on_dropped(self._items.close)

    def __repr__(self) -> str:
        return f"<ItemStream {self._items.call.endpoint}>"


def bind_streams(streams: Sequence[ItemStream[Any]]) -> None:
    """Have the first error of any of ``streams`` end all of them."""
    sinks = tuple(stream._items for stream in streams)
    for sink in sinks:
        sink.peers = tuple(other for other in sinks if other is not sink)


def open_stream(call: Call) -> tuple[_Items, ItemStream[Any]]:
    """Return the sink of a generator call, and what its caller iterates."""
    items = _Items(call)
    return items, ItemStream(items)


class _StreamEnd(Exception):  # noqa: N818  names a state
    pass


def _end() -> Any:
    raise _StreamEnd
