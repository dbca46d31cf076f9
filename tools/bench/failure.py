"""From SIGKILL of a proc to the exception at a caller that waits on it."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Final

from . import limits
from .lab import BUDGET_S, Lab, Measure
from .rows import Goal, Row

if TYPE_CHECKING:
    from collections.abc import Generator

    from .subject import Group

_GOAL: Final = Goal(at_most=5, p99_at_most=15)
_KILLS: Final = ("first", "second")
_REPORTED_S: Final = 0.5
_BUSY_LIMIT: Final = "pidfd beside the busy thread"
_ENOUGH: Final = 3


def _row(name: str, title: str) -> Row:
    return Row(name=name, title=title, unit="ms", limit_name="SIGKILL to pidfd", anchor=2.0, goal=_GOAL)


def _deaths(name: str, rows: dict[str, Row], *, busy: bool) -> Measure:
    def run(lab: Lab) -> None:
        samples: dict[str, list[float]] = {kill: [] for kill in _KILLS}
        limit: list[float] = []
        busy_limit: list[float] = []
        nursery = limits.Nursery()
        end = time.perf_counter() + BUDGET_S
        with limits.closing_all(nursery), hidden_reports():
            for number in range(lab.effort.deaths):
                lab.say(f"{rows['first'].title}, {number + 1} of {lab.effort.deaths}")
                limit.append(nursery.kill_time())
                with lab.fresh_group(3) as group, _spinning(busy):
                    if busy:
                        busy_limit.append(nursery.kill_time())
                    for rank, kill in enumerate(_KILLS):
                        if kill in rows:
                            samples[kill].append(death_time(group, rank))
                            # At once: a runtime may never report the next one.
                            lab.record(rows[kill], samples[kill], limit=limit, beside={_BUSY_LIMIT: busy_limit})
                if number >= _ENOUGH and time.perf_counter() > end:
                    break

    return Measure(name=name, rows=tuple(rows.values()), run=run)


def death_time(group: Group, rank: int) -> float:
    """Return the seconds from SIGKILL of a rank to the exception at a caller that waits on it."""
    pid = group.pids()[rank]
    wait_failed = group.hang(rank)
    killed_at = limits.kill_soon(pid)
    wait_failed()
    failed_at = time.perf_counter()
    return failed_at - killed_at()


@contextmanager
def hidden_reports() -> Generator[None]:
    """Keep from the terminal what the runtime reports of failures, as it should."""
    with redirect_stderr(StringIO()):
        yield
        # A report waits a moment for what follows from its root.
        time.sleep(_REPORTED_S)


@contextmanager
def _spinning(busy: bool) -> Generator[None]:
    """Let another thread of this process, the controller, run Python code without a pause."""
    end = threading.Event()

    def spin() -> None:
        while not end.is_set():
            pass

    spinner = threading.Thread(target=spin, name="busy controller")
    if busy:
        spinner.start()
    try:
        yield
    finally:
        end.set()
        if busy:
            spinner.join(limits.WAIT_S)


MEASURES: Final = (
    _deaths(
        "kill",
        {
            "first": _row("kill", "SIGKILL to exception at a waiting caller"),
            "second": _row("kill-second", "second failure in the same mesh"),
        },
        busy=False,
    ),
    _deaths("kill-busy", {"first": _row("kill-busy", "the same, controller busy in Python")}, busy=True),
)
