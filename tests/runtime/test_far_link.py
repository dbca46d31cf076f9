"""What goes to other hosts goes through one gate, in the order in which it was sent, over whatever link."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from danaus.runtime.messages import wire
from danaus.runtime.messages.far_link import CAST, PLAIN, REPLY, FarLink, Gate
from danaus.runtime.messages.link import MULTIPART

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIMIT_MS = 5000
A, B = "m@1x2.0", "m@1x2.1"


class Agent:
    """Reads at the gate as the host's agent does."""

    def __init__(self, context: zmq.Context[Any], directory: Path) -> None:
        self.path = os.path.join(directory, "gate")
        self.socket: zmq.Socket[bytes] = context.socket(zmq.PULL)
        self.socket.rcvhwm = 0
        self.socket.rcvtimeo = LIMIT_MS

    def bind(self) -> None:
        self.socket.bind(f"ipc://{self.path}")

    def take(self, count: int) -> list[tuple[Any, ...]]:
        """The next messages: the meta frame, read, and the frames."""
        taken: list[tuple[Any, ...]] = []
        for _ in range(count):
            meta, *frames = self.socket.recv_multipart()
            (*fields,) = wire.msgpack.unpackb(meta)
            taken.append((fields, *frames))
        return taken

    def has_more(self) -> bool:
        return bool(self.socket.poll(50))


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context = zmq.Context()
    yield context
    context.term()


