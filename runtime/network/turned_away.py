"""Decides when to say who was turned away: at once when it begins, then now and then, never for each of many.

Pure: no socket or clock in this file.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from .door import HANDSHAKE_MS

EVERY_S: Final = 10.0
SURE_S: Final = HANDSHAKE_MS / 1000 + 1.0
"""After so long, a connection that has not got in does not get in any more."""


class Counts(NamedTuple):
    """Of a listener, so far.

    Attributes:
        garbage: Messages of callers with the key that were no requests.
        refused: Callers with another key.
        failed: Connections that did not get in, those with another key and those that still try among them.
    """

    garbage: int = 0
    refused: int = 0
    failed: int = 0


class TurnedAway:
    """Follows the counts of a listener."""

    def __init__(self) -> None:
        self._told = Counts()
        self._due_s: float | None = None
        self._not_before_s = 0.0

    def check(self, counts: Counts, *, now_s: float) -> bool:
        """Return whether ``counts`` are to be told now."""
        if counts == self._told:
            self._due_s = None
            return False
        is_sure = counts[:2] != self._told[:2]
        due_s = max(now_s if is_sure else now_s + SURE_S, self._not_before_s)
        self._due_s = due_s if self._due_s is None else min(due_s, self._due_s)
        if now_s < self._due_s:
            return False
        self._told, self._due_s, self._not_before_s = counts, None, now_s + EVERY_S
        return True

    def next_check_s(self) -> float | None:
        """Return when :meth:`check` may have something to tell that it has not yet."""
        return self._due_s
