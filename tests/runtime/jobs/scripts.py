"""What the tests run on the hosts of a job: actors that say where they are, or count, and waiting for their return."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import cloudpickle

from danaus import Actor, HostMesh, Restart, SupervisionError, checkpoint, context, endpoint

if TYPE_CHECKING:
    from collections.abc import Callable

cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMIT_S = 30.0
OFTEN = Restart(max_restarts=100)


class Place(Actor):
    """Says which process it is in, and of which incarnation."""

    @endpoint
    def where(self) -> tuple[int, int, int]:
        return os.getpid(), os.getppid(), context().actor_instance.incarnation

    @endpoint
    def variable(self, name: str) -> str | None:
        return os.environ.get(name)


class Counter(Place):
    """Saves its count only when its host is about to be taken away."""

    def __init__(self) -> None:
        self.count = 0

    def restore(self, count: int) -> None:
        self.count = count

    def __drain__(self, seconds: float) -> None:
        checkpoint(self.count)

    @endpoint
    def add(self) -> int:
        self.count += 1
        return self.count


def spawn_places(hosts: HostMesh) -> Any:
    """One actor on each host, made again with its host."""
    return hosts.spawn_procs(restart=OFTEN, gpus="none").spawn("places", Place)


def where(places: Any) -> list[tuple[int, int, int]]:
    return list(places.where.options(timeout=LIMIT_S).call().get().values())


def eventually(work: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """What ``work`` returns once it neither raises that a rank is lost, nor returns None or False."""
    deadline_s = time.monotonic() + limit_s
    while True:
        error = None
        try:
            found = work()
        except SupervisionError as lost:
            found, error = None, lost
        if found:
            return found
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {limit_s:g} s") from error
        time.sleep(0.05)
