"""Processes of other hosts that somebody here waits to hear of.

Pure: events go in, commands come out. The agent of the other host tells this agent, once; this one tells its own. When
a host is lost nobody else can tell what became of its processes, so it is decided here.

    asked --on_up--> up --on_died, on_host_lost--> gone; or followed by the next incarnation, of which the watchers hear
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..address import address, host_of, incarnation_of, mesh_of, name_of, next_address, place_of, rank_of
from ..failure import FailureKind, MeshFailure
from ..host.proc_table import Command, TellGone, TellReplaced, TellUp

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Ask:
    """Command: ask the agent of ``proc``'s host to tell this agent what becomes of it."""

    proc: str


FarCommand = Command | Ask


@dataclass(slots=True)
class _Far:
    watchers: set[str] = field(default_factory=set)
    is_up: bool = False
    is_ordered: bool = False
    is_sent: bool = False
    """Whether its host has been asked to start it; until then the order waits for the next one."""
    restartable: bool = False


class FarProcs:
    """What one agent knows of processes elsewhere."""

    def __init__(self) -> None:
        self._procs: dict[str, _Far] = {}
        self._gone: dict[str, tuple[MeshFailure, str | None]] = {}
        self._late: dict[str, set[str]] = {}
        self._restartable: dict[str, bool] = {}

    def on_watch(self, proc: str, watcher: str) -> list[FarCommand]:
        """``watcher``, a process here or this agent, wants to hear of ``proc``."""
        gone = self._gone.get(proc)
        if gone is not None:
            failure, following = gone
            told: list[FarCommand] = [TellGone(watcher, proc, failure, following)]
            if following is not None:
                return told + self.on_watch(following, watcher)
            if failure.kind is not FailureKind.STOPPED:
                self._late.setdefault(proc, set()).add(watcher)
            return told
        far = self._procs.get(proc)
        if far is None:
            far = self._procs[proc] = _Far(restartable=self._restartable.get(mesh_of(proc), False))
            far.watchers.add(watcher)
            return [Ask(proc)]
        # Who had waited for it may have ended before its host came back, and then nobody has asked the agent there.
        is_asked = bool(far.watchers)
        far.watchers.add(watcher)
        if far.is_up:
            return [TellUp(watcher, proc)]
        return [] if is_asked else [Ask(proc)]

    def on_ordered(self, procs: Iterable[str], owner: str, *, restartable: bool) -> list[FarCommand]:
        """A process here has ordered ``procs``, and the agents there will tell of them unasked."""
        commands: list[FarCommand] = []
        for proc in procs:
            self._restartable[mesh_of(proc)] = restartable
            before = _before(proc)
            far = self._procs.setdefault(proc, _Far())
            far.restartable, far.is_ordered = restartable, True
            far.watchers.add(owner)
            if before in self._late:
                commands += self.on_replaced(before, proc)
        return commands

    def on_order_sent(self, procs: Iterable[str]) -> None:
        """The host of ``procs`` has been asked to start them."""
        for proc in procs:
            far = self._procs.get(proc)
            if far is not None:
                far.is_sent = True

    def is_gone(self, proc: str) -> bool:
        """Whether it has ended, or will never be started."""
        return proc in self._gone

    def on_policy(self, mesh: str, *, restartable: bool) -> None:
        """A mesh that was ordered here got or lost its policy."""
        self._restartable[mesh] = restartable
        for proc, far in self._procs.items():
            if mesh_of(proc) == mesh:
                far.restartable = restartable

    def on_up(self, proc: str, *, restartable: bool) -> list[FarCommand]:
        """It takes messages."""
        before = _before(proc)
        told = self.on_replaced(before, proc) if before in self._late else []
        far = self._procs.get(proc)
        if far is None:
            return []
        far.is_up, far.restartable = True, restartable
        return [*told, *(TellUp(watcher, proc) for watcher in sorted(far.watchers))]

    def on_died(self, proc: str, failure: MeshFailure, following: str | None) -> list[FarCommand]:
        """Its agent says that it is gone."""
        far = self._procs.pop(proc, None)
        if proc in self._gone:
            return []
        self._gone[proc] = failure, following
        watchers = set() if far is None else far.watchers
        if following is not None:
            # Its agent tells of that one without being asked.
            self._procs.setdefault(following, _Far(restartable=True)).watchers |= watchers
        elif failure.kind is not FailureKind.STOPPED and watchers:
            self._late[proc] = set(watchers)
        return [TellGone(watcher, proc, failure, following) for watcher in sorted(watchers)]

    def on_replaced(self, before: str, following: str) -> list[FarCommand]:
        """Another process takes the place of one that was lost for good, or was lost before it had started."""
        watchers = self._late.pop(before, set())
        announced = self._procs.get(before)
        if announced is not None and self._is_announced(before):
            failure = replace(self._gone[_before(before)][0], incarnation=incarnation_of(before))
            return self.on_died(before, failure, following) + self._up_if_known(following)
        if before in self._gone:
            self._gone[before] = self._gone[before][0], following
        far = self._procs.setdefault(following, _Far())
        far.watchers |= watchers
        told: list[FarCommand] = [TellReplaced(watcher, before, following) for watcher in sorted(watchers)]
        return told + ([TellUp(watcher, following) for watcher in sorted(watchers)] if far.is_up else [])

    def _up_if_known(self, proc: str) -> list[FarCommand]:
        far = self._procs[proc]
        return [TellUp(watcher, proc) for watcher in sorted(far.watchers)] if far.is_up else []

    def on_watcher_gone(self, watcher: str) -> None:
        """A process here has ended."""
        for far in self._procs.values():
            far.watchers.discard(watcher)
        for watchers in self._late.values():
            watchers.discard(watcher)

    def on_host_lost(self, slot: int, host: str, why: str, *, kind: FailureKind, may_return: bool) -> list[FarCommand]:
        """All processes of a host are gone."""
        commands: list[FarCommand] = []
        for proc in [proc for proc in self._procs if host_of(proc) == slot]:
            far = self._procs[proc]
            if may_return and self._is_awaited(proc):
                # Not started yet: it may be on the next host.
                continue
            follows = far.restartable and may_return
            failure = MeshFailure(
                kind=kind,
                mesh=name_of(proc),
                rank=rank_of(proc),
                host=host,
                incarnation=incarnation_of(proc),
                detail=why,
                restarts=follows,
            )
            commands += self.on_died(proc, failure, next_address(proc) if follows else None)
        return commands

    def on_host_back(self, slot: int) -> list[FarCommand]:
        """Another agent has taken the place of a lost one, and knows of nobody who waits."""
        late = [proc for proc in self._late if host_of(proc) == slot]
        wanted = [proc for proc, far in self._procs.items() if host_of(proc) == slot and far.watchers]
        # Who watches the place of a lost process hears of the next one from whoever orders it.
        return [Ask(proc) for proc in [*wanted, *map(next_address, late)]]

    def on_abandoned(self, proc: str) -> list[FarCommand]:
        """Its owner does not start it, and its host is not there to say so."""
        before = _before(proc)
        if proc in self._gone or before not in self._gone:
            return []
        return self.on_died(proc, replace(self._gone[before][0], restarts=False), None)

    def _is_awaited(self, proc: str) -> bool:
        """Whether no host has been asked for ``proc`` yet, as far as is known here."""
        far = self._procs[proc]
        return not far.is_up and not far.is_sent and (far.is_ordered or self._is_announced(proc))

    def _is_announced(self, proc: str) -> bool:
        """Whether ``proc`` is only said to follow another."""
        return not self._procs[proc].is_up and _before(proc) in self._gone


def _before(proc: str) -> str:
    """The address of the process that was at this place before; empty where there was none."""
    return address(place_of(proc), incarnation_of(proc) - 1) if incarnation_of(proc) else ""
