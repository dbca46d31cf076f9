"""Carries packets between the agents of a job: one neighbour at a time, and whole from end to end.

Delivery is between the two ends (streams.py): here numbered, there put in order, once each, whatever happened to the
connections and agents in between, which only carry. What is in a packet is router.py's affair.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..messages.wire import WireError, pack
from . import packets
from .bundles import Bundles
from .neighbours import PING_S
from .packets import ACK, BUNDLE, BYE, DATA, PING, TOPOLOGY, pack_data, split_bundle, unpack_header
from .streams import Inbox, Outbox
from .tree import Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .neighbours import Neighbours
    from .packets import Frames
    from .streams import Send

_log = logging.getLogger("danaus.agent")
_RESTORE_S: Final = 1.5
"""Silence of a neighbour after which what went its way may be lost."""

FAN_OUT: Final = 8


class Member(NamedTuple):
    """One host's agent."""

    slot: int
    life: int
    endpoint: str
    host: str


class Loss(NamedTuple):
    """How and why a host is lost, and whether another may take its place."""

    why: str
    may_return: bool
    kind: str = "host lost"
    """Of the failures of its ranks: a value of ``FailureKind``."""


class Packet(NamedTuple):
    """What an outbox keeps."""

    meta: bytes
    body: Frames


class Carrier(ABC):
    """The agents of a job as one of them sees them, and the packets on their way.

    Args:
        slot: Of this agent.
        life: Of this agent.
        host: Name of its host.
        neighbours: Makes its sockets, given who takes what comes.
        on_lost: Hears of hosts that are lost: slot, and why.
        on_member: Hears of hosts that are new, or back.
    """

    def __init__(
        self,
        slot: int,
        life: int,
        host: str,
        neighbours: Callable[[Callable[[int, Frames], object]], Neighbours],
        *,
        on_lost: Callable[[int, Loss], object],
        on_member: Callable[[int], object],
    ) -> None:
        self.slot, self.life = slot, life
        self._on_lost, self._on_member = on_lost, on_member
        self.neighbours = neighbours(self._on_message)
        self.members: dict[int, Member] = {slot: Member(slot, life, self.neighbours.endpoint, host)}
        self.lost: dict[int, Loss] = {}
        self.epoch = 0
        self.fan_out, self.gateway = FAN_OUT, 0
        self.tree = Tree([0, slot] if slot else [0])
        self._outboxes: dict[int, Outbox] = {}
        self._inboxes: dict[int, Inbox] = {}
        self._busy: set[int] = set()
        self._owed: set[int] = set()
        self._departed: set[tuple[int, int]] = set()
        self._bundles = Bundles()
        self._ping_at_s = 0.0
        self._heard_parent_s = time.monotonic()
        self.num_dropped = 0
        self.num_received = 0

    # for router.py:

    @abstractmethod
    def _open(self, origin: int, meta: Any, body: Frames) -> None:
        """Deliver what has arrived; called once for each packet, in the order sent."""

    @abstractmethod
    def _pass_on(
        self, neighbour: int, origin: int, life: int, others: list[list[int]], frames: Frames, now_s: float
    ) -> None:
        """Carry a packet that came from ``neighbour`` and is for others."""

    # topology:

    def set_members(
        self, members: Iterable[Member], lost: dict[int, Loss], *, epoch: int, fan_out: int, gateway: int
    ) -> None:
        """Take over what the root says of the job's agents, unless something newer is known.

        Raises:
            ValueError: They make no tree.
        """
        if epoch <= self.epoch:
            return
        table = {member.slot: member for member in members}
        tree = Tree(list(table), fan_out=fan_out, lost=lost.keys(), gateway=gateway or None)
        if self.slot not in table:
            raise ValueError(f"host {self.slot} is neither a member nor lost")
        before, was_lost = self.members, self.lost
        self.members, self.lost, self.tree = table, dict(lost), tree
        self.epoch, self.fan_out, self.gateway = epoch, fan_out, gateway
        newly_lost = {slot: loss for slot, loss in lost.items() if was_lost.get(slot) != loss}
        changed = {
            slot
            for slot, member in table.items()
            if slot in before and (before[slot].life != member.life or (slot in was_lost and slot not in lost))
        }
        for slot in {*newly_lost, *changed}:
            self._start_anew(slot)
        if self.slot in lost:
            self._on_lost(self.slot, lost[self.slot])
            return
        self._connect_children()
        for slot in changed - newly_lost.keys() - was_lost.keys() - {self.slot}:
            self._on_lost(slot, Loss("another agent has taken its place", True))
        for slot, loss in newly_lost.items():
            self._on_lost(slot, loss)
        new = {slot for slot in table if slot not in before and slot not in lost} | (changed - lost.keys())
        for slot in new - {self.slot}:
            self._on_member(slot)
        self._restore(lambda _next_hop: True, time.monotonic())

    def _connect_children(self) -> None:
        children = {slot: self.members[slot].endpoint for slot in self.tree.children(self.slot)}
        self.neighbours.set_children(children, now_s=time.monotonic())
        for slot in children:
            self._send_topology(slot)

    def _start_anew(self, slot: int) -> None:
        """Nothing that was under way to or from a host counts any more."""
        self._outboxes.pop(slot, None)
        self._inboxes.pop(slot, None)
        self._busy.discard(slot)
        self._owed.discard(slot)

    def _send_topology(self, child: int) -> None:
        members = [list(member) for member in self.members.values()]
        lost = [[slot, *loss] for slot, loss in self.lost.items()]
        header = pack([TOPOLOGY, self.epoch, members, lost, self.fan_out, self.gateway])
        self.neighbours.send(child, [header], now_s=time.monotonic())

    def is_known(self, slot: int) -> bool:
        """Whether something can be sent to the host at ``slot``: else it is lost, or never was."""
        return slot in self.members and slot not in self.lost

    # sending:

    def _post(self, destinations: list[int], packet: Packet) -> None:
        size_bytes = sum(map(len, packet.body)) + len(packet.meta)
        if size_bytes > packets.PART_BYTES:
            for meta, body in packets.split_packet(packet.meta, packet.body):
                self._post_whole(destinations, Packet(meta, body), len(body[0]))
        else:
            self._post_whole(destinations, packet, size_bytes)

    def _post_whole(self, destinations: list[int], packet: Packet, size_bytes: int) -> None:
        now_s = time.monotonic()
        numbered: list[list[int]] = []
        for slot in destinations:
            if slot == self.slot or not self.is_known(slot):
                self.num_dropped += 1
                continue
            outbox = self._outboxes.get(slot)
            if outbox is None:
                outbox = self._outboxes[slot] = Outbox()
            self._busy.add(slot)
            for send in outbox.add(packet, size_bytes, now_s=now_s):
                if send.packet is packet:
                    numbered.append([slot, self.members[slot].life, send.seq])
                else:
                    self._transmit(slot, [send], now_s)
        if numbered:
            self._carry(self.slot, self.life, numbered, packet.meta, packet.body, now_s)

    def _transmit(self, slot: int, sends: Iterable[Send], now_s: float) -> None:
        member = self.members.get(slot)
        if member is not None:
            for send in sends:
                packet = send.packet
                self._carry(self.slot, self.life, [[slot, member.life, send.seq]], packet.meta, packet.body, now_s)

    def _carry(
        self,
        origin: int,
        life: int,
        numbered: list[list[int]],
        meta: Any,
        body: Frames,
        now_s: float,
        *,
        came_from: int | None = None,
    ) -> None:
        """Send a packet one step further, to one neighbour for each branch of the tree that it is for."""
        if len(numbered) == 1:
            branches = {self._next_hop(numbered[0][0]): numbered}
        else:
            branches = defaultdict(list)
            for each in numbered:
                branches[self._next_hop(each[0])].append(each)
        for hop, part in branches.items():
            if hop is None or hop == came_from:
                # No way, or two agents that do not agree on it yet: sent again by its origin.
                self.num_dropped += 1
            else:
                self._hand_on(hop, [pack_data(origin, life, part), meta, *body], now_s, waits=False)

    def _next_hop(self, slot: int) -> int | None:
        return self.tree.next_hop(self.slot, slot) if self.is_known(slot) and slot != self.slot else None

    def _hand_on(self, hop: int, frames: Frames, now_s: float, *, waits: bool) -> None:
        if waits:
            self._bundles.add(hop, frames, now_s=now_s)
            return
        held = self._bundles.take(hop)
        if held:
            frames = bundle([*held, frames])
        self.neighbours.send(hop, frames, now_s=now_s)

    # receiving:

    def _on_message(self, neighbour: int, frames: Frames) -> None:
        self.num_received += 1
        try:
            self._on_frames(neighbour, frames)
        except (WireError, ValueError, TypeError, KeyError) as error:
            # Whatever another agent says, the processes of this host are not to end by it.
            self.num_dropped += 1
            _log.warning("dropped a malformed message of the agent of host %s: %s", neighbour, error)

    def _on_frames(self, neighbour: int, frames: Frames) -> None:
        header = unpack_header(frames[0])
        now_s = time.monotonic()
        self._on_heard(neighbour, now_s)
        kind = header[0]
        if kind == DATA:
            self._on_data(neighbour, header, frames, now_s)
        elif kind == ACK:
            self._on_ack(neighbour, header, frames, now_s)
        elif kind == BUNDLE:
            for part in split_bundle(frames, header[1]):
                if unpack_header(part[0])[0] == BUNDLE:
                    raise WireError("a bundle in a bundle")
                self._on_frames(neighbour, part)
        elif kind == TOPOLOGY:
            self._on_topology(header)
        elif kind == BYE:
            self._departed.add((neighbour, header[2]))
        elif header[3] < self.epoch and neighbour in self.neighbours.children:
            self._send_topology(neighbour)

    def _on_heard(self, neighbour: int, now_s: float) -> None:
        heard = self.neighbours.heard_s
        was_silent = now_s - heard.get(neighbour, 0.0) > _RESTORE_S
        heard[neighbour] = now_s
        if self.slot and neighbour == self.tree.parent(self.slot):
            self._heard_parent_s = now_s
        if was_silent:
            self._restore(lambda hop: hop == neighbour, now_s)

    def _on_topology(self, header: list[Any]) -> None:
        _, epoch, members, lost, fan_out, gateway = header
        try:
            table = [Member(int(slot), int(life), str(endpoint), str(host)) for slot, life, endpoint, host in members]
            gone = {int(slot): Loss(str(why), bool(may_return), str(kind)) for slot, why, may_return, kind in lost}
            self.set_members(table, gone, epoch=epoch, fan_out=fan_out, gateway=gateway)
        except (TypeError, ValueError) as error:
            raise WireError(f"not a topology: {error}") from error

    def _on_data(self, neighbour: int, header: list[Any], frames: Frames, now_s: float) -> None:
        _, origin, life, destinations = header
        if len(frames) < 2:
            raise WireError("a packet without a meta frame")
        others = [each for each in destinations if each[0] != self.slot]
        for slot, to_life, seq in destinations:
            if slot == self.slot and to_life == self.life:
                self._accept(origin, life, seq, frames, now_s)
        if others:
            self._pass_on(neighbour, origin, life, others, frames, now_s)

    def _accept(self, origin: int, life: int, seq: int, frames: Frames, now_s: float) -> None:
        member = self.members.get(origin)
        if member is None or member.life != life or origin in self.lost:
            # Not heard of yet, or lost: it sends again, or is gone.
            self.num_dropped += 1
            return
        inbox = self._inboxes.get(origin)
        if inbox is None:
            inbox = self._inboxes[origin] = Inbox()
        try:
            arrived = inbox.on_packet(seq, frames[1:], sum(map(len, frames)), now_s=now_s)
        except ValueError as error:
            raise WireError(str(error)) from error
        for meta, *body in arrived:
            self._open_safely(origin, meta, body)
        if self._inboxes.get(origin) is not inbox:
            # It was lost by what it said.
            return
        ack_s = inbox.next_ack_s
        if ack_s is not None and ack_s <= now_s:
            self._acknowledge(origin, inbox, now_s)
        elif ack_s is not None:
            self._owed.add(origin)

    def _open_safely(self, origin: int, meta: Any, body: Frames) -> None:
        try:
            self._open(origin, meta, body)
        except (WireError, ValueError, TypeError, KeyError) as error:
            # Those behind it have been counted as received, and are not to be lost with it.
            self.num_dropped += 1
            _log.warning("dropped a malformed packet of host %s: %s", origin, error)

    def _acknowledge(self, origin: int, inbox: Inbox, now_s: float) -> None:
        self._owed.discard(origin)
        member, hop = self.members.get(origin), self._next_hop(origin)
        cumulative = inbox.take_ack()
        if member is not None and hop is not None and cumulative is not None:
            header = pack([ACK, self.slot, self.life, origin, member.life, cumulative])
            self._hand_on(hop, [header], now_s, waits=True)

    def _on_ack(self, neighbour: int, header: list[Any], frames: Frames, now_s: float) -> None:
        _, receiver, life, sender, sender_life, cumulative = header
        if sender != self.slot:
            hop = self._next_hop(sender)
            if hop is not None and hop != neighbour:
                self._hand_on(hop, frames[:1], now_s, waits=True)
            return
        member, outbox = self.members.get(receiver), self._outboxes.get(receiver)
        if member is None or member.life != life or sender_life != self.life or outbox is None:
            return
        try:
            sends = outbox.on_ack(cumulative, now_s=now_s)
        except ValueError as error:
            raise WireError(str(error)) from error
        self._transmit(receiver, sends, now_s)
        if not outbox.num_unacked:
            self._busy.discard(receiver)

    # time:

    def check(self, *, now_s: float) -> None:
        """Do what is due: acknowledge, send again, ping."""
        for origin in list(self._owed):
            inbox = self._inboxes[origin]
            if inbox.next_ack_s is None or inbox.next_ack_s <= now_s:
                self._acknowledge(origin, inbox, now_s)
        for slot in list(self._busy):
            outbox = self._outboxes[slot]
            due_s = outbox.next_check_s()
            if due_s is not None and due_s <= now_s:
                self._transmit(slot, outbox.check(now_s=now_s), now_s)
        for hop, held in self._bundles.due(now_s=now_s):
            self.neighbours.send(hop, bundle(held), now_s=now_s)
        if now_s >= self._ping_at_s:
            self._ping_at_s = now_s + PING_S
            self.neighbours.ping(pack([PING, self.slot, self.life, self.epoch]))

    def next_check_s(self) -> float:
        """When :meth:`check` has something to do."""
        times_s = [self._ping_at_s]
        times_s += [self._outboxes[slot].next_check_s() or self._ping_at_s for slot in self._busy]
        times_s += [self._inboxes[origin].next_ack_s or 0.0 for origin in self._owed]
        bundle_s = self._bundles.next_due_s()
        return min(times_s if bundle_s is None else [*times_s, bundle_s])

    def has_children(self) -> bool:
        """Whether agents below this one have not said their last word."""
        below = () if self.slot in self.lost else self.tree.children(self.slot)
        return any((slot, self.members[slot].life) not in self._departed for slot in below)

    def say_bye(self) -> None:
        """Tell the parent that nothing more comes from here."""
        parent = self.tree.parent(self.slot) if self.slot not in self.lost else None
        if parent is not None:
            self.neighbours.send(parent, [pack([BYE, self.slot, self.life])], now_s=time.monotonic())

    def silent_children(self, limit_s: float, *, now_s: float) -> list[int]:
        """Children that have not been heard of for longer than ``limit_s``."""
        heard = self.neighbours.heard_s
        return [slot for slot in self.neighbours.children if now_s - heard.get(slot, now_s) > limit_s]

    def parent_silent_s(self, *, now_s: float) -> float:
        """How long nothing has come from above; 0 at the root."""
        return now_s - self._heard_parent_s if self.slot else 0.0

    def _restore(self, goes_by: Callable[[int], bool], now_s: float) -> None:
        """What was lost with a connection is sent again."""
        for slot in list(self._busy):
            hop = self._next_hop(slot)
            if hop is not None and goes_by(hop):
                self._transmit(slot, self._outboxes[slot].on_path_restored(now_s=now_s), now_s)

    @property
    def is_idle(self) -> bool:
        """Whether all that was sent has been acknowledged."""
        return not self._busy


def bundle(messages: list[Frames]) -> Frames:
    """Lay messages to one neighbour end to end."""
    if len(messages) == 1:
        return messages[0]
    return [pack([BUNDLE, [len(frames) for frames in messages]]), *(frame for frames in messages for frame in frames)]
