"""What an actor's slot is blocked on: the hooks in futures and runners that feed the wait-for graph (see waits.py).

A slot belongs to its actor's thread: an endpoint that blocks the thread, or the one async endpoint that the actor waits
for, holds it. Who waits elsewhere (a concurrent endpoint, a task or a thread of the actor's own) blocks no slot, so no
circle goes through it. A wait is noted after 250 ms; what it costs before that is a lock's time limit.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from ..errors import DanausError
    from ..messages import wire
    from ..messages.link import Lane
    from ..proc import LocalProc
    from .wait_watch import Noted

NOTE_AFTER_S: Final = 0.25
"""A shorter wait is no part of the graph."""

_thread = threading.local()


class Awaited(Protocol):
    """What a slot can be blocked on: a future, or the next item of a stream."""

    def done(self) -> bool:
        """Whether there is nothing to wait for."""
        ...

    def describe(self) -> str:
        """The call, as text."""
        ...

    def _waits_for(self) -> Sequence[tuple[Lane, int]]:
        """The actors that all have to answer first, with the port that they answer to."""
        ...

    def _call_off(self, error: DanausError, /) -> None:
        """Fail with ``error``, and tell the actors that nobody waits any more (I/O thread)."""
        ...


class Slot:
    """One actor's slot; used by the actor's thread alone.

    Attributes:
        task: The async endpoint that holds it, or None.
        envelope: The call that this task runs.
    """

    def __init__(self, proc: LocalProc, key: str) -> None:
        self.key = key
        self.task: asyncio.Task[None] | None = None
        self.envelope: wire.Envelope | None = None
        self._proc = proc
        self._awaited: Awaited | None = None
        self._since_s = 0.0
        self._is_looked_after = False
        self._noted: Noted | None = None

    def note(self, awaited: Awaited, since_s: float) -> Noted | None:
        """The actor's thread has been blocked since ``time.time() == since_s``; :meth:`forget` ends it."""
        from ..context import current_message

        return self._proc.waits.note(self.key, awaited, since_s, current_message.get(), is_async=False)

    def forget(self, noted: Noted) -> None:
        """The wait is over."""
        self._proc.waits.forget(noted)

    def on_await(self, awaited: Awaited, loop: asyncio.AbstractEventLoop) -> None:
        """The slot's task begins to await ``awaited``."""
        self._awaited, self._since_s = awaited, loop.time()
        if not self._is_looked_after:
            self._is_looked_after = True
            loop.call_later(NOTE_AFTER_S, self._look, loop)

    def on_awaited(self) -> None:
        """The slot's task goes on."""
        self._awaited = None
        if self._noted is not None:
            self._proc.waits.forget(self._noted)
            self._noted = None

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        # One look in 250 ms, however many waits there were: a timer for each would cost each one.
        remaining_s = self._since_s + NOTE_AFTER_S - loop.time()
        if self._awaited is not None and remaining_s > 0:
            loop.call_later(remaining_s, self._look, loop)
            return
        self._is_looked_after = False
        if self._awaited is not None:
            since_s = time.time() - (loop.time() - self._since_s)
            self._noted = self._proc.waits.note(self.key, self._awaited, since_s, self.envelope, is_async=True)


def bind_slot(slot: Slot | None) -> None:
    """Say whose slot the calling thread is."""
    _thread.slot = slot


def thread_slot() -> Slot | None:
    """The slot that a wait of this thread blocks; None on threads that are no actor's."""
    return getattr(_thread, "slot", None)


def task_slot(asyncio: Any) -> Slot | None:
    """The slot that an ``await`` here blocks: that of the task which holds it, not of the tasks that it started."""
    slot: Slot | None = getattr(_thread, "slot", None)
    return slot if slot is not None and slot.task is not None and slot.task is asyncio.current_task() else None
