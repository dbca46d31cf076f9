"""Which sockets an end of a group's connections touches, on real sockets of this process."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING

from danaus.runtime.collectives.sockets import answer_for_missing, cut, own_listeners, tickets_in

if TYPE_CHECKING:
    from collections.abc import Generator

HOST = "127.0.0.1"


@contextlib.contextmanager
def connection() -> Generator[tuple[socket.socket, socket.socket, socket.socket]]:
    """A listener, and both ends of a connection to it."""
    with (
        socket.create_server((HOST, 0)) as listener,
        socket.create_connection(listener.getsockname(), timeout=5) as near,
        listener.accept()[0] as far,
    ):
        far.settimeout(5)
        yield listener, near, far


def test_only_connections_with_an_end_at_a_named_listener_are_cut() -> None:
    with connection() as (ours, near, far), connection() as (_, other_near, other_far):
        num_cut = cut([ours.getsockname()])

        assert num_cut == 2
        assert (near.recv(1), far.recv(1)) == (b"", b"")
        other_near.sendall(b"x")
        assert other_far.recv(1) == b"x"


def test_the_listener_itself_goes_on() -> None:
    with connection() as (listener, _, _):
        cut([listener.getsockname()])

        with socket.create_connection(listener.getsockname(), timeout=5), listener.accept()[0]:
            pass


def test_a_listener_of_that_port_elsewhere_is_another() -> None:
    with connection() as (listener, near, far):
        assert cut([("127.0.0.2", listener.getsockname()[1])]) == 0
        near.sendall(b"x")
        assert far.recv(1) == b"x"


def test_sockets_that_are_closed_or_not_connected_are_passed_over() -> None:
    with socket.socket() as fresh, connection() as (listener, near, _):
        near.close()

        assert cut([listener.getsockname()]) <= 1
        assert fresh.fileno() >= 0


def test_own_listeners_are_those_of_one_host_that_accept() -> None:
    with connection() as (listener, near, _):
        found = own_listeners(HOST)

        assert listener.getsockname() in found
        assert near.getsockname() not in found
        assert listener.getsockname() not in own_listeners("127.0.0.2")


def test_a_missing_member_is_answered_for_with_its_ticket() -> None:
    with socket.create_server((HOST, 0)) as listener:
        answer_for_missing(listener.getsockname(), [3, 5])

        for ticket in (3, 5):
            with listener.accept()[0] as caller:
                caller.settimeout(5)
                assert caller.recv(100) == struct.pack("=q", ticket)
                assert caller.recv(1) == b""


def test_tickets_end_what_a_member_publishes() -> None:
    assert tickets_in(b"address" + struct.pack("=3q", 7, 8, 9), 3) == (7, 8, 9)
    assert tickets_in(b"short", 3) == ()
