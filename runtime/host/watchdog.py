"""The agent's side of the watch for stuck processes: asks them, reads their states, takes stacks, tells their owners.

A shell around monitor.py, for the agent's loop.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..address import incarnation_of
from ..failure import FailureKind, MeshFailure, pack_failure
from .monitor import Command, Monitor, Ping, TakeStack, TellStuck
from .proc_table import ProcState
from .stack_taker import StackTaker, Subject
from .stacks import Stacks, is_traced, read_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .proc_table import Proc


@dataclass(slots=True)
class _Watched:
    pid: int
    thread: int
    names: dict[int, str]
    path: str
    stacks: str = ""
    owner_of_gil: str | None = None
    failure: bytes = b""


class Watchdog:
    """Watches the processes that have said that they are ready.

    Args:
        limit_s: Within how many seconds a stuck process is told of; 0 watches nothing.
        host: Name of this host.
        procs: The agent's records, by address.
        tell: Sends an event to a process.
        log_tail: The last lines that a process wrote.
        watch: Has a function called when a descriptor can be read.
        unwatch: Ends that.
    """

    def __init__(
        self,
        limit_s: float,
        *,
        host: str,
        procs: dict[str, Proc],
        tell: Callable[[str, str, dict[str, Any]], None],
        log_tail: Callable[[str], list[str]],
        watch: Callable[[int, Callable[[], object]], None],
        unwatch: Callable[[int], None],
    ) -> None:
        self._host, self._procs = host, procs
        self._tell, self._log_tail = tell, log_tail
        self._is_on = limit_s > 0
        self._monitor = Monitor(limit_s)
        self._taker = StackTaker(limit_s / 5, watch=watch, unwatch=unwatch)
        self._watched: dict[str, _Watched] = {}

    def on_ready(self, proc: str, fields: dict[str, Any]) -> None:
        """``proc`` has done its bootstrap: it is expected to answer from now on."""
        record = self._procs.get(proc)
        if self._is_on and record is not None and record.pid is not None:
            names = {int(ident): name for ident, name in fields["threads"].items()}
            self._watched[proc] = _Watched(record.pid, fields["io_thread"], names, fields["stacks"])
            self._monitor.on_ready(proc, now_s=time.monotonic())

    def on_exit(self, proc: str) -> None:
        """``proc`` is gone."""
        watched = self._drop(proc)
        if watched is not None:
            with contextlib.suppress(OSError):
                os.unlink(watched.path)

    def _drop(self, proc: str) -> _Watched | None:
        self._monitor.on_gone(proc)
        return self._watched.pop(proc, None)

    def on_pong(self, proc: str, number: int) -> None:
        """``proc`` has answered."""
        self._carry_out(self._monitor.on_pong(proc, number, now_s=time.monotonic()))

    def check(self, *, now_s: float) -> None:
        """Do what is due."""
        if not self._watched:
            return
        for proc in self._monitor.due(now_s=now_s):
            if self._record(proc) is None:
                self.on_exit(proc)
            else:
                state = read_state(self._watched[proc].pid)
                self._carry_out(self._monitor.on_look(proc, state, now_s=now_s))
        self._carry_out(self._monitor.check(now_s=now_s))
        self._taker.check(now_s=now_s)

    def _record(self, proc: str) -> Proc | None:
        """The record of a process of which anything is expected: one that was told to end has a time limit for that."""
        record = self._procs.get(proc)
        return None if record is None or record.state is ProcState.STOPPING else record

    def next_check_s(self) -> float | None:
        """When :meth:`check` may have something to do."""
        if not self._watched:
            return None
        times = [self._monitor.next_check_s(), self._taker.next_check_s()]
        return min((time_s for time_s in times if time_s is not None), default=None)

    def close(self) -> None:
        """End what is under way."""
        self._watched.clear()
        self._taker.close()

    def _carry_out(self, commands: Iterable[Command]) -> None:
        for command in commands:
            watched = self._watched.get(command.proc)
            if watched is None:
                continue
            if isinstance(command, Ping):
                self._tell(command.proc, "ping", {"number": command.number})
            elif isinstance(command, TakeStack):
                self._take_stack(command, watched)
            elif isinstance(command, TellStuck):
                self._tell_stuck(command, watched)
            else:
                self._tell_recovered(command.proc, watched)

    def _take_stack(self, command: TakeStack, watched: _Watched) -> None:
        proc, episode = command.proc, command.episode
        if is_traced(watched.pid):
            self._on_stack(proc, episode, watched, None, "it is being traced")
            return
        subject = Subject(
            pid=watched.pid,
            path=watched.path,
            thread=watched.thread,
            names=watched.names,
            is_stopped=command.is_stopped,
        )
        self._taker.take(
            subject,
            lambda stacks, why_not: self._on_stack(proc, episode, watched, stacks, why_not),
            now_s=time.monotonic(),
        )

    def _on_stack(self, proc: str, episode: int, watched: _Watched, stacks: Stacks | None, why_not: str) -> None:
        is_quiet = is_traced(watched.pid)
        if stacks is None:
            watched.stacks, watched.owner_of_gil = f"(not to be had: {why_not})", None
        else:
            is_quiet |= stacks.excuses_silence
            owner = stacks.gil_owner
            watched.stacks, watched.owner_of_gil = str(stacks), None if owner is None else owner.name
        commands = self._monitor.on_stack(proc, episode, is_quiet=is_quiet, now_s=time.monotonic())
        self._carry_out(commands)

    def _tell_stuck(self, command: TellStuck, watched: _Watched) -> None:
        record = self._record(command.proc)
        if record is None:
            return
        failure = MeshFailure(
            kind=FailureKind.STUCK,
            mesh=record.name,
            rank=record.rank,
            dims=record.info.dims,
            host=self._host,
            pid=watched.pid,
            incarnation=incarnation_of(command.proc),
            log_tail=tuple(self._log_tail(command.proc)),
            traceback=watched.stacks,
            detail=_detail(command, watched),
        )
        watched.failure = pack_failure(failure)
        self._tell(record.owner, "stuck", {"proc": command.proc, "failure": watched.failure})

    def _tell_recovered(self, proc: str, watched: _Watched) -> None:
        record = self._record(proc)
        if record is not None and watched.failure:
            self._tell(record.owner, "recovered", {"proc": proc, "failure": watched.failure})


def _detail(command: TellStuck, watched: _Watched) -> str:
    if command.is_stopped:
        return f"stopped by a signal (SIGSTOP or its like); it goes on with `kill -CONT {watched.pid}`"
    silent = f"its I/O thread has not answered for {command.silent_s:.1f} s"
    if watched.owner_of_gil is not None:
        return f"{silent}: thread {watched.owner_of_gil} holds the interpreter lock"
    if read_state(watched.pid) == "D":
        return f"{silent}: the kernel has it wait for a disk, a network file system or a driver (state D)"
    return f"{silent}: something holds the interpreter lock, or the process gets no CPU time"
