"""The actor that the chaos soak strikes: it keeps a log of what it has handled, and tells it."""

# Endpoints here call what was given to them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import os
import sys
import zlib
from typing import TYPE_CHECKING, Any

import cloudpickle

from danaus import Actor, current_rank, endpoint, testing, this_host

if TYPE_CHECKING:
    from collections.abc import Iterator

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ENDPOINTS = ("add", "tell", "total", "items", "rest", "relay", "state")
POINTS = ("noted",)
RELAY_LIMIT_S = 30.0


class Subject(Actor):
    """Every endpoint notes who sent which message, and answers with its life and the place in the log."""

    def __init__(self) -> None:
        self.life = f"{current_rank().rank}/{os.urandom(4).hex()}"
        self.log: list[tuple[str, int]] = []

    def note(self, sender: str, number: int) -> tuple[str, int]:
        """Handle one message."""
        self.log.append((sender, number))
        testing.point("noted")
        return self.life, len(self.log)

    @endpoint
    def add(self, sender: str, number: int) -> tuple[str, int]:
        return self.note(sender, number)

    @endpoint
    def tell(self, sender: str, number: int) -> None:
        self.note(sender, number)

    @endpoint
    def total(self, sender: str, number: int, values: bytes) -> tuple[str, int, int, bytes]:
        return *self.note(sender, number), zlib.crc32(values), values[::2]

    @endpoint
    def items(self, sender: str, number: int, count: int) -> Iterator[tuple[str, int]]:
        life, _ = self.note(sender, number)
        for index in range(count):
            yield life, index

    @endpoint
    async def rest(self, sender: str, number: int) -> tuple[str, int]:
        noted = self.note(sender, number)
        await asyncio.sleep(0.001)
        return noted

    @endpoint
    def relay(self, sender: str, number: int, other: Any) -> tuple[str, int, str, int]:
        noted = self.note(sender, number)
        return *noted, *other.add.call_one(self.life, number).get(timeout=RELAY_LIMIT_S)

    @endpoint
    def nest(self, sender: str, number: int) -> tuple[str, int, int]:
        """Spawn a process of one's own, and leave its end to one's own end."""
        noted = self.note(sender, number)
        below = this_host().spawn_procs({"one": 1}, name="below").spawn("below", Subject)
        return *noted, below.pid.call_one().get(timeout=RELAY_LIMIT_S)

    @endpoint(idempotent=True)
    def look(self) -> str:
        return self.life

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def state(self, sender: str, number: int) -> tuple[str, int, int, list[tuple[str, int]]]:
        life, place = self.note(sender, number)
        return life, place, os.getpid(), self.log
