"""The envelope: what was packed comes out again, and nothing else does."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danaus.runtime.messages import wire

# A busy machine is no reason to fail.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

TEXT = st.text("ab.é☃\0", max_size=8)
NUMBER = st.integers(0, 1 << 40)
BODY = st.binary(max_size=64)

# One strategy for the fields of each kind; attachments of None only, frames have tests of their own.
KINDS: dict[int, list[st.SearchStrategy[Any]]] = {
    wire.CALL: [TEXT, TEXT, TEXT, TEXT, NUMBER, NUMBER, st.none(), NUMBER, BODY, st.none()],
    wire.SPAWN: [TEXT, TEXT, st.tuples(NUMBER, st.booleans(), st.none() | TEXT).map(list), BODY, st.none()],
    wire.STOP: [TEXT, TEXT, NUMBER, NUMBER],
    wire.PING: [TEXT, TEXT, NUMBER, NUMBER],
    wire.REPLY: [NUMBER, NUMBER, NUMBER, NUMBER, st.none() | BODY, st.none()],
    wire.CANCEL: [TEXT, TEXT, NUMBER, st.floats(0, 1e6)],
    wire.MORE: [TEXT, TEXT, NUMBER, NUMBER],
    wire.CREDIT: [TEXT, TEXT, TEXT, NUMBER, NUMBER],
    wire.PROBE: [TEXT, TEXT, TEXT, NUMBER],
    wire.WAITS: [TEXT, TEXT, NUMBER, st.lists(NUMBER, max_size=3)],
    wire.LEASE: [TEXT, st.lists(NUMBER, max_size=4)],
    wire.EVENT: [TEXT, st.dictionaries(TEXT, TEXT, max_size=3)],
    wire.REQUEST: [TEXT, TEXT, st.dictionaries(TEXT, TEXT, max_size=3)],
}
ENVELOPES = st.sampled_from(sorted(KINDS)).flatmap(
    lambda kind: st.tuples(*KINDS[kind]).map(lambda fields: [kind, *fields])
)


def call(attachment: Any, *, body: bytes | None = b"body") -> list[Any]:
    return [wire.CALL, "actor", "method", "proc", "root", 1, 0, None, 0, body, attachment]


def reply(attachment: Any) -> list[Any]:
    return [wire.REPLY, 1, 0, wire.OK, 0, None, attachment]


def spawn(attachment: Any) -> list[Any]:
    return [wire.SPAWN, "actor", "proc", [0, False, None, None], b"", attachment]


def outcome_of(frames: list[Any]) -> list[list[Any]] | None:
    """The envelopes of a message, or None where it was refused in the one way it may be."""
    try:
        return list(wire.unpack(frames))
    except wire.WireError:
        return None


def test_every_kind_has_a_round_trip() -> None:
    kinds = [wire.CALL, wire.SPAWN, wire.STOP, wire.REPLY, wire.CANCEL, wire.MORE]
    kinds += [wire.CREDIT, wire.PROBE, wire.LEASE, wire.EVENT, wire.REQUEST, wire.PING, wire.WAITS]

    assert sorted(KINDS) == sorted(kinds) == list(range(len(kinds)))


@UNHURRIED
@given(st.lists(ENVELOPES, max_size=8))
def test_envelopes_laid_end_to_end_come_out_in_order(envelopes: list[list[Any]]) -> None:
    frame = b"".join(map(wire.pack, envelopes))

    assert list(wire.unpack([frame])) == envelopes
    assert list(wire.unpack([memoryview(frame)])) == envelopes


@UNHURRIED
@given(ENVELOPES)
def test_the_fast_path_agrees_with_the_general_one(envelope: list[Any]) -> None:
    assert wire.unpack_one(wire.pack(envelope)) == envelope


def test_the_fast_path_leaves_several_envelopes_to_the_general_one() -> None:
    assert wire.unpack_one(wire.pack(call(None)) * 2) is None


def test_the_fast_path_leaves_an_envelope_with_frames_to_the_general_one() -> None:
    assert wire.unpack_one(wire.pack(call(2))) is None


def test_a_reference_to_a_segment_stays_in_its_envelope() -> None:
    reference = ["procs.0", 7, "name", [[0, 100]]]

    assert wire.unpack_one(wire.pack(call(reference))) == call(reference)
    assert list(wire.unpack([wire.pack(call(reference))])) == [call(reference)]


def test_frames_go_in_order_to_the_envelopes_that_announce_them() -> None:
    first = b"".join(map(wire.pack, [call(2), [wire.CANCEL, "actor", "proc", 1, 2.5], reply(1), spawn(3)]))

    envelopes = list(wire.unpack([first, b"a", b"b", b"c", b"d", b"e", b"f"]))

    assert envelopes == [
        call([b"a", b"b"]),
        [wire.CANCEL, "actor", "proc", 1, 2.5],
        reply([b"c"]),
        spawn([b"d", b"e", b"f"]),
    ]


@pytest.mark.parametrize("make", [call, reply, spawn])
@pytest.mark.parametrize(("announced", "sent"), [(1, 0), (3, 2), (1 << 60, 2)])
def test_more_frames_announced_than_sent_are_refused(make: Any, announced: int, sent: int) -> None:
    with pytest.raises(wire.WireError, match=f"announces {announced} frames, {sent} are left"):
        list(wire.unpack([wire.pack(make(announced)), *[b""] * sent]))


def test_the_second_envelope_cannot_have_the_frames_of_the_first() -> None:
    envelopes = wire.unpack([wire.pack(call(2)) + wire.pack(call(1)), b"a", b"b"])

    assert next(envelopes) == call([b"a", b"b"])
    with pytest.raises(wire.WireError, match="0 are left"):
        next(envelopes)


@pytest.mark.parametrize("count", [0, -1])
def test_an_announcement_of_no_frames_is_refused(count: int) -> None:
    with pytest.raises(wire.WireError):
        list(wire.unpack([wire.pack(call(count)), b"a"]))


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "call",
        b"call",
        {},
        {0: 1},
        [],
        [wire.CALL],
        [99, 1, 2, 3],
        [-1, 1, 2],
        ["CALL", 1, 2],
        [None],
        [[0], 1, 2],
        [{}, 1, 2],
        [*call(None), "one too many"],
        call(None)[:-1],
    ],
    ids=repr,
)
def test_what_is_not_an_envelope_is_refused(value: Any) -> None:
    frame = wire.pack(value)

    with pytest.raises(wire.WireError, match="not an envelope"):
        list(wire.unpack([frame]))
    with pytest.raises(wire.WireError, match="not an envelope"):
        wire.unpack_one(frame)


def test_a_map_with_a_key_that_cannot_be_hashed_is_refused() -> None:
    frame = b"\x81\x91\x01\x02"

    assert wire.unpack_one(frame) is None
    with pytest.raises(wire.WireError):
        list(wire.unpack([frame]))


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(wire.WireError):
        list(wire.unpack([b"\x91" * 100_000]))


@UNHURRIED
@given(ENVELOPES, ENVELOPES, st.data())
def test_a_frame_cut_off_anywhere_yields_what_is_whole_and_then_an_error(
    first: list[Any], second: list[Any], data: st.DataObject
) -> None:
    whole, cut = wire.pack(first), wire.pack(second)
    length = data.draw(st.integers(1, len(cut) - 1))

    envelopes = wire.unpack([whole + cut[:length]])

    assert next(envelopes) == first
    with pytest.raises(wire.WireError):
        next(envelopes)
    assert wire.unpack_one(cut[:length]) is None


@UNHURRIED
@given(st.binary(max_size=200), st.integers(0, 3))
def test_arbitrary_bytes_raise_nothing_but_a_wire_error(frame: bytes, num_frames: int) -> None:
    outcome_of([frame, *[b"buffer"] * num_frames])
    with contextlib.suppress(wire.WireError):
        wire.unpack_one(frame)


@UNHURRIED
@given(ENVELOPES, st.integers(0, 1 << 20), st.integers(1, 255), st.integers(0, 2))
def test_a_damaged_envelope_raises_nothing_but_a_wire_error(
    envelope: list[Any], place: int, change: int, num_frames: int
) -> None:
    frame = bytearray(wire.pack(envelope))
    frame[place % len(frame)] ^= change

    envelopes = outcome_of([bytes(frame), *[b"buffer"] * num_frames])

    for each in envelopes or ():
        assert len(each) == 1 + len(KINDS[each[0]])


def test_an_empty_frame_holds_no_envelope() -> None:
    assert list(wire.unpack([b""])) == []


def test_the_packer_can_be_used_again_after_it_refused_a_value() -> None:
    with pytest.raises(TypeError):
        wire.pack([wire.EVENT, "name", {"value": object()}])

    assert list(wire.unpack([wire.pack(call(None))])) == [call(None)]
