"""Holds back what handlers of signals would raise, where to be cut short would leave a mess.

Python runs handlers on the main thread, between any two of its steps. Ctrl-C in the middle of a start would leave a
directory that nobody knows of; in the middle of a cleanup, what was not cleaned up yet; in the middle of a message, the
next one would be taken for its rest.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import contextlib
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# The functions in C: those around them look up enumerations, which makes a message ten times as expensive.
_get_handler: Final[Callable[[int], Any]] = _signal.getsignal
_set_handler: Final[Callable[[int, Any], Any]] = _signal.signal

END_SIGNAL: Final = signal.SIGRTMAX - 7
"""By which another thread ends the script: its handler raises SystemExit on the main thread, wherever that blocks."""

_NOTICE_S: Final = 0.25
_SIGNALS: Final = (int(signal.SIGINT), int(signal.SIGTERM), END_SIGNAL)


class InterruptsHeld:
    """Runs a ``with`` block to its end; handlers of Ctrl-C, of SIGTERM and of our own signal run after it.

    On other threads than the main one nothing is held, since no handler runs there.
    """

    __slots__ = ("_arrived", "_handlers")

    def __init__(self) -> None:
        self._arrived: list[tuple[int, Any]] = []
        self._handlers: list[tuple[int, Any]] = []

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        try:
            for signum in _SIGNALS:
                handler = _get_handler(signum)
                if callable(handler):
                    self._handlers.append((signum, handler))
                    _set_handler(signum, self._note)
        except BaseException:
            self._restore()
            raise

    def __exit__(self, *_error: object) -> None:
        handlers = dict(self._handlers)
        self._restore()
        for signum, frame in self._arrived:
            handlers[signum](signum, frame)

    def _note(self, signum: int, frame: Any) -> None:
        self._arrived.append((signum, frame))

    def _restore(self) -> None:
        """Put the handlers back, Ctrl-C's last; what one of them raises meanwhile does not keep another from it."""
        handlers = self._handlers
        try:
            while handlers:
                _set_handler(*handlers[-1])
                handlers.pop()
        except BaseException:
            self._restore()
            raise


def acquire_noticing(lock: threading.Lock, timeout_s: float) -> bool:
    """Same as ``lock.acquire(timeout=timeout_s)``, and sure to notice Ctrl-C within a moment.

    Python's own part of a signal's handler may run just before the main thread falls asleep in ``acquire``; nothing
    wakes it then, and the rest of the handler, which raises, would run only when the lock is there.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return lock.acquire(timeout=timeout_s)
    deadline_s = float("inf") if timeout_s < 0 else time.monotonic() + timeout_s
    while not lock.acquire(timeout=max(0.0, min(_NOTICE_S, deadline_s - time.monotonic()))):
        if time.monotonic() >= deadline_s:
            return False
    return True


def end_as_interrupted() -> None:
    """Have the interpreter exit as if ``KeyboardInterrupt`` had ended the script, from inside its exit.

    Raised by an ``atexit`` function, it would be printed as ignored, and the script would end with success.
    """
    with contextlib.suppress(KeyboardInterrupt):
        # CPython remembers how the code that it last ran from text has ended, and kills itself by SIGINT at the end.
        exec("raise KeyboardInterrupt")  # noqa: S102
