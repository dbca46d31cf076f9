"""Where processes run: on one core or where the scheduler puts them. Two that talk are twice as fast on one core."""

from __future__ import annotations

import contextlib
import os
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence


class Placement(Enum):
    """Where a block of samples runs; limit and runtime are always measured under the same."""

    FREE = "free"
    """Where the scheduler puts each process, be it on one core or on two: not always the same for both."""
    ONE_CORE = "one core"
    TWO_CORES = "two cores"
    """This process on one, all others on another."""

    @property
    def slug(self) -> str:
        """The name within a row's name."""
        return self.value.replace(" ", "-")


@contextlib.contextmanager
def placed(placement: Placement) -> Generator[None]:
    """Keep this process and its descendants, with every thread, on the cores of ``placement`` for the block."""
    if placement is Placement.FREE:
        yield
        return
    allowed = os.sched_getaffinity(0)
    last, first = max(allowed), min(allowed)
    others = descendants(os.getpid())
    _confine([os.getpid()], {first if placement is Placement.TWO_CORES else last})
    _confine(others, {last})
    try:
        yield
    finally:
        _confine([os.getpid(), *others], allowed)


def _confine(pids: Sequence[int], cores: set[int]) -> None:
    for pid in pids:
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
