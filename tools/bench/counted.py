"""Counts the messages that a process handles, from outside of the runtime."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator

    from ...runtime.proc import LocalProc


@dataclass(slots=True)
class Handled:
    """Messages that a process has handled."""

    received: int = 0
    sent: int = 0
    """To other hosts."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, *, received: int = 0, sent: int = 0) -> None:
        """Count messages."""
        with self._lock:
            self.received += received
            self.sent += sent


@contextlib.contextmanager
def counted(local: LocalProc) -> Generator[Handled]:
    """Count what this process receives, and what it sends to other hosts."""
    handled = Handled()
    # Nothing public sees a message.
    on_frame, send_locked = local._on_frame, local.gate.send_locked  # noqa: SLF001

    def count_received(frame: bytes) -> None:
        handled.add(received=1)
        on_frame(frame)

    def count_sent(meta: bytes, frames: Any) -> None:
        handled.add(sent=1)
        send_locked(meta, frames)

    local._on_frame, local.gate.send_locked = count_received, count_sent  # type: ignore[method-assign]  # noqa: SLF001
    try:
        yield handled
    finally:
        del local._on_frame, local.gate.send_locked  # noqa: SLF001
