"""The agents of a job over a network that exists in memory, in a time of its own: the same seed gives the same run.

The routers are the real ones. Their sockets are not: a link between two agents delivers in order, as TCP does, until it
is cut; what was on it then is late, or lost with the connection.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import msgpack

from danaus.runtime.network import packets
from danaus.runtime.network.router import Loss, Member, Router

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import pytest

    from danaus.runtime.network.neighbours import Neighbours

LATENCY_S = 0.0005
Frames = list[bytes]
End = tuple[int, int]
"""One agent: slot and life."""


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class Link:
    """A connection that ``above`` has made to ``below``."""

    def __init__(self, above: End, below: End) -> None:
        self.ends = above, below
        self.is_closed = False
        self.cut: set[End] = set()
        """Whose messages do not pass."""
        self.connection = 0
        self.held: dict[End, list[Frames]] = {above: [], below: []}
        self.last_s = {above: 0.0, below: 0.0}

    def other(self, end: End) -> End:
        return self.ends[end == self.ends[0]]


class SimulatedNeighbours:
    """What a router sees of its sockets; see :class:`danaus.runtime.network.neighbours.Neighbours`."""

    def __init__(self, network: Simulation, me: End, on_message: Callable[[int, Frames], object]) -> None:
        self._network, self.me, self.on_message = network, me, on_message
        self.endpoint = f"{me[0]}.{me[1]}"
        self.heard_s: dict[int, float] = {}
        self.below: dict[int, tuple[str, Link]] = {}
        self.above: dict[int, Link] = {}

    @property
    def children(self) -> Iterable[int]:
        return self.below.keys()

    def set_children(self, endpoints: dict[int, str], *, now_s: float) -> list[int]:
        for slot in [slot for slot, (endpoint, _) in self.below.items() if endpoints.get(slot) != endpoint]:
            self.below.pop(slot)[1].is_closed = True
            self.heard_s.pop(slot, None)
        new = [slot for slot in endpoints if slot not in self.below]
        for slot in new:
            number, _, life = endpoints[slot].partition(".")
            self.below[slot] = endpoints[slot], self._network.connect(self.me, (int(number), int(life)))
            self.heard_s[slot] = now_s
        return new

    def send(self, slot: int, frames: Frames, *, now_s: float) -> bool:
        if now_s - self.heard_s.get(slot, -2.0) >= 2.0:
            return False
        return self._send(slot, frames)

    def ping(self, header: bytes) -> None:
        for slot in [*self.below, *self.above]:
            self._send(slot, [header])

    def forget_parent(self, slot: int) -> None:
        if self.above.pop(slot, None) is not None and slot not in self.below:
            self.heard_s.pop(slot, None)

    def _send(self, slot: int, frames: Frames) -> bool:
        link = self.below[slot][1] if slot in self.below else self.above.get(slot)
        if link is None:
            return False
        self._network.transmit(link, self.me, [bytes(frame) for frame in frames])
        return True


class Agent:
    """One agent, what it has sent and what it was delivered."""

    def __init__(self, network: Simulation, slot: int, life: int) -> None:
        self.end = slot, life
        self.is_alive = True
        self.received: dict[End, list[int]] = defaultdict(list)
        self.sent: dict[End, int] = defaultdict(int)
        # Ports: answers to several calls have no order.
        self.answers: dict[End, list[int]] = defaultdict(list)
        self.answered: dict[End, list[int]] = defaultdict(list)
        self.losses: list[int] = []
        self._ports = count(1)
        self.sockets: SimulatedNeighbours

        def neighbours(on_message: Callable[[int, Frames], object]) -> Neighbours:
            self.sockets = SimulatedNeighbours(network, self.end, on_message)
            return cast("Neighbours", self.sockets)

        self.router = Router(
            slot,
            life,
            f"host{slot}",
            neighbours,
            deliver=self._on_delivered,
            on_agent_message=lambda origin, data: None,
            on_lost=lambda lost, loss: self.losses.append(lost),
            on_member=lambda member: None,
        )

    def send(self, slots: Iterable[int], size_bytes: int, *, is_answered: bool = False) -> None:
        """Send one numbered message to a process on each of ``slots``, in one packet where they are several."""
        router = self.router
        slots = [slot for slot in slots if router.is_known(slot) and slot != self.end[0]]
        port = next(self._ports) if is_answered else 0
        body = self._numbered(slots, size_bytes, port)
        if len(slots) == 1:
            router.from_process([packets.pack([packets.PLAIN, process(slots[0])]), body])
        elif slots:
            shares = {slot: [[process(slot), slot]] for slot in slots}
            meta = packets.pack([packets.CAST, shares, process(self.end[0]), port, b""])
            router.from_process([meta, b"head", b"tail", body])

    def _numbered(self, slots: Iterable[int], size_bytes: int, port: int) -> bytes:
        numbers: dict[int, int] = {}
        for slot in slots:
            end = slot, self.router.members[slot].life
            self.sent[end] += 1
            numbers[slot] = self.sent[end]
        return packets.pack([*self.end, numbers, port, bytes(size_bytes)])

    def _on_delivered(self, proc: str, frames: Frames) -> None:
        # Joined answers are several in one frame.
        messages = msgpack.Unpacker(strict_map_key=False, max_buffer_size=0)
        messages.feed(frames[-1])
        for slot, life, numbers, port, _ in messages:
            if numbers is None:
                self.answers[slot, life].append(port)
                continue
            self.received[slot, life].append(numbers[self.end[0]])
            if port and self.router.is_known(slot) and self.router.members[slot].life == life:
                self._answer((slot, life), port)

    def _answer(self, caller: End, port: int) -> None:
        self.answered[caller].append(port)
        meta = packets.pack([packets.REPLY, process(caller[0]), port])
        self.router.from_process([meta, packets.pack([*self.end, None, port, b""])])


def process(slot: int) -> str:
    """The process that sends and receives on a host."""
    return f"m@{slot}x1.0"


class Simulation:
    """All of it; slot 0 is the root."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_hosts: int, *, fan_out: int, seed: int = 0) -> None:
        self.clock = Clock()
        for module in ("carrier", "router"):
            monkeypatch.setattr(f"danaus.runtime.network.{module}.time", self.clock)
        self.random = random.Random(seed)
        self.fan_out, self.gateway, self.epoch = fan_out, 0, 0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = count()
        self.links: list[Link] = []
        self.num_transmitted = 0
        self.agents = {slot: Agent(self, slot, 0) for slot in range(num_hosts)}
        """Of each slot the last one."""
        self.all_agents = list(self.agents.values())
        self.lost: dict[int, Loss] = {}
        self.publish()
        self.run(0.5)

    # time:

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end_s = self.clock.now_s + seconds
        while True:
            checks_s = min(agent.router.next_check_s() for agent in self.living())
            # What is due again at once is so a moment later: time cannot stand still.
            next_s = max(min(checks_s, self._events[0][0] if self._events else end_s), self.clock.now_s + 1e-5)
            if next_s > end_s:
                self.clock.now_s = end_s
                return
            self.clock.now_s = next_s
            while self._events and self._events[0][0] <= next_s:
                heapq.heappop(self._events)[2]()
            for agent in self.living():
                if agent.router.next_check_s() <= next_s:
                    agent.router.check(now_s=next_s)

    def at(self, seconds: float, step: Callable[[], object]) -> None:
        """Do ``step`` in so many seconds."""
        heapq.heappush(self._events, (self.clock.now_s + seconds, next(self._order), step))

    def living(self) -> list[Agent]:
        return [agent for agent in self.all_agents if agent.is_alive]

    # the network:

    def connect(self, above: End, below: End) -> Link:
        link = Link(above, below)
        self.links.append(link)
        return link

    def transmit(self, link: Link, source: End, frames: Frames) -> None:
        if link.is_closed:
            return
        self.num_transmitted += 1
        if source in link.cut:
            link.held[source].append(frames)
            return
        latency_s = LATENCY_S * (1 + self.random.random())
        at_s = link.last_s[source] = max(self.clock.now_s + latency_s, link.last_s[source])
        connection = link.connection
        self.at(at_s - self.clock.now_s, lambda: self._arrive(link, source, frames, connection))

    def _arrive(self, link: Link, source: End, frames: Frames, connection: int) -> None:
        agents = {agent.end: agent for agent in self.living()}
        dest = link.other(source)
        if link.is_closed or connection != link.connection or dest not in agents:
            return
        if source in link.cut:
            link.held[source].append(frames)
            return
        agent = agents[dest]
        if source == link.ends[0]:
            agent.sockets.above[source[0]] = link
        agent.sockets.on_message(source[0], frames)

    def cut(self, link: Link, *, one_way: bool = False) -> None:
        """Let nothing pass; what was on the way waits."""
        link.cut = {self.random.choice(link.ends)} if one_way else set(link.ends)

    def heal(self, link: Link, *, is_lost: bool) -> None:
        """Let messages pass again, and those that waited unless the connection was lost with them."""
        link.cut = set()
        if is_lost:
            self.reset(link)
        for end, held in link.held.items():
            link.held[end] = []
            for frames in held:
                self.transmit(link, end, frames)

    def reset(self, link: Link) -> None:
        """Make the connection anew: what was on the way is lost."""
        link.connection += 1
        for held in link.held.values():
            held.clear()

    # hosts:

    def publish(self) -> None:
        """Let the root tell what is so now."""
        self.epoch += 1
        members = [
            Member(slot, agent.end[1], agent.sockets.endpoint, f"host{slot}") for slot, agent in self.agents.items()
        ]
        root = self.agents[0].router
        root.set_members(members, dict(self.lost), epoch=self.epoch, fan_out=self.fan_out, gateway=self.gateway)

    def kill(self, slot: int) -> None:
        """End an agent, of which the root has to be told."""
        self.agents[slot].is_alive = False
        for link in self.links:
            if self.agents[slot].end in link.ends:
                self.reset(link)

    def lose(self, slot: int, *, may_return: bool = False) -> None:
        """Tell the root that a host is lost."""
        self.lost[slot] = Loss("killed", may_return)
        self.publish()

    def replace(self, slot: int) -> None:
        """Put another agent in the place of a dead one, and tell the root."""
        before = self.agents[slot]
        self.agents[slot] = Agent(self, slot, before.end[1] + 1)
        self.all_agents.append(self.agents[slot])
        self.lost.pop(slot, None)
        self.publish()

    def open_links(self) -> list[Link]:
        living = {agent.end for agent in self.living()}
        return [link for link in self.links if not link.is_closed and living.issuperset(link.ends)]

    # what must hold:

    def check_order(self) -> None:
        """Whatever was delivered was delivered once and in order."""
        for agent in self.all_agents:
            for origin, numbers in agent.received.items():
                assert numbers == list(range(1, len(numbers) + 1)), f"{origin} -> {agent.end}: {numbers}"
            for origin, ports in agent.answers.items():
                assert len(set(ports)) == len(ports), f"{origin} -> {agent.end}: {sorted(ports)}"

    def missing(self) -> dict[tuple[End, End], Any]:
        """Pairs of living hosts between which something is still missing: what was sent, and what was delivered."""
        agents = {agent.end: agent for agent in self.living() if agent.end[0] not in self.lost}
        counts: dict[tuple[End, End], Any] = {}
        for agent in agents.values():
            for end in [end for end in {*agent.sent, *agent.answered} if end in agents]:
                sent = agent.sent[end], sorted(agent.answered[end])
                received = len(agents[end].received[agent.end]), sorted(agents[end].answers[agent.end])
                if sent != received:
                    counts[agent.end, end] = sent, received
        return counts

    def wait_delivered(self, limit_s: float) -> float:
        """Let time pass until nothing is missing; return how long that took."""
        began_s = self.clock.now_s
        while self.missing() and self.clock.now_s < began_s + limit_s:
            self.run(0.05)
        self.check_order()
        assert not self.missing()
        return self.clock.now_s - began_s
