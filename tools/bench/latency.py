"""Single calls: how long one takes, from the controller, from an actor, to many procs, beside a busy neighbour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from . import limits
from .lab import Lab, Measure, in_turns, times
from .placement import Placement, placed
from .rows import Goal, Row

if TYPE_CHECKING:
    from .subject import Group

Block = Callable[[], list[float]]
Rows = dict[Placement, Row]
Anchors = Mapping[Placement, float | None]

_PAIR_US: Final = {Placement.FREE: 85.0, Placement.ONE_CORE: 38.0, Placement.TWO_CORES: 85.0}
_RELAY_US: Final = {Placement.FREE: 96.0, Placement.ONE_CORE: 38.0}
_SCATTER_PLACEMENTS: Final = (Placement.FREE, Placement.ONE_CORE)
_SCATTER_US: Final = {8: 287.0, 32: 1074.0}
_SPIN_S: Final = 0.3
_CALLS_WHILE_SPINNING: Final = 15
"""Few enough that all end before the spin does, even at 15 ms a call."""
_PAUSE_S: Final = 0.003
"""Between those calls: while messages come without a rest, the busy thread hardly gets to run at all."""


def _placed_rows(name: str, title: str, *, limit_name: str, anchors: Anchors, goal: Goal | None) -> Rows:
    return {
        placement: Row(
            name=f"{name}-{placement.slug}",
            title=f"{title}, {placement.value}",
            unit="us",
            limit_name=limit_name,
            anchor=anchor,
            goal=goal,
        )
        for placement, anchor in anchors.items()
    }


def _measure_placed(lab: Lab, rows: Rows, block: Block, limit_block: Block) -> None:
    for placement, row in rows.items():
        lab.say(row.title)
        with placed(placement):
            samples, limit = in_turns(lab.effort.rounds, block, limit_block)
        lab.record(row, samples, limit=limit)


def _one_call(
    name: str, title: str, goal: Goal, anchors: Anchors, block: Callable[[Group, int], list[float]]
) -> Measure:
    rows = _placed_rows(name, title, limit_name="ZeroMQ PAIR", anchors=anchors, goal=goal)

    def run(lab: Lab) -> None:
        group, calls = lab.group(2), lab.effort.calls
        pair = limits.PingPong()
        with limits.closing_all(pair):
            _measure_placed(lab, rows, lambda: block(group, calls), lambda: pair.times(calls))

    return Measure(name=name, rows=tuple(rows.values()), run=run)


def _call_procs(num_procs: int) -> Measure:
    rows = _placed_rows(
        f"call-{num_procs}",
        f"call on {num_procs} proc{'s' if num_procs > 1 else ''}",
        limit_name="ZeroMQ scatter and gather",
        anchors=dict.fromkeys(_SCATTER_PLACEMENTS, _SCATTER_US.get(num_procs)),
        goal=Goal(times=2.0) if num_procs in _SCATTER_US else None,
    )

    def run(lab: Lab) -> None:
        group, calls = lab.group(num_procs), max(20, lab.effort.calls // num_procs)
        nursery = limits.Nursery()
        with limits.closing_all(nursery):
            nursery.fork_workers(num_procs)
            _measure_placed(lab, rows, lambda: times(group.call_all, calls), lambda: nursery.calls(calls))

    return Measure(name=f"call-{num_procs}", rows=tuple(rows.values()), run=run)


def _many_actors() -> Measure:
    row = Row(
        name="actors-32-in-8",
        title="call on 32 actors in 8 procs",
        unit="us",
        limit_name="its own call on 32 procs",
        goal=Goal(times=1.0),
    )

    def run(lab: Lab) -> None:
        few, many, calls = lab.group(8, actors=4), lab.group(32), max(20, lab.effort.calls // 32)
        lab.say(row.title)
        samples, limit = in_turns(
            lab.effort.rounds, lambda: times(few.call_all, calls), lambda: times(many.call_all, calls)
        )
        lab.record(row, samples, limit=limit)

    return Measure(name=row.name, rows=(row,), run=run)


def _busy_neighbour() -> Measure:
    row = Row(
        name="busy-neighbour",
        title="call, neighbour in the proc busy in Python",
        unit="ms",
        limit_name="ZeroMQ PAIR beside a busy thread",
        anchor=0.65,
        goal=Goal(at_most=1.0),
    )

    def run(lab: Lab) -> None:
        group = lab.group(2)

        def block() -> list[float]:
            wait_ended = group.spin_neighbour(_SPIN_S)
            samples = limits.paced_times(group.call_one, _CALLS_WHILE_SPINNING, pause_s=_PAUSE_S)
            wait_ended()
            return samples

        pair = limits.PingPong(busy=True)
        with limits.closing_all(pair):
            lab.say(row.title)
            samples, limit = in_turns(
                lab.effort.rounds, block, lambda: pair.times(_CALLS_WHILE_SPINNING, pause_s=_PAUSE_S)
            )
        lab.record(row, samples, limit=limit)

    return Measure(name=row.name, rows=(row,), run=run)


def _sync_calls(group: Group, count: int) -> list[float]:
    return times(group.call_one, count)


def _async_calls(group: Group, count: int) -> list[float]:
    return times(group.call_one_async, count)


def _relayed_calls(group: Group, count: int) -> list[float]:
    return group.relay(count)


MEASURES: Final = (
    _one_call("round-trip", "call, sync endpoint", Goal(times=2.5, p99_times_p50=3.0), _PAIR_US, _sync_calls),
    _one_call("round-trip-async", "call, async endpoint", Goal(times=3.0), _PAIR_US, _async_calls),
    _one_call("actor-to-actor", "call, actor to actor", Goal(times=2.5), _RELAY_US, _relayed_calls),
    _call_procs(1),
    _call_procs(8),
    _call_procs(32),
    _many_actors(),
    _busy_neighbour(),
)
