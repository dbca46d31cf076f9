"""Joins a host agent to the other hosts of its job; an agent whose job has one host has none of this."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any, Final

from ..address import CONTROLLER, host_of
from ..bulk import certificate
from ..network.attacher import Attacher
from ..network.elsewhere import Elsewhere
from ..network.keys import new_secret
from ..network.root_hosts import END_LIMIT_S, RootHosts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import zmq

    from ..network.packets import Frames
    from .agent import Agent
    from .proc_table import Command
    from .settings import AgentSettings

_log = logging.getLogger("danaus.agent")


class AgentNetwork:
    """What an agent does with other hosts.

    Args:
        agent: The agent.
        context: Its ZeroMQ context.
        directory: The job's on this host.
        host: Name of this host.
        settings: What the daemon has said; None at the root, which makes the job's secret.
    """

    def __init__(
        self, agent: Agent, context: zmq.Context[Any], directory: str, host: str, settings: AgentSettings | None
    ) -> None:
        self._agent, self._context = agent, context
        self._job = os.path.basename(directory) if settings is None else settings.job
        self._secret = new_secret() if settings is None else settings.secret
        self._certificate = _mint() if settings is None else settings.certificate
        self.slot = 0 if settings is None else settings.slot
        certificate.write(directory, self._certificate)
        self.elsewhere = Elsewhere(
            self,
            context,
            slot=self.slot,
            life=0 if settings is None else settings.incarnation,
            host=host,
            directory=directory,
            secret=self._secret,
            address=None if settings is None else _tcp(settings.listen),
            advertise=None if settings is None else settings.advertise,
            watch=agent.loop.watch_socket,
            unwatch=agent.loop.unwatch_socket,
            touch=agent.loop.touch,
        )
        self._root: RootHosts | None = None
        self._below: Attacher | None = None
        self._is_told = False
        self._end_at_s: float | None = None
        if settings is None:
            self._root = RootHosts(
                self.elsewhere,
                context,
                job=self._job,
                secret=self._secret,
                certificate=self._certificate,
                watch=agent.loop.watch_socket,
                unwatch=agent.loop.unwatch_socket,
                tell=agent.tell,
            )

    @property
    def endpoint(self) -> str:
        """Where other agents reach this one."""
        return self.elsewhere.router.neighbours.endpoint

    # for the agent:

    def split(self, name: str, sender: str, fields: dict[str, Any]) -> dict[str, Any] | None:
        """Send on what concerns other hosts; return what concerns this one, or None."""
        if self._root is not None and sender == CONTROLLER and name in self._OF_CONTROLLER:
            self._OF_CONTROLLER[name](self._root, fields)
            # Known as soon as the first host is asked.
            self._agent.set_host_address(self._root.host_address)
            return None
        return self.elsewhere.split(name, sender, fields)

    def tell(self, proc: str, data: bytes) -> None:
        """Send a packed envelope to a process, or the agent, of another host."""
        if host_of(proc) != self.slot:
            self.elsewhere.tell(proc, data)

    def keep_copy(self, proc: str, actor: str, state: bytes) -> None:
        """Have another host keep what an actor here wants to have back, too."""
        if self.slot:
            buddy = self._buddy()
            if buddy is not None:
                fields = {"proc": proc, "actor": actor, "state": state}
                self.elsewhere.ask_agent(buddy, "keep_copy", fields)

    def _buddy(self) -> int | None:
        """The next host after this one."""
        router = self.elsewhere.router
        others = [slot for slot in sorted(router.members) if slot != self.slot and router.is_known(slot)]
        return next((slot for slot in others if slot > self.slot), others[0] if others else None)

    def hand_over(self, kept: dict[str, dict[str, bytes]]) -> None:
        """This host is taken away: the root gives ``kept`` to the one that follows."""
        self.elsewhere.ask_agent(0, "take_over", {"kept": kept})

    def on_member(self, slot: int) -> None:
        """An agent has joined, or follows another at its slot."""
        self._agent.on_member(slot)

    def check(self, *, now_s: float) -> None:
        """Do what is due."""
        self.elsewhere.check(now_s=now_s)
        for each in (self._root, self._below):
            if each is not None:
                each.check(now_s=now_s)

    def next_check_s(self) -> float | None:
        """When :meth:`check` has something to do."""
        parts = (self.elsewhere, self._root, self._below)
        times_s = [self._end_at_s, *(each.next_check_s() for each in parts if each is not None)]
        return min((time_s for time_s in times_s if time_s is not None), default=None)

    def end(self) -> None:
        """The job ends: the root tells the others."""
        if self._root is not None:
            self._root.end()
        elif self._is_told and self._end_at_s is None:
            self._end_at_s = time.monotonic() + END_LIMIT_S

    def is_over(self) -> bool:
        """Whether nothing has to be waited for: the root waits for all, others for those that are told by them."""
        now_s = time.monotonic()
        if self._root is not None:
            return self._root.is_over(now_s=now_s)
        return self._end_at_s is None or now_s >= self._end_at_s or not self.elsewhere.router.has_children()

    def close(self, *, is_preempted: bool) -> None:
        """Say good-bye, and close every socket."""
        if self.slot:
            self.elsewhere.tell_agent(0, "ended", {"slot": self.slot, "is_preempted": is_preempted})
            self.elsewhere.router.say_bye()
        for each in (self._root, self._below):
            if each is not None:
                each.close()
        self.elsewhere.close(500)

    # for Elsewhere:

    def handle(self, name: str, sender: str, fields: dict[str, Any]) -> None:
        """Carry out a request that concerns this host."""
        if name == "attach_below":
            self._attach_below(fields)
        elif name == "leave_below":
            if self._below is not None:
                (self._below.shut_down if fields["shut_down"] else self._below.detach)(fields["slot"])
        else:
            self._agent.handle(name, sender, fields)

    def _attach_below(self, fields: dict[str, Any]) -> None:
        """Attach a host that can be reached from here, and not by the root."""
        tell = self.elsewhere.tell_agent
        if self._below is None:
            self._below = Attacher(
                self._context,
                job=self._job,
                secret=self._secret,
                certificate=self._certificate,
                watch=self._agent.loop.watch_socket,
                unwatch=self._agent.loop.unwatch_socket,
                on_attached=lambda slot, answer: tell(0, "attached_below", {"slot": slot, "answer": answer}),
                on_refused=lambda slot, why: tell(0, "refused_below", {"slot": slot, "reason": why}),
                on_exited=lambda slot, life, code: tell(0, "exited_below", {"slot": slot, "life": life, "code": code}),
            )
        slot, deadline_s = fields["slot"], time.monotonic() + fields["timeout_s"]
        try:
            self._below.attach(slot, fields["life"], fields["address"], fields["secret"], deadline_s=deadline_s)
        except ValueError as error:
            tell(0, "refused_below", {"slot": slot, "reason": str(error)})

    def tell_here(self, commands: Iterable[Command]) -> None:
        """Tell processes of this host."""
        self._agent.carry_out(commands)

    def deliver(self, proc: str, frames: Frames) -> None:
        """Hand a message to a process of this host."""
        self._agent.deliver(proc, frames)

    def on_far_owner_gone(self, proc: str) -> None:
        """End what a process of another host had ordered here."""
        self._agent.on_owner_gone(proc)

    def on_told(self, origin: int, name: str, fields: dict[str, Any]) -> None:
        """Take what the agent of another host says about that host (the root)."""
        root = self._root
        handler = None if root is None else self._TOLD.get(name)
        if root is None or handler is None:
            _log.warning("host %d said %r, which means nothing here", origin, name)
        else:
            with contextlib.suppress(KeyError):
                handler(root, fields)

    def on_job_over(self, why: str) -> None:
        """The job has ended, or goes on without this host."""
        if why:
            _log.warning("this host leaves the job: %s", why)
        self._is_told = not why
        self._agent.quit()

    _OF_CONTROLLER: Final[dict[str, Callable[[RootHosts, dict[str, Any]], None]]] = {
        "attach": lambda root, fields: root.on_attach(fields),
        "detach": lambda root, fields: root.on_detach(fields),
        "give_up_host": lambda root, fields: root.on_give_up(fields),
        "host_ready": lambda root, fields: root.on_ready(fields),
        "may_return": lambda root, fields: root.on_may_return(fields),
    }
    _TOLD: Final[dict[str, Callable[[RootHosts, dict[str, Any]], None]]] = {
        "joined": lambda root, fields: root.on_joined(fields["slot"]),
        "silent": lambda root, fields: root.on_silent(fields["slot"], fields["life"], fields["seconds"]),
        "ended": lambda root, fields: root.on_ended(fields["slot"], is_preempted=fields["is_preempted"]),
        "attached_below": lambda root, fields: root.on_attached(fields["slot"], fields["answer"]),
        "refused_below": lambda root, fields: root.on_refused(fields["slot"], fields["reason"]),
        "exited_below": lambda root, fields: root.on_exited(fields["slot"], fields["life"], fields["code"]),
    }


def _mint() -> bytes:
    """A certificate for the job; empty where the package for that is missing: then nothing streams directly."""
    try:
        return certificate.mint()
    except ImportError:
        _log.warning("without certificates large values go through the agents, slowly: pip install 'danaus[hosts]'")
        return b""


def _tcp(host: str) -> str:
    return f"tcp://[{host}]:0" if ":" in host else f"tcp://{host}:0"
