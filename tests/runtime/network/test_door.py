"""Who holds the key comes in, nobody else does; over real sockets."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from danaus.runtime.network import door as doors
from danaus.runtime.network.door import Door, connect, listen
from danaus.runtime.network.endpoints import endpoint_of, is_loopback, split_address
from danaus.runtime.network.keys import KeyPair, derive

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET, STRANGERS = b"a" * 32, b"b" * 32
LISTENER, CALLER = derive(SECRET, "listener", "host"), derive(SECRET, "caller", "host")
LIMIT_S = 5.0
SILENCE_S = 0.4
"""How long nothing may come from who is turned away; a good caller takes some 2 ms."""


@dataclass
class Entrance:
    """A listener with its door, and a context for callers."""

    context: zmq.Context[Any]
    callers: zmq.Context[Any]
    door: Door
    listener: zmq.Socket[Any]
    made: list[zmq.Socket[Any]] = field(default_factory=list[zmq.Socket[Any]])
    """A socket that is forgotten is closed, with what it had to send."""

    @property
    def endpoint(self) -> str:
        return endpoint_of(self.listener)

    def call(self, keys: KeyPair, server_public: bytes = LISTENER.public, **options: Any) -> zmq.Socket[Any]:
        self.made.append(connect(self.callers, zmq.DEALER, self.endpoint, keys, server_public, **options))
        return self.made[-1]

    def close(self) -> None:
        for each in self.made:
            each.close(0)
        self.door.close()

    def receive(self, limit_s: float = LIMIT_S) -> list[bytes] | None:
        """Serve until something comes in, None where nothing does."""
        deadline_s = time.monotonic() + limit_s
        poller = zmq.Poller()
        poller.register(self.door.socket, zmq.POLLIN)
        poller.register(self.listener, zmq.POLLIN)
        while (left_s := deadline_s - time.monotonic()) > 0:
            ready = dict(poller.poll(int(left_s * 1000) + 1))
            if self.door.socket in ready:
                self.door.serve()
            if self.listener in ready:
                return self.listener.recv_multipart()
        return None

    def serve_until_refused(self, count: int) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while self.door.refused < count:
            assert time.monotonic() < deadline_s, "nobody was refused"
            self.door.socket.poll(100)
            self.door.serve()


@pytest.fixture
def entrance() -> Iterator[Entrance]:
    context: zmq.Context[Any] = zmq.Context()
    callers: zmq.Context[Any] = zmq.Context()
    door = Door(context, [CALLER.public])
    listener = listen(context, zmq.ROUTER, "tcp://127.0.0.1:0", LISTENER, door, max_message_bytes=4096)
    entrance = Entrance(context, callers, door, listener)
    yield entrance
    entrance.close()
    callers.destroy(0)
    context.term()


def test_a_caller_with_the_key_comes_in_and_is_answered(entrance: Entrance) -> None:
    caller = entrance.call(CALLER)
    caller.send(b"hello")

    received = entrance.receive()

    assert received is not None
    assert received[1] == b"hello"
    entrance.listener.send_multipart([received[0], b"welcome"])
    assert caller.poll(int(LIMIT_S * 1000))
    assert caller.recv() == b"welcome"
    assert entrance.door.refused == 0


def test_an_unknown_caller_who_knows_the_listeners_key_is_turned_away_and_counted(entrance: Entrance) -> None:
    caller = entrance.call(derive(STRANGERS, "caller", "host"))
    caller.send(b"evil")

    entrance.serve_until_refused(1)

    assert entrance.receive(SILENCE_S) is None
    assert entrance.door.last_refused == "127.0.0.1"


def test_a_key_made_for_jobs_opens_no_host(entrance: Entrance) -> None:
    entrance.call(derive(SECRET, "caller", "job")).send(b"evil")

    entrance.serve_until_refused(1)

    assert entrance.receive(SILENCE_S) is None


def test_a_caller_that_expects_another_listener_gets_nowhere(entrance: Entrance) -> None:
    entrance.call(CALLER, server_public=derive(STRANGERS, "listener", "host").public).send(b"lost")

    assert entrance.receive(SILENCE_S) is None


def test_a_listener_without_the_key_hears_nothing_of_a_caller() -> None:
    """It cannot pose as the host: the caller's messages are for the owner of the key only."""
    context: zmq.Context[Any] = zmq.Context()
    impostor_keys = derive(STRANGERS, "listener", "host")
    door = Door(context, [CALLER.public])
    impostor = listen(context, zmq.ROUTER, "tcp://127.0.0.1:0", impostor_keys, door)
    entrance = Entrance(context, zmq.Context(), door, impostor)

    entrance.call(CALLER, server_public=LISTENER.public).send(b"secret")

    assert entrance.receive(SILENCE_S) is None
    entrance.close()
    entrance.callers.term()
    context.term()


