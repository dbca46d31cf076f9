"""Decides which hosts are in the job: kept by the root, the controller's own agent, for as long as the job lasts.

asked --daemon answers--> started --its agent has joined--> member --lost--> replaced: asked again, for the next life
  |                          |
  +--refused-----------------+--late--> the whole request fails, and what was started for it ends
"""

from __future__ import annotations

import signal
import socket as net
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..address import CONTROLLER
from ..config import fan_out
from ..failure import FailureKind
from .attacher import Attacher
from .carrier import Loss, Member
from .endpoints import split_address

if TYPE_CHECKING:
    from collections.abc import Callable

    import zmq

    from .elsewhere import Elsewhere
    from .neighbours import Unwatch, Watch

LAST_WORD_S: Final = 0.5
"""How long the last word of an agent may take, once its daemon has said that it has ended in good order."""

END_LIMIT_S: Final = 6.0
"""How long the agents of other hosts may take to end."""


@dataclass(slots=True)
class _Request:
    """Hosts that the controller has asked for in one go."""

    token: int
    deadline_s: float
    addresses: dict[int, str]
    lives: dict[int, int]
    via: int
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    joined: set[int] = field(default_factory=set)
    is_admitted: bool = False


class RootHosts:
    """The hosts of a job.

    Args:
        elsewhere: The root's way to the others.
        context: ZeroMQ's.
        job: Name of the job.
        secret: The job's.
        certificate: The job's certificate with its key, PEM.
        watch: Has a socket polled.
        unwatch: Ends that.
        tell: Tells the controller.
    """

    def __init__(
        self,
        elsewhere: Elsewhere,
        context: zmq.Context[Any],
        *,
        job: str,
        secret: bytes,
        certificate: bytes,
        watch: Watch,
        unwatch: Unwatch,
        tell: Callable[[str, str, dict[str, Any]], object],
    ) -> None:
        self._elsewhere, self._router, self._tell = elsewhere, elsewhere.router, tell
        self.attacher = Attacher(
            context,
            job=job,
            secret=secret,
            certificate=certificate,
            watch=watch,
            unwatch=unwatch,
            on_attached=self.on_attached,
            on_refused=self.on_refused,
            on_exited=self.on_exited,
        )
        self._requests: dict[int, _Request] = {}
        self._by_slot: dict[int, _Request] = {}
        self._left: set[int] = set()
        self._releases: list[tuple[int, set[int], float]] = []
        self._may_return: set[int] = set()
        self._ended: set[int] = set()
        self._exits: dict[int, tuple[float, int, int]] = {}
        self._end_at_s: float | None = None
        self.host_address = "127.0.0.1"

    # what the controller asks:

    def on_attach(self, fields: dict[str, Any]) -> None:
        """Have agents started on hosts: ``hosts`` is [[slot, life, address], ...]; the answer is one for all."""
        now_s = time.monotonic()
        hosts = fields["hosts"]
        request = _Request(
            token=fields["token"],
            deadline_s=now_s + fields["timeout_s"],
            addresses={slot: address for slot, _, address in hosts},
            lives={slot: life for slot, life, _ in hosts},
            via=fields["via"],
        )
        self._requests[request.token] = request
        if fields["may_return"]:
            self._may_return |= request.addresses.keys()
        for slot, life, address in hosts:
            self._by_slot[slot] = request
            self._left.discard(slot)
            self._ended.discard(slot)
            if request.via:
                below = {"slot": slot, "life": life, "address": address, "secret": fields["secret"]}
                self._elsewhere.ask_agent(request.via, "attach_below", {**below, "timeout_s": fields["timeout_s"]})
                continue
            try:
                self.attacher.attach(slot, life, address, fields["secret"], deadline_s=request.deadline_s)
                self.host_address = _address_towards(address) or self.host_address
            except ValueError as error:
                self.on_refused(slot, str(error))

    def on_detach(self, fields: dict[str, Any]) -> None:
        """End this job's agents on ``slots``, or with ``shut_down`` the daemons there."""
        for slot in fields["slots"]:
            self._leave(slot, shut_down=fields["shut_down"])
        self._releases.append((fields["token"], set(fields["slots"]), time.monotonic() + END_LIMIT_S))
        self._look_at_releases()

    def on_ready(self, fields: dict[str, Any]) -> None:
        """A host that has taken the place of a lost one has all that it needs."""
        self._elsewhere.tell_ready(fields["slot"])

    def on_may_return(self, fields: dict[str, Any]) -> None:
        """Somebody will look for another host should this one be lost."""
        request = self._by_slot.get(fields["slot"])
        if request is not None:
            self._may_return.add(fields["slot"])

    def on_give_up(self, fields: dict[str, Any]) -> None:
        """No other host takes the place of a lost one."""
        slot = fields["slot"]
        loss = self._router.lost.get(slot)
        if loss is not None and loss.may_return:
            self._publish(lost={slot: loss._replace(may_return=False)})

    # what daemons and agents say:

    def on_attached(self, slot: int, answer: dict[str, Any]) -> None:
        """An agent runs."""
        request = self._by_slot.get(slot)
        if request is not None and slot in request.addresses:
            request.answers[slot] = answer
            self._look_at(request)

    def on_refused(self, slot: int, reason: str) -> None:
        """None does."""
        request = self._by_slot.get(slot)
        if request is not None:
            request.failed[slot] = reason
            self._look_at(request)

    def on_exited(self, slot: int, life: int, code: int) -> None:
        """A daemon says that its agent of this job has ended."""
        request = self._by_slot.get(slot)
        if request is not None and request.token in self._requests:
            request.failed[slot] = f"the agent there ended at once, with code {code}"
            self._look_at(request)
        elif self._life_of(slot) == life and code in {0, -signal.SIGTERM} and self._end_at_s is None:
            # Its own last word comes by another way, and may be behind: it says whether the host was taken away.
            self._exits[slot] = time.monotonic() + LAST_WORD_S, life, code
            return
        self._on_exit(slot, life, code)

    def _on_exit(self, slot: int, life: int, code: int) -> None:
        if self._life_of(slot) == life:
            self.lose(slot, f"its agent ended with code {code}")
        self._ended.add(slot)
        self._look_at_releases()

    def on_joined(self, slot: int) -> None:
        """A new agent has heard of the job, and can be heard."""
        request = self._by_slot.get(slot)
        if request is not None and request.token in self._requests:
            request.joined.add(slot)
            self._look_at(request)

    def on_silent(self, slot: int, life: int, seconds: float) -> None:
        """The agent above it has not heard of a host for the grace period."""
        if self._life_of(slot) == life:
            self.lose(slot, f"not heard of for {seconds:g} s")

    def on_ended(self, slot: int, *, is_preempted: bool) -> None:
        """An agent says good-bye."""
        why = "its host was taken away" if is_preempted else "its agent was told to end"
        self._exits.pop(slot, None)
        self._ended.add(slot)
        self.lose(slot, why, kind=FailureKind.PREEMPTED if is_preempted else FailureKind.HOST_LOST)
        self._look_at_releases()

    def lose(self, slot: int, why: str, *, kind: FailureKind = FailureKind.HOST_LOST) -> None:
        """A host is gone: tell everybody."""
        if not self._router.is_known(slot):
            return
        if self._end_at_s is not None:
            if slot not in self._ended:
                # Those below it are still to be told, by another way.
                self._publish(lost={slot: Loss("the job has ended", False, FailureKind.STOPPED.value)})
            return
        if slot in self._left:
            self._publish(lost={slot: Loss("it was released", False, FailureKind.STOPPED.value)})
            return
        known_before = self._living()
        self._publish(lost={slot: Loss(why, slot in self._may_return, kind.value)})
        for each in known_before:
            loss = self._router.lost.get(each)
            if loss is not None:
                self._tell(CONTROLLER, "host_lost", {"slot": each, "why": loss.why})

    def _look_at_releases(self) -> None:
        """Say which hosts the controller has none of its agents on any more."""
        now_s = time.monotonic()
        for release in list(self._releases):
            token, slots, deadline_s = release
            living = {slot for slot in slots if self._router.is_known(slot)}
            if living and now_s >= deadline_s:
                for slot in living:
                    self.lose(slot, "")
                living = set()
            if not living:
                self._releases.remove(release)
                self._tell(CONTROLLER, "released", {"token": token})

    def _life_of(self, slot: int) -> int | None:
        member = self._router.members.get(slot)
        return None if member is None else member.life

    # requests under way:

    def _look_at(self, request: _Request) -> None:
        if request.token not in self._requests:
            return
        waiting = request.addresses.keys() - request.answers.keys() - request.failed.keys()
        if not waiting and not request.failed and not request.is_admitted:
            request.is_admitted = True
            members = [
                Member(slot, request.lives[slot], str(answer["endpoint"]), str(answer["host"]))
                # Not in the order of the answers: who is above whom depends on the slots alone.
                for slot in request.addresses
                if (answer := request.answers[slot])
            ]
            self._publish(members=members, gateway=request.via or self._router.gateway)
        if request.failed and not waiting:
            self._fail(request)
        elif request.joined >= request.addresses.keys():
            del self._requests[request.token]
            hosts = [[slot, answer["host"], answer["versions"]] for slot, answer in request.answers.items()]
            fields = {"token": request.token, "hosts": hosts, "failed": [], "host_address": self.host_address}
            self._tell(CONTROLLER, "attached", fields)

    def _fail(self, request: _Request) -> None:
        del self._requests[request.token]
        for slot in request.addresses:
            self._leave(slot, shut_down=False)
        if request.is_admitted:
            known = [slot for slot in request.addresses if self._router.is_known(slot)]
            self._publish(lost={slot: Loss("it did not join in time", False) for slot in known})
        failed = [[request.addresses[slot], reason] for slot, reason in request.failed.items()]
        fields = {"token": request.token, "hosts": [], "failed": failed, "host_address": self.host_address}
        self._tell(CONTROLLER, "attached", fields)

    def _leave(self, slot: int, *, shut_down: bool) -> None:
        self._left.add(slot)
        request = self._by_slot.get(slot)
        if request is not None and request.via:
            self._elsewhere.ask_agent(request.via, "leave_below", {"slot": slot, "shut_down": shut_down})
            return
        if shut_down:
            self.attacher.shut_down(slot)
        else:
            self.attacher.detach(slot)

    def _publish(
        self, *, members: list[Member] | None = None, lost: dict[int, Loss] | None = None, gateway: int | None = None
    ) -> None:
        """Have everybody know who is in the job now."""
        router = self._router
        table = {**router.members, **{member.slot: member for member in members or ()}}
        back = {member.slot for member in members or ()}
        losses = {slot: loss for slot, loss in {**router.lost, **(lost or {})}.items() if slot not in back}
        gateway = router.gateway if gateway is None else gateway
        if gateway in losses:
            # Nobody behind it can be reached any more.
            behind = losses[gateway]._replace(why=f"its gateway is lost: {losses[gateway].why}", may_return=False)
            losses = {**{slot: behind for slot in table if slot}, **losses}
            gateway = 0
        router.set_members(table.values(), losses, epoch=router.epoch + 1, fan_out=fan_out(), gateway=gateway)

    # time:

    def check(self, *, now_s: float) -> None:
        """Fail requests that are late."""
        self.attacher.check(now_s=now_s)
        for slot, (due_s, life, code) in list(self._exits.items()):
            if now_s >= due_s:
                del self._exits[slot]
                self._on_exit(slot, life, code)
        self._look_at_releases()
        for request in [each for each in self._requests.values() if now_s >= each.deadline_s]:
            for slot in request.addresses.keys() - request.failed.keys() - request.joined:
                why = "its agent cannot be reached from here" if slot in request.answers else "no answer in time"
                request.failed[slot] = why
            self._fail(request)

    def next_check_s(self) -> float | None:
        """When :meth:`check` may have something to do."""
        times_s = [self.attacher.next_check_s(), self._end_at_s, *(each.deadline_s for each in self._requests.values())]
        times_s += [deadline_s for _, _, deadline_s in self._releases]
        times_s += [due_s for due_s, _, _ in self._exits.values()]
        return min((time_s for time_s in times_s if time_s is not None), default=None)

    # the end:

    def end(self) -> None:
        """Have all other agents end."""
        if self._end_at_s is None:
            self._end_at_s = time.monotonic() + END_LIMIT_S
            for slot in self._living():
                self._elsewhere.tell_agent(slot, "end", {})

    def _living(self) -> list[int]:
        return [slot for slot in self._router.members if slot and self._router.is_known(slot)]

    def is_over(self, *, now_s: float) -> bool:
        """Whether no other agent is left, or the time for that has passed."""
        if self._end_at_s is None:
            return True
        return now_s >= self._end_at_s or not (set(self._living()) - self._ended)

    def close(self) -> None:
        """Leave the daemons."""
        self.attacher.close()


def _address_towards(address: str) -> str | None:
    """The address of this machine on the way to another."""
    host, port = split_address(address)
    try:
        family, kind, _, _, found = net.getaddrinfo(host, port, type=net.SOCK_DGRAM)[0]
        with net.socket(family, kind) as probe:
            # Sends nothing: the system only chooses the interface.
            probe.connect(found)
            return str(probe.getsockname()[0])
    except OSError:
        return None
