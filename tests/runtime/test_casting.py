"""A call to ranks on other hosts goes to the agent once; each rank gets it with the slot of its own."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from danaus.runtime.calls.casting import cast
from danaus.runtime.messages import wire
from danaus.runtime.messages.attachment import Outgoing
from danaus.runtime.messages.far_link import FarLink, Gate
from danaus.runtime.messages.link import MULTIPART, Lane, Link
from danaus.runtime.network import packets

BEFORE = [wire.CALL, "workers", "step", "controller.0", "main", 41]
AFTER = [[2, 2], wire.EXPLICIT_PORT]
SIZE_BYTES = 100


class FakeGate(Gate):
    """Keeps what is handed to the agent."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sent: list[tuple[list[Any], list[bytes]]] = []

    def send_locked(self, meta: bytes, frames: Any) -> None:
        assert self.lock.locked()
        self.sent.append((packets.unpack_meta(meta), [bytes(frame) for frame in frames]))


class FakeProc:
    """What :func:`cast` needs of the process."""

    proc_id = "controller.0"

    def __init__(self) -> None:
        self.gate = FakeGate()

    def far(self, proc: str, *, is_open: bool = True, bound: int = 10) -> Lane:
        link = FarLink(proc, Link.flush, self.gate)
        if is_open:
            link.open(None, "")  # type: ignore[arg-type]
        return Lane(link, "workers", "main", "workers", bound)

    def near(self, proc: str) -> Lane:
        return Lane(Link(proc, Link.flush), "workers", "main", "workers", 10)

    def cast(
        self, lanes: list[Lane], *, frames: list[bytes] | None = None, joined: int = 0, reduce: bytes = b""
    ) -> set[int]:
        out = Outgoing(b"body", len(frames) if frames else None, frames or [])
        out.size_bytes = SIZE_BYTES
        return cast(self, lanes, BEFORE, AFTER, out, joined, reduce)  # type: ignore[arg-type]


@pytest.fixture
def proc() -> FakeProc:
    return FakeProc()


def calls_of(sent: tuple[list[Any], list[bytes]], slot: int) -> dict[str, list[Any]]:
    """What the agent of a host makes of a cast for its processes."""
    (kind, shares, *_), (head, tail, *frames) = sent
    assert kind == packets.CAST
    made: dict[str, list[Any]] = {}
    for name, call_slot in shares[slot]:
        first, *rest = packets.join_call(head, call_slot, tail, frames)
        (made[name],) = wire.unpack([first.removeprefix(MULTIPART), *rest])
    return made


def test_one_message_holds_the_call_for_every_rank_elsewhere(proc: FakeProc) -> None:
    names = ["m@1:2x2.0", "m@1:2x2.1", "m@1:2x2.2", "m@1:2x2.3"]

    sent = proc.cast([proc.far(name) for name in names])

    assert sent == {0, 1, 2, 3}
    (message,) = proc.gate.sent
    shares = {1: [[names[0], 0], [names[1], 1]], 2: [[names[2], 2], [names[3], 3]]}
    assert message[0] == [packets.CAST, shares, "controller.0", 0, b""]
    assert calls_of(message, 2) == {names[slot]: [*BEFORE, slot, *AFTER, b"body", None] for slot in (2, 3)}


def test_the_arguments_frames_travel_once(proc: FakeProc) -> None:
    proc.cast([proc.far("m@1x2.0"), proc.far("m@1x2.1")], frames=[b"one", b"two"])

    (message,) = proc.gate.sent
    assert message[1][2:] == [b"one", b"two"]
    assert calls_of(message, 1)["m@1x2.1"] == [*BEFORE, 1, *AFTER, b"body", [b"one", b"two"]]


def test_replies_are_joined_only_where_the_call_says_so(proc: FakeProc) -> None:
    lanes = [proc.far("m@1x2.0"), proc.far("m@1x2.1")]

    proc.cast(lanes)
    proc.cast(lanes, joined=41)

    assert [message[0][3] for message in proc.gate.sent] == [0, 41]
    flags = [calls_of(message, 1)["m@1x2.0"][8] for message in proc.gate.sent]
    assert flags == [wire.EXPLICIT_PORT, wire.EXPLICIT_PORT | wire.JOINED]


def test_the_agents_hear_by_which_operation_values_may_be_joined(proc: FakeProc) -> None:
    proc.cast([proc.far("m@1x2.0"), proc.far("m@1x2.1")], joined=41, reduce=b"sum")

    assert proc.gate.sent[0][0][4] == b"sum"


def test_ranks_of_this_host_are_left_to_their_own_links(proc: FakeProc) -> None:
    lanes = [proc.near("local.0"), proc.far("m@1x2.0"), proc.near("local.1"), proc.far("m@1x2.1")]

    assert proc.cast(lanes) == {1, 3}
    assert proc.gate.sent[0][0][1] == {1: [["m@1x2.0", 1], ["m@1x2.1", 3]]}


@pytest.mark.parametrize("num_far", [0, 1])
def test_fewer_than_two_elsewhere_are_no_cast(proc: FakeProc, num_far: int) -> None:
    lanes = [proc.near("local.0"), *[proc.far("m@1x1.0")][:num_far]]

    assert proc.cast(lanes) == set()
    assert proc.gate.sent == []
    assert [lane.account.spent for lane in lanes] == [0] * len(lanes)


def test_ranks_that_are_not_up_get_theirs_over_their_links_which_hold_it(proc: FakeProc) -> None:
    lanes = [proc.far("m@1x4.0"), proc.far("m@1x4.1", is_open=False), proc.far("m@1x4.2"), proc.far("m@1x4.3")]

    assert proc.cast(lanes) == {0, 2, 3}


def test_ranks_without_room_wait_for_credit_and_what_waits_is_not_overtaken(proc: FakeProc) -> None:
    full, waiting = proc.far("m@1x4.0", bound=1), proc.far("m@1x4.1")
    full.account.spend(SIZE_BYTES)
    waiting.backlog.append((1, b"", Outgoing(b"", None, [])))

    assert proc.cast([full, waiting, proc.far("m@1x4.2"), proc.far("m@1x4.3")]) == {2, 3}


def test_what_is_cast_is_accounted_for_like_any_message(proc: FakeProc) -> None:
    lanes = [proc.far("m@1x2.0", bound=2), proc.far("m@1x2.1", bound=2)]

    assert [proc.cast(lanes) for _ in range(3)] == [{0, 1}, {0, 1}, set()]
    assert [(lane.account.spent, lane.account.spent_bytes) for lane in lanes] == [(2, 2 * SIZE_BYTES)] * 2


def test_a_rank_whose_link_leads_to_the_next_incarnation_gets_its_own_message(proc: FakeProc) -> None:
    renamed = proc.far("m@1x3.0", is_open=False)
    other = FarLink("m@1x3.0~1", Link.flush, proc.gate)
    renamed.link.forward_to(other)
    other.open(None, "")  # type: ignore[arg-type]

    assert proc.cast([renamed, proc.far("m@1x3.1"), proc.far("m@1x3.2")]) == {1, 2}
