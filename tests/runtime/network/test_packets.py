"""What one agent packs another reads as the same; casts and large packets are put together again as they were."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.messages import wire
from danaus.runtime.messages.link import MULTIPART
from danaus.runtime.messages.wire import WireError
from danaus.runtime.network import packets
from danaus.runtime.network.packets import PART_BYTES, join_call, join_packet, split_packet, unpack_header, unpack_meta

HEADERS = [
    [packets.DATA, 1, 0, [[2, 0, 7], [3, 1, 8]]],
    [packets.DATA, 1, 0, []],
    [packets.ACK, 1, 0, 2, 0, 7],
    [packets.PING, 1, 0, 5],
    [packets.TOPOLOGY, 5, [[1, 0, "tcp://h:1", "h"]], [[2, "gone", False]], 8, 0],
    [packets.BUNDLE, [1, 2]],
]
METAS = [
    [packets.PLAIN, "m@1x2.0"],
    [packets.REPLY, "m@1x2.0", 9],
    [packets.CAST, {1: [["m@1x2.0", 0], ["m@1x2.1", 1]]}, "controller.0", 9, b"sum"],
    [packets.CAST, {}, "controller.0", 0, b""],
    [packets.AGENT],
    [packets.PART, True],
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_is_read_as_it_was_packed(header: list[Any]) -> None:
    assert unpack_header(packets.pack(header)) == header
    assert unpack_header(memoryview(packets.pack(header))) == header


def test_the_header_of_data_names_every_destination() -> None:
    assert unpack_header(packets.pack_data(1, 2, [[3, 0, 4], [5, 1, 6]])) == [
        packets.DATA,
        1,
        2,
        [[3, 0, 4], [5, 1, 6]],
    ]


@pytest.mark.parametrize(
    "header",
    [
        [],
        [9, 1],
        ["0", 1, 0, []],
        [True, 1, 0, []],
        [packets.DATA, 1, 0],
        [packets.DATA, -1, 0, []],
        [packets.DATA, 1, 0, [[2, 0]]],
        [packets.DATA, 1, 0, [[2, 0, -1]]],
        [packets.DATA, 1, 0, [2]],
        [packets.ACK, 1, 0, 2, 0, True],
        [packets.BUNDLE, [1, -1]],
        [packets.BUNDLE, ["1"]],
        {"kind": 0},
    ],
)
def test_what_is_no_header_is_refused(header: Any) -> None:
    with pytest.raises(WireError, match="not a"):
        unpack_header(packets.pack(header))


@pytest.mark.parametrize("meta", METAS)
def test_a_meta_frame_is_read_as_it_was_packed(meta: list[Any]) -> None:
    assert unpack_meta(packets.pack(meta)) == meta


@pytest.mark.parametrize(
    "meta",
    [
        [],
        [[]],
        [packets.PLAIN],
        [packets.PLAIN, 1],
        [packets.PLAIN, "m.0", 1],
        [packets.REPLY, "m.0"],
        [packets.CAST, {}, "m.0", 0],
        [packets.CAST, [], "m.0", 0, b""],
        [packets.CAST, {}, 1, 0, b""],
        [packets.CAST, {}, "m.0", None, b""],
        [packets.CAST, {}, "m.0", 0, "sum"],
        [packets.CAST, {"1": []}, "m.0", 0, b""],
        [packets.CAST, {1: {}}, "m.0", 0, b""],
        [packets.CAST, {1: [["m.0"]]}, "m.0", 0, b""],
        [packets.CAST, {1: [[0, "m.0"]]}, "m.0", 0, b""],
        [packets.CAST, {1: ["m.0"]}, "m.0", 0, b""],
        [packets.AGENT, 1],
        [packets.PART, 1],
        [17],
    ],
)
def test_what_is_no_meta_frame_is_refused(meta: list[Any]) -> None:
    with pytest.raises(WireError, match="not the meta frame"):
        unpack_meta(packets.pack(meta))


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        (b"", "malformed"),
        (b"\x93\x01", "malformed"),
        (packets.pack([packets.PING, 1, 0, 5]) + b"\0", "malformed"),
        (packets.pack(7), "not a header"),
        (bytes(packets.MAX_HEADER_BYTES + 1), f"at most {packets.MAX_HEADER_BYTES}"),
    ],
)
def test_frames_that_are_no_list_are_refused(frame: bytes, what: str) -> None:
    with pytest.raises(WireError, match=what):
        unpack_header(frame)
    with pytest.raises(WireError, match=what):
        unpack_meta(frame)


def test_a_bundle_is_split_into_its_messages() -> None:
    frames = [b"header", b"a", b"b", b"c", b"d", b"e", b"f"]

    assert packets.split_bundle(frames, [1, 3, 2]) == [[b"a"], [b"b", b"c", b"d"], [b"e", b"f"]]
    assert packets.split_bundle([b"header"], []) == []


@pytest.mark.parametrize("sizes", [[1], [3], [1, 0, 1], [2, 1]])
def test_a_bundle_that_says_something_else_than_it_holds_is_refused(sizes: list[int]) -> None:
    with pytest.raises(WireError, match="a bundle of"):
        packets.split_bundle([b"header", b"a", b"b"], sizes)


# casts:

CALL_FIELDS = [wire.CALL, "workers", "step", "controller.0", "main", 41, None, [2, 2], 0, b"body", None]


def parts(fields: list[Any]) -> tuple[bytes, bytes]:
    """What is before the slot and what is behind it, as a caller lays them out."""
    return b"\x9b" + b"".join(map(wire.pack, fields[:6])), b"".join(map(wire.pack, fields[7:]))


@given(st.integers(0, 1 << 40))
def test_each_rank_of_a_cast_gets_the_call_with_its_slot(slot: int) -> None:
    head, tail = parts(CALL_FIELDS)

    frames = join_call(head, slot, tail, [])

    assert list(wire.unpack(frames)) == [[*CALL_FIELDS[:6], slot, *CALL_FIELDS[7:]]]


def test_the_frames_of_a_cast_go_to_each_rank() -> None:
    fields = [*CALL_FIELDS[:10], 2]
    head, tail = parts(fields)

    first, *frames = join_call(head, 3, tail, [b"one", b"two"])

    assert first[:1] == MULTIPART
    (envelope,) = wire.unpack([first[1:], *frames])
    assert envelope == [*fields[:6], 3, *fields[7:10], [b"one", b"two"]]


# pieces:


def pieces_of(meta: bytes, body: list[bytes]) -> tuple[list[bool], list[bytes]]:
    split = split_packet(meta, body)
    metas = [unpack_meta(each) for each, _ in split]
    assert all(kind == packets.PART for kind, _ in metas)
    return [is_last for _, is_last in metas], [piece for _, (piece,) in split]


@pytest.mark.parametrize("size", [0, 1, PART_BYTES - 20, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES + 17])
def test_a_large_packet_is_the_same_after_its_way_in_pieces(size: int) -> None:
    meta, body = packets.pack([packets.PLAIN, "m.0"]), [bytes([number % 251 for number in range(size)]), b"", b"tail"]

    is_last, pieces = pieces_of(meta, body)

    assert is_last == [False] * (len(pieces) - 1) + [True]
    assert all(0 < len(piece) <= PART_BYTES for piece in pieces)
    assert join_packet(pieces) == [meta, *body]


def test_bodies_may_be_any_kind_of_buffer() -> None:
    meta = packets.pack([packets.AGENT])

    _, pieces = pieces_of(meta, [memoryview(b"view"), bytearray(b"array")])  # type: ignore[list-item]

    assert join_packet(pieces) == [meta, b"view", b"array"]


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b""],
        [packets.pack([])],
        [packets.pack(b"x")],
        [packets.pack([b"meta", "text"])],
        [packets.pack([b"m"])[:-1]],
    ],
)
def test_pieces_that_are_no_packet_are_refused(pieces: list[bytes]) -> None:
    with pytest.raises(WireError, match="pieces are no packet"):
        join_packet(pieces)


def test_a_packet_of_which_a_piece_is_missing_is_refused() -> None:
    _, pieces = pieces_of(packets.pack([packets.AGENT]), [bytes(3 * PART_BYTES)])

    for missing in range(len(pieces)):
        with pytest.raises(WireError, match="pieces are no packet"):
            join_packet([piece for number, piece in enumerate(pieces) if number != missing])
