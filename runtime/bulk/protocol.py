"""The stream protocol between who wants a buffer's bytes and its owner: fixed headers, then bytes. Pure.

A request is 64 bytes; the reply is 16, a short text where something is wrong, and, for a read, the bytes. A write sends
its bytes once the owner has agreed, and the owner says when all are in place. A connection carries one request at a
time. No part of it is ever unpickled.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

MAGIC: Final = b"DnB1"
MAX_TEXT: Final = 512
MAX_BYTES: Final = 1 << 50
_REQUEST: Final = struct.Struct(">4sB3x16sQQQQ8x")
_REPLY: Final = struct.Struct(">4sBxHQ")
REQUEST_BYTES: Final = _REQUEST.size
REPLY_BYTES: Final = _REPLY.size


class Op(IntEnum):
    """What is asked."""

    READ = 1
    WRITE = 2
    DROP = 3
    FETCH = 4
    """The bytes of a payload that was lent; the slot is the lease."""


class Status(IntEnum):
    """What is answered."""

    OK = 0
    DROPPED = 1
    REFUSED = 2
    """The request is wrong: it will not succeed when it is made again."""


class ProtocolError(ValueError):
    """What came is not of this protocol."""


class Request(NamedTuple):
    """A request's fields."""

    op: int
    token: bytes
    slot: int
    number: int
    offset: int
    length: int

    def pack(self) -> bytes:
        """Return the header."""
        return _REQUEST.pack(MAGIC, *self)


def unpack_request(data: bytes) -> Request:
    """Read a request's header.

    Raises:
        ProtocolError: It is none.
    """
    magic, *fields = _REQUEST.unpack(data)
    request = Request(*fields)
    if magic != MAGIC or request.op not in set(Op) or max(request.offset, request.length) > MAX_BYTES:
        raise ProtocolError(f"not a request: {data[:16]!r}")
    return request


def pack_reply(status: Status, length: int = 0, text: str = "") -> bytes:
    """Return a reply's header and text."""
    encoded = text.encode(errors="replace")[:MAX_TEXT]
    return _REPLY.pack(MAGIC, status, len(encoded), length) + encoded


def unpack_reply(data: bytes) -> tuple[Status, int, int]:
    """Return the status, the length of the text that follows, and the length of what was asked for.

    Raises:
        ProtocolError: It is no reply.
    """
    magic, status, text_bytes, length = _REPLY.unpack(data)
    if magic != MAGIC or status not in set(Status) or text_bytes > MAX_TEXT or length > MAX_BYTES:
        raise ProtocolError(f"not a reply: {data!r}")
    return Status(status), text_bytes, length
