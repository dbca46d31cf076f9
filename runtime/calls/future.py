"""The result of something that happens elsewhere: got by blocking, by awaiting, or by callback.

A future is resolved once, usually by the I/O thread. Nothing of the user's runs there: the reply is loaded by the
thread that asks for it, callbacks run on a thread of their own.
"""

from __future__ import annotations

import sys
import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from ..errors import CallCancelledError
from ..interrupts import acquire_noticing
from ..supervision.slots import NOTE_AFTER_S, task_slot, thread_slot

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator, Sequence
    from contextvars import Context

    from ..errors import DanausError
    from ..messages.link import Lane

R = TypeVar("R", covariant=True)

_IDLE_S: Final = 0.2
"""How long the thread for callbacks waits for more of them."""

_lock = threading.Lock()
"""Guards every future's transition from pending to resolved; held for a few instructions."""


class Future(Generic[R]):
    """A value that is on its way.

    ``get`` blocks, ``await`` does not; both may be used many times, from several threads and event loops. A reply is
    loaded (unpickled) once, by the first thread that asks.
    """

    __slots__ = ("__weakref__", "_callbacks", "_describe", "_load", "_load_lock", "_resolved", "_value")

    def __init__(self, describe: str | Callable[[], str] = "future") -> None:
        self._describe = describe
        self._resolved = False
        self._load: Callable[[], Any] | None = None
        self._load_lock: threading.Lock | None = None
        self._value: Any = None
        self._callbacks: list[Callable[[], None]] | None = None

    # asking:

    def get(self, timeout: float | None = None) -> R:
        """Block until the value is there and return it, or raise what went wrong.

        Args:
            timeout: Seconds to wait; None waits as long as the call's own limit allows.

        Raises:
            TimeoutError: Time passed. Nothing is cancelled: a later ``get`` may still succeed.
            RuntimeError: Called on a thread that runs an event loop, which it would block; ``await`` instead.
        """
        self._wait(timeout)
        return self._outcome()

    def result(self, timeout: float | None = None) -> R:
        """Same as :meth:`get`, by the name that :mod:`concurrent.futures` uses."""
        return self.get(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block as :meth:`get` does and return the exception, or None where there is a value."""
        self._wait(timeout)
        try:
            self._outcome()
        except Exception as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
            return error
        return None

    def done(self) -> bool:
        """Whether the outcome is known; never blocks."""
        return self._resolved

    def cancel(self) -> bool:
        """Give up on the call and tell the actor; return False where the outcome was known already.

        A queued call is removed, an async endpoint gets ``CancelledError``, a sync endpoint runs on and its reply is
        dropped.
        """
        if not self._reject(CallCancelledError(self.describe())):
            return False
        self._on_cancelled()
        return True

    def add_done_callback(self, callback: Callable[[Future[R]], object]) -> None:
        """Call ``callback(self)`` once the outcome is known, on a thread that runs callbacks alone."""
        self._when_done(lambda: _run_apart(lambda: callback(self)))

    def __await__(self) -> Generator[Any, None, R]:
        return self._await().__await__()

    async def _await(self) -> R:
        if not self._resolved:
            import asyncio

            loop = asyncio.get_running_loop()
            arrived: asyncio.Future[None] = loop.create_future()

            def wake() -> None:
                if not arrived.done():
                    arrived.set_result(None)

            self._when_done(lambda: call_soon(loop, wake))
            slot = task_slot(asyncio)
            if slot is not None:
                slot.on_await(self, loop)
            try:
                await arrived
            except asyncio.CancelledError:
                self.cancel()
                raise
            finally:
                if slot is not None:
                    slot.on_awaited()
        return self._outcome()

    def as_asyncio(self) -> asyncio.Future[R]:
        """Return a new :class:`asyncio.Future` of the running loop with the same outcome."""
        import asyncio

        return asyncio.ensure_future(self._await())

    def describe(self) -> str:
        """What is awaited, as text."""
        return self._describe if isinstance(self._describe, str) else self._describe()

    def __repr__(self) -> str:
        return f"<Future {self.describe()} {'done' if self._resolved else 'pending'}>"

    # telling (I/O thread and the runtime):

    def _resolve(self, load: Callable[[], Any]) -> bool:
        """Set the outcome to whatever ``load()`` returns or raises; it runs later, on the asker's thread."""
        with _lock:
            if self._resolved:
                return False
            self._load = load
            self._resolved = True
            callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback()
        return True

    def _reject(self, error: BaseException) -> bool:
        def fail() -> Any:
            raise error

        return self._resolve(fail)

    def _on_cancelled(self) -> None:
        """Subclasses tell the actor."""

    def _when_done(self, callback: Callable[[], None]) -> None:
        """Run ``callback`` on the resolving thread (or here, if resolved); it must be short and never wait."""
        with _lock:
            if not self._resolved:
                if self._callbacks is None:
                    self._callbacks = []
                self._callbacks.append(callback)
                return
        callback()

    def _wait(self, timeout: float | None) -> None:
        if self._resolved:
            return
        refuse_inside_loop(f"{self!r}.get()", "await")
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout={timeout!r}: expected seconds, zero or more, or None")
        arrived = threading.Lock()
        arrived.acquire()
        self._when_done(arrived.release)
        since_s = time.time()
        limit_s = NOTE_AFTER_S if timeout is None else min(timeout, NOTE_AFTER_S)
        try:
            has_arrived = arrived.acquire(timeout=limit_s) or self._wait_on(arrived, timeout, since_s)
        except BaseException:
            # Ctrl-C, or what else a signal's handler raises: who waited gives up, as a cancelled `await` does.
            self.cancel()
            raise
        if not has_arrived:
            raise TimeoutError(f"{self.describe()}: nothing after {timeout:g} s; it goes on, ask again or cancel it")

    def _wait_on(self, arrived: threading.Lock, timeout: float | None, since_s: float) -> bool:
        """Wait for the rest of ``timeout``, as part of the wait-for graph where this blocks an actor's slot."""
        rest_s = -1.0 if timeout is None else min(max(0.0, timeout - NOTE_AFTER_S), threading.TIMEOUT_MAX)
        slot = thread_slot()
        noted = None if slot is None else slot.note(self, since_s)
        try:
            return acquire_noticing(arrived, rest_s)
        finally:
            if slot is not None and noted is not None:
                slot.forget(noted)

    def _waits_for(self) -> Sequence[tuple[Lane, int]]:
        """The actors that all have to answer before this is done, with the port that they answer to."""
        return ()

    def _call_off(self, error: DanausError) -> None:
        """Fail with ``error``, and tell the actors that nobody waits any more (I/O thread)."""
        if not self.done():
            # Called off before the caller hears of it: what the caller does next comes after it at the actor.
            self._on_cancelled()
            self._reject(error)

    def _outcome(self) -> Any:
        load = self._load
        if load is not None:
            with _lock:
                if self._load_lock is None:
                    self._load_lock = threading.Lock()
            with self._load_lock:
                if self._load is not None:
                    self._value = _settle(load)
                    self._load = None
        succeeded, value = self._value
        if succeeded:
            return value
        raise value


def _settle(load: Callable[[], Any]) -> tuple[bool, Any]:
    try:
        return True, load()
    except BaseException as error:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
        return False, error


def in_event_loop() -> bool:
    """Whether an event loop runs on this thread. Asks without importing asyncio, which costs a script 25 ms."""
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None


def refuse_inside_loop(what: str, instead: str) -> None:
    """Raise RuntimeError where blocking would stop the event loop that runs on this thread."""
    if in_event_loop():
        raise RuntimeError(
            f"{what}: this would block the event loop that runs on this thread; use `{instead}` in async code"
        )


def call_soon(
    loop: asyncio.AbstractEventLoop, callback: Callable[[], object], *, context: Context | None = None
) -> None:
    """Run ``callback`` on ``loop`` from any thread, unless the loop was closed; by default in this thread's context."""
    try:
        loop.call_soon_threadsafe(callback, context=context)
    except RuntimeError:
        # Closed while the call was under way: nobody waits any more.
        return


_callbacks: SimpleQueue[Callable[[], object]] = SimpleQueue()
_has_thread = False


def _run_apart(callback: Callable[[], object]) -> None:
    """Run ``callback`` on the thread for callbacks, which ends once it has had nothing to do for a moment."""
    global _has_thread
    _callbacks.put(callback)
    with _lock:
        if _has_thread:
            return
        _has_thread = True
    threading.Thread(target=_run_callbacks, name="danaus-callbacks", daemon=True).start()


def _run_callbacks() -> None:
    global _has_thread
    while True:
        try:
            callback = _callbacks.get(timeout=_IDLE_S)
        except Empty:
            with _lock:
                if _callbacks.empty():
                    _has_thread = False
                    return
            continue
        try:
            callback()
        except Exception:
            import logging

            logging.getLogger("danaus").exception("a future's callback raised")
        # While the thread waits, nothing keeps the future.
        del callback
