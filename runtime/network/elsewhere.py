"""An agent's part in a job of several hosts: sends requests where they belong, and tells its own what it hears.

    process --REQUEST--> its agent --what concerns other hosts--> their agents
    their agents --EVENT--> this one --> those here that wait for it

The root, the controller's agent, decides who is a member; the others take its word (root_hosts.py).
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, Protocol

import zmq

from ..address import CONTROLLER, GATE, agent_of, host_of, incarnation_of, mesh_of, name_of, rank_of, slots_of
from ..config import grace_s
from ..failure import FailureKind, MeshFailure, unpack_failure
from ..host.proc_table import TellGone
from ..messages import wire
from .attempts import Attempts
from .door import Door
from .far_procs import Ask, FarProcs
from .keys import derive
from .neighbours import Neighbours
from .router import Router, receive_gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..host.proc_table import Command
    from .carrier import Loss
    from .far_procs import FarCommand
    from .neighbours import Unwatch, Watch
    from .packets import Frames

ORPHANED_S: Final = 5.0
"""How much longer than the grace period an agent waits for one above it."""

_TO_ONE: Final = frozenset({"watch", "restart", "abandon", "signal"})
_TO_MESH: Final = frozenset({"stop_mesh", "policy"})
_log = logging.getLogger("danaus.agent")


class Here(Protocol):
    """What the agent does for this part of it."""

    def handle(self, name: str, sender: str, fields: dict[str, Any]) -> None:
        """Carry out a request that concerns this host."""
        ...

    def tell_here(self, commands: Iterable[Command]) -> None:
        """Tell processes of this host."""
        ...

    def deliver(self, proc: str, frames: Frames) -> None:
        """Hand a message to a process of this host."""
        ...

    def on_far_owner_gone(self, proc: str) -> None:
        """End what a process of another host had ordered here."""
        ...

    def on_told(self, origin: int, name: str, fields: dict[str, Any]) -> None:
        """Take what the agent of another host says about that host."""
        ...

    def on_member(self, slot: int) -> None:
        """An agent has joined, or follows another at its slot."""
        ...

    def on_job_over(self, why: str) -> None:
        """The job has ended, or goes on without this host."""
        ...


class Elsewhere:
    """The other hosts, for one agent.

    Args:
        here: The agent.
        context: ZeroMQ's.
        slot: Of this host.
        life: Of this agent.
        host: Name of this host.
        directory: The job's on this host.
        secret: The job's.
        address: Where to listen; None at the root.
        advertise: Host by which others reach this one.
        watch: Has a socket polled.
        unwatch: Ends that.
        touch: Hears of sockets that something was sent on.
    """

    def __init__(
        self,
        here: Here,
        context: zmq.Context[Any],
        *,
        slot: int,
        life: int,
        host: str,
        directory: str,
        secret: bytes,
        address: str | None,
        advertise: str | None,
        watch: Watch,
        unwatch: Unwatch,
        touch: Unwatch,
    ) -> None:
        self._here, self.slot = here, slot
        self.name = agent_of(slot)
        listener, caller = derive(secret, "listener", "job"), derive(secret, "caller", "job")
        self._door = Door(context, [caller.public])
        watch(self._door.socket, self._door.serve)

        def neighbours(on_message: Callable[[int, Frames], object]) -> Neighbours:
            return Neighbours(
                context,
                slot=slot,
                life=life,
                address=address,
                advertise=advertise,
                listener=listener,
                caller=caller,
                door=self._door,
                watch=watch,
                unwatch=unwatch,
                touch=touch,
                on_message=on_message,
            )

        self.router = Router(
            slot,
            life,
            host,
            neighbours,
            deliver=here.deliver,
            on_agent_message=self._on_agent_message,
            on_lost=self._on_lost,
            on_member=self._on_member,
        )
        listening = self.router.neighbours.listener
        self.attempts = None if listening is None else Attempts(listening)
        if self.attempts is not None:
            watch(self.attempts.socket, self.attempts.serve)
        self._gate: zmq.Socket[bytes] = context.socket(zmq.PULL)
        self._gate.rcvhwm = 0
        self._gate.bind(f"ipc://{os.path.join(directory, GATE)}")
        watch(self._gate, lambda: receive_gate(self._gate, self.router))
        self._unwatch = unwatch
        self._far = FarProcs()
        self._held: dict[int, list[tuple[str, str, dict[str, Any]]]] = defaultdict(list)
        self._unready: set[int] = set()
        self._told_silent: set[int] = set()
        self.grace_s = grace_s()

    # requests of processes here:

    def split(self, name: str, sender: str, fields: dict[str, Any]) -> dict[str, Any] | None:
        """Send on what concerns other hosts; return what concerns this one, or None."""
        if name in _TO_ONE:
            return self._to_one(name, sender, fields)
        if name in _TO_MESH:
            return self._to_mesh(name, sender, fields)
        if name in {"spawn", "stop"}:
            return self._to_procs(name, sender, fields)
        return fields

    def _to_one(self, name: str, sender: str, fields: dict[str, Any]) -> dict[str, Any] | None:
        proc = fields["proc"]
        slot = host_of(proc)
        if slot == self.slot:
            return fields
        if name == "watch":
            self._carry_out(self._far.on_watch(proc, sender))
        elif self.router.is_known(slot):
            self._request(slot, name, sender, fields)
        elif name == "abandon":
            self._abandon(proc)
        return None

    def _abandon(self, proc: str) -> None:
        """Nobody starts a rank of a host that is lost, so nobody there can say so to the others."""
        self._carry_out(self._far.on_abandoned(proc))
        for slot in self.router.members:
            if slot != self.slot:
                self._event(slot, "abandoned", {"proc": proc})

    def _to_mesh(self, name: str, sender: str, fields: dict[str, Any]) -> dict[str, Any] | None:
        # What is kept of a mesh's actors is kept on other hosts, too.
        slots = slots_of(fields["mesh"]) if name == "policy" else [*self.router.members]
        if name == "policy":
            self._far.on_policy(fields["mesh"], restartable=fields["restartable"])
        for slot in slots:
            if slot != self.slot and self.router.is_known(slot):
                self._request(slot, name, sender, fields)
        return fields if self.slot in slots else None

    def _to_procs(self, name: str, sender: str, fields: dict[str, Any]) -> dict[str, Any] | None:
        by_slot: dict[int, list[str]] = {slot: [] for slot in slots_of(fields["mesh"])} if name == "spawn" else {}
        for proc in fields["procs"]:
            by_slot.setdefault(host_of(proc), []).append(proc)
        mine = by_slot.pop(self.slot, None)
        for slot, procs in by_slot.items():
            part = {**fields, "procs": procs}
            if name == "spawn":
                self._order(slot, sender, part)
            elif self.router.is_known(slot):
                self._request(slot, name, sender, part)
            else:
                self._carry_out(self._stopped(procs))
        return None if mine is None else {**fields, "procs": mine}

    def _order(self, slot: int, owner: str, fields: dict[str, Any]) -> None:
        procs = fields["procs"]
        self._carry_out(self._far.on_ordered(procs, owner, restartable=fields["restartable"]))
        loss = self.router.lost.get(slot)
        # An owner that has paused before it starts a rank again may come between the host's return and its files.
        lacks_files = slot in self._unready and bool(fields["workspaces"])
        if self.router.is_known(slot) and not lacks_files:
            self._send_order(slot, owner, fields)
        elif lacks_files or (loss is not None and loss.may_return):
            self._held[slot].append(("spawn", owner, fields))
        else:
            why = "there is no such host" if loss is None else loss.why
            self._carry_out(self._lost(procs, why))

    def _send_order(self, slot: int, owner: str, fields: dict[str, Any]) -> None:
        self._far.on_order_sent(fields["procs"])
        self._request(slot, "spawn", owner, fields)

    def _lost(self, procs: list[str], why: str) -> list[FarCommand]:
        commands: list[FarCommand] = []
        for proc in procs:
            commands += self._far.on_died(proc, self._failure(proc, FailureKind.HOST_LOST, why), None)
        return commands

    def _stopped(self, procs: list[str]) -> list[FarCommand]:
        commands: list[FarCommand] = []
        for proc in procs:
            commands += self._far.on_died(proc, self._failure(proc, FailureKind.STOPPED, ""), None)
        return commands

    def _failure(self, proc: str, kind: FailureKind, why: str) -> MeshFailure:
        return MeshFailure(
            kind=kind,
            mesh=name_of(proc),
            rank=rank_of(proc),
            host=self._host_name(host_of(proc)),
            incarnation=incarnation_of(proc),
            detail=why,
        )

    def _host_name(self, slot: int) -> str:
        member = self.router.members.get(slot)
        return member.host if member is not None else f"host {slot}"

    # to other agents:

    def tell(self, proc: str, data: bytes) -> None:
        """Send a packed envelope to a process elsewhere, or to the agent there where ``proc`` is its address."""
        if mesh_of(proc).startswith("agent@"):
            self.router.to_agent(host_of(proc), data)
        else:
            self.router.to_process(proc, [data])

    def _request(self, slot: int, name: str, sender: str, fields: dict[str, Any]) -> None:
        self.router.to_agent(slot, wire.pack([wire.REQUEST, name, sender, fields]))

    def _event(self, slot: int, name: str, fields: dict[str, Any]) -> None:
        self.router.to_agent(slot, wire.pack([wire.EVENT, name, fields]))

    def tell_agent(self, slot: int, name: str, fields: dict[str, Any]) -> None:
        """Tell another agent something."""
        self._event(slot, name, fields)

    def tell_ready(self, slot: int) -> None:
        """Have everybody hear that a host has what it needs."""
        for other in self.router.members:
            if other != self.slot and self.router.is_known(other):
                self._event(other, "host_ready", {"slot": slot})
        self.on_host_ready(slot)

    def ask_agent(self, slot: int, name: str, fields: dict[str, Any]) -> None:
        """Ask another agent for something that concerns the job as a whole."""
        self._request(slot, name, self.name, fields)

    # from other agents:

    def _on_agent_message(self, origin: int, data: Any) -> None:
        for envelope in wire.unpack([data]):
            try:
                if envelope[0] == wire.REQUEST:
                    self._on_request(envelope[1], envelope[2], envelope[3])
                elif envelope[0] == wire.EVENT:
                    self._on_event(origin, envelope[1], envelope[2])
                else:
                    raise wire.WireError(f"agents send one another requests and events, not kind {envelope[0]}")
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise wire.WireError(f"{envelope[1]!r:.40}: {type(error).__name__}: {error}") from error

    def _on_request(self, name: str, sender: str, fields: dict[str, Any]) -> None:
        if name == "spawn" and host_of(sender) != self.slot and sender != CONTROLLER:
            # What it has ordered here ends with it.
            self._carry_out(self._far.on_watch(sender, self.name))
        self._here.handle(name, sender, fields)

    def _on_event(self, origin: int, name: str, fields: dict[str, Any]) -> None:
        if name == "up":
            self._carry_out(self._far.on_up(fields["proc"], restartable=bool(fields.get("restartable"))))
        elif name == "died":
            failure = unpack_failure(fields["failure"])
            self._carry_out(self._far.on_died(fields["proc"], failure, fields["next"]))
        elif name == "replaced":
            self._carry_out(self._far.on_replaced(fields["proc"], fields["next"]))
        elif name == "abandoned":
            self._carry_out(self._far.on_abandoned(fields["proc"]))
        elif name == "host_ready":
            self.on_host_ready(fields["slot"])
        elif name == "end":
            self._here.on_job_over("")
        else:
            self._here.on_told(origin, name, fields)

    def _carry_out(self, commands: Iterable[FarCommand]) -> None:
        for command in commands:
            if isinstance(command, Ask):
                slot = host_of(command.proc)
                if self.router.is_known(slot):
                    self._request(slot, "watch", self.name, {"proc": command.proc})
                    continue
                loss = self.router.lost.get(slot)
                if loss is None or not loss.may_return:
                    why = "there is no such host" if loss is None else loss.why
                    self._carry_out(self._lost([command.proc], why))
            elif getattr(command, "to", None) != self.name:
                self._here.tell_here([command])
            elif isinstance(command, TellGone):
                self._here.on_far_owner_gone(command.proc)

    def on_process_gone(self, proc: str) -> None:
        """A process of this host has ended."""
        self._far.on_watcher_gone(proc)

    # members:

    def _on_lost(self, slot: int, loss: Loss) -> None:
        if slot in {0, self.slot}:
            self._here.on_job_over(loss.why)
            return
        kind = FailureKind(loss.kind)
        host = self._host_name(slot)
        commands = self._far.on_host_lost(slot, host, loss.why, kind=kind, may_return=loss.may_return)
        self._carry_out(commands)
        if loss.may_return:
            self._unready.add(slot)
        else:
            self._unready.discard(slot)
            for _, _, fields in self._held.pop(slot, ()):
                self._carry_out(self._lost(fields["procs"], loss.why))

    def _on_member(self, slot: int) -> None:
        if not slot:
            self._event(0, "joined", {"slot": self.slot})
        self._told_silent.discard(slot)
        # Before anything is started there that asks for it.
        self._here.on_member(slot)
        self._carry_out(self._far.on_host_back(slot))

    def on_host_ready(self, slot: int) -> None:
        """A host that has taken the place of a lost one has all that it needs: what waits for it starts there."""
        if not self.router.is_known(slot):
            # Lost again; what waits goes on waiting for the next.
            return
        self._unready.discard(slot)
        for _, owner, fields in self._held.pop(slot, ()):
            # Some may have been stopped meanwhile.
            procs = [proc for proc in fields["procs"] if not self._far.is_gone(proc)]
            self._send_order(slot, owner, {**fields, "procs": procs})

    # time:

    def check(self, *, now_s: float) -> None:
        """Do what is due."""
        self.router.check(now_s=now_s)
        if self.slot and self.router.parent_silent_s(now_s=now_s) > self.grace_s + ORPHANED_S:
            self._here.on_job_over(f"no agent above this one for {self.grace_s + ORPHANED_S:g} s")
            return
        silent = self.router.silent_children(self.grace_s, now_s=now_s)
        for slot in silent:
            if slot not in self._told_silent:
                fields = {"slot": slot, "life": self.router.members[slot].life, "seconds": self.grace_s}
                if self.slot:
                    self._event(0, "silent", fields)
                else:
                    self._here.on_told(0, "silent", fields)
        self._told_silent = set(silent)

    def next_check_s(self) -> float:
        """When :meth:`check` has something to do."""
        return self.router.next_check_s()

    def close(self, linger_ms: int) -> None:
        """Close every socket."""
        if self.attempts is not None:
            self._unwatch(self.attempts.socket)
            self.attempts.close()
        self.router.neighbours.close(linger_ms)
        self._unwatch(self._gate)
        self._gate.close(0)
        self._unwatch(self._door.socket)
        self._door.close()
