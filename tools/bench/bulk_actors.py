"""The actor of the measures of bulk transfers."""

from __future__ import annotations

from typing import Any

from ...runtime import Actor, endpoint
from ...runtime.bulk.remote_buffer import RemoteBuffer
from . import payload


class Keeper(Actor):
    """Holds registered memory, and takes large arguments."""

    def __init__(self) -> None:
        self._memory: Any = None
        self._buffer: RemoteBuffer | None = None

    @endpoint
    def register(self, size_bytes: int) -> RemoteBuffer:
        """Return a buffer of ones."""
        self.drop_own()
        self._memory = payload.make("numpy", size_bytes)
        self._buffer = RemoteBuffer(self._memory)
        return self._buffer

    @endpoint
    def drop(self) -> None:
        """Forget the buffer."""
        self.drop_own()

    def drop_own(self) -> None:
        """Same, within this process."""
        if self._buffer is not None:
            self._buffer.drop().get(timeout=10)
        self._buffer = self._memory = None

    @endpoint
    def ends(self, payload: Any) -> tuple[int, int]:
        """Return the first and the last element of an array: it is here, and not read."""
        return int(payload[0]), int(payload[-1])
