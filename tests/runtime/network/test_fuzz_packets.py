"""Whatever another agent sends, an agent drops and counts it, or takes it for what it is; nothing else happens."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.messages import wire
from danaus.runtime.network import packets
from danaus.runtime.network.router import Member, Router

from .fuzzing import fuzzed

if TYPE_CHECKING:
    from collections.abc import Callable

    from danaus.runtime.network.neighbours import Neighbours

UNHURRIED = fuzzed(100)

KEYS = st.integers(-2, 6) | st.text("a@.0x~", max_size=6)
ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.integers(-2, 6)
    | st.floats()
    | st.binary(max_size=20)
    | st.text("a@.0x~é\0", max_size=8)
    | st.sampled_from(["a@1x2.0", "agent@1x1.0", "a.0"])
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=16,
)
NUMBER = st.integers(0, 5)
DESTINATION = st.tuples(NUMBER, NUMBER, NUMBER).map(list)
MEMBER = st.tuples(NUMBER, NUMBER, st.just("tcp://127.0.0.1:1"), st.text("h1", max_size=3)).map(list)
LOST = st.tuples(NUMBER, st.just("why"), st.booleans(), st.booleans()).map(list)

HEADERS = st.one_of(
    st.tuples(st.just(packets.DATA), NUMBER, NUMBER, st.lists(DESTINATION, max_size=4)),
    st.tuples(st.just(packets.ACK), NUMBER, NUMBER, NUMBER, NUMBER, NUMBER),
    st.tuples(st.just(packets.PING), NUMBER, NUMBER, NUMBER),
    st.tuples(
        st.just(packets.TOPOLOGY),
        NUMBER,
        st.lists(MEMBER, max_size=5),
        st.lists(LOST, max_size=3),
        NUMBER,
        NUMBER,
    ),
    st.tuples(st.just(packets.BUNDLE), st.lists(NUMBER, max_size=4)),
).map(list)
METAS = st.one_of(
    st.tuples(st.just(packets.PLAIN), st.sampled_from(["a@1x2.0", "a.0", "", "@"])),
    st.tuples(st.just(packets.REPLY), st.sampled_from(["a@1x2.0", "a.0"]), NUMBER),
    st.tuples(
        st.just(packets.CAST),
        st.dictionaries(NUMBER, st.lists(st.tuples(st.just("a@1x2.0"), NUMBER).map(list), max_size=3), max_size=3),
    ),
    st.tuples(st.just(packets.AGENT)),
    st.tuples(st.just(packets.PART), st.booleans()),
).map(list)
PACKED = st.one_of(st.binary(max_size=60), VALUES.map(wire.pack), HEADERS.map(wire.pack), METAS.map(wire.pack))


def spoil(data: bytes, place: int, change: int) -> bytes:
    """Change one byte, or cut there."""
    if not data:
        return data
    at = place % len(data)
    return data[:at] if not change else data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]


def only_wire_errors(function: Callable[[Any], object], argument: Any) -> object:
    with contextlib.suppress(wire.WireError):
        return function(argument)
    return None


@UNHURRIED
@given(PACKED)
def test_headers_and_metas_raise_nothing_but_a_wire_error(data: bytes) -> None:
    only_wire_errors(packets.unpack_header, data)
    only_wire_errors(packets.unpack_meta, data)
    only_wire_errors(packets.unpack_header, memoryview(data))


@UNHURRIED
@given(HEADERS, METAS, st.integers(0, 1 << 20), st.integers(0, 255))
def test_damaged_headers_and_metas_raise_nothing_but_a_wire_error(
    header: list[Any], meta: list[Any], place: int, change: int
) -> None:
    only_wire_errors(packets.unpack_header, spoil(wire.pack(header), place, change))
    only_wire_errors(packets.unpack_meta, spoil(wire.pack(meta), place, change))


@UNHURRIED
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=6), st.lists(st.integers(-3, 9), max_size=6))
def test_a_bundle_is_split_as_it_says_or_not_at_all(frames: list[Any], sizes: list[int]) -> None:
    parts = only_wire_errors(lambda each: packets.split_bundle(*each), (frames, [size for size in sizes if size >= 0]))

    if parts is not None:
        assert [frame for part in cast("list[list[Any]]", parts) for frame in part] == frames[1:]


@UNHURRIED
@given(st.lists(st.binary(max_size=40), max_size=4))
def test_pieces_are_joined_to_frames_or_not_at_all(pieces: list[bytes]) -> None:
    frames = only_wire_errors(packets.join_packet, pieces)

    assert frames is None or all(type(frame) is bytes for frame in cast("list[Any]", frames))


ENVELOPES = st.sampled_from(sorted(wire._FIELDS)).flatmap(
    lambda kind: st.lists(VALUES, min_size=wire._FIELDS[kind] - 1, max_size=wire._FIELDS[kind] - 1).map(
        lambda fields: [kind, *fields]
    )
)


@UNHURRIED
@given(
    st.lists(ENVELOPES, max_size=3),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4),
    st.lists(st.binary(max_size=8), max_size=3),
)
def test_envelopes_of_any_fields_and_damage_raise_nothing_but_a_wire_error(
    envelopes: list[list[Any]], damage: list[tuple[int, int]], frames: list[bytes]
) -> None:
    data = b"".join(map(wire.pack, envelopes))
    for place, change in damage:
        data = spoil(data, place, change)

    found = only_wire_errors(lambda each: list(wire.unpack(each)), [data, *frames])
    only_wire_errors(wire.unpack_one, data)

    for envelope in cast("list[list[Any]]", found or []):
        assert len(envelope) == wire._FIELDS[envelope[0]]


class Sockets:
    """Neighbours that send nothing anywhere."""

    endpoint = "tcp://127.0.0.1:1"

    def __init__(self) -> None:
        self.children: set[int] = set()
        self.heard_s: dict[int, float] = {}
        self.sent: list[tuple[int, Any]] = []

    def set_children(self, endpoints: dict[int, str], *, now_s: float) -> list[int]:
        self.children = set(endpoints)
        return list(endpoints)

    def send(self, slot: int, frames: Any, *, now_s: float) -> bool:
        self.sent.append((slot, frames))
        return True

    def ping(self, header: bytes) -> None:
        pass

    def forget_parent(self, slot: int) -> None:
        pass


class Subject:
    """The router of slot 1 in a job of four, and what it has handed on."""

    def __init__(self) -> None:
        self.sockets = Sockets()
        self.delivered: list[tuple[str, Any]] = []
        self.agent_messages: list[tuple[int, Any]] = []
        self.router = Router(
            1,
            0,
            "nest",
            lambda _on_message: cast("Neighbours", self.sockets),
            deliver=lambda proc, frames: self.delivered.append((proc, frames)),
            on_agent_message=lambda origin, data: self.agent_messages.append((origin, data)),
            on_lost=lambda _slot, _loss: None,
            on_member=lambda _slot: None,
        )
        members = [Member(slot, 0, f"tcp://127.0.0.1:{slot + 1}", f"h{slot}") for slot in range(4)]
        self.router.set_members(members, {}, epoch=1, fan_out=1, gateway=0)

    def receive(self, neighbour: int, frames: list[Any]) -> None:
        """What a neighbour's socket hands over."""
        self.router._on_message(neighbour, frames)

    def data(self, seq: int, meta: list[Any], *body: bytes) -> None:
        self.receive(0, [packets.pack_data(0, 0, [[1, 0, seq]]), wire.pack(meta), *body])


