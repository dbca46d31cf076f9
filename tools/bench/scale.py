"""Five hundred procs on one machine: up, called, down."""

from __future__ import annotations

import os
import time
from typing import Final

from . import limits
from .lab import Lab, Measure, timed, times
from .placement import descendants
from .rows import Goal, Row

_PROCS: Final = 500


def _scale() -> Measure:
    up = Row(name="scale-up", title=f"{_PROCS} procs: up, first reply of all", unit="s", limit_name=f"{_PROCS} forks")
    call = Row(
        name="scale-call", title=f"{_PROCS} procs: call on all", unit="ms", limit_name="ZeroMQ scatter and gather"
    )
    down = Row(name="scale-down", title=f"{_PROCS} procs: down", unit="s", limit_name="forked ZeroMQ workers")
    memory = Row(
        name="scale-memory", title=f"{_PROCS} procs: PSS of all and daemons", unit="GiB", goal=Goal(at_most=12)
    )

    def run(lab: Lab) -> None:
        lab.clear()
        lab.say(f"forking {_PROCS} ZeroMQ workers")
        nursery = limits.Nursery()
        with limits.closing_all(nursery):
            forks = nursery.fork_time(_PROCS)
            nursery.fork_workers(_PROCS)
            raw_calls = nursery.calls(5)
            raw_down = nursery.stop_workers()
        lab.say(f"starting {_PROCS} procs")
        start = time.perf_counter()
        with lab.fresh_group(_PROCS) as group:
            lab.record(up, [time.perf_counter() - start], limit=[forks])
            lab.record(call, times(group.call_all, 5), limit=raw_calls)
            weights = [limits.memory_of(pid) for pid in descendants(os.getpid())]
            lab.record(memory, [sum(pss for pss, _ in weights)], beside={"USS": [sum(uss for _, uss in weights)]})
            lab.say(f"stopping {_PROCS} procs")
            lab.record(down, [timed(group.stop)], limit=[raw_down])

    return Measure(name="scale", rows=(up, call, down, memory), run=run, only_large=True)


MEASURES: Final = (_scale(),)
