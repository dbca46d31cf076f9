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
from typing import TYPE_CHECKING, Any, Final

import zmq

from ..address import (
    AGENT,
    CONTROLLER,
    mesh_of,
    slots_of,
)
from ..config import GRACE_AFTER_ERROR_S, preempt_s
from ..failure import FailureKind, unpack_failure
from ..messages import wire
from ..messages.frames import received
from ..messages.link import Link
from .agent_network import AgentNetwork
from .agent_procs import AgentProcs
from .kept import Kept
from .oom import MEMORY_S
from .proc_table import ProcState, TellUp

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from .settings import AgentSettings

SAME_SIGNAL_S: Final = 2.0
"""A scheduler that signals every process of a job, and a daemon that passes its signal on, mean one and the same."""

_log = logging.getLogger("danaus.agent")


class Agent(AgentProcs):
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
        super().__init__(directory, host, log_directory, seed, slot=slot)
        self._context: zmq.Context[Any] = zmq.Context()
        self._pull: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._pull.rcvhwm = 0
        self._pull.bind(f"ipc://{directory}/{AGENT}")
        self.loop.watch_socket(self._pull, self._receive)
        self._kept = Kept(self._on_recalled, waits=life > 0)
        self._look_at_s = 0.0
        self._drain_until_s: float | None = None
        self._signalled_s: float | None = None
        self._is_preempted = False
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
        "spawn": AgentProcs._on_spawn,
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
