"""Decides which processes are stuck: alive, and silent for too long.

Pure: answers, process states and the time go in, commands come out; the watchdog carries them out. Every process is
looked at, and asked for an answer by its I/O thread, about four times within the limit.

    ANSWERING --unanswered, or stopped, at a look--> SUSPECT --its time is over and its stack is there--> STUCK
        ^                                               |                                                   |
        +---------------- it answers -------------------+---------------------------------------------------+

A stopped process is told of at its second look in that state. A silent one is not told of while its stack shows that
it imports modules or initialises CUDA, nor while it is traced. When the agent itself was held up, nobody else is to
blame: all silence counts from then on.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

MAX_PINGS_PER_S: Final = 200
"""What the agent spends on asking; on hosts with many processes the period grows."""

_LOOKS_PER_LIMIT: Final = 4
_MAX_LOOKS_AT_ONCE: Final = 16
# In parts of the limit. With one period before the first question, and the stack in hand, all fit into it.
_STACK_AFTER: Final = 0.4
_TELL_AFTER: Final = 0.65

STOPPED: Final = "T"
TRACED: Final = "t"


class Phase(Enum):
    """How far the suspicion against a process goes; the module's docstring draws it."""

    ANSWERING = auto()
    SUSPECT = auto()
    STUCK = auto()


@dataclass(frozen=True, slots=True)
class Ping:
    """Command: ask the I/O thread of ``proc`` for an answer."""

    proc: str
    number: int


@dataclass(frozen=True, slots=True)
class TakeStack:
    """Command: take the stacks of ``proc``, and answer with :meth:`Monitor.on_stack`."""

    proc: str
    episode: int
    is_stopped: bool


@dataclass(frozen=True, slots=True)
class TellStuck:
    """Command: tell the owner of ``proc`` that it has been silent, or stopped, for ``silent_s``."""

    proc: str
    is_stopped: bool
    silent_s: float


@dataclass(frozen=True, slots=True)
class TellRecovered:
    """Command: tell the owner of ``proc`` that it answers again."""

    proc: str
    stuck_s: float


Command = Ping | TakeStack | TellStuck | TellRecovered


@dataclass(slots=True)
class _Proc:
    proc: str
    phase: Phase = Phase.ANSWERING
    awaited: int = 0
    """Number of the ping that is not answered yet, 0 where all are."""
    since_s: float = 0.0
    """Since when it is silent, or was seen stopped."""
    looks_stopped: int = 0
    episode: int = 0
    stack_at_s: float | None = None
    """When to take the stack; None once that was ordered."""
    has_stack: bool = False


