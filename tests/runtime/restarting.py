"""Actors and helpers of the tests in which ranks are lost and come back."""

# Endpoints here take and return anything.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np

from danaus import Actor, SupervisionError, checkpoint, context, endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# The workers of a test run cannot import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMIT_S = 20.0
"""How long anything may take on a busy machine."""


class Counter(Actor):
    """Counts, checkpoints, and remembers how it was made."""

    def __init__(self, start: int = 0, array: np.ndarray | None = None) -> None:
        self.count, self.array = start, array
        self.story = ["init"]

    def restore(self, state: Any) -> None:
        self.story.append(f"restore {state}")
        self.count = state

    @endpoint
    def pid(self) -> int:
        return os.getpid()

    @endpoint
    def add(self, number: int, *, keep: bool = False, path: str | None = None) -> int:
        self.count += number
        if keep:
            checkpoint(self.count, path=path)
        return self.count

    @endpoint
    def keep(self, state: Any, path: str | None = None) -> None:
        checkpoint(state, path=path)

    @endpoint
    def told(self) -> tuple[list[str], int, int]:
        """Its story, count and incarnation."""
        return self.story, self.count, context().actor_instance.incarnation

    @endpoint
    def total(self) -> float:
        return 0.0 if self.array is None else float(np.sum(self.array))

    @endpoint
    def die(self, signum: int = signal.SIGKILL) -> None:
        os.kill(os.getpid(), signum)

    @endpoint
    def fail(self, text: str = "broken") -> None:
        """Meant for broadcast: then nobody is told but the owner."""
        raise ValueError(text)

    @endpoint
    def wait_file(self, path: str) -> None:
        """Busy until somebody opens the other end of a named pipe."""
        with open(path, encoding="utf-8") as pipe:
            pipe.read()


class Events:
    """A callback that keeps what it is told, for a test that waits for it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self._changed = threading.Condition()

    def __call__(self, event: Any) -> None:
        with self._changed:
            self.seen.append(event)
            self._changed.notify_all()

    def wait(self, condition: Callable[[list[Any]], bool]) -> list[Any]:
        """Block until ``condition(seen)`` holds."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.seen), LIMIT_S), f"seen: {self.seen}"
            return list(self.seen)

    def wait_states(self, *states: str) -> list[Any]:
        """Block until changes of these states were told, in this order, among others."""
        return self.wait(lambda seen: _is_part(states, [change.state for change in seen]))


def _is_part(wanted: Sequence[str], states: Sequence[str]) -> bool:
    rest = iter(states)
    return all(state in rest for state in wanted)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def retried(ask: Callable[[], Any]) -> Any:
    """Call again while a call fails by a rank that its policy starts again."""
    while True:
        try:
            return ask()
        except SupervisionError as error:
            if not error.failure.restarts:
                raise


def kill_agent() -> None:
    """Kill the host agent of this job."""
    from danaus.runtime import controller

    assert controller._controller is not None
    assert controller._controller._agent is not None
    controller._controller._agent.kill()
