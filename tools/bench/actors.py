"""The benchmark's actors in Danaus."""

from __future__ import annotations

from typing import Any

from ...runtime import Actor, endpoint
from . import acts


class Probe(Actor):
    """Answers, counts, sums and hangs on request."""

    noop = endpoint(acts.noop)
    tick = endpoint(acts.tick)
    ticks = endpoint(acts.ticks)
    pid = endpoint(acts.pid)
    relay = endpoint(acts.relay)
    ignore = endpoint(acts.ignore)
    total = endpoint(acts.total)
    borrowed_total = endpoint(borrow=True)(acts.borrowed_total)
    sum_times = endpoint(acts.sum_times)
    produce = endpoint(acts.produce)
    hang = endpoint(acts.hang)
    spin = endpoint(acts.spin)


class AsyncProbe(Actor):
    """The async endpoint, on an actor of its own: a running loop must not slow the sync one."""

    noop_async = endpoint(acts.noop_async)


class Knot(Actor):
    """Waits for another actor, which may wait for this one."""

    @endpoint
    def ask(self, others: list[Any]) -> None:
        """Have the first of ``others`` ask the rest, and wait for it."""
        if others:
            others[0].ask.call_one(others[1:]).get(timeout=60)
