"""A process's part in the wait-for graph: its waits, and the probes that go along them; waits.py decides about them.

Loaded when the first wait has lasted long enough to be noted, or the first probe arrives.
"""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from ..address import place_of
from ..errors import DeadlockError
from ..messages import wire
from . import waits
from .waits import Edge, Probe, Wait, Waiting

if TYPE_CHECKING:
    from ..proc import LocalProc
    from .slots import Awaited


class Noted:
    """A wait that is part of the graph."""

    def __init__(self, wait: Wait, awaited: Awaited, caller: tuple[str, int] | None, *, is_async: bool) -> None:
        self.waiting = Waiting(wait)
        self.awaited, self.caller, self.is_async = awaited, caller, is_async
        self.before: Noted | None = None

    def refresh(self) -> Waiting | None:
        """The wait with the edges that it has now; None where it is over."""
        if self.awaited.done():
            return None
        self.waiting.edges = tuple(Edge(lane.proc, lane.actor, port) for lane, port in self.awaited._waits_for())
        return self.waiting


class WaitWatch:
    """A process's part in the wait-for graph.

    Attributes:
        num_probes: Probes sent from here so far.
        num_broken: Waits that were failed here so far.
    """

    def __init__(self, proc: LocalProc) -> None:
        self.num_probes = self.num_broken = 0
        self._proc = proc
        self._noted: dict[str, Noted] = {}
        self._numbers = itertools.count(1)
        self._searches = itertools.count(1)

    # the actors' threads:

    def note(
        self, key: str, awaited: Awaited, since_s: float, envelope: wire.Envelope | None, *, is_async: bool
    ) -> Noted | None:
        """Make a wait part of the graph, if it is for actors' answers."""
        if not awaited._waits_for():
            return None
        proc, runner = self._proc, self._proc.actors.get(key)
        instance = runner and runner.instance
        wait = Wait(
            proc=proc.proc_id,
            actor=key,
            number=next(self._numbers),
            since_s=since_s,
            who=f"{instance.name} rank {instance.rank.rank}" if instance else key,
            endpoint=envelope[2] if envelope else "__init__",
            host=proc.host,
            pid=proc.pid,
            awaited=awaited.describe(),
        )
        caller = (envelope[3], envelope[5]) if envelope else None
        noted = Noted(wait, awaited, caller, is_async=is_async)
        noted.before = self._noted.get(key)
        self._noted[key] = noted
        proc.run_soon(partial(self._search, noted))
        return noted

    def forget(self, noted: Noted) -> None:
        """The wait is over."""
        key = noted.waiting.wait.actor
        if noted.before is None:
            self._noted.pop(key, None)
        else:
            self._noted[key] = noted.before

    # the I/O thread:

    def is_blocked_on(self, key: str, place: str) -> bool:
        """Whether an actor here keeps its thread blocked until one at ``place`` answers, and has for 250 ms."""
        noted = self._noted.get(key)
        waiting = noted.refresh() if noted is not None and not noted.is_async else None
        return waiting is not None and any(place_of(edge.proc) == place for edge in waiting.edges)

    def on_probe(self, envelope: wire.Envelope) -> None:
        """Pass a probe on, or act on what it found."""
        _, actor, caller, port, packed = envelope
        try:
            probe = Probe.unpack(packed)
        except (TypeError, ValueError) as error:
            raise wire.WireError(f"not a probe: {error}") from error
        waiting = self._waiting(actor, (caller, port))
        if waiting is not None:
            self._carry_out(waits.follow(probe, waiting))

    def _waiting(self, actor: str, call: tuple[str, int]) -> Waiting | None:
        """What ``actor`` is blocked on, if that keeps it from answering ``call``."""
        noted = self._noted.get(actor)
        if noted is None:
            return self._waiting_for_room(actor)
        if noted.is_async and call != noted.caller and self._overlaps(actor, call):
            return None
        return noted.refresh()

    def _waiting_for_room(self, actor: str) -> Waiting | None:
        proc, lane = self._proc, self._proc.blocked.get(actor)
        if lane is None or lane.account.has_room():
            return None
        wait = Wait(proc.proc_id, actor, lane.wait_id, 0.0, actor, "", proc.host, proc.pid, lane.name, is_for_room=True)
        return Waiting(wait, (Edge(lane.proc, lane.actor, 0),))

    def _overlaps(self, actor: str, call: tuple[str, int]) -> bool:
        """Whether ``call`` goes on although the actor's slot is taken: it is one of a concurrent endpoint's."""
        runner = self._proc.actors.get(actor)
        handler = runner and runner._handler
        if runner is None or handler is None:
            return False
        gated = [envelope for waiting in list(runner._gated.values()) for _, envelope in tuple(waiting)]
        return call in handler.active or any((envelope[3], envelope[5]) == call for envelope in gated)

    def _search(self, noted: Noted) -> None:
        waiting = self._current(noted.waiting.wait)
        if waiting is None:
            return
        self._carry_out(waits.search(waiting, next(self._searches)))
        pause_s = waits.pause_s(time.time() - waiting.wait.since_s)
        self._proc.run_at(time.monotonic() + pause_s, partial(self._search, noted))

    def _confirm(self, cycle: tuple[Wait, ...]) -> None:
        waiting = self._current(cycle[0])
        if waiting is not None:
            self._carry_out(waits.confirm(waiting, cycle))

    def _current(self, wait: Wait) -> Waiting | None:
        noted = self._noted.get(wait.actor)
        return noted.refresh() if noted is not None and noted.waiting.wait.key == wait.key else None

    def _carry_out(self, commands: list[Any]) -> None:
        for command in commands:
            match command:
                case waits.SendProbe(edge, probe):
                    self._send(edge, probe)
                case waits.ConfirmLater(cycle):
                    self._proc.run_at(time.monotonic() + waits.CONFIRM_AFTER_S, partial(self._confirm, cycle))
                case waits.Break(cycle):
                    self._break(cycle)
                case waits.Overdraft(wait):
                    # As if the sender's own probe, which looks for senders alone, had come back to it.
                    self._proc.send(wait.proc, [wire.PROBE, wait.actor, wait.proc, wait.actor, wait.number])
                case _:
                    raise AssertionError(command)

    def _send(self, edge: Edge, probe: Probe) -> None:
        link = self._proc.links.get(edge.proc)
        # Who is not up waits for nobody, and a held probe would be old when it arrives.
        if link is not None and link.is_open:
            self.num_probes += 1
            link.send(wire.pack([wire.WAITS, edge.actor, self._proc.proc_id, edge.port, probe.pack()]))

    def _break(self, cycle: tuple[Wait, ...]) -> None:
        noted = self._noted.get(cycle[0].actor)
        if noted is not None and noted.waiting.wait.key == cycle[0].key and not noted.awaited.done():
            self.num_broken += 1
            now_s = time.time()
            noted.awaited._call_off(DeadlockError(cycle[0].awaited, waits.in_order(cycle), now_s))
