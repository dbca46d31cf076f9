"""Which processes a host has, who waits to hear of them, and what to do when they are late to end.

Pure: events and the time go in, commands come out; the agent carries them out.

    PENDING --on_spawn--> STARTING --on_up--> UP --on_stop--> STOPPING --on_exit--> (gone)
       ^                      |               |                              ^
       |                      +---on_stop-----+------------------------------+      on_exit from any state ends it
       +--- the one before it has ended, and its mesh has a policy: its owner says whether it is to start

A process's watchers watch the one that follows it at its place, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto
from signal import SIGKILL, SIGTERM
from typing import TYPE_CHECKING

from ..address import address, incarnation_of, mesh_of, name_of, next_address, place_of, rank_of
from ..config import GRACE_AFTER_ERROR_S, GRACE_S
from ..failure import FailureKind, MeshFailure

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TERM_S = 0.5
"""Time between SIGTERM and SIGKILL."""


class ProcState(Enum):
    """Where a process is in its life; the module's docstring draws it."""

    PENDING = auto()
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
    """Command: tell ``to`` that ``proc`` has ended; ``following`` is what may take its place."""

    to: str
    proc: str
    failure: MeshFailure
    following: str | None = None


@dataclass(frozen=True, slots=True)
class TellReplaced:
    """Command: tell ``to`` that ``following`` takes the place of ``proc``, which ended earlier."""

    to: str
    proc: str
    following: str


@dataclass(frozen=True, slots=True)
class AskStop:
    """Command: ask ``proc`` to clean up and exit; ``failure`` says why, if that is to start it again."""

    proc: str
    failure: MeshFailure | None = None


@dataclass(frozen=True, slots=True)
class Kill:
    """Command: send a signal to ``proc``."""

    proc: str
    pid: int
    signum: int


Command = TellUp | TellGone | TellReplaced | AskStop | Kill


@dataclass(frozen=True, slots=True)
class MeshInfo:
    """What the processes of a mesh have in common.

    Attributes:
        mesh: Its id.
        name: Its name.
        owner: Address of the process that ordered it.
        dims: Its dimensions, as (label, size).
        size: Number of its ranks; processes of a higher rank are spares.
        restartable: Whether a rank that has ended may be started again unasked.
        watcher: Who hears of its processes in the owner's place: the agent of the host that it is on.
    """

    mesh: str
    name: str
    owner: str
    dims: tuple[tuple[str, int], ...]
    size: int
    restartable: bool = False
    watcher: str = ""


@dataclass(slots=True)
class Proc:
    """What the table knows of one process."""

    proc: str
    info: MeshInfo
    state: ProcState = ProcState.STARTING
    pid: int | None = None
    watchers: set[str] = field(default_factory=set)
    reason: tuple[FailureKind, str] | None = None
    restart: MeshFailure | None = None
    """Why it is stopped, if that is to start it again."""
    stop_at_s: float = 0.0
    escalation: int = 0

    @property
    def mesh(self) -> str:
        """Id of its mesh."""
        return self.info.mesh

    @property
    def name(self) -> str:
        """Name of its mesh."""
        return self.info.name

    @property
    def owner(self) -> str:
        """Address of the process that ordered it."""
        return self.info.owner

    @property
    def rank(self) -> int:
        """Its rank."""
        return rank_of(self.proc)

    @property
    def is_spare(self) -> bool:
        """Whether it waits to take the place of another."""
        return self.rank >= self.info.size