@fuzzed(50)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(PACKED, min_size=1, max_size=4)), max_size=6))
def test_a_router_takes_whatever_frames_come(messages: list[tuple[int, list[bytes]]]) -> None:
    subject = Subject()

    for neighbour, frames in messages:
        subject.receive(neighbour, list(frames))
        subject.router.check(now_s=time.monotonic())

    assert subject.router.num_received == len(messages)


@fuzzed(50)
@given(st.lists(st.tuples(st.integers(0, 3), HEADERS, METAS, st.lists(PACKED, max_size=3)), max_size=8))
def test_a_router_takes_well_formed_nonsense(messages: list[tuple[int, list[Any], list[Any], list[bytes]]]) -> None:
    subject = Subject()

    for neighbour, header, meta, body in messages:
        subject.receive(neighbour, [wire.pack(header), wire.pack(meta), *body])
        subject.router.check(now_s=time.monotonic())


@UNHURRIED
@given(METAS, st.integers(0, 1 << 20), st.integers(0, 255), st.lists(PACKED, max_size=3))
def test_after_nonsense_from_a_process_others_are_served(
    meta: list[Any], place: int, change: int, body: list[bytes]
) -> None:
    """What receive_gate expects of a process here: WireError, or a bad address."""
    subject = Subject()

    with contextlib.suppress(wire.WireError, ValueError):
        subject.router.from_process([spoil(wire.pack(meta), place, change), *body])

    subject.router.from_process([wire.pack([packets.PLAIN, "a@2x1.0"]), b"hello"])
    assert subject.sockets.sent[-1][1][-1] == b"hello"