@pytest.mark.parametrize("mechanism", ["NULL", "PLAIN"])
def test_a_caller_without_curve_gets_nowhere(entrance: Entrance, mechanism: str) -> None:
    caller: zmq.Socket[Any] = entrance.callers.socket(zmq.DEALER)
    entrance.made.append(caller)
    if mechanism == "PLAIN":
        caller.plain_username, caller.plain_password = b"root", b"root"
    caller.connect(entrance.endpoint)
    caller.send(b"evil")

    assert entrance.receive(SILENCE_S) is None

    # The good one still does.
    entrance.call(CALLER).send(b"hello")
    assert entrance.receive() is not None


def test_a_frame_over_the_bound_drops_its_sender_and_nobody_else(entrance: Entrance) -> None:
    big, small = entrance.call(CALLER), entrance.call(CALLER)
    big.send(b"x" * 4097)
    assert entrance.receive(SILENCE_S) is None

    small.send(b"x" * 4096)

    received = entrance.receive()
    assert received is not None
    assert len(received[1]) == 4096


def test_a_stranger_that_comes_again_and_again_is_refused_each_time(entrance: Entrance) -> None:
    stranger = derive(STRANGERS, "caller", "host")
    for _ in range(20):
        entrance.call(stranger).send(b"evil")

    entrance.serve_until_refused(20)

    entrance.call(CALLER).send(b"hello")
    received = entrance.receive()
    assert received is not None
    assert received[1] == b"hello"


def test_without_its_handler_a_listener_lets_nobody_in(entrance: Entrance) -> None:
    """libzmq asks whoever has bound the handler's name: with nobody there, it would let every caller in."""
    entrance.door.socket.close(0)
    poller_was_closed = entrance.door.closed

    entrance.call(derive(STRANGERS, "caller", "host")).send(b"evil")

    assert poller_was_closed
    assert entrance.listener.poll(int(SILENCE_S * 1000)) == 0


def test_closing_the_door_closes_its_listeners_first(entrance: Entrance) -> None:
    entrance.door.close()

    assert entrance.listener.closed
    assert entrance.door.closed
    entrance.door.close()


def test_a_context_has_one_door(entrance: Entrance) -> None:
    with pytest.raises(zmq.ZMQError, match="in use"):
        Door(entrance.context, [CALLER.public])


def test_an_allowed_key_that_is_none_makes_no_door() -> None:
    context: zmq.Context[Any] = zmq.Context()

    with pytest.raises(ValueError, match="9"):
        Door(context, [b"too short"])

    Door(context, []).close()
    context.term()


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://127.0.0.1:0"])
def test_listening_without_a_key_is_refused_and_says_how_to_get_one(entrance: Entrance, address: str) -> None:
    with pytest.raises(ValueError, match=r"without a key: messages are pickles.*danaus key FILE"):
        listen(entrance.context, zmq.ROUTER, address, None, entrance.door)


def test_listening_without_a_door_or_with_another_contexts_is_refused(entrance: Entrance) -> None:
    with pytest.raises(ValueError, match="without a door"):
        listen(entrance.context, zmq.ROUTER, "tcp://127.0.0.1:0", LISTENER, None)
    with pytest.raises(ValueError, match="of another context"):
        listen(entrance.callers, zmq.ROUTER, "tcp://127.0.0.1:0", LISTENER, entrance.door)
    entrance.door.close()
    with pytest.raises(ValueError, match="closed"):
        listen(entrance.context, zmq.ROUTER, "tcp://127.0.0.1:0", LISTENER, entrance.door)


def test_an_address_that_is_taken_leaves_no_socket(entrance: Entrance) -> None:
    with pytest.raises(zmq.ZMQError, match="in use"):
        listen(entrance.context, zmq.ROUTER, entrance.endpoint, LISTENER, entrance.door)


