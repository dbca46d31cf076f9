"""What agents hand to one another: small msgpack headers before frames that nobody on the way looks into.

Pure: lists and bytes. The first frame is the header; DATA has a second one, the meta frame, which is for the agents at
the destination alone. What follows is a message as a process sent it.

    DATA      kind, origin, life, [[destination, life, seq], ...]      one packet for one host, or a cast for several
    ACK       kind, receiver, life, sender, life, cumulative           end to end, like DATA
    PING      kind, slot, life, epoch                                  between neighbours
    TOPOLOGY  kind, epoch, members, lost, fan_out, gateway (slot, or 0)       from a parent to its children
    BYE       kind, slot, life                                         from a child to its parent: its last word
    BUNDLE    kind, [number of frames, ...]                            several of the above, one after the other

    meta:  PLAIN  kind, process
           REPLY  kind, process, port                       the same, for what may be joined with other replies
           CAST   kind, {destination: [[process, slot of the call], ...]}, caller, port, operation by which to reduce
                  body: head, tail, frames (see join_call); port 0 where no replies are to be joined
           AGENT  kind                                                      body: one envelope, for the agent itself
           PART   kind, is it the last                                      body: a piece of a packet that is too large

Hosts are known by slot and *life*: how many agents of this job have had that slot before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgpack

from ..messages.link import MULTIPART
from ..messages.wire import WireError, pack

if TYPE_CHECKING:
    from collections.abc import Sequence

DATA: Final = 0
ACK: Final = 1
PING: Final = 2
TOPOLOGY: Final = 3
BUNDLE: Final = 4
BYE: Final = 5

PLAIN: Final = 0
CAST: Final = 1
AGENT: Final = 2
REPLY: Final = 3
PART: Final = 4

MAX_MESSAGE_BYTES: Final = 1 << 20
"""What a peer may send in one frame. libzmq makes room for it before the peer has shown its key."""

MAX_HEADER_BYTES: Final = MAX_MESSAGE_BYTES
PART_BYTES: Final = 1 << 19
"""Packets from this size on are sent in pieces."""


Frames = list[Any]
"""Bytes, memoryviews or ZeroMQ frames."""


def pack_data(origin: int, life: int, destinations: Sequence[Sequence[int]]) -> bytes:
    """Header of a packet for each ``[slot, life, seq]`` of ``destinations``."""
    return pack([DATA, origin, life, destinations])


def unpack_header(frame: Any) -> list[Any]:
    """Return the header of a message between agents.

    Raises:
        WireError: It is none.
    """
    header = _unpack(frame)
    shape = _SHAPES.get(header[0]) if header and type(header[0]) is int else None
    if shape is None or len(header) != len(shape) + 1:
        raise WireError(f"not a header of an agent: {header!r:.80}")
    for value, kind in zip(header[1:], shape, strict=True):
        if type(value) is not kind or (kind is int and value < 0):
            raise WireError(f"not a header of an agent: {header!r:.80}")
    if header[0] == DATA:
        for each in header[3]:
            if not _is_ints(each, 3):
                raise WireError(f"not a destination: {each!r:.80}")
    elif header[0] == BUNDLE and not _is_ints(header[1], len(header[1])):
        raise WireError(f"not a bundle: {header[1]!r:.80}")
    return header


def unpack_meta(frame: Any) -> list[Any]:
    """Return the meta frame of a packet, or of what a process hands to its agent.

    Raises:
        WireError: It is none.
    """
    meta = _unpack(frame)
    kind = meta[0] if meta and type(meta[0]) is int else None
    if kind in {PLAIN, REPLY}:
        if len(meta) == _META_FIELDS[kind] and type(meta[1]) is str:
            return meta
    elif kind == CAST:
        types = [dict, str, int, bytes]
        is_whole = [type(each) for each in meta[1:]] == types
        if is_whole and all(map(_is_share, meta[1].items())):
            return meta
    elif (kind == AGENT and len(meta) == 1) or (kind == PART and len(meta) == 2 and type(meta[1]) is bool):
        return meta
    raise WireError(f"not the meta frame of a packet: {meta!r:.80}")


def split_bundle(frames: Frames, sizes: Sequence[int]) -> list[Frames]:
    """The messages of a BUNDLE, whose header is ``frames[0]``.

    Raises:
        WireError: They are not as many frames as it says.
    """
    if sum(sizes) != len(frames) - 1 or 0 in sizes:
        raise WireError(f"a bundle of {sum(sizes)} frames has {len(frames) - 1}")
    parts: list[Frames] = []
    start = 1
    for size in sizes:
        parts.append(frames[start : start + size])
        start += size
    return parts


def split_packet(meta: bytes, body: Frames) -> list[tuple[bytes, Frames]]:
    """Cut a packet into pieces, each with a meta frame of its own; see :func:`join_packet`."""
    data = memoryview(pack([meta, *map(bytes, body)]))
    starts = range(0, len(data), PART_BYTES)
    return [(pack([PART, start == starts[-1]]), [bytes(data[start : start + PART_BYTES])]) for start in starts]


def join_packet(pieces: Sequence[bytes]) -> Frames:
    """Meta frame and body of a packet that came in pieces.

    Raises:
        WireError: They are no packet.
    """
    try:
        frames = msgpack.unpackb(b"".join(pieces), max_ext_len=0)
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        raise WireError(f"the pieces are no packet: {error}") from error
    if type(frames) is not list or not frames or any(type(frame) is not bytes for frame in frames):
        raise WireError("the pieces are no packet")
    return frames


def join_call(head: Any, slot: Any, tail: Any, frames: Frames) -> Frames:
    """The message to one rank of a cast: the fields of its CALL before the slot, the slot, and those behind it."""
    data = b"".join((head, pack(slot), tail))
    return [MULTIPART + data, *frames] if frames else [data]


def _is_ints(value: object, count: int) -> bool:
    return type(value) is list and len(value) == count and all(type(each) is int and each >= 0 for each in value)


def _is_share(share: tuple[Any, Any]) -> bool:
    slot, calls = share
    return (
        type(slot) is int
        and type(calls) is list
        and all(
            type(each) is list and len(each) == 2 and type(each[0]) is str and type(each[1]) is int for each in calls
        )
    )


def _unpack(frame: Any) -> list[Any]:
    data = frame if type(frame) is bytes else memoryview(frame)
    if len(data) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(data)} bytes; at most {MAX_HEADER_BYTES}")
    try:
        value = msgpack.unpackb(data, strict_map_key=False, max_ext_len=0)
    except (msgpack.UnpackException, ValueError, TypeError, MemoryError) as error:
        raise WireError(f"malformed header: {error}") from error
    if type(value) is not list:
        raise WireError(f"not a header: {value!r:.80}")
    return value


_SHAPES: Final[dict[int, tuple[type, ...]]] = {
    DATA: (int, int, list),
    ACK: (int, int, int, int, int),
    PING: (int, int, int),
    TOPOLOGY: (int, list, list, int, int),
    BUNDLE: (list,),
    BYE: (int, int),
}
_META_FIELDS: Final = {PLAIN: 2, REPLY: 3}
