"""Headers of streams: what is packed is read, and nothing else is taken for a header."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danaus.runtime.bulk.protocol import (
    MAX_BYTES,
    MAX_TEXT,
    REPLY_BYTES,
    REQUEST_BYTES,
    Op,
    ProtocolError,
    Request,
    Status,
    pack_reply,
    unpack_reply,
    unpack_request,
)

numbers = st.integers(0, MAX_BYTES)


@given(st.sampled_from(Op), st.binary(min_size=16, max_size=16), st.integers(0, 2**64 - 1), numbers, numbers)
def test_requests_come_back_as_they_were(op: Op, token: bytes, slot: int, offset: int, length: int) -> None:
    request = Request(op, token, slot, 3, offset, length)

    assert len(request.pack()) == REQUEST_BYTES
    assert unpack_request(request.pack()) == request


@given(st.sampled_from(Status), numbers, st.text())
def test_replies_come_back_as_they_were(status: Status, length: int, text: str) -> None:
    packed = pack_reply(status, length, text)

    assert unpack_reply(packed[:REPLY_BYTES]) == (status, len(packed) - REPLY_BYTES, length)
    assert len(packed) <= REPLY_BYTES + MAX_TEXT


@given(st.binary(min_size=REQUEST_BYTES, max_size=REQUEST_BYTES))
def test_garbage_is_no_request(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a request"):
        unpack_request(data)


@given(st.binary(min_size=REPLY_BYTES, max_size=REPLY_BYTES))
def test_garbage_is_no_reply(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a reply"):
        unpack_reply(data)


@pytest.mark.parametrize("request_", [Request(9, bytes(16), 0, 0, 0, 0), Request(1, bytes(16), 0, 0, 1 << 60, 0)])
def test_unknown_operations_and_absurd_sizes_are_no_requests(request_: Request) -> None:
    with pytest.raises(ProtocolError, match="not a request"):
        unpack_request(request_.pack())
