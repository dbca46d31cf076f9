"""Where processes run: on one core, or wherever the scheduler puts them. Two that talk are twice as fast on one core."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from enum import Enum


class Placement(Enum):
    """Where a block of samples runs; limit and runtime are always measured under the same."""

    ONE_CORE = "one core"
    FREE = "free"

    @property
    def slug(self) -> str:
        """The name within a row's name."""
        return self.value.replace(" ", "-")


@contextlib.contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Keep this process and all of its descendants, with every thread, on one core for the block (or do nothing)."""
    if placement is Placement.FREE:
        yield
        return
    allowed = os.sched_getaffinity(0)
    _confine({max(allowed)})
    try:
        yield
    finally:
        _confine(allowed)


def _confine(cores: set[int]) -> None:
    for pid in (os.getpid(), *descendants(os.getpid())):
        # A thread or process may end between being listed and being moved.
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread), cores)


def descendants(pid: int) -> list[int]:
    """Return the processes below ``pid``, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            children.setdefault(parent_of(int(entry)), []).append(int(entry))
    found = list(children.get(pid, []))
    for each in found:
        found.extend(children.get(each, []))
    return found


def parent_of(pid: int) -> int:
    """Return the parent of a process, 0 where it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            # The name, in parentheses, may itself hold spaces and parentheses.
            return int(stat.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0
