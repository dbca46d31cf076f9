"""Routers with real sockets between them, and a proxy in the middle that breaks the connections."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import zmq
from zmq.utils.garbage import gc

from danaus.runtime.network.door import Door
from danaus.runtime.network.keys import derive
from danaus.runtime.network.neighbours import Neighbours
from danaus.runtime.network.packets import PART_BYTES
from danaus.runtime.network.router import Member, Router

from .proxy import Direction, Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Shared machines are slow at times.
pytestmark = pytest.mark.timeout(60)

SECRET = b"s" * 32
LISTENER, CALLER = derive(SECRET, "listener", "job"), derive(SECRET, "caller", "job")
LIMIT_S = 15.0


class RealAgent:
    """An agent's sockets and router, served by the test's own thread."""

    def __init__(self, slot: int) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.door = Door(self.context, [CALLER.public])
        self.ready: dict[zmq.Socket[Any], Callable[[], object]] = {self.door.socket: self.door.serve}
        self.received: list[bytes] = []

        def neighbours(on_message: Callable[[int, list[Any]], object]) -> Neighbours:
            return Neighbours(
                self.context,
                slot=slot,
                life=0,
                address="tcp://127.0.0.1:0" if slot else None,
                advertise=None,
                listener=LISTENER,
                caller=CALLER,
                door=self.door,
                watch=self.ready.__setitem__,
                unwatch=lambda socket: self.ready.pop(socket, None),
                touch=lambda _socket: None,
                on_message=on_message,
            )

        self.router = Router(
            slot,
            0,
            f"host{slot}",
            neighbours,
            deliver=lambda proc, frames: self.received.extend(map(bytes, frames)),
            on_agent_message=lambda origin, data: None,
            on_lost=lambda lost, loss: None,
            on_member=lambda member: None,
        )

    def close(self) -> None:
        self.router.neighbours.close()
        self.door.close()
        self.context.destroy(0)


class Pair:
    """The root and one host, with the proxy between them."""

    def __init__(self) -> None:
        self.root, self.host = RealAgent(0), RealAgent(1)
        self.proxy = Proxy(self.host.router.neighbours.endpoint)
        members = [Member(0, 0, "", "host0"), Member(1, 0, self.proxy.address, "host1")]
        self.root.router.set_members(members, {}, epoch=1, fan_out=8, gateway=0)
        self.serve(lambda: self.host.router.is_known(0))

    def serve(self, until: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Do what the loops of the two agents do until something is so."""
        end_s = time.monotonic() + limit_s
        while True:
            assert time.monotonic() < end_s, f"waited for {limit_s:g} s"
            poller = zmq.Poller()
            ready = self.root.ready | self.host.ready
            for socket in ready:
                poller.register(socket, zmq.POLLIN)
            due_s = min(agent.router.next_check_s() for agent in (self.root, self.host))
            for socket, _ in poller.poll(max(0, min(50, int(1000 * (due_s - time.monotonic()))))):
                ready[socket]()
            for agent in (self.root, self.host):
                agent.router.check(now_s=time.monotonic())
            if until():
                return

    def serve_for(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        self.serve(lambda: time.monotonic() >= end_s)

    def send(self, numbers: range, size_bytes: int = 0) -> None:
        """Send them both ways."""
        for number in numbers:
            body = number.to_bytes(4, "big") + bytes(size_bytes)
            self.root.router.to_process("m@1x1.0", [body])
            self.host.router.to_process("controller.0", [body])

    def expect(self, count: int) -> None:
        """Wait for ``count`` messages each way, and see that they are the first ones, in order, once."""
        self.serve(lambda: min(len(self.root.received), len(self.host.received)) >= count)
        self.serve(lambda: self.root.router.is_idle and self.host.router.is_idle)
        for agent in (self.root, self.host):
            assert [int.from_bytes(body[:4], "big") for body in agent.received] == list(range(count))

    def close(self) -> None:
        self.root.close()
        self.host.close()
        self.proxy.close()
        # pyzmq's thread, which frees what was sent without a copy; it starts again when it is needed.
        gc.stop()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_packets_of_all_sizes_pass_encrypted(pair: Pair) -> None:
    sizes = (0, 100, 70_000, PART_BYTES - 100, PART_BYTES + 100, 3 * PART_BYTES)
    for number, size_bytes in enumerate(sizes):
        pair.send(range(number, number + 1), size_bytes)
    pair.expect(len(sizes))
    assert sorted(map(len, pair.host.received)) == [4 + size_bytes for size_bytes in sizes]


def test_connections_that_are_reset_again_and_again_lose_nothing(pair: Pair) -> None:
    for step in range(10):
        pair.send(range(step * 300, (step + 1) * 300), 1000)
        pair.serve_for(0.02 * (step % 4))
        pair.proxy.kill()
    pair.expect(3000)
    assert pair.proxy.num_accepted > 5


def test_large_packets_survive_resets(pair: Pair) -> None:
    for number in range(4):
        pair.send(range(number, number + 1), 2 * PART_BYTES)
        pair.serve_for(0.03)
        pair.proxy.kill()
    pair.expect(4)
    assert {len(body) for body in pair.host.received} == {2 * PART_BYTES + 4}


@pytest.mark.parametrize("directions", [(), (Direction.OUT,), (Direction.BACK,)], ids=["both", "out", "back"])
def test_cut_that_loses_what_it_held_loses_nothing_in_the_end(pair: Pair, directions: tuple[Direction, ...]) -> None:
    pair.send(range(100), 1000)
    pair.proxy.cut(*directions)
    pair.send(range(100, 1000), 1000)
    pair.serve_for(0.7)
    pair.proxy.kill()
    pair.serve_for(0.1)
    pair.proxy.heal()
    pair.send(range(1000, 1100), 1000)
    pair.expect(1100)


def test_cut_longer_than_the_heartbeats_is_survived(pair: Pair) -> None:
    pair.proxy.cut()
    pair.send(range(1000), 1000)
    pair.serve_for(4.5)
    assert not pair.host.received
    pair.proxy.heal()
    pair.expect(1000)


def test_long_way_is_filled_without_sending_much_twice(pair: Pair) -> None:
    pair.proxy.delay_s = 0.1
    for start in range(0, 3000, 100):
        pair.send(range(start, start + 100), 1000)
        pair.serve_for(0)
    pair.expect(3000)
    outboxes = [*pair.root.router._outboxes.values(), *pair.host.router._outboxes.values()]
    # None on a machine that is free; a moment without a processor looks like a loss.
    assert sum(outbox.num_resent for outbox in outboxes) < 300


def test_traffic_that_stops_is_quiet(pair: Pair) -> None:
    pair.send(range(100))
    pair.expect(100)
    before = pair.root.router.num_received + pair.host.router.num_received
    pair.serve_for(1.5)
    # Pings twice a second each way, and what of a bundle was still on its way.
    assert pair.root.router.num_received + pair.host.router.num_received - before <= 10
