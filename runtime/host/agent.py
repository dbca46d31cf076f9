"""The host agent: the one daemon of a job on a host that starts processes, watches them and tells who waits for them.

It never unpickles and runs no user code. On the controller's host the controller starts it, in a Python of its own (see
interpreter.py); on other hosts `danaus host` does, for each job that attaches.

    controller --REQUEST--> agent --fork request--> zygote --fork--> procs (children of the agent)
    agent --EVENT--> controller and procs: up, died, log, stop
    agent <--packets--> agents of other hosts (network/)
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import zmq

from ..address import (
    AGENT,
    CONTROLLER,
    address,
    file_name,
    host_of,
    incarnation_of,
    mesh_of,
    next_address,
    place_of,
    rank_of,
    slots_of,
)
from ..config import GRACE_AFTER_ERROR_S, preempt_s, stuck_s
from ..failure import FailureKind, pack_failure, unpack_failure
from ..messages import wire
from ..messages.frames import received
from ..messages.link import Link
from .agent_network import AgentNetwork
from .kept import Kept
from .log_files import LogFiles
from .loop import Loop
from .oom import MEMORY_S, OomWatch
from .orders import Orders
from .outputs import Outputs
from .proc_table import AskStop, Command, ProcState, ProcTable, TellGone, TellReplaced, TellUp
from .stacks import stacks_file
from .watchdog import Watchdog
from .zygotes import Zygotes

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Sequence

    from .settings import AgentSettings

SAME_SIGNAL_S: Final = 2.0
"""A scheduler that signals every process of a job, and a daemon that passes its signal on, mean one and the same."""

_log = logging.getLogger("danaus.agent")


class Agent:
    """The daemon's state and its loop.

    Args:
        directory: The job's private socket directory.
        parent_fd: Pidfd of the process whose end is this one's: the controller, or the host's daemon.
        host: Name of this host.
        log_directory: Where per-rank files go.
        seed: Socket of the first zygote, forked before this process had anything to hand on.
        slot: Of this host in the job.
        life: How many agents have had that slot before.
    """

    def __init__(
        self,
        directory: str,
        parent_fd: int,
        host: str,
        log_directory: str,
        seed: socket.socket,
        *,
        slot: int = 0,
        life: int = 0,
    ) -> None:
        self._directory, self._host, self._slot = directory, host, slot
        self._table = ProcTable(host)
        self._orders = Orders(directory, host, slot)
        self._context: zmq.Context[Any] = zmq.Context()
        self._pull: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._pull.rcvhwm = 0
        self._pull.bind(f"ipc://{directory}/{AGENT}")
        self.loop = Loop()
        self.loop.watch_socket(self._pull, self._receive)
        self._network: AgentNetwork | None = None
        self._links: dict[str, Link] = {}
        self._pidfds: dict[str, int] = {}
        self._old_paths: dict[str, str] = {}
        self._delayed: list[tuple[dict[str, Any], list[str]]] = []
        self._kept = Kept(self._on_recalled, waits=life > 0)
        self._quitting = False
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
        self._oom, self._look_at_s = OomWatch(), 0.0
        self._watchdog = Watchdog(
            stuck_s(),
            host=host,
            procs=self._table.procs,
            tell=self.tell,
            log_tail=self._outputs.last_lines,
            watch=self.loop.watch,
            unwatch=self.loop.unwatch,
        )
        self._draining: set[str] = set()
        self._drain_until_s: float | None = None
        self._signalled_s: float | None = None
        self._is_preempted = self._leaves = False
        self._parent_fd = parent_fd
        self.loop.watch(self._parent_fd, self._on_parent_gone)
        self.loop.watch_signals((signal.SIGTERM, signal.SIGINT), self._on_signals)
        if not slot:
            self._link(CONTROLLER, f"{directory}/{CONTROLLER}")
            fields = {"path": f"{directory}/{AGENT}", "pid": os.getpid(), "logs": log_directory}
            self.tell(CONTROLLER, "agent_up", fields)

    # the loop:

    def run(self) -> None:
        """Serve until the job ends; leaves nothing behind."""
        while not self._is_over():
            self.loop.wait(self._timeout_ms())
            now_s = time.monotonic()
            for part in (self._network, self._watchdog, self._kept):
                if part is not None:
                    part.check(now_s=now_s)
            self.carry_out(self._table.check(now_s=now_s))
            if self._drain_until_s is not None and (not self._draining or now_s >= self._drain_until_s):
                self._end_preempted()
            if now_s >= self._look_at_s:
                self._look_at_s = now_s + MEMORY_S / 2
                self._oom.look(now_s=now_s)
        self._close()

    def _is_over(self) -> bool:
        is_over = self._quitting and not self._table.procs
        return is_over and (self._network is None or self._network.is_over())

    def _timeout_ms(self) -> int:
        checked = (self._table, self._watchdog, self._network, self._kept)
        times_s = [*(each.next_check_s() for each in checked if each is not None), self._drain_until_s]
        next_s = min((time_s for time_s in times_s if time_s is not None), default=None)
        return -1 if next_s is None else max(0, int((next_s - time.monotonic()) * 1000) + 1)

    def _receive(self) -> None:
        for frames in received(self._pull, 256):
            try:
                if len(frames) > 1:
                    raise wire.WireError("agents take no attachments")  # noqa: TRY301  told like any other
                for envelope in wire.unpack(frames):
                    self._on_request(envelope)
            except wire.WireError as error:
                _log.warning("dropped a malformed message: %s", error)

    # requests:

    def _on_request(self, envelope: wire.Envelope) -> None:
        if envelope[0] != wire.REQUEST:
            raise wire.WireError(f"agents take requests, not kind {envelope[0]}")
        _, name, sender, fields = envelope
        if self._network is None and (name == "attach" or self._is_elsewhere(fields)):
            self._join(None)
        if self._network is not None:
            fields = self._network.split(name, sender, fields)
        if fields is not None:
            self.handle(name, sender, fields)

    def _is_elsewhere(self, fields: dict[str, Any]) -> bool:
        """Whether a request is about processes of other hosts, of which an agent before this one may have known."""
        mesh = fields.get("mesh") or mesh_of(fields.get("proc", ""))
        return isinstance(mesh, str) and slots_of(mesh) != (self._slot,)

    def handle(self, name: str, sender: str, fields: dict[str, Any]) -> None:
        """Carry out a request that concerns this host."""
        handler = self._REQUESTS.get(name)
        if handler is None:
            _log.warning("unknown request %r of %s", name, sender)
        else:
            handler(self, sender, fields)

    def _on_up(self, _sender: str, fields: dict[str, Any]) -> None:
        proc = fields["proc"]
        self._zygotes.on_up(proc, fields["pid"])
        self._remove_old_path(proc)
        if proc not in self._links:
            self._link(proc, fields["path"])
        self.carry_out(self._table.on_up(proc))

    def _on_watch(self, sender: str, fields: dict[str, Any]) -> None:
        proc = fields["proc"]
        self.carry_out([TellUp(sender, proc)] if proc == CONTROLLER else self._table.on_watch(proc, sender))

    def _on_signal(self, sender: str, fields: dict[str, Any]) -> None:
        pidfd = self._pidfds.get(fields["proc"])
        # Of one that is gone the sender hears as its watcher.
        if pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, fields["signum"])
                self._send(sender, [wire.REPLY, fields["port"], 0, wire.OK, 0, fields["token"], None])

    def _on_failing(self, sender: str, fields: dict[str, Any]) -> None:
        self._table.on_failing(sender, FailureKind(fields["kind"]), fields["traceback"])
        self.tell(sender, "noted", {})

    def _on_stop(self, _sender: str, fields: dict[str, Any]) -> None:
        self.carry_out(self._table.on_stop(fields["procs"], now_s=time.monotonic(), grace_s=fields["grace_s"]))

    def _on_stop_mesh(self, _sender: str, fields: dict[str, Any]) -> None:
        """No rank of a mesh is wanted any more: its spares go, and so does what was kept for it."""
        self._end_mesh(fields["mesh"])

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

    def _on_restart(self, _sender: str, fields: dict[str, Any]) -> None:
        failure = unpack_failure(fields["failure"])
        self.carry_out(self._table.on_restart(fields["proc"], failure, now_s=time.monotonic()))

    def _on_abandon(self, _sender: str, fields: dict[str, Any]) -> None:
        self.carry_out(self._table.on_abandon(fields["proc"]))

    def _on_policy(self, _sender: str, fields: dict[str, Any]) -> None:
        self._table.on_policy(fields["mesh"], restartable=fields["restartable"])

    def _on_keep(self, sender: str, fields: dict[str, Any]) -> None:
        """Keep what an actor wants to have back when it is started again."""
        self._kept.keep(sender, fields["actor"], fields["state"])
        if self._network is not None:
            self._network.keep_copy(sender, fields["actor"], fields["state"])
        self.tell(sender, "kept", {"token": fields["token"], "state": None})

    def _on_recalled(self, proc: str, token: int, state: bytes | None) -> None:
        self.tell(proc, "kept", {"token": token, "state": state})

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

    # processes:

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

    # links:

    def _link(self, proc: str, path: str) -> None:
        link = self._links[proc] = Link(proc, Link.flush)
        link.open(self._context, f"ipc://{path}")

    def tell(self, proc: str, name: str, fields: dict[str, Any]) -> None:
        """Send an event to a process, wherever it is."""
        self._send(proc, [wire.EVENT, name, fields])

    def _send(self, proc: str, envelope: wire.Envelope) -> None:
        link = self._links.get(proc)
        if link is not None:
            link.send(wire.pack(envelope))
        elif self._network is not None:
            self._network.tell(proc, wire.pack(envelope))

    # other hosts:

    def _join(self, settings: AgentSettings | None) -> AgentNetwork:
        self._network = AgentNetwork(self, self._context, self._directory, self._host, settings)
        return self._network

    def join(self, settings: AgentSettings) -> str:
        """Be one of several agents of a job; return where the others reach this one."""
        self.set_host_address(settings.advertise)
        return self._join(settings).endpoint

    def set_host_address(self, address: str) -> None:
        """Processes of other hosts reach those of this one at ``address``."""
        if address != self._orders.host_address:
            self._orders.host_address = address
            for proc in self._links:
                self.tell(proc, "host_address", {"address": address})

    def on_member(self, slot: int) -> None:
        """An agent has joined; where it follows a lost one it gets what is kept of that one's actors."""
        kept = self._kept.of_host(slot)
        if kept and self._network is not None:
            self._network.elsewhere.ask_agent(slot, "take_over", {"kept": kept})

    def deliver(self, proc: str, frames: Sequence[Any]) -> None:
        """Hand a message from another host to a process here; dropped where that is gone."""
        link = self._links.get(proc)
        if link is not None:
            link.carry(frames)

    def on_owner_gone(self, proc: str) -> None:
        """A process of another host is gone: end what it had ordered here."""
        self.carry_out(self._table.on_owner_gone(proc, now_s=time.monotonic()))
        for mesh in self._orders.owned_by(proc):
            self._end_mesh(mesh)
        self._orders.on_owner_lost(proc)

    # logs:

    def _on_lines(self, proc: str, stream: str, lines: list[str]) -> None:
        record = self._table.procs.get(proc)
        name, rank = (record.name, record.rank) if record is not None else (proc, 0)
        fields = {"mesh": mesh_of(proc), "name": name, "rank": rank, "stream": stream, "lines": lines}
        self.tell(CONTROLLER, "log", fields)

    def _warn(self, text: str) -> None:
        fields = {"mesh": "agent", "name": "agent", "rank": 0, "stream": "stderr", "lines": [text]}
        self.tell(CONTROLLER, "log", fields)

    # the end:

    def _on_parent_gone(self) -> None:
        self.loop.unwatch(self._parent_fd)
        link = self._links.pop(CONTROLLER, None)
        if link is not None:
            link.close()
        self.quit()

    def quit(self, grace_s: float = GRACE_AFTER_ERROR_S) -> None:
        """End every process here, then this one; on the controller's host, the whole job."""
        self._quitting = True
        self._leaves = self._is_preempted or self._slot != 0
        if self._network is not None:
            self._network.end()
        commands = self._table.on_stop(list(self._table.procs), now_s=time.monotonic(), grace_s=grace_s)
        self.carry_out(commands)
        delayed, self._delayed = self._delayed, []
        # A zygote that still imports would only start them after that.
        waiting = [*self._zygotes.give_up_pending(), *(proc for _, procs in delayed for proc in procs)]
        self._on_not_started(waiting, "", "")

    def _on_signals(self, signums: list[int]) -> None:
        now_s = time.monotonic()
        if signal.SIGINT in signums or (self._signalled_s is not None and now_s - self._signalled_s > SAME_SIGNAL_S):
            self.quit()
        elif not self._quitting and self._signalled_s is None:
            self._signalled_s = now_s
            self._preempt()

    def _preempt(self) -> None:
        """This host is about to be taken away: tell everybody, and give actors time to save what they have."""
        records = [r for r in self._table.procs.values() if r.state is ProcState.UP and not r.is_spare]
        seconds = preempt_s()
        self._draining = {record.proc for record in records}
        self._drain_until_s = time.monotonic() + seconds
        for owner in {record.owner for record in records} | {CONTROLLER}:
            owned = [record.proc for record in records if record.owner == owner]
            self.tell(owner, "preempted", {"host": self._host, "seconds": seconds, "procs": owned})
        for record in records:
            self.tell(record.proc, "drain", {"seconds": seconds})

    def _end_preempted(self) -> None:
        """All have drained, or the time is over: hand over what is kept, and end."""
        self._drain_until_s = None
        self._is_preempted = True
        if self._network is not None and self._slot:
            self._network.hand_over(self._kept.of_host(self._slot))
        else:
            self.tell(CONTROLLER, "handover", {"kept": self._kept.of_host(self._slot)})
        self.quit()

    def _close(self) -> None:
        # At its very end Python gives signals back their default action: a late notice would change the exit code.
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        self._zygotes.close()
        self._watchdog.close()
        if self._network is not None:
            self._network.close(is_preempted=self._is_preempted)
        else:
            self.tell(CONTROLLER, "bye", {})
        for link in self._links.values():
            link.close(linger_ms=500)
        self._pull.close(0)
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)

    _REQUESTS: Final[dict[str, Callable[[Agent, str, dict[str, Any]], None]]] = {
        "spawn": _on_spawn,
        "up": _on_up,
        "watch": _on_watch,
        "failing": _on_failing,
        "signal": _on_signal,
        "stop": _on_stop,
        "stop_mesh": _on_stop_mesh,
        "restart": _on_restart,
        "abandon": _on_abandon,
        "policy": _on_policy,
        "keep": _on_keep,
        "recall": lambda self, sender, fields: self._kept.recall(sender, fields["actor"], fields["token"]),
        "forget": lambda self, sender, fields: self._kept.forget(sender, fields["actor"]),
        "ready": lambda self, sender, fields: self._watchdog.on_ready(sender, fields),
        "pong": lambda self, sender, fields: self._watchdog.on_pong(sender, fields["number"]),
        "drained": lambda self, sender, _fields: self._draining.discard(sender),
        "take_over": lambda self, _sender, fields: self._kept.take_over(fields["kept"]),
        "keep_copy": lambda self, _sender, fields: self._kept.keep(fields["proc"], fields["actor"], fields["state"]),
        "quit": lambda self, _sender, fields: self.quit(fields["grace_s"]),
    }


def _before(proc: str) -> str:
    """The address of the process that was at this place before."""
    return address(place_of(proc), incarnation_of(proc) - 1)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
