"""Which processes a host has, who waits to hear of them, and what to do when they are late to end.

Pure: events and the time go in, commands come out; the agent carries them out.

    STARTING --on_up--> UP --on_stop--> STOPPING --on_exit--> (gone)
        |               |                              ^
        +---on_stop-----+------------------------------+      on_exit from any state ends it
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from signal import SIGKILL, SIGTERM
from typing import TYPE_CHECKING

from ..config import GRACE_S
from ..failure import FailureKind, MeshFailure

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TERM_S = 0.5
"""Time between SIGTERM and SIGKILL."""


class ProcState(Enum):
    """Where a process is in its life; the module's docstring draws it."""

    STARTING = auto()
    UP = auto()
    STOPPING = auto()


@dataclass(frozen=True, slots=True)
class TellUp:
    """Command: tell ``to`` that ``proc`` takes messages."""

    to: str
    proc: str


@dataclass(frozen=True, slots=True)
class TellGone:
    """Command: tell ``to`` that ``proc`` has ended."""

    to: str
    proc: str
    failure: MeshFailure


@dataclass(frozen=True, slots=True)
class AskStop:
    """Command: ask ``proc`` to clean up and exit."""

    proc: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Command: send a signal to ``proc``."""

    proc: str
    pid: int
    signum: int


Command = TellUp | TellGone | AskStop | Kill


@dataclass(slots=True)
class Proc:
    """What the table knows of one process."""

    proc: str
    mesh: str
    name: str
    rank: int
    owner: str
    state: ProcState = ProcState.STARTING
    pid: int | None = None
    watchers: set[str] = field(default_factory=set)
    reason: tuple[FailureKind, str] | None = None
    stop_at_s: float = 0.0
    escalation: int = 0


class ProcTable:
    """The processes of one host."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.procs: dict[str, Proc] = {}
        self.gone: dict[str, MeshFailure] = {}
        self._early_watchers: dict[str, set[str]] = {}

    def on_spawn(self, mesh: str, name: str, owner: str, procs: Sequence[tuple[str, int]]) -> None:
        """A mesh was ordered; ``procs`` are (address, rank)."""
        for proc, rank in procs:
            record = self.procs[proc] = Proc(proc, mesh, name, rank, owner)
            record.watchers = {owner} | self._early_watchers.pop(proc, set())

    def on_started(self, proc: str, pid: int) -> list[Command]:
        """The process exists."""
        record = self.procs[proc]
        record.pid = pid
        if record.state is ProcState.STOPPING:
            return [Kill(proc, pid, SIGTERM)]
        return []

    def on_up(self, proc: str) -> list[Command]:
        """The process takes messages."""
        record = self.procs.get(proc)
        if record is None or record.state is ProcState.UP:
            return []
        if record.state is ProcState.STOPPING:
            return [AskStop(proc)]
        record.state = ProcState.UP
        return [TellUp(watcher, proc) for watcher in sorted(record.watchers)]

    def on_watch(self, proc: str, watcher: str) -> list[Command]:
        """``watcher`` wants to hear when ``proc`` comes up and when it ends; at once, if it has."""
        failure = self.gone.get(proc)
        if failure is not None:
            return [TellGone(watcher, proc, failure)]
        record = self.procs.get(proc)
        if record is None:
            self._early_watchers.setdefault(proc, set()).add(watcher)
            return []
        record.watchers.add(watcher)
        return [TellUp(watcher, proc)] if record.state is ProcState.UP else []

    def on_failing(self, proc: str, kind: FailureKind, traceback: str) -> None:
        """The process says why it is about to exit."""
        record = self.procs.get(proc)
        if record is not None:
            record.reason = kind, traceback

    def on_not_started(self, proc: str, detail: str, traceback: str = "") -> list[Command]:
        """The process could not be started."""
        record = self.procs.get(proc)
        if record is None:
            return []
        return self._end(record, kind=FailureKind.SPAWN_ERROR, detail=detail, traceback=traceback)

    def on_exit(
        self, proc: str, *, exit_code: int | None, signum: int | None, log_tail: Sequence[str], now_s: float
    ) -> list[Command]:
        """The process has ended: tell who waits, and stop the meshes it owned."""
        record = self.procs.get(proc)
        if record is None:
            return []
        tail = tuple(log_tail)
        if record.state is ProcState.STOPPING:
            commands = self._end(record, kind=FailureKind.STOPPED)
        elif record.reason is not None:
            kind, traceback = record.reason
            commands = self._end(record, kind=kind, traceback=traceback, log_tail=tail)
        elif signum is not None:
            commands = self._end(record, kind=FailureKind.KILLED, signum=signum, log_tail=tail)
        else:
            commands = self._end(record, kind=FailureKind.EXITED, exit_code=exit_code, log_tail=tail)
        return commands + self.on_owner_gone(proc, now_s=now_s)

    def on_owner_gone(self, owner: str, *, now_s: float) -> list[Command]:
        """Stop what a process that is gone had spawned."""
        return self.on_stop([record.proc for record in self.procs.values() if record.owner == owner], now_s=now_s)

    def on_stop(self, procs: Iterable[str], *, now_s: float, grace_s: float = GRACE_S) -> list[Command]:
        """Ask processes to end; those that are late get SIGTERM, then SIGKILL (see :meth:`check`)."""
        commands: list[Command] = []
        for proc in procs:
            record = self.procs.get(proc)
            if record is None:
                continue
            if record.state is ProcState.STOPPING:
                record.stop_at_s = min(record.stop_at_s, now_s + grace_s)
                continue
            was_up = record.state is ProcState.UP
            record.state = ProcState.STOPPING
            record.stop_at_s = now_s + grace_s
            if was_up:
                commands.append(AskStop(proc))
            elif record.pid is not None:
                commands.append(Kill(proc, record.pid, SIGTERM))
        return commands

    def check(self, *, now_s: float) -> list[Command]:
        """Return the signals for processes whose time to end has passed."""
        commands: list[Command] = []
        for record in self.procs.values():
            if record.state is not ProcState.STOPPING or record.pid is None or now_s < record.stop_at_s:
                continue
            signum = SIGTERM if record.escalation == 0 else SIGKILL
            record.escalation += 1
            record.stop_at_s = now_s + TERM_S
            commands.append(Kill(record.proc, record.pid, signum))
        return commands

    def next_check_s(self) -> float | None:
        """When :meth:`check` may have something to do."""
        stopping = [r.stop_at_s for r in self.procs.values() if r.state is ProcState.STOPPING and r.pid is not None]
        return min(stopping, default=None)

    def _end(
        self,
        record: Proc,
        *,
        kind: FailureKind,
        exit_code: int | None = None,
        signum: int | None = None,
        log_tail: tuple[str, ...] = (),
        traceback: str = "",
        detail: str = "",
    ) -> list[Command]:
        failure = MeshFailure(
            kind=kind,
            mesh=record.name,
            rank=record.rank,
            host=self.host,
            pid=record.pid,
            exit_code=exit_code,
            signum=signum,
            log_tail=log_tail,
            traceback=traceback,
            detail=detail,
        )
        del self.procs[record.proc]
        self.gone[record.proc] = failure
        for other in self.procs.values():
            other.watchers.discard(record.proc)
        return [TellGone(watcher, record.proc, failure) for watcher in sorted(record.watchers)]
