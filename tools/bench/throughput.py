"""Many messages at once: calls in flight and broadcasts to one actor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from . import limits
from .lab import Lab, Measure, in_turns, timed
from .rows import Goal, Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from .subject import Group

_CALLS_PER_S: Final = 290e3


def _to_one_actor(name: str, title: str, goal: Goal, send: Callable[[Group, int], None]) -> Measure:
    row = Row(
        name=name,
        title=title,
        unit="/s",
        limit_name="ZeroMQ DEALER, pickled calls",
        anchor=_CALLS_PER_S,
        goal=goal,
        more_is_better=True,
    )

    def run(lab: Lab) -> None:
        group, count = lab.group(2), lab.effort.flight
        calls, drain = limits.Calls(), limits.Drain()
        with limits.closing_all(calls, drain):
            lab.say(title)
            rates, limit, push = in_turns(
                lab.effort.rounds,
                lambda: [count / timed(lambda: send(group, count))],
                lambda: [calls.rate(count)],
                lambda: [drain.rate(count)],
            )
        lab.record(row, rates, limit=limit, beside={"ZeroMQ PUSH of 100 B": push})

    return Measure(name=name, rows=(row,), run=run)


def _call_many(group: Group, count: int) -> None:
    group.call_many(count)


def _broadcast_many(group: Group, count: int) -> None:
    group.broadcast_many(count)


MEASURES: Final = (
    _to_one_actor("in-flight", "10,000 calls in flight", Goal(times=0.2), _call_many),
    _to_one_actor("broadcast", "broadcasts, until handled", Goal(times=0.4), _broadcast_many),
)
