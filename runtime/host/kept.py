"""What actors want to have back when they are started again: kept here, and by one other host for the case of a loss.

actor --keep--> agent --copy--> agent of the next host
actor started again --recall--> agent                      (the host was not lost)
new agent of the slot <--take over-- who has the copies
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from ..address import host_of, mesh_of, place_of

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S: Final = 2.0
"""How long the agent that follows a lost one waits for the copies before it says that there is nothing."""


class Kept:
    """States by place and actor.

    Args:
        answer: Sends a state, or None, to the process that has asked: process, token, state.
        waits: Whether the agent follows a lost one, whose actors' states may still be on their way.
    """

    def __init__(self, answer: Callable[[str, int, bytes | None], object], *, waits: bool) -> None:
        self._answer = answer
        self._states: dict[str, dict[str, bytes]] = {}
        self._until_s = time.monotonic() + WAIT_S if waits else 0.0
        self._waiting: list[tuple[str, str, int]] = []

    def keep(self, proc: str, actor: str, state: bytes) -> None:
        """Keep a state in place of an earlier one."""
        self._states.setdefault(place_of(proc), {})[actor] = state

    def forget(self, proc: str, actor: str) -> None:
        """The actor was stopped."""
        self._states.get(place_of(proc), {}).pop(actor, None)

    def forget_mesh(self, mesh: str) -> None:
        """Nobody wants a mesh any more."""
        for place in [place for place in self._states if mesh_of(place) == mesh]:
            del self._states[place]

    def recall(self, proc: str, actor: str, token: int) -> None:
        """Answer a process that is started again."""
        state = self._states.get(place_of(proc), {}).get(actor)
        if state is None and time.monotonic() < self._until_s:
            self._waiting.append((proc, actor, token))
        else:
            self._answer(proc, token, state)

    def take_over(self, states: dict[str, dict[str, bytes]]) -> None:
        """Take what was kept by others."""
        for place, actors in states.items():
            # What an actor has kept here since then is newer.
            self._states[place] = {**actors, **self._states.get(place, {})}
        waiting, self._waiting = self._waiting, []
        for proc, actor, token in waiting:
            self.recall(proc, actor, token)

    def of_host(self, slot: int) -> dict[str, dict[str, bytes]]:
        """What is kept of actors of a host."""
        return {place: actors for place, actors in self._states.items() if actors and host_of(place) == slot}

    def check(self, *, now_s: float) -> None:
        """Answer those who have waited long enough."""
        if self._waiting and now_s >= self._until_s:
            waiting, self._waiting = self._waiting, []
            for proc, actor, token in waiting:
                self.recall(proc, actor, token)

    def next_check_s(self) -> float | None:
        """When :meth:`check` may have something to do."""
        return self._until_s if self._waiting else None

    @property
    def all(self) -> dict[str, dict[str, bytes]]:
        """Everything, by place."""
        return self._states