class ProcTable:
    """The processes of one host."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.procs: dict[str, Proc] = {}
        self.gone: dict[str, MeshFailure] = {}
        self._following: dict[str, str] = {}
        self._early_watchers: dict[str, set[str]] = {}
        self._late_watchers: dict[str, set[str]] = {}
        # Of places that were another host's before it was lost: the incarnation that is the first here.
        self._first: dict[str, int] = {}

    def on_spawn(self, info: MeshInfo, procs: Sequence[str]) -> list[Command]:
        """Processes were ordered: a new mesh, or single ranks of a mesh again."""
        commands: list[Command] = []
        for proc in procs:
            if proc in self.gone:
                # Stopped or abandoned while the order was under way.
                continue
            record = self.procs.get(proc)
            if record is None:
                record = self.procs[proc] = Proc(proc, info, watchers={info.watcher or info.owner})
                commands += self._fill_hole(record)
                if address(place_of(proc), incarnation_of(proc) - 1) not in self.gone:
                    self._first.setdefault(place_of(proc), incarnation_of(proc))
            record.info, record.state = info, ProcState.STARTING
            record.watchers |= self._early_watchers.pop(proc, set())
            commands += self._pass_over(record)
            if record.is_spare:
                record.watchers.clear()
        return commands

    def _pass_over(self, record: Proc) -> list[Command]:
        """Those who wait for one that was to be here before, and was lost with its host, hear of the new one."""
        place, number = place_of(record.proc), incarnation_of(record.proc)
        before = [proc for proc in self._early_watchers if place_of(proc) == place and incarnation_of(proc) < number]
        commands: list[Command] = []
        for proc in before:
            watchers = self._early_watchers.pop(proc)
            record.watchers |= watchers
            commands += [TellReplaced(watcher, proc, record.proc) for watcher in sorted(watchers)]
        return commands

    def _fill_hole(self, record: Proc) -> list[Command]:
        """Those who knew the process that ended at this place hear of the new one."""
        before = address(place_of(record.proc), incarnation_of(record.proc) - 1)
        if before not in self._late_watchers:
            return []
        self._following[before] = record.proc
        watchers = self._late_watchers.pop(before)
        record.watchers |= watchers
        return [TellReplaced(watcher, before, record.proc) for watcher in sorted(watchers)]

    def on_mesh_over(self, mesh: str) -> None:
        """No rank of a mesh will be started again."""
        self.on_policy(mesh, restartable=False)
        for proc in [proc for proc in self._late_watchers if mesh_of(proc) == mesh]:
            del self._late_watchers[proc]

    def on_policy(self, mesh: str, *, restartable: bool) -> None:
        """A mesh got or lost the policy by which its ranks are started again."""
        for record in self.procs.values():
            if record.mesh == mesh:
                record.info = replace(record.info, restartable=restartable)

    def on_adopt(self, spare: str, proc: str) -> None:
        """``spare`` takes the place of ``proc``, which was ordered and not started; it will say that it is up."""
        waiting, record = self.procs.pop(proc), self.procs.pop(spare)
        record.proc, record.info, record.watchers = proc, waiting.info, waiting.watchers
        record.state = ProcState.STARTING
        self.procs[proc] = record

    def find_spare(self, mesh: str) -> str | None:
        """Return a spare of ``mesh`` that could take a place at once."""
        ready = (r.proc for r in self.procs.values() if r.mesh == mesh and r.is_spare and r.state is ProcState.UP)
        return next(ready, None)

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
            return [AskStop(proc, record.restart)]
        record.state = ProcState.UP
        return [TellUp(watcher, proc) for watcher in sorted(record.watchers)]

    def on_watch(self, proc: str, watcher: str) -> list[Command]:
        """``watcher`` wants to hear when ``proc`` comes up and when it ends; at once, if it has."""
        failure = self.gone.get(proc)
        if failure is not None:
            following = self._following.get(proc)
            told: list[Command] = [TellGone(watcher, proc, failure, following)]
            if following is not None:
                return told + self.on_watch(following, watcher)
            self._late_watchers.setdefault(proc, set()).add(watcher)
            return told
        record = self.procs.get(proc)
        if record is None and incarnation_of(proc) < self._first.get(place_of(proc), 0):
            following = next_address(proc)
            told = [TellGone(watcher, proc, self._lost_before(proc), following)]
            return told + self.on_watch(following, watcher)
        if record is None:
            self._early_watchers.setdefault(proc, set()).add(watcher)
            return []
        record.watchers.add(watcher)
        return [TellUp(watcher, proc)] if record.state is ProcState.UP else []

    def _lost_before(self, proc: str) -> MeshFailure:
        """What is known of a process of the host in whose place this one is."""
        return MeshFailure(
            kind=FailureKind.HOST_LOST,
            mesh=name_of(proc),
            rank=rank_of(proc),
            host=self.host,
            incarnation=incarnation_of(proc),
            detail="its host was lost, and this one has taken its place",
            restarts=True,
        )

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
        if record.state is ProcState.STOPPING:
            return self._end_as_told(record, ())
        return self._end(record, kind=FailureKind.SPAWN_ERROR, detail=detail, traceback=traceback)

    def on_exit(
        self,
        proc: str,
        *,
        exit_code: int | None,
        signum: int | None,
        log_tail: Sequence[str],
        now_s: float,
        out_of_memory: str = "",
    ) -> list[Command]:
        """The process has ended: tell who waits, and stop the meshes it owned.

        Args:
            proc: Its address.
            exit_code: Its exit status, where it exited.
            signum: The signal that killed it, where one did.
            log_tail: The last lines that it wrote.
            now_s: The time.
            out_of_memory: What the cgroups say, where it was the kernel that killed it for want of memory.
        """
        record = self.procs.get(proc)
        if record is None:
            return []
        tail = tuple(log_tail)
        if record.state is ProcState.STOPPING:
            commands = self._end_as_told(record, tail)
        elif record.reason is not None:
            kind, traceback = record.reason
            commands = self._end(record, kind=kind, traceback=traceback, log_tail=tail)
        elif signum is not None:
            kind = FailureKind.OUT_OF_MEMORY if out_of_memory else FailureKind.KILLED
            commands = self._end(record, kind=kind, signum=signum, log_tail=tail, detail=out_of_memory)
        else:
            commands = self._end(record, kind=FailureKind.EXITED, exit_code=exit_code, log_tail=tail)
        return commands + self.on_owner_gone(proc, now_s=now_s)

    def _end_as_told(self, record: Proc, log_tail: tuple[str, ...]) -> list[Command]:
        """It was told to end: for good, or to be started again."""
        why = record.restart
        if why is None:
            return self._end(record, kind=FailureKind.STOPPED)
        return self._end(
            record, kind=why.kind, log_tail=log_tail, traceback=why.traceback, detail=why.detail, cause=why.cause
        )

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
            if record.state is ProcState.PENDING:
                commands += self._end(record, kind=FailureKind.STOPPED)
            elif record.state is ProcState.STOPPING:
                record.restart = None
                record.stop_at_s = min(record.stop_at_s, now_s + grace_s)
            else:
                commands += self._ask_stop(record, now_s=now_s, grace_s=grace_s)
        return commands

    def on_restart(self, proc: str, failure: MeshFailure, *, now_s: float) -> list[Command]:
        """End a process for the reason ``failure``, so that it can be started again."""
        record = self.procs.get(proc)
        if record is None or record.state in {ProcState.PENDING, ProcState.STOPPING}:
            return []
        record.restart = failure
        is_stuck = failure.kind is FailureKind.STUCK
        return self._ask_stop(record, now_s=now_s, grace_s=0.0 if is_stuck else GRACE_AFTER_ERROR_S)

    def on_abandon(self, proc: str) -> list[Command]:
        """The owner of ``proc``, which is pending, does not start it: it is gone as the one before it."""
        record = self.procs.get(proc)
        if record is None or record.state is not ProcState.PENDING:
            return []
        before = next(gone for gone, following in self._following.items() if following == proc)
        return self._gone(record, replace(self.gone[before], restarts=False), following=None)

    def _ask_stop(self, record: Proc, *, now_s: float, grace_s: float) -> list[Command]:
        was_up = record.state is ProcState.UP
        record.state, record.stop_at_s = ProcState.STOPPING, now_s + grace_s
        if was_up:
            return [AskStop(record.proc, record.restart)]
        return [] if record.pid is None else [Kill(record.proc, record.pid, SIGTERM)]

    def check(self, *, now_s: float) -> list[Command]:
        """Return the signals for processes whose time to end has passed."""
        commands: list[Command] = []
        for record in self.procs.values():
            if record.state is not ProcState.STOPPING or record.pid is None or now_s < record.stop_at_s:
                continue
            is_patient = record.escalation == 0 and not (record.restart and record.restart.kind is FailureKind.STUCK)
            signum = SIGTERM if is_patient else SIGKILL
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
        cause: MeshFailure | None = None,
    ) -> list[Command]:
        info = record.info
        may_follow = info.restartable and kind is not FailureKind.STOPPED and not record.is_spare
        failure = MeshFailure(
            kind=kind,
            mesh=info.name,
            rank=record.rank,
            dims=info.dims,
            host=self.host,
            pid=record.pid,
            incarnation=incarnation_of(record.proc),
            exit_code=exit_code,
            signum=signum,
            log_tail=log_tail,
            traceback=traceback,
            detail=detail,
            cause=cause,
            restarts=may_follow,
        )
        return self._gone(record, failure, following=next_address(record.proc) if may_follow else None)

    def _gone(self, record: Proc, failure: MeshFailure, *, following: str | None) -> list[Command]:
        proc = record.proc
        del self.procs[proc]
        self.gone[proc] = failure
        for other in self.procs.values():
            other.watchers.discard(proc)
        for watchers in self._late_watchers.values():
            watchers.discard(proc)
        if following is not None:
            self._following[proc] = following
            self.procs[following] = Proc(following, record.info, ProcState.PENDING, watchers=set(record.watchers))
        elif failure.kind is not FailureKind.STOPPED:
            self._late_watchers[proc] = set(record.watchers)
        return [TellGone(watcher, proc, failure, following) for watcher in sorted(record.watchers)]
