"""Several hosts, each a daemon of its own on loopback: calls, how they grow, how soon many are up."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, Final

from . import limits
from .counted import counted
from .lab import Lab, Measure, in_turns, timed, times
from .placement import Placement, descendants, placed
from .rows import Goal, Row
from .subject import WAIT_S, AbsentError
from .tcp_limit import RelayedPingPong, TcpPingPong

if TYPE_CHECKING:
    from collections.abc import Generator

    from ...runtime import HostMesh

_ACTORS: Final = 4
"""On each host."""
_FEW: Final = (1, 4, 16)
_MANY: Final = 64
_MANY_S: Final = 180.0
"""How long they may take before it is a failure and no figure."""


def _round_trip() -> Measure:
    rows = {
        placement: Row(
            name=f"host-round-trip-{placement.slug}",
            title=f"call to a proc of another host, CURVE, {placement.value}",
            unit="us",
            limit_name="ZeroMQ PAIR over tcp",
            goal=Goal(times=5.0),
        )
        for placement in (Placement.FREE, Placement.ONE_CORE)
    }

    def run(lab: Lab) -> None:
        lab.say(rows[Placement.FREE].title)
        calls = lab.effort.calls
        pair, relayed = TcpPingPong(), RelayedPingPong()
        with limits.closing_all(pair, relayed), _hosts(lab, 1) as hosts:
            probe = _probes(hosts, 1).slice(hosts=0, p=0)
            for placement, row in rows.items():
                lab.say(row.title)
                with placed(placement):
                    samples, limit, beside = in_turns(
                        lab.effort.rounds,
                        lambda: times(lambda: probe.noop.call_one().get(timeout=WAIT_S), calls),
                        lambda: pair.times(calls),
                        lambda: relayed.times(calls),
                    )
                lab.record(row, samples, limit=limit, beside={"ZeroMQ through two relays": beside})

    return Measure(name="host-round-trip", rows=tuple(rows.values()), run=run)


def _growth_rows(num_hosts: int) -> tuple[Row, Row]:
    what = f"call on {num_hosts} host{'s' if num_hosts > 1 else ''} x {_ACTORS} actors"
    messages = Row(
        name=f"hosts-messages-{num_hosts}",
        title=f"{what}: messages of the controller",
        unit="messages",
        limit_name="fan-out",
        goal=Goal(times=2.0),
    )
    return messages, Row(name=f"hosts-call-{num_hosts}", title=what, unit="ms")


def _growth(num_hosts: int) -> Measure:
    rows = _growth_rows(num_hosts)

    def run(lab: Lab) -> None:
        lab.say(rows[1].title)
        with _hosts(lab, num_hosts) as hosts:
            _record_growth(lab, rows, _probes(hosts, _ACTORS))

    return Measure(name=f"hosts-{num_hosts}", rows=rows, run=run)


def _many() -> Measure:
    messages, call = _growth_rows(_MANY)
    up = Row(
        name="hosts-up",
        title=f"{_MANY} hosts attached, {_MANY * _ACTORS} procs up, first reply of all",
        unit="s",
        goal=Goal(at_most=30),
    )
    memory = Row(name="hosts-memory", title=f"{_MANY} hosts: PSS of all procs, agents and daemons", unit="GiB")

    def run(lab: Lab) -> None:
        only_danaus(lab)
        from ...runtime.jobs import LocalJob

        lab.clear()
        lab.say(f"starting {_MANY} daemons")
        job = LocalJob(hosts=_MANY)
        with job:
            start = time.perf_counter()
            job.apply()
            _wait_ready(job)
            ready = time.perf_counter()
            lab.say(f"attaching to {_MANY} hosts")
            hosts = job.hosts(timeout=_MANY_S)
            attached = time.perf_counter()
            lab.say(f"starting {_MANY * _ACTORS} procs")
            probes = _probes(hosts, _ACTORS)
            replied = time.perf_counter()
            beside = {"daemons": [ready - start], "attached": [attached - ready], "procs": [replied - attached]}
            lab.record(up, [replied - ready], beside=beside)
            weights = [_memory_of(pid) for pid in descendants(os.getpid())]
            lab.record(memory, [sum(pss for pss, _ in weights)], beside={"USS": [sum(uss for _, uss in weights)]})
            lab.say(call.title)
            _record_growth(lab, (messages, call), probes)
            lab.say(f"ending {_MANY} hosts")

    return Measure(name=f"hosts-{_MANY}", rows=(up, memory, messages, call), run=run, only_large=True)


@contextlib.contextmanager
def _hosts(lab: Lab, count: int) -> Generator[HostMesh]:
    only_danaus(lab)
    from ...runtime.jobs import LocalJob

    with LocalJob(hosts=count) as job:
        yield job.hosts(timeout=WAIT_S)


def _probes(hosts: HostMesh, per_host: int) -> Any:
    """An actor in each of ``per_host`` procs on every host, all of which have answered."""
    from .actors import Probe

    probes: Any = hosts.spawn_procs({"p": per_host}, name="bench", preload=()).spawn("probes", Probe)
    probes.noop.call().get(timeout=_MANY_S)
    return probes


def _record_growth(lab: Lab, rows: tuple[Row, Row], probes: Any) -> None:
    from ...runtime.config import fan_out
    from ...runtime.context import local_proc

    counts: list[tuple[int, int]] = []
    seconds: list[float] = []
    for _ in range(max(10, lab.effort.calls // 5)):
        with counted(local_proc()) as handled:
            seconds.append(timed(lambda: probes.noop.call().get(timeout=WAIT_S)))
        counts.append((handled.received, handled.sent))
    beside = {"received": [float(each[0]) for each in counts], "sent": [float(each[1]) for each in counts]}
    lab.record(rows[0], [float(sum(each)) for each in counts], limit=[float(fan_out())], beside=beside)
    lab.record(rows[1], seconds)


def _wait_ready(job: Any) -> None:
    """Wait until every daemon of a job listens."""
    end = time.perf_counter() + _MANY_S
    while not all(host.address for host in job.state().hosts):
        if time.perf_counter() > end:
            raise TimeoutError(f"the daemons are not up after {_MANY_S:g} s")
        time.sleep(0.1)


def _memory_of(pid: int) -> tuple[float, float]:
    try:
        return limits.memory_of(pid)
    except OSError:
        # Ended between being listed and being looked at.
        return 0.0, 0.0


def only_danaus(lab: Lab) -> None:
    """Refuse a measure of another runtime."""
    if lab.subject.package != "danaus":
        raise AbsentError("its hosts are not started by this benchmark")


MEASURES: Final = (_round_trip(), *map(_growth, _FEW), _many())
