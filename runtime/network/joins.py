"""Collects what belongs together on its way to one receiver: the replies to a call of many ranks.

Pure: the time is passed in. Who passes a call on knows how many answers will come back by it. They go on as one as soon
as all are there; those that are there after a moment do not wait for the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

Key: TypeAlias = tuple[str, int]
"""The process that has called, and its port."""

HOLD_S: Final = 0.003
"""How long the first answer waits for others."""

MAX_CALLS: Final = 4096
"""Calls that are remembered; answers to older ones go on alone."""


@dataclass(slots=True)
class _Join:
    missing: int
    items: list[Any] = field(default_factory=list)
    due_s: float = 0.0


class Joins:
    """Answers under way, by the call that they belong to."""

    def __init__(self) -> None:
        self._joins: OrderedDict[Key, _Join] = OrderedDict()
        # In the order in which their first answers came.
        self._held: dict[Key, None] = {}

    def expect(self, key: Key, count: int) -> None:
        """``count`` answers to a call will come by here. A call that is sent again changes nothing: some may wait."""
        if count > 1:
            self._joins.setdefault(key, _Join(count))
            while len(self._joins) > MAX_CALLS and (oldest := next(iter(self._joins))) not in self._held:
                del self._joins[oldest]

    def add(self, key: Key, item: Any, *, now_s: float) -> list[Any]:
        """Take one answer; return what goes on now: it alone, all of them, or nothing yet."""
        join = self._joins.get(key)
        if join is None:
            return [item]
        join.missing -= 1
        join.items.append(item)
        if join.missing <= 0:
            del self._joins[key]
            self._held.pop(key, None)
            return join.items
        if key not in self._held:
            self._held[key] = None
            join.due_s = now_s + HOLD_S
        return []

    @property
    def is_holding(self) -> bool:
        """Whether anything waits."""
        return bool(self._held)

    def take(self, proc: str) -> list[tuple[Key, list[Any]]]:
        """Return what waits for ``proc``: something else goes there that must not overtake it."""
        return [self._take(key) for key in list(self._held) if key[0] == proc] if self._held else []

    def due(self, *, now_s: float) -> list[tuple[Key, list[Any]]]:
        """Return what has waited long enough."""
        return [self._take(key) for key in list(self._held) if self._joins[key].due_s <= now_s] if self._held else []

    def _take(self, key: Key) -> tuple[Key, list[Any]]:
        self._held.pop(key, None)
        join = self._joins[key]
        items, join.items = join.items, []
        return key, items

    def next_due_s(self) -> float | None:
        """When something will have waited long enough."""
        return min((self._joins[key].due_s for key in self._held), default=None)
