"""Holds back, for a moment, what may travel with others: acknowledgements, and replies to a call to many.

Pure: the time is passed in. What waits goes with the next message that does not, or when enough of it is there, or when
the moment is over; so an agent with many below it sends a few messages upwards, and not one for each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .packets import Frames

HOLD_S: Final = 0.003
"""How long a message may wait."""

FULL: Final = 256
FULL_BYTES: Final = 1 << 20


class Bundles:
    """Messages that wait, by the neighbour that they go to."""

    def __init__(self) -> None:
        self._held: dict[int, list[Frames]] = {}
        self._sizes: dict[int, int] = {}
        self._due_s: dict[int, float] = {}

    def add(self, hop: int, frames: Frames, *, now_s: float) -> None:
        """Keep a message for ``hop``."""
        held = self._held.get(hop)
        if held is None:
            held = self._held[hop] = []
            self._sizes[hop] = 0
            self._due_s[hop] = now_s + HOLD_S
        held.append(frames)
        self._sizes[hop] += sum(map(len, frames))
        if len(held) >= FULL or self._sizes[hop] >= FULL_BYTES:
            self._due_s[hop] = now_s

    def take(self, hop: int) -> list[Frames]:
        """Return what waits for ``hop``; none of it waits any more."""
        self._sizes.pop(hop, None)
        self._due_s.pop(hop, None)
        return self._held.pop(hop, [])

    def due(self, *, now_s: float) -> list[tuple[int, list[Frames]]]:
        """Return what has waited long enough."""
        if not self._held:
            return []
        return [(hop, self.take(hop)) for hop in [hop for hop, due_s in self._due_s.items() if due_s <= now_s]]

    def next_due_s(self) -> float | None:
        """When something will have waited long enough."""
        return min(self._due_s.values(), default=None)