def test_every_interface_is_reached_by_the_advertised_name(entrance: Entrance) -> None:
    listener = listen(entrance.context, zmq.ROUTER, "tcp://*:0", LISTENER, entrance.door)
    endpoint = endpoint_of(listener, advertise="localhost")
    caller = connect(entrance.callers, zmq.DEALER, endpoint, CALLER, LISTENER.public)
    entrance.made.append(caller)
    caller.send(b"hello")

    everywhere = Entrance(entrance.context, entrance.callers, entrance.door, listener)

    assert endpoint.startswith("tcp://localhost:")
    assert everywhere.receive() is not None


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 on this machine")
def test_it_listens_and_connects_by_ipv6(entrance: Entrance) -> None:
    try:
        listener = listen(entrance.context, zmq.ROUTER, "tcp://[::1]:0", LISTENER, entrance.door)
    except zmq.ZMQError:
        pytest.skip("no IPv6 loopback on this machine")
    ipv6 = Entrance(entrance.context, entrance.callers, entrance.door, listener)
    ipv6.call(CALLER).send(b"hello")

    assert ipv6.endpoint.startswith("tcp://[::1]:")
    assert ipv6.receive() is not None
    ipv6.made[0].close()


def test_options_are_set_before_the_connection_is_made(entrance: Entrance) -> None:
    entrance.call(CALLER, options={zmq.ROUTING_ID: b"me"}).send(b"hello")

    assert entrance.receive() == [b"me", b"hello"]


def test_sockets_watch_their_peers_and_linger_not(entrance: Entrance) -> None:
    for each in (entrance.listener, entrance.call(CALLER)):
        assert each.linger == 0
        assert each.handshake_ivl == doors.HANDSHAKE_MS
        assert (each.heartbeat_ivl, each.heartbeat_timeout) == (doors.HEARTBEAT_MS, doors.HEARTBEAT_TIMEOUT_MS)


def test_a_request_that_is_not_libzmqs_own_is_not_answered(entrance: Entrance) -> None:
    """Whoever is in this context could connect to the handler; it must not trip over them."""
    other: zmq.Socket[Any] = entrance.context.socket(zmq.DEALER)
    other.linger = 0
    other.connect("inproc://zeromq.zap.01")
    key = b"k" * 32
    other.send_multipart([b"", b"1.0"])
    other.send_multipart([b"", b"9.9", b"1", b"danaus", b"", b"", b"CURVE", key])
    other.send_multipart([b"", b"1.0", b"2", b"elsewhere", b"", b"", b"CURVE", key])
    other.send_multipart([b"", b"1.0", b"3", b"danaus", b"", b"", b"NULL"])
    other.send_multipart([b"", b"1.0", b"4", b"danaus", b"", b"", b"PLAIN", b"root", b"root"])

    entrance.serve_until_refused(3)

    answers = [other.recv_multipart(zmq.NOBLOCK) for _ in range(3)]
    assert [(each[2], each[3]) for each in answers] == [(b"2", b"400"), (b"3", b"400"), (b"4", b"400")]
    other.close()


@pytest.mark.parametrize(
    "address",
    ["", "tcp://", "tcp://host", "tcp://:5", "tcp://host:", "tcp://host:x", "tcp://host:99999", "tcp://host:-1",
     "tcp://a b:1", "tcp://::1:5", "udp://host:1", "host:1", "tcp://host:\uff11"],
)  # fmt: skip
def test_a_malformed_address_is_named(address: str) -> None:
    with pytest.raises(ValueError, match="expected tcp://HOST:PORT"):
        split_address(address)


def test_a_host_that_cannot_be_found_is_named(entrance: Entrance) -> None:
    address = "tcp://no-such-host.invalid:1"

    with pytest.raises(ValueError, match=r"host 'no-such-host\.invalid' cannot be found"):
        connect(entrance.callers, zmq.DEALER, address, CALLER, LISTENER.public)


def test_loopback_is_told_from_what_others_reach() -> None:
    assert is_loopback("tcp://127.0.0.1:1")
    assert is_loopback("tcp://127.9.9.9:1")
    assert is_loopback("tcp://[::1]:1")
    assert is_loopback("tcp://localhost:1")
    assert not is_loopback("tcp://0.0.0.0:1")
    assert not is_loopback("tcp://10.0.0.1:1")
