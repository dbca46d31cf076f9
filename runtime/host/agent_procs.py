"""The processes of a host agent: started through zygotes, watched by pidfds, and told of as the table says."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..address import CONTROLLER, address, file_name, host_of, incarnation_of, mesh_of, next_address, place_of, rank_of
from ..config import stuck_s
from ..failure import FailureKind, pack_failure
from .log_files import LogFiles
from .loop import Loop
from .oom import OomWatch
from .orders import Orders
from .outputs import Outputs
from .proc_table import AskStop, Command, ProcState, ProcTable, TellGone, TellReplaced, TellUp
from .stacks import stacks_file
from .watchdog import Watchdog
from .zygotes import Zygotes

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from ..messages.link import Link
    from .agent_network import AgentNetwork
    from .kept import Kept


class AgentProcs(ABC):
    """The part of an agent that has to do with processes.

    Args:
        directory: The job's private socket directory.
        host: Name of this host.
        log_directory: Where per-rank files go.
        seed: Socket of the first zygote.
        slot: Of this host in the job.
    """

    _kept: Kept

    def __init__(self, directory: str, host: str, log_directory: str, seed: socket.socket, *, slot: int) -> None:
        self._directory, self._host, self._slot = directory, host, slot
        self.loop = Loop()
        self._table = ProcTable(host)
        self._orders = Orders(directory, host, slot)
        self._network: AgentNetwork | None = None
        self._links: dict[str, Link] = {}
        self._pidfds: dict[str, int] = {}
        self._old_paths: dict[str, str] = {}
        self._delayed: list[tuple[dict[str, Any], list[str]]] = []
        self._draining: set[str] = set()
        self._quitting = self._leaves = False
        self._outputs = Outputs(
            LogFiles(log_directory), self._on_lines, watch=self.loop.watch, unwatch=self.loop.unwatch
        )
        self._zygotes = Zygotes(
            seed,
            watch=self.loop.watch,
            unwatch=self.loop.unwatch,
            on_started=self._on_started,
            started=self._started_pids,
            on_failed=self._on_not_started,
            warn=self._warn,
        )
        self._oom = OomWatch()
        self._watchdog = Watchdog(
            stuck_s(),
            host=host,
            procs=self._table.procs,
            tell=self.tell,
            log_tail=self._outputs.last_lines,
            watch=self.loop.watch,
            unwatch=self.loop.unwatch,
        )

    @abstractmethod
    def tell(self, proc: str, name: str, fields: dict[str, Any]) -> None:
        """Send an event to a process, wherever it is."""

    @abstractmethod
    def _on_lines(self, proc: str, stream: str, lines: list[str]) -> None:
        """A process has written lines."""

    @abstractmethod
    def _warn(self, text: str) -> None:
        """Have the controller print a line."""

    def _end_mesh(self, mesh: str) -> None:
        self._table.on_mesh_over(mesh)
        spares = [record.proc for record in self._table.procs.values() if record.mesh == mesh and record.is_spare]
        self._orders.forget(mesh)
        self._kept.forget_mesh(mesh)
        self.carry_out(self._table.on_stop(spares, now_s=time.monotonic(), grace_s=0.0))
        self._drop_mesh(mesh)

    def _drop_mesh(self, mesh: str) -> None:
        """Give up what the processes of a mesh shared, once there are none."""
        if any(record.mesh == mesh for record in self._table.procs.values()):
            return
        self._orders.on_empty(mesh)

    def _on_spawn(self, owner: str, fields: dict[str, Any]) -> None:
        procs = [proc for proc in fields["procs"] if proc not in self._table.gone]
        if fields["procs"] and not procs:
            return
        num_spares = fields["spares"] if self._orders.get(fields["mesh"]) is None else 0
        order = self._orders.add(self._with_boot_file(fields, owner), owner)
        self.carry_out(self._table.on_spawn(self._orders.info(order), procs))
        if self._quitting:
            self._table.on_stop(procs, now_s=time.monotonic())
        if owner in self._table.gone or self._quitting:
            self._on_not_started(procs, f"its owner {owner} had ended", "")
            return
        self._start(order, procs)
        for spare in self._orders.spares(order, num_spares):
            self._start_spare(order, spare)

    def _with_boot_file(self, fields: dict[str, Any], owner: str) -> dict[str, Any]:
        """Put down what the processes of a mesh read, where its owner is on another host."""
        if host_of(owner) == self._slot:
            return fields
        path = f"{self._directory}/{file_name(fields['mesh'])}.boot@{file_name(owner)}"
        with contextlib.suppress(FileExistsError), open(path, "xb", opener=_private) as file:
            file.write(fields["boot"])
        return {**fields, "boot_file": path}

    def _start(self, order: dict[str, Any], procs: list[str]) -> None:
        """Fork ``procs``, or have spares be them, once what those before them had spawned has ended."""
        owners = {record.owner for record in self._table.procs.values()}
        if any(incarnation_of(proc) and _before(proc) in owners for proc in procs):
            self._delayed.append((order, procs))
            return
        stopped = [proc for proc in procs if self._table.procs[proc].state is ProcState.STOPPING]
        if stopped:
            self._on_not_started(stopped, "", "")
        wanted = [proc for proc in procs if proc not in stopped]
        self._fork(order, [proc for proc in wanted if not self._adopt_spare(order, proc)])

    def _start_delayed(self) -> None:
        delayed, self._delayed = self._delayed, []
        for order, procs in delayed:
            self._start(order, procs)

    def _fork(self, order: dict[str, Any], procs: list[str]) -> None:
        """Have a zygote make ``procs``."""
        if not procs:
            return
        try:
            requests = [self._orders.request(order, proc) for proc in procs]
            outputs = [self._outputs.open(proc) for proc in procs]
        except (OSError, ValueError) as error:
            self._on_not_started(procs, f"{type(error).__name__}: {error}", "")
            return
        self._zygotes.start(
            self._orders.zygote_key(order),
            order["preload"],
            order["zygote_env"],
            self._orders.sys_path(order),
            self._orders.common(order),
            requests,
            outputs,
        )

    def _adopt_spare(self, order: dict[str, Any], proc: str) -> bool:
        """Let a spare of the mesh take the place of ``proc``; return False where there is none."""
        spare = self._table.find_spare(order["mesh"]) if incarnation_of(proc) else None
        if spare is None:
            return False
        try:
            request = self._orders.request(order, proc)
        except (OSError, ValueError):
            # Told by the attempt to fork it.
            return False
        self._table.on_adopt(spare, proc)
        self._links[proc] = self._links.pop(spare)
        pidfd = self._pidfds[proc] = self._pidfds.pop(spare)
        self.loop.unwatch(pidfd)
        self.loop.watch(pidfd, lambda: self._on_exit(proc))
        self._outputs.rename(spare, proc)
        self.tell(proc, "adopt", request)
        # Not removed before it answers: the link to it may still be about to connect.
        self._old_paths[proc] = f"{self._directory}/{file_name(spare)}"
        self._start_spare(order, next_address(spare))
        return True

    def _start_spare(self, order: dict[str, Any], spare: str) -> None:
        self._table.on_spawn(replace(self._orders.info(order), restartable=False), [spare])
        self._fork(order, [spare])

    def _started_pids(self) -> set[int]:
        return {record.pid for record in self._table.procs.values() if record.pid is not None}

    def _on_started(self, proc: str, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        self._pidfds[proc] = pidfd
        self.loop.watch(pidfd, lambda: self._on_exit(proc))
        self._oom.on_started(proc, pid)
        self.carry_out(self._table.on_started(proc, pid))

    def _on_not_started(self, procs: Iterable[str], detail: str, traceback: str) -> None:
        for proc in procs:
            self._outputs.close(proc)
            self.carry_out(self._table.on_not_started(proc, detail, traceback))
        self._start_delayed()

    def _on_exit(self, proc: str) -> None:
        pidfd = self._pidfds[proc]
        status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        if status is None:
            return
        del self._pidfds[proc]
        self.loop.unwatch(pidfd)
        os.close(pidfd)
        killed = status.si_code != os.CLD_EXITED
        tail = self._outputs.close(proc)
        commands = self._table.on_exit(
            proc,
            exit_code=None if killed else status.si_status,
            signum=status.si_status if killed else None,
            log_tail=tail,
            now_s=time.monotonic(),
            out_of_memory=self._killed_by_kernel(proc, status),
        )
        self._draining.discard(proc)
        self.carry_out(commands)
        self._forget(proc)
        if self._network is not None:
            self._network.elsewhere.on_process_gone(proc)
        for mesh in self._orders.owned_by(proc):
            self._end_mesh(mesh)
        if self._table.gone[proc].kind is not FailureKind.STOPPED:
            self._orders.on_owner_lost(proc)
        self._replace_spare(proc)
        self._start_delayed()

    def _killed_by_kernel(self, proc: str, status: os.waitid_result) -> str:
        record = self._table.procs.get(proc)
        is_ours = record is None or record.state is ProcState.STOPPING
        if is_ours or status.si_status != signal.SIGKILL or status.si_code == os.CLD_EXITED:
            return ""
        return self._oom.on_killed(proc, now_s=time.monotonic())

    def _replace_spare(self, proc: str) -> None:
        """A spare has ended: start another, unless they keep ending."""
        order = self._orders.get(mesh_of(proc))
        if order is None or rank_of(proc) < order["count"] or self._quitting:
            return
        if self._table.gone[proc].kind is FailureKind.STOPPED:
            return
        if self._orders.may_replace_spare(proc):
            self._start_spare(order, next_address(proc))
        else:
            self._warn(f"spares of mesh {order['name']!r} keep ending; none is started any more")

    def _remove_old_path(self, proc: str) -> None:
        """Remove the socket that ``proc`` had as a spare."""
        with contextlib.suppress(KeyError, OSError):
            os.unlink(self._old_paths.pop(proc))

    def _forget(self, proc: str) -> None:
        link = self._links.pop(proc, None)
        if link is not None:
            link.close()
        self._watchdog.on_exit(proc)
        self._oom.on_exit(proc)
        self._remove_old_path(proc)
        own = f"{self._directory}/{file_name(proc)}"
        for path in (own, stacks_file(own)):
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._drop_mesh(mesh_of(proc))

    def carry_out(self, commands: Iterable[Command]) -> None:
        """Do what the table says."""
        for command in commands:
            if isinstance(command, TellUp):
                record = self._table.procs.get(command.proc)
                fields = {
                    "proc": command.proc,
                    "path": f"{self._directory}/{file_name(command.proc)}",
                    "restartable": record is not None and record.info.restartable,
                }
                self.tell(command.to, "up", fields)
            elif isinstance(command, TellGone):
                if self._leaves and (command.to == CONTROLLER or host_of(command.to) != self._slot):
                    # They learn of all of them at once, by the end of this process: then another host can start them.
                    continue
                fields = {"failure": pack_failure(command.failure), "next": command.following}
                self.tell(command.to, "died", {"proc": command.proc, **fields})
            elif isinstance(command, TellReplaced):
                self.tell(command.to, "replaced", {"proc": command.proc, "next": command.following})
            elif isinstance(command, AskStop):
                failure = command.failure and pack_failure(command.failure)
                self.tell(command.proc, "stop", {"failure": failure})
            else:
                pidfd = self._pidfds.get(command.proc)
                if pidfd is not None:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(pidfd, command.signum)


def _before(proc: str) -> str:
    """The address of the process that was at this place before."""
    return address(place_of(proc), incarnation_of(proc) - 1)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
