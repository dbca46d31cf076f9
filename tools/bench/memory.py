"""What idle processes weigh: PSS (shared pages split among their users), and beside it USS (what only they use)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from . import limits
from .lab import Lab, Measure
from .rows import Goal, Row
from .subject import AbsentError

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROCS: Final = 8


def _workers(name: str, title: str, *, torch: bool, goal: float, anchor: float) -> Measure:
    row = Row(
        name=name, title=title, unit="MiB", limit_name="forked ZeroMQ worker", anchor=anchor, goal=Goal(at_most=goal)
    )

    def run(lab: Lab) -> None:
        lab.say(title)
        # One after the other: pages that both map would be split between them.
        lab.clear()
        nursery = limits.Nursery(*(["torch"] if torch else []))
        with limits.closing_all(nursery):
            nursery.fork_workers(_PROCS)
            forked = nursery.memory()
        with lab.fresh_group(_PROCS, torch=torch) as group:
            ours = [limits.memory_of(pid) for pid in group.pids()]
        lab.record(
            row,
            [pss for pss, _ in ours],
            limit=[pss for pss, _ in forked],
            beside={"USS": [uss for _, uss in ours], "USS of the limit": [uss for _, uss in forked]},
        )

    return Measure(name=name, rows=(row,), run=run)


def _daemons() -> Measure:
    agent = Row(name="memory-agent", title="host agent", unit="MiB", goal=Goal(at_most=30))
    zygote = Row(
        name="memory-zygote",
        title="zygote with torch, 8 procs alive",
        unit="MiB",
        limit_name="plain process with the same imports",
        goal=Goal(times=1.0),
    )

    def run(lab: Lab) -> None:
        lab.say("host agent and zygote")
        with lab.fresh_group(_PROCS, torch=True) as group:
            found = {role: _sum(pids) for role, pids in lab.subject.daemons(group.pids()).items() if pids}
            if not found:
                raise AbsentError(f"{lab.subject.name} keeps no process beside its workers")
            plain_pss, plain_uss = limits.imported_memory(lab.subject.package, "torch")
        if "agent" in found:
            pss, uss = found["agent"]
            lab.record(agent, [pss], beside={"USS": [uss]})
        if "zygote" in found:
            pss, uss = found["zygote"]
            lab.record(zygote, [pss], limit=[plain_pss], beside={"USS": [uss], "USS of the limit": [plain_uss]})

    return Measure(name="memory-daemons", rows=(agent, zygote), run=run)


def _sum(pids: Sequence[int]) -> tuple[float, float]:
    weights = [limits.memory_of(pid) for pid in pids]
    return sum(pss for pss, _ in weights), sum(uss for _, uss in weights)


MEASURES: Final = (
    _workers("memory-torch", "idle proc with torch, 8 alive", torch=True, goal=25, anchor=19),
    _workers("memory", "idle proc without torch, 8 alive", torch=False, goal=16, anchor=16),
    _daemons(),
)
