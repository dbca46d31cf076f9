"""What running a call needs: the state of a call under way, and how values and errors are put into replies."""

from __future__ import annotations

import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .messages.payload import Payload, dump

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from .context import ActorInstance
    from .messages import wire

ITEM_WINDOW: Final = 64
"""Items that a generator may be ahead of its caller."""

_RUNTIME: Final = str(Path(__file__).parent)


class ActiveCall:
    """A call under way that can still be cancelled."""

    task: asyncio.Task[None] | None = None
    """What runs it, where that is not its actor's thread alone."""

    def __init__(self, envelope: wire.Envelope) -> None:
        self.envelope = envelope
        self.is_cancelled = False
        self._lock = threading.Lock()
        self._cancel: Callable[[], object] | None = None

    def on_cancel(self, cancel: Callable[[], object]) -> None:
        """Have ``cancel`` called when the caller gives up, or now if it has."""
        with self._lock:
            self._cancel = cancel
        if self.is_cancelled:
            cancel()

    def cancel(self) -> None:
        """The caller gave up (I/O thread)."""
        with self._lock:
            self.is_cancelled = True
            self._notify()
        if self._cancel is not None:
            self._cancel()

    def allow(self, count: int) -> None:
        """The caller has room for ``count`` more items; only a generator's has (I/O thread)."""

    def _notify(self) -> None:
        """Wake who waits for something to change; called with the lock held."""


class GeneratorCall(ActiveCall):
    """A generator under way, and its window of items."""

    def __init__(self, envelope: wire.Envelope) -> None:
        super().__init__(envelope)
        self._window = ITEM_WINDOW
        self._changed = threading.Condition(self._lock)
        self._loop_waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def allow(self, count: int) -> None:
        """The caller has room for ``count`` more items (I/O thread)."""
        with self._lock:
            self._window += count
            self._notify()

    def wait_window(self) -> bool:
        """Block until one more item may be sent; return False where nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._window > 0 or self.is_cancelled)
            self._window -= 1
            return not self.is_cancelled

    async def wait_window_async(self) -> bool:
        """Same as :meth:`wait_window`, on an event loop."""
        while True:
            import asyncio

            loop = asyncio.get_running_loop()
            with self._lock:
                if self._window > 0 or self.is_cancelled:
                    self._window -= 1
                    return not self.is_cancelled
                waiter = loop.create_future()
                self._loop_waiter = loop, waiter
            await waiter

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._loop_waiter is not None:
            loop, waiter = self._loop_waiter
            self._loop_waiter = None
            loop.call_soon_threadsafe(_set, waiter)


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def dump_value(value: Any) -> Payload:
    """Pickle an endpoint's result.

    Raises:
        TypeError: It cannot be pickled; the message says which value, and why.
    """
    try:
        return dump(value)
    except Exception as error:
        raise TypeError(
            f"the endpoint returned {type(value).__qualname__}, which cannot be pickled "
            f"({type(error).__name__}: {error}); return plain data, arrays, tensors or handles"
        ) from error


def dump_error(place: str, error: BaseException, *, while_loading: bool = False) -> Payload:
    """Pickle an exception with its traceback; where the exception itself cannot be, its text goes alone."""
    text = local_traceback(error)
    if while_loading:
        text = f"the message could not be loaded there\n{text}"
    try:
        exception: Payload | None = dump(error)
        assert exception is not None
        if exception.buffers:
            exception = None
    except Exception:  # noqa: BLE001  told to whoever waits, or the last thing on this thread
        exception = None
    return dump((place, exception.body if exception else None, text, while_loading))


def local_traceback(error: BaseException) -> str:
    """Format ``error`` without the runtime's own frames, so that it reads as if the method had been called locally."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_RUNTIME) and frames.tb_next is not None:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def where(instance: ActorInstance, envelope: wire.Envelope) -> str:
    """Name the call that ``envelope`` carries: actor, endpoint, rank, host and pid."""
    proc = instance.proc_runtime
    return (
        f"{instance.name}.{envelope[2]} on rank {instance.rank.rank} {instance.rank} (host {proc.host}, pid {proc.pid})"
    )


class hidden_loop:  # noqa: N801  reads as a statement
    """Makes a sync endpoint inside the serving loop look as if no loop ran, so that it may block."""

    def __enter__(self) -> None:
        import asyncio

        self._loop = asyncio.get_running_loop()
        asyncio._set_running_loop(None)

    def __exit__(self, *_exc: object) -> None:
        import asyncio

        asyncio._set_running_loop(self._loop)
