"""Single calls: how long one takes, from the controller, from an actor, to many procs, beside a busy neighbour."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from . import limits
from .lab import Lab, Measure, in_turns, timed, times
from .placement import Placement, placed
from .rows import Goal, Row
from .subject import Group

_PAIR: Final = "ZeroMQ PAIR"
_PAIR_US: Final = {Placement.ONE_CORE: 38.0, Placement.FREE: 85.0}
_SCATTER_US: Final = {8: 287.0, 32: 1074.0}
_SPIN_S: Final = 0.3


def _round_trip(name: str, title: str, goal: Goal | None, call: Callable[[Group], Callable[[], object]]) -> Measure:
    rows = {
        placement: Row(
            name=f"{name}-{placement.slug}",
            title=f"{title}, {placement.value}",
            unit="us",
            limit_name=_PAIR,
            anchor=_PAIR_US[placement],
            goal=goal,
        )
        for placement in Placement
    }

    def run(lab: Lab) -> None:
        work, effort = call(lab.group(2)), lab.effort
        with _ping_pong() as pair:
            for placement, row in rows.items():
                lab.say(row.title)
                with placed(placement):
                    samples, limit = in_turns(
                        effort.rounds, lambda: times(work, effort.calls), lambda: pair.times(effort.calls)
                    )
                lab.record(row, samples, limit=limit)

    return Measure(name=name, rows=tuple(rows.values()), run=run)


def _actor_to_actor() -> Measure:
    rows = {
        placement: Row(
            name=f"actor-to-actor-{placement.slug}",
            title=f"actor to actor, {placement.value}",
            unit="us",
            limit_name=_PAIR,
            anchor={Placement.ONE_CORE: 38.0, Placement.FREE: 96.0}[placement],
            goal=Goal(times=2.5),
        )
        for placement in Placement
    }

    def run(lab: Lab) -> None:
        group, effort = lab.group(2), lab.effort
        with _ping_pong() as pair:
            for placement, row in rows.items():
                lab.say(row.title)
                with placed(placement):
                    samples, limit = in_turns(
                        effort.rounds, lambda: group.relay(effort.calls), lambda: pair.times(effort.calls)
                    )
                lab.record(row, samples, limit=limit)

    return Measure(name="actor-to-actor", rows=tuple(rows.values()), run=run)


def _call_procs(num_procs: int) -> Measure:
    rows = {
        placement: Row(
            name=f"call-{num_procs}-{placement.slug}",
            title=f"call on {num_procs} proc{'s' if num_procs > 1 else ''}, {placement.value}",
            unit="us",
            limit_name="ZeroMQ scatter, gather",
            anchor=_SCATTER_US.get(num_procs),
            goal=Goal(times=2.0) if num_procs > 1 else None,
        )
        for placement in Placement
    }

    def run(lab: Lab) -> None:
        group, effort = lab.group(num_procs), lab.effort
        calls = max(10, effort.calls // num_procs)
        nursery = limits.Nursery()
        with limits.closing_all(nursery):
            nursery.fork_workers(num_procs)
            for placement, row in rows.items():
                lab.say(row.title)
                with placed(placement):
                    samples, limit = in_turns(
                        effort.rounds, lambda: times(group.call_all, calls), lambda: nursery.calls(calls)
                    )
                lab.record(row, samples, limit=limit)

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
        few, many, effort = lab.group(8, actors=4), lab.group(32), lab.effort
        calls = max(10, effort.calls // 32)
        lab.say(row.title)
        samples, limit = in_turns(
            effort.rounds, lambda: times(few.call_all, calls), lambda: times(many.call_all, calls)
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

        def calls() -> Iterator[float]:
            wait_ended = group.spin_neighbour(_SPIN_S)
            # About half of the spin, should a call take 10 ms: the last must not run beside a neighbour at rest.
            samples = times(group.call_one, 15)
            wait_ended()
            return iter(samples)

        with _ping_pong(busy=True) as pair:
            lab.say(row.title)
            samples, limit = in_turns(lab.effort.rounds, calls, lambda: pair.times(15))
        lab.record(row, samples, limit=limit)

    return Measure(name=row.name, rows=(row,), run=run)


@contextmanager
def _ping_pong(*, busy: bool = False) -> Iterator[limits.PingPong]:
    pair = limits.PingPong(busy=busy)
    with limits.closing_all(pair):
        yield pair


MEASURES: Final = (
    _round_trip(
        "round-trip",
        "call, sync endpoint",
        Goal(times=2.5, p99_times_p50=3.0),
        lambda group: group.call_one,
    ),
    _round_trip("round-trip-async", "call, async endpoint", Goal(times=3.0), lambda group: group.call_one_async),
    _actor_to_actor(),
    _call_procs(1),
    _call_procs(8),
    _call_procs(32),
    _many_actors(),
    _busy_neighbour(),
)
