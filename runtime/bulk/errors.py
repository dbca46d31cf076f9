"""What may go wrong with a transfer.

DanausError
├── BufferDropped         the buffer was dropped by its owner
├── TransferError         it cannot be carried out: refused, no certificate, no way to the owner
├── TransferTimeoutError  it was not over within its limit (also a TimeoutError)
└── SupervisionError
    └── OwnerDied         the process that the memory belonged to is gone
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import DanausError, SupervisionError

if TYPE_CHECKING:
    from ..failure import MeshFailure


class BufferDropped(DanausError):  # noqa: N818  names a state
    """The buffer was dropped: its memory may serve other ends by now."""

    def __init__(self, buffer: str) -> None:
        super().__init__(buffer)
        self.buffer = buffer

    def __str__(self) -> str:
        return f"{self.buffer}: it was dropped; register the memory again and send the new RemoteBuffer"


class TransferError(DanausError):
    """A transfer cannot be carried out."""

    def __init__(self, buffer: str, reason: str) -> None:
        super().__init__(buffer, reason)
        self.buffer, self.reason = buffer, reason

    def __str__(self) -> str:
        return f"{self.buffer}: {self.reason}"


class TransferTimeoutError(DanausError, TimeoutError):
    """A transfer was not over within its limit; the local memory may hold a part of it."""

    def __init__(self, buffer: str, timeout_s: float, done_bytes: int, size_bytes: int, last_error: str = "") -> None:
        super().__init__(buffer, timeout_s, done_bytes, size_bytes, last_error)
        self.buffer, self.timeout_s, self.last_error = buffer, timeout_s, last_error
        self.done_bytes, self.size_bytes = done_bytes, size_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        # TimeoutError is an OSError, which keeps two arguments only.
        fields = (self.buffer, self.timeout_s, self.done_bytes, self.size_bytes, self.last_error)
        return TransferTimeoutError, fields, self.__dict__

    def __str__(self) -> str:
        last = f" (last: {self.last_error})" if self.last_error else ""
        return (
            f"{self.buffer}: {self.done_bytes} of {self.size_bytes} bytes within {self.timeout_s:g} s{last}; "
            "raise the timeout, or look at what its owner does"
        )


class OwnerDied(SupervisionError):  # noqa: N818  names what happened
    """The process that a buffer's memory belonged to is gone."""

    def __init__(self, buffer: str, failure: MeshFailure) -> None:
        super().__init__(failure, buffer)
        self.args = (buffer, failure)
        self.buffer = buffer
