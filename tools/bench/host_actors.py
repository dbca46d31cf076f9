"""The actors of the measures of several hosts."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

from ...runtime import Actor, endpoint

if TYPE_CHECKING:
    from collections.abc import Sequence


class Noter(Actor):
    """Keeps the numbers that come, and sends such to others."""

    def __init__(self) -> None:
        self._came: defaultdict[int, list[int]] = defaultdict(list)

    @endpoint
    def note(self, sender: int, number: int) -> None:
        """Keep the number of a message."""
        self._came[sender].append(number)

    @endpoint
    def came(self) -> dict[int, list[int]]:
        """Return what each sender's messages were, in the order in which they came."""
        return dict(self._came)

    @endpoint
    def send(self, sender: int, target: Noter, count: int, rate: float) -> None:
        """Send so many numbered messages, at so many a second."""
        send_numbers(sender, [target], count, rate)


def send_numbers(sender: int, targets: Sequence[Noter], count: int, rate: float) -> None:
    """Send the numbers from 0 to all of ``targets``, at ``rate`` a second or as fast as there is room."""
    start = time.perf_counter()
    for number in range(count):
        for target in targets:
            target.note.broadcast(sender, number)
        ahead_s = start + number / rate - time.perf_counter()
        if ahead_s > 0.005:
            time.sleep(ahead_s)