@pytest.fixture
def agent(context: zmq.Context[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    agent = Agent(context, tmp_path_factory.mktemp("g"))
    agent.bind()
    yield agent
    agent.socket.close(0)


@pytest.fixture
def gate(context: zmq.Context[Any], agent: Agent) -> Iterator[Gate]:
    gate = Gate(context, lambda: agent.path)
    yield gate
    gate.close()


def make(proc: str, gate: Gate) -> FarLink:
    def wake(_link: object) -> None:
        raise AssertionError("nothing of a far link waits for the I/O thread")

    return FarLink(proc, wake, gate)


def opened(proc: str, gate: Gate, context: zmq.Context[Any]) -> FarLink:
    link = make(proc, gate)
    link.open(context, "")
    return link


def test_what_is_sent_before_the_process_is_up_is_held_and_goes_first(
    context: zmq.Context[Any], gate: Gate, agent: Agent
) -> None:
    link = make(A, gate)
    link.send(b"one")
    link.send(b"two", [memoryview(b"frame")])
    link.stage(b"three")
    assert not link.is_open
    assert not link.was_open
    assert not agent.has_more()

    link.open(context, "")
    link.send(b"four", lazy=True)

    assert link.is_open
    assert link.was_open
    assert agent.take(4) == [
        ([PLAIN, A], b"one"),
        ([PLAIN, A], MULTIPART + b"two", b"frame"),
        ([PLAIN, A], b"three"),
        ([PLAIN, A], b"four"),
    ]


def test_opening_twice_sends_nothing_twice(context: zmq.Context[Any], gate: Gate, agent: Agent) -> None:
    link = make(A, gate)
    link.send(b"one")

    link.open(context, "")
    link.open(context, "")

    assert agent.take(1) == [([PLAIN, A], b"one")]
    assert not agent.has_more()


def test_messages_over_all_links_and_casts_stay_in_the_order_in_which_they_were_sent(
    context: zmq.Context[Any], gate: Gate, agent: Agent
) -> None:
    links = [opened(A, gate, context), opened(B, gate, context)]
    expected: list[tuple[Any, ...]] = []
    for number in range(200):
        body = b"%d" % number
        if number % 5 == 4:
            with gate.lock:
                gate.send_locked(wire.pack([CAST, {}, "me.0", 0]), [b"head", b"tail", body])
            expected.append(([CAST, {}, "me.0", 0], b"head", b"tail", body))
            continue
        link = links[number % 2]
        if number % 3:
            link.send(body)
            expected.append(([PLAIN, link.proc], body))
        else:
            link.send(body, [b"x" * number])
            expected.append(([PLAIN, link.proc], MULTIPART + body, b"x" * number))

    assert agent.take(200) == expected


def test_frames_are_copied_before_send_returns(context: zmq.Context[Any], gate: Gate, agent: Agent) -> None:
    link, held = opened(A, gate, context), make(B, gate)
    buffer = bytearray(b"before")

    link.send(b"sent", [buffer])
    held.send(b"held", [buffer])
    buffer[:] = b"after!"
    held.open(context, "")

    assert [frames[-1] for frames in agent.take(2)] == [b"before", b"before"]


def test_messages_wait_for_an_agent_that_is_not_there_yet(
    context: zmq.Context[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    agent = Agent(context, tmp_path_factory.mktemp("g"))
    gate = Gate(context, lambda: agent.path)
    try:
        opened(A, gate, context).send(b"early")

        agent.bind()

        assert agent.take(1) == [([PLAIN, A], b"early")]
    finally:
        gate.close()
        agent.socket.close(0)


# replies:


def test_a_reply_that_may_be_joined_says_so_and_to_which_call_it_belongs(
    context: zmq.Context[Any], gate: Gate, agent: Agent
) -> None:
    link = opened(A, gate, context)

    link.send_reply(7, b"reply", [])
    link.send_reply(7, b"large", [b"frame"])

    # What has frames of its own cannot be laid end to end.
    assert agent.take(2) == [([REPLY, A, 7], b"reply"), ([PLAIN, A], MULTIPART + b"large", b"frame")]


def test_a_reply_to_a_process_that_is_not_up_is_held_like_anything_else(
    context: zmq.Context[Any], gate: Gate, agent: Agent
) -> None:
    link = make(A, gate)
    link.send(b"before")
    link.send_reply(7, b"reply", [])

    link.open(context, "")

    assert agent.take(2) == [([PLAIN, A], b"before"), ([PLAIN, A], b"reply")]


# processes that are followed by others before they were ever up:


def test_a_link_that_is_renamed_sends_what_it_holds_to_the_new_name(
    context: zmq.Context[Any], gate: Gate, agent: Agent
) -> None:
    link = make(A, gate)
    link.send(b"held")

    link.proc = f"{A}~1"
    link.open(context, "")
    link.send(b"sent")

    assert agent.take(2) == [([PLAIN, f"{A}~1"], b"held"), ([PLAIN, f"{A}~1"], b"sent")]


def test_what_a_link_holds_goes_before_what_the_one_it_is_forwarded_to_holds(
    context: zmq.Context[Any], gate: Gate, agent: Agent
) -> None:
    old, known = make(A, gate), make(f"{A}~1", gate)
    old.send(b"held by the old")
    known.send(b"held by the new")

    old.forward_to(known)
    old.send(b"sent over the old")
    old.stage(b"staged over the old")
    old.send_reply(7, b"reply over the old", [])
    known.open(context, "")
    old.send(b"sent once open", [b"frame"])

    assert [frames[1:] for frames in agent.take(6)] == [
        (b"held by the old",),
        (b"held by the new",),
        (b"sent over the old",),
        (b"staged over the old",),
        (b"reply over the old",),
        (MULTIPART + b"sent once open", b"frame"),
    ]


def test_what_a_link_holds_goes_at_once_where_the_one_it_is_forwarded_to_is_open(
    context: zmq.Context[Any], gate: Gate, agent: Agent
) -> None:
    old, known = make(A, gate), opened(f"{A}~1", gate, context)
    old.send(b"held")

    old.forward_to(known)
    old.send(b"sent")

    assert agent.take(2) == [([PLAIN, f"{A}~1"], b"held"), ([PLAIN, f"{A}~1"], b"sent")]


# the end:


def test_a_closed_link_drops_what_it_holds_and_what_is_sent_later(
    context: zmq.Context[Any], gate: Gate, agent: Agent
) -> None:
    held, sending = make(A, gate), opened(B, gate, context)
    held.send(b"dropped")

    held.close()
    sending.close()
    held.send(b"dropped, too")
    sending.send(b"and this")
    sending.send_reply(7, b"and a reply", [])
    held.open(context, "")
    sending.open(context, "")

    assert (held.is_open, sending.is_open) == (False, False)
    assert not agent.has_more()


def test_closing_one_link_leaves_the_gate_to_the_others(context: zmq.Context[Any], gate: Gate, agent: Agent) -> None:
    one, other = opened(A, gate, context), opened(B, gate, context)
    one.send(b"first")

    one.close()
    other.send(b"second")

    assert agent.take(2) == [([PLAIN, A], b"first"), ([PLAIN, B], b"second")]


def test_a_gate_that_closes_sends_within_its_time_what_is_on_its_way(
    context: zmq.Context[Any], gate: Gate, agent: Agent
) -> None:
    link = opened(A, gate, context)
    for _ in range(100):
        link.send(bytes(10_000))

    gate.close(LIMIT_MS)
    gate.close()

    assert len(agent.take(100)) == 100
