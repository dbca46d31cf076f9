"""Which rank a ``choose`` goes to: of two random ranks the less loaded, or the one that keeps a session."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from ..messages.link import Lane


def pick(lanes: Sequence[Lane], gone: Container[str], session: object = None) -> Lane:
    """Return the lane to use.

    Load is what this sender has under way to each rank (Mitzenmacher, "The power of two choices in randomized load
    balancing", 2001). A session goes to the living rank with the highest hash of (session, rank), so that a death moves
    only the sessions of the dead rank. Where every rank is gone the first is returned, and calling it says why.
    """
    alive = [lane for lane in lanes if lane.proc not in gone] or [lanes[0]]
    if session is not None:
        import hashlib

        return max(alive, key=lambda lane: hashlib.blake2b(f"{session!r}|{lane.name}".encode(), digest_size=8).digest())
    if len(alive) == 1:
        return alive[0]
    first, second = random.sample(alive, 2)
    return min(first, second, key=lambda lane: lane.account.under_way)
