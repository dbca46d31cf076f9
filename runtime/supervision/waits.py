"""Decides which actors wait for each other in a circle, and which of their waits is to end.

Pure: no thread, socket or clock. An actor whose one slot is blocked on a call has a *wait*, with an *edge* to each
actor whose answer it needs. Edges are known to the process of who waits, so a circle is found by probes along them:

    search      from a wait along all its edges; every wait on the way adds itself; one that comes back found a cycle
    confirm     a moment later, along that cycle alone: everyone has to be in the same wait still
    break       the youngest wait fails; where one waits for room in a mailbox, that one goes over its bound instead

Every wait searches, among older waits alone, so what finds a cycle is its youngest wait: a chain of calls, each younger
than the one before, costs a probe for each. The youngest of all waits that lie on cycles always finds one.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIRM_AFTER_S: Final = 0.1
"""Time for answers on their way to arrive, between a cycle's search and its confirmation."""

_MIN_PAUSE_S: Final = 0.1
_MAX_PAUSE_S: Final = 1.0

Key: TypeAlias = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Wait:
    """One blocked slot, as probes carry it and errors tell it.

    Attributes:
        proc: Address of the process.
        actor: Key of the actor in it.
        number: Tells this wait from others of the process.
        since_s: ``time.time()`` at which it began.
        who: The actor in words.
        endpoint: What the actor is busy with.
        host: Host name.
        pid: Process id.
        awaited: The call that it waits for, in words.
        is_for_room: Whether it waits to send, for room in a mailbox, rather than for an answer.
    """

    proc: str
    actor: str
    number: int
    since_s: float
    who: str
    endpoint: str
    host: str
    pid: int
    awaited: str
    is_for_room: bool = False

    @property
    def key(self) -> Key:
        """What tells this wait from every other."""
        return self.proc, self.actor, self.number

    @property
    def age(self) -> tuple[float, Key]:
        """What is greater for the younger of two waits; of equally old ones for the last by name."""
        return self.since_s, self.key


@dataclass(frozen=True, slots=True)
class Edge:
    """Whom a wait is for: ``actor`` in ``proc`` has to answer the call whose reply port is ``port``, 0 for room."""

    proc: str
    actor: str
    port: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What travels along edges.

    Attributes:
        search: Number of this search, growing with each of the wait that began it.
        at: 0 while it searches; while it confirms, the index in ``path`` of the wait that it goes to.
        path: The waits that it came along, from the one that began it; the whole cycle, while it confirms.
    """

    search: int
    at: int
    path: tuple[Wait, ...]

    def pack(self) -> list[Any]:
        """As plain values, for the wire."""
        return [self.search, self.at, [astuple(wait) for wait in self.path]]

    @staticmethod
    def unpack(values: Sequence[Any]) -> Probe:
        """Rebuild what :meth:`pack` made.

        Raises:
            ValueError: It has not as many values, or none on its path.
            TypeError: It is no packed probe.
        """
        search, at, path = values
        if not path:
            raise ValueError("the path is empty")
        return Probe(search, at, tuple(Wait(*wait) for wait in path))


@dataclass(slots=True)
class Waiting:
    """A wait of this process: what is known of it, and which searches of others have passed it."""

    wait: Wait
    edges: tuple[Edge, ...] = ()
    seen: dict[Key, int] = field(default_factory=dict[Key, int])


@dataclass(frozen=True, slots=True)
class SendProbe:
    """Command: send ``probe`` along ``edge``."""

    edge: Edge
    probe: Probe


@dataclass(frozen=True, slots=True)
class ConfirmLater:
    """Command: in ``CONFIRM_AFTER_S``, see whether ``cycle``, found by its first wait, is still there."""

    cycle: tuple[Wait, ...]


@dataclass(frozen=True, slots=True)
class Break:
    """Command: fail the first wait of ``cycle``, whose process this is."""

    cycle: tuple[Wait, ...]


@dataclass(frozen=True, slots=True)
class Overdraft:
    """Command: let the sender that waits for room go over the bound."""

    wait: Wait


Command: TypeAlias = SendProbe | ConfirmLater | Break | Overdraft


def search(waiting: Waiting, number: int) -> list[SendProbe]:
    """Begin a search for cycles through ``waiting``; ``number`` grows with each."""
    probe = Probe(number, 0, (waiting.wait,))
    return [SendProbe(edge, probe) for edge in waiting.edges]


def confirm(waiting: Waiting, cycle: tuple[Wait, ...]) -> list[SendProbe]:
    """Begin the second round along ``cycle``, which begins with ``waiting``."""
    return _along(waiting, Probe(0, 1, cycle))


def follow(probe: Probe, waiting: Waiting) -> list[Command]:
    """Decide what becomes of a probe that reached an actor whose slot is blocked; elsewhere probes just end."""
    return _on_confirm(probe, waiting) if probe.at else _on_search(probe, waiting)


def _on_search(probe: Probe, waiting: Waiting) -> list[Command]:
    here, first = waiting.wait, probe.path[0]
    if here.key == first.key:
        return _on_cycle(probe.path)
    if not here.is_for_room and here.age > first.age:
        # What cycle there may be is for the younger one to find.
        return []
    if any((wait.proc, wait.actor) == (here.proc, here.actor) for wait in probe.path):
        # A cycle beside the one searched for, which is found by its own waits; or a wait that is over.
        return []
    if waiting.seen.get(first.key, 0) >= probe.search:
        return []
    waiting.seen[first.key] = probe.search
    longer = Probe(probe.search, 0, (*probe.path, here))
    return [SendProbe(edge, longer) for edge in waiting.edges]


def _on_cycle(cycle: tuple[Wait, ...]) -> list[Command]:
    for wait in cycle:
        if wait.is_for_room:
            # Harmless where the cycle is gone by now, so nothing has to be confirmed.
            return [Overdraft(wait)]
    return [ConfirmLater(cycle)]


def _on_confirm(probe: Probe, waiting: Waiting) -> list[Command]:
    cycle = probe.path
    if waiting.wait.key != cycle[probe.at % len(cycle)].key:
        return []
    if probe.at == len(cycle):
        return [Break(cycle)]
    return [*_along(waiting, Probe(probe.search, probe.at + 1, cycle))]


def _along(waiting: Waiting, probe: Probe) -> list[SendProbe]:
    target = probe.path[probe.at % len(probe.path)]
    edges = [edge for edge in waiting.edges if (edge.proc, edge.actor) == (target.proc, target.actor)]
    return [SendProbe(edge, probe) for edge in edges[:1]]


def in_order(cycle: tuple[Wait, ...]) -> tuple[Wait, ...]:
    """A cycle that was found, as it is told: along its edges, with its youngest wait at the end."""
    return (*cycle[1:], *cycle[:1])


def pause_s(waited_s: float) -> float:
    """How long to wait with the next search.

    The wait that closes a cycle finds it by its first search, or by the next where another was noted a little later.
    """
    return min(_MAX_PAUSE_S, max(_MIN_PAUSE_S, waited_s / 2))
