"""A link's batch is sent by whoever comes next, or by the I/O thread, which has to be told."""

from __future__ import annotations

from typing import Any

import zmq

from danaus.runtime.messages import wire
from danaus.runtime.messages.link import MULTIPART, Link


class Socket:
    """Keeps what is sent over it."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, data: bytes, *_flags: Any, **_options: Any) -> None:
        self.sent.append(data)


def open_link() -> tuple[Link, Socket, list[Link]]:
    woken: list[Link] = []
    link, socket = Link("mesh.0", woken.append), Socket()
    link._socket, link._send_raw = socket, socket.send  # type: ignore[assignment]
    return link, socket, woken


def envelopes(count: int) -> list[bytes]:
    return [wire.pack([wire.LEASE, "me", [number]]) for number in range(count)]


def test_first_message_of_a_batch_wakes_the_thread_that_sends_it() -> None:
    link, socket, woken = open_link()
    one, two = envelopes(2)

    link.send(one, lazy=True)
    link.send(two, lazy=True)
    assert (woken, socket.sent) == ([link], [])
    link.flush()

    assert socket.sent == [one + two]


def test_batch_that_began_with_a_staged_message_wakes_it_too() -> None:
    link, socket, woken = open_link()
    one, two, three = envelopes(3)

    link.stage(one)
    link.send(two, lazy=True)
    link.stage(three)
    assert woken == [link]
    link.flush()
    link.send(one, lazy=True)

    assert socket.sent == [one + two + three]
    assert woken == [link, link]


def test_message_that_is_not_lazy_takes_the_batch_along() -> None:
    link, socket, woken = open_link()
    one, two, three = envelopes(3)

    link.stage(one)
    link.send(two, lazy=True)
    link.send(three)

    assert socket.sent == [one + two + three]
    assert woken == [link]


def test_what_a_link_holds_goes_over_another_that_it_is_forwarded_to() -> None:
    context = zmq.Context()
    receiver = context.socket(zmq.PULL)
    receiver.bind("inproc://next")
    receiver.rcvtimeo = 2000
    old, known = Link("m.0~1", Link.flush), Link("m.0~2", Link.flush)
    try:
        old.send(b"held by the old")
        known.send(b"held by the new")
        old.forward_to(known)
        old.send(b"sent over the old")
        known.open(context, "inproc://next")
        old.send(b"sent once open", [b"frame"])

        assert [receiver.recv() for _ in range(3)] == [b"held by the old", b"held by the new", b"sent over the old"]
        assert receiver.recv_multipart() == [MULTIPART + b"sent once open", b"frame"]
    finally:
        known.close()
        receiver.close(0)
        context.term()
