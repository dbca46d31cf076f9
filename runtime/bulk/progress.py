"""How far one transfer has come, and when it has to end: its limit, its cancellation, the death of its owner."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from . import stream
from .errors import TransferTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable


class CalledOff(Exception):  # noqa: N818  names a state; never leaves this package
    """Nobody waits for the transfer any more."""


class Progress:
    """One transfer's state; used by the thread that carries it out, and :meth:`call_off` by any.

    Args:
        name: Of what is transferred, for errors.
        size_bytes: How much there is to do.
        timeout_s: Limit, from now on.
        check_owner: Raises where the other process is known to be gone.
        is_for_rests: Whether the limit is for a time without any progress, and not for the whole.
    """

    def __init__(
        self,
        name: str,
        size_bytes: int,
        timeout_s: float,
        check_owner: Callable[[], None],
        *,
        is_for_rests: bool = False,
    ) -> None:
        self._is_for_rests = is_for_rests
        self.name, self.size_bytes, self.timeout_s = name, size_bytes, timeout_s
        self.done_bytes = 0
        self.last_error = ""
        self.deadline_s = time.monotonic() + timeout_s
        self._check_owner = check_owner
        self._called_off = threading.Event()
        self._moved_s = time.monotonic()

    @property
    def left_bytes(self) -> int:
        """What is still to be done."""
        return self.size_bytes - self.done_bytes

    def call_off(self) -> None:
        """Have the transfer end soon."""
        self._called_off.set()

    def check(self) -> None:
        """Raise where the transfer is to end: TransferTimeoutError, CalledOff."""
        if self._called_off.is_set():
            raise CalledOff
        if time.monotonic() > self.deadline_s:
            error = self.last_error
            raise TransferTimeoutError(self.name, self.timeout_s, self.done_bytes, self.size_bytes, error)

    def check_owner(self) -> None:
        """Raise where the other process is gone."""
        self._check_owner()

    def pause(self, seconds: float) -> None:
        """Wait before trying again, but not longer than there is time."""
        self._called_off.wait(min(seconds, stream.remaining_s(self.deadline_s) + 0.001))

    def on_moved(self, size_bytes: int) -> None:
        """So much more is done."""
        self.done_bytes += size_bytes
        self._moved_s = time.monotonic()
        if self._is_for_rests:
            self.deadline_s = self._moved_s + self.timeout_s
        self.check()

    def on_stall(self) -> None:
        """Nothing came for a moment."""
        self.check()
        self.check_owner()
        if time.monotonic() - self._moved_s > stream.STALL_S:
            raise stream.Cut(f"nothing came for {stream.STALL_S:g} s")
