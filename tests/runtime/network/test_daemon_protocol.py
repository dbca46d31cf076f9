"""A daemon's requests: what is right is read, everything else is garbage or refused with a reason."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.network.daemon_protocol import (
    MAX_PEM_BYTES,
    MAX_REQUEST_BYTES,
    MAX_SLOT,
    Attach,
    Detach,
    Garbage,
    Refusal,
    Request,
    Simple,
    parse,
)

from .fuzzing import fuzzed

UNHURRIED = fuzzed(100)
SECRET = b"TELL-NOBODY-" + b"x" * 20
FIELDS: dict[str, Any] = {"job": "train-a1", "slot": 3, "incarnation": 2, "secret": SECRET}


def pack(*message: Any) -> bytes:
    return msgpack.packb(list(message)) or b""


def read(data: bytes) -> Request | None:
    """The request, or None where it was turned down in one of the two ways it may be."""
    try:
        return parse(data)
    except (Garbage, Refusal):
        return None


@pytest.mark.parametrize("kind", ["info", "ping", "shutdown"])
def test_requests_without_fields(kind: str) -> None:
    assert parse(pack(kind, 7)) == Simple(kind, 7)


def test_requests_with_fields() -> None:
    assert parse(pack("detach", 0, {"job": "a"})) == Detach(0, "a")
    assert parse(pack("attach", 1, FIELDS)) == Attach(1, "train-a1", 3, 2, SECRET)
    everything = {"certificate": b"c", "log_directory": "/x", "env": {"A": "b"}}
    assert parse(pack("attach", 1, {**FIELDS, **everything})) == Attach(
        1, "train-a1", 3, 2, SECRET, b"c", "/x", {"A": "b"}
    )


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\xc0", pack(), pack("ping"), pack("ping", -1), pack("ping", 1 << 63), pack("ping", True),
     pack("ping", 1.0), pack("ping", "1"), pack("ping", 1, {}, 2), pack("ping", 1) + b"\xc0", b"\x92\xa4ping",
     msgpack.packb({"ping": 1}), msgpack.packb("ping"), b"\x93\xa6attach\x01\x81\x01\x02",
     b"\x91" * 2000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
     b"\x92\xa4ping\x01".ljust(MAX_REQUEST_BYTES + 1, b"\0")],
)  # fmt: skip
def test_garbage(data: bytes) -> None:
    with pytest.raises(Garbage):
        parse(data)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (["explode", 4], "no such request"),
        ([b"ping", 4], "no such request"),
        (["ping", 4, {}], "takes no fields"),
        (["detach", 4], "takes a map"),
        (["detach", 4, ["job"]], "takes a map"),
        (["detach", 4, {}], "missing: job"),
        (["detach", 4, {"job": "a", "force": True}], "unknown field"),
        (["detach", 4, {"job": "a", b"b": True}], "unknown field"),
        (["attach", 4, {}], "missing: incarnation, job, secret, slot"),
    ],
)
def test_a_refusal_has_the_requests_number(message: list[Any], reason: str) -> None:
    with pytest.raises(Refusal) as raised:
        parse(pack(*message))

    assert raised.value.number == 4
    assert reason in raised.value.reason


WRONG: dict[str, list[Any]] = {
    "job": ["", ".", "..", "a/b", "../../etc", "a b", "-a", "a" * 65, "ä", "a\n", "a\0", b"a", 1, None],
    "slot": [0, -1, MAX_SLOT + 1, 1.0, True, "1", None],
    "incarnation": [-1, 1 << 31, True, "0", None],
    "secret": [b"", SECRET[:-1], SECRET + b"x", SECRET.decode(), list(SECRET), None],
    "certificate": [b"x" * (MAX_PEM_BYTES + 1), "text", None],
    "log_directory": ["relative", "/a\0b", "/a\nb", "/" * 1025, b"/a", None],
    "env": [[], {"A": 1}, {"A=B": "c"}, {"": "c"}, {"A": "b\0c"}, {"A" * 129: "b"}, {"A": "b" * 4097}, {b"A": "b"},
            {f"A{i}": "" for i in range(65)}],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named_and_not_shown(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(Refusal) as raised:
            parse(pack("attach", 4, {**FIELDS, name: value}))

        assert raised.value.reason.startswith(f"{name}: expected ")
        assert "TELL-NOBODY" not in repr(raised.value)


def test_requests_show_no_secret() -> None:
    request = parse(pack("attach", 1, {**FIELDS, "certificate": b"PRIVATE", "env": {"TOKEN": "HIDDEN"}}))

    assert not any(word in repr(request) for word in ("TELL-NOBODY", "PRIVATE", "HIDDEN"))


@UNHURRIED
@given(st.binary(max_size=512))
def test_arbitrary_bytes_are_turned_down(data: bytes) -> None:
    request = read(data)

    # A request can be guessed only if its kind is spelled out.
    assert request is None or any(kind in data for kind in (b"info", b"ping", b"shutdown", b"detach"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.binary(max_size=40)
    | st.text(max_size=40) | st.sampled_from(["attach", "detach", *FIELDS, *WRONG]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.sampled_from([*WRONG]), inner),
    max_leaves=12,
)  # fmt: skip


@UNHURRIED
@given(st.lists(VALUES, max_size=4), st.dictionaries(st.sampled_from([*WRONG]), VALUES))
def test_well_formed_nonsense_is_turned_down(message: list[Any], changed: dict[str, Any]) -> None:
    read(pack(*message))
    request = read(pack("attach", 1, {**FIELDS, **changed}))

    if isinstance(request, Attach):
        assert type(request.slot) is int
        assert 1 <= request.slot <= MAX_SLOT
        assert len(request.secret) == 32
        assert "/" not in request.job


@UNHURRIED
@given(st.data())
def test_a_right_request_with_bytes_changed_does_no_harm(data: st.DataObject) -> None:
    packed = bytearray(pack("attach", 1, {**FIELDS, "certificate": b"c" * 40, "env": {"A": "b"}}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(packed) - 1))
        packed[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=6))
        if not packed:
            break

    request = read(bytes(packed))

    assert request is None or isinstance(request, Attach)