@pytest.mark.parametrize("number", [0, -1, 1 << 40, 5000])
def test_numbers_that_no_sender_uses_are_dropped(number: int) -> None:
    subject = Subject()

    subject.data(number, [packets.PLAIN, "a@1x1.0"], b"x")
    subject.data(1, [packets.PLAIN, "a@1x1.0"], b"good")

    assert [frames for _, frames in subject.delivered] == [[b"good"]]


def test_what_claims_to_be_of_an_unknown_or_another_life_is_dropped() -> None:
    subject = Subject()
    for origin, life in ((9, 0), (0, 7)):
        subject.receive(0, [packets.pack_data(origin, life, [[1, 0, 1]]), wire.pack([packets.PLAIN, "a@1x1.0"]), b"x"])

    assert subject.delivered == []
    assert subject.router.num_dropped == 2


def test_packets_far_ahead_are_kept_within_bounds() -> None:
    """A sender that leaves out the first packet cannot make the agent keep all that follow it."""
    subject = Subject()
    body = b"x" * (1 << 20)
    tracemalloc.start()
    try:
        for seq in range(2, 200):
            subject.data(seq, [packets.PLAIN, "a@1x1.0"], bytearray(body))  # type: ignore[arg-type]
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert subject.delivered == []
    assert kept_bytes < 80 << 20


GREEDY = {
    "array": b"\xdd\x7f\xff\xff\xff",
    "arrays in arrays": b"\xdd\x0f\xff\xff\xff" * 100,
    "short arrays": b"\xdc\xff\xff" * 1000,
    "full arrays": (b"\xdd\x00\x10\x00\x00" * 1000).ljust(1 << 20, b"\0"),
    "map": b"\xdf\x7f\xff\xff\xff",
    "bytes": b"\xc6\x7f\xff\xff\xff",
    "extension": b"\xc9\x7f\xff\xff\xff\x01",
    "deep": b"\x91" * 1_000_000,
    "flat": b"\x9b" + b"\x80" * 1_000_000,
}
"""Frames that announce much and bring little."""

READ_ALL = """
import resource, sys
from danaus.runtime.messages import wire
from danaus.runtime.network import daemon_protocol, packets
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for text in sys.stdin.read().split():
    data = bytes.fromhex(text)
    for read in (lambda: list(wire.unpack([data])), lambda: wire.unpack_one(data), lambda: packets.unpack_header(data),
                 lambda: packets.unpack_meta(data), lambda: daemon_protocol.parse(data)):
        try:
            read()
        except ValueError:
            pass
print(peak() - before)
"""


def test_announcements_of_much_fill_no_memory() -> None:
    """In a process of its own, whose peak is known."""
    ended = subprocess.run(
        [sys.executable, "-c", READ_ALL],
        input=" ".join(frame.hex() for frame in GREEDY.values()),
        capture_output=True,
        text=True,
        timeout=15,
        check=True,
    )

    # Some 100 MB, of lists that were made and are found to be cut off.
    assert int(ended.stdout) < 250 << 10


@pytest.mark.parametrize("frame", GREEDY.values(), ids=GREEDY.keys())
def test_announcements_of_much_cost_little(frame: bytes) -> None:
    """Of sizes that are announced and not sent, nothing is made room for that stays."""
    started_s = time.monotonic()

    for read in (lambda data: list(wire.unpack([data])), packets.unpack_header, packets.unpack_meta):
        with pytest.raises(wire.WireError):
            read(frame)
    only_wire_errors(wire.unpack_one, frame)

    # Some 0.3 s where two busy cores are shared.
    assert time.monotonic() - started_s < 5.0
