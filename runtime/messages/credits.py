"""Flow control between one sending and one receiving actor: how much may be under way.

Pure arithmetic, no lock. ``spend`` is called by senders under their link's lock, ``give_back`` by the I/O thread alone,
and each side writes counters of its own, so neither needs the other's lock.
"""

from __future__ import annotations

from typing import Final

DEFAULT_MAILBOX: Final = 1 << 14
"""Messages that one sender may have under way to one actor."""

DEFAULT_MAILBOX_BYTES: Final = 256 << 20
"""Bytes that one sender may have under way to one actor; one message may pass the bound."""


class CreditAccount:
    """The sender's side: what it sent, what came back, what it may still send."""

    __slots__ = ("bound", "bound_bytes", "overdraft", "returned", "returned_bytes", "spent", "spent_bytes")

    def __init__(self, bound: int, bound_bytes: int = DEFAULT_MAILBOX_BYTES) -> None:
        self.bound, self.bound_bytes = bound, bound_bytes
        self.spent = self.spent_bytes = 0
        self.returned = self.returned_bytes = 0
        self.overdraft = 0

    @property
    def under_way(self) -> int:
        """Messages sent and not yet handled."""
        return self.spent - self.returned

    def has_room(self) -> bool:
        """Whether one more message may be sent."""
        return (
            self.spent - self.returned < self.bound + self.overdraft
            and self.spent_bytes - self.returned_bytes < self.bound_bytes
        ) or self.spent == self.returned

    def spend(self, size_bytes: int) -> None:
        """Count one message as sent."""
        self.spent += 1
        self.spent_bytes += size_bytes

    def give_back(self, messages: int, size_bytes: int) -> None:
        """Count messages as handled by the receiver."""
        self.returned += messages
        self.returned_bytes += size_bytes

    def grant_overdraft(self) -> None:
        """Widen the bound that holds back: a cycle of actors waits for itself, and only going over a bound moves it."""
        if self.spent_bytes - self.returned_bytes >= self.bound_bytes:
            self.bound_bytes *= 2
        else:
            self.overdraft += max(1, self.overdraft)


class CreditDebt:
    """The receiver's side for one sender: handled messages whose credit has not been returned yet."""

    __slots__ = ("_messages_at", "messages", "size_bytes")

    def __init__(self, bound: int) -> None:
        self._messages_at = max(1, bound // 2)
        self.messages = self.size_bytes = 0

    def add(self, size_bytes: int) -> bool:
        """Count one handled message; return whether it is time to return the credit.

        A sender stuck at its bound has that much under way, all of which is handled in the end, so returning at half
        of the messages or a quarter of the bytes always frees it.
        """
        self.messages += 1
        self.size_bytes += size_bytes
        return self.messages >= self._messages_at or self.size_bytes >= DEFAULT_MAILBOX_BYTES // 4

    def take(self) -> tuple[int, int]:
        """Return (messages, bytes) to give back and start again."""
        taken = self.messages, self.size_bytes
        self.messages = self.size_bytes = 0
        return taken