class Monitor:
    """The processes of one host that are expected to answer.

    Args:
        limit_s: Within how many seconds a stuck process is to be told of.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._procs: dict[str, _Proc] = {}
        self._looks: deque[tuple[float, _Proc]] = deque()
        self._suspects: dict[str, _Proc] = {}
        self._next_number = 0
        self._last_s: float | None = None

    @property
    def period_s(self) -> float:
        """Time between two looks at one process."""
        return max(self.limit_s / _LOOKS_PER_LIMIT, len(self._procs) / MAX_PINGS_PER_S)

    def phase(self, proc: str) -> Phase | None:
        """How ``proc`` is thought to be; None where it is not watched."""
        record = self._procs.get(proc)
        return None if record is None else record.phase

    def on_ready(self, proc: str, *, now_s: float) -> None:
        """``proc`` has started: from now on it is expected to answer."""
        if proc not in self._procs:
            record = self._procs[proc] = _Proc(proc)
            self._look_later(record, now_s)

    def on_gone(self, proc: str) -> None:
        """``proc`` has ended, or was told to: nothing more is expected of it."""
        self._procs.pop(proc, None)
        self._suspects.pop(proc, None)

    def due(self, *, now_s: float) -> list[str]:
        """Return the processes whose state is to be read now; each is answered with :meth:`on_look`."""
        if self._last_s is not None and now_s - self._last_s > self.limit_s / 2 + self.period_s:
            self._forgive(now_s)
        self._last_s = now_s if self._procs else None
        found: list[str] = []
        while self._looks and self._looks[0][0] <= now_s and len(found) < _MAX_LOOKS_AT_ONCE:
            record = self._looks.popleft()[1]
            if self._procs.get(record.proc) is record:
                found.append(record.proc)
                self._look_later(record, now_s)
        return found

    def _look_later(self, record: _Proc, now_s: float) -> None:
        # Looks happen together, so that the agent sleeps between: at multiples of half a period.
        grid_s = self.limit_s / _LOOKS_PER_LIMIT / 2
        self._looks.append((math.floor((now_s + self.period_s) / grid_s) * grid_s, record))

    def _forgive(self, now_s: float) -> None:
        for record in self._procs.values():
            if record.phase is not Phase.STUCK:
                self._clear(record)
                record.since_s = now_s

    def on_look(self, proc: str, state: str, *, now_s: float) -> list[Command]:
        """``state`` is the letter that the kernel gives the state of ``proc``."""
        record = self._procs.get(proc)
        if record is None:
            return []
        if state == STOPPED:
            return self._on_stopped(record, now_s)
        if record.phase is not Phase.STUCK and (record.looks_stopped or state == TRACED):
            self._clear(record)
            record.since_s = now_s
        record.looks_stopped = 0
        if state == TRACED:
            return []
        if not record.awaited:
            self._next_number += 1
            record.awaited = self._next_number
            if record.phase is Phase.ANSWERING:
                record.since_s = now_s
            return [Ping(proc, record.awaited)]
        if record.phase is Phase.ANSWERING and record.since_s < now_s:
            self._suspect(record, record.since_s + _STACK_AFTER * self.limit_s)
        return []

    def _on_stopped(self, record: _Proc, now_s: float) -> list[Command]:
        record.looks_stopped += 1
        if record.phase is Phase.STUCK:
            return []
        if record.looks_stopped == 1:
            if record.phase is Phase.ANSWERING:
                record.since_s = now_s
                self._suspect(record, None)
            return []
        if record.has_stack:
            return [self._tell(record, now_s)]
        return [self._take_stack(record)] if record.looks_stopped == 2 else []

    def on_pong(self, proc: str, number: int, *, now_s: float) -> list[Command]:
        """The I/O thread of ``proc`` has answered a ping."""
        record = self._procs.get(proc)
        if record is None or number != record.awaited:
            return []
        stuck_s = now_s - record.since_s
        was_stuck = record.phase is Phase.STUCK
        self._clear(record)
        record.awaited = 0
        return [TellRecovered(proc, stuck_s)] if was_stuck else []

    def on_stack(self, proc: str, episode: int, *, is_quiet: bool, now_s: float) -> list[Command]:
        """The stacks are there, or could not be had.

        Args:
            proc: The process.
            episode: As in the command.
            is_quiet: They show that it may be silent: it imports, initialises CUDA, or is traced.
            now_s: The time.
        """
        record = self._procs.get(proc)
        if record is None or record.episode != episode or record.phase is not Phase.SUSPECT:
            return []
        if is_quiet and not record.looks_stopped:
            record.stack_at_s = now_s + self.limit_s
            return []
        record.has_stack = True
        return self._check(record, now_s)

    def check(self, *, now_s: float) -> list[Command]:
        """Return what is due for those under suspicion."""
        return [command for record in list(self._suspects.values()) for command in self._check(record, now_s)]

    def next_check_s(self) -> float | None:
        """When :meth:`due` or :meth:`check` may have something to do."""
        while self._looks and self._procs.get(self._looks[0][1].proc) is not self._looks[0][1]:
            self._looks.popleft()
        times = [self._looks[0][0]] if self._looks else []
        for record in self._suspects.values():
            if record.stack_at_s is not None:
                times.append(record.stack_at_s)
            elif record.has_stack:
                times.append(record.since_s + _TELL_AFTER * self.limit_s)
        return min(times, default=None)

    def _check(self, record: _Proc, now_s: float) -> list[Command]:
        if record.looks_stopped:
            # Its second look in that state decides.
            return [self._tell(record, now_s)] if record.has_stack and record.looks_stopped > 1 else []
        if record.stack_at_s is not None and now_s >= record.stack_at_s:
            return [self._take_stack(record)]
        if record.has_stack and now_s >= record.since_s + _TELL_AFTER * self.limit_s:
            return [self._tell(record, now_s)]
        return []

    def _take_stack(self, record: _Proc) -> TakeStack:
        record.stack_at_s = None
        return TakeStack(record.proc, record.episode, bool(record.looks_stopped))

    def _tell(self, record: _Proc, now_s: float) -> TellStuck:
        record.phase = Phase.STUCK
        self._suspects.pop(record.proc, None)
        return TellStuck(record.proc, bool(record.looks_stopped), now_s - record.since_s)

    def _suspect(self, record: _Proc, stack_at_s: float | None) -> None:
        record.phase, record.stack_at_s, record.has_stack = Phase.SUSPECT, stack_at_s, False
        self._suspects[record.proc] = record

    def _clear(self, record: _Proc) -> None:
        """Suspicion ends; a stack on its way belongs to an episode that is over."""
        record.phase, record.stack_at_s, record.has_stack = Phase.ANSWERING, None, False
        record.looks_stopped = 0
        record.episode += 1
        self._suspects.pop(record.proc, None)
